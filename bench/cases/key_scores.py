# SPDX-License-Identifier: Apache-2.0
"""`key_scores` on the attention shapes of SmolLM2-135M, causal: what every key receives from all queries.

Providers: `eager` (the whole attention matrix, its softmax in float32 as transformers' eager attention has it, summed
over rows), `chunked` (the same for 256 rows at a time, plain PyTorch), and fastprompt, which is given the log-sum-exp
that a forward pass leaves. For scale, that forward pass itself, which computes something else: `flash` is PyTorch's,
`forward` the same kernels', `forward/NAME` one of PyTorch's backends that leaves its log-sum-exp (checked by the scores
that follow from it).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.case import Case, Provider, Step, Work, composed
from bench.measure import too_large
from bench.peers import by_library
from fastprompt.ops import key_scores, prompt_attention
from fastprompt.ops.cuda.libraries import LIBRARIES
from fastprompt.ops.dispatch import IMPLS

CHUNK = 256


def build(
    device: str, tokens: int = 4096, batch: int = 1, heads: int = 9, heads_kv: int = 3, dim: int = 64,
    dtype: str = "bfloat16",
) -> Case:  # fmt: skip
    """The case."""
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(batch, h, tokens, dim, device=device).to(kind) for h in (heads, heads_kv, heads_kv)
    )
    none = key.new_empty(heads_kv, 0, dim)
    with torch.no_grad():
        _, lse = prompt_attention(query, key, value, none, none, is_causal=True, return_lse=True)

    def matrix(rows: int, exact: bool = False) -> list[Tensor]:
        """From the attention matrix, ``rows`` of its rows at a time."""
        wide = torch.float64 if exact else torch.float32
        q, k = (x.double() if exact else x for x in (query, key))
        k = k.repeat_interleave(heads // heads_kv, dim=1)
        total = torch.zeros(batch, heads, tokens, dtype=wide, device=device)
        for first in range(0, tokens, rows):
            last = min(first + rows, tokens)
            scores = q[:, :, first:last] @ k[:, :, :last].mT * dim**-0.5
            hidden = torch.ones(last - first, last, dtype=torch.bool, device=device).triu_(first + 1)
            weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1, dtype=wide)
            total[..., :last] += (weights if exact else weights.to(kind)).sum(2, dtype=wide)
        return [total.unflatten(1, (heads_kv, -1)).mean(2)]

    @torch.no_grad()
    def forward(attend: Callable = prompt_attention) -> list[Tensor]:
        return list(attend(query, key, value, none, none, is_causal=True, return_lse=True))

    def flash() -> list[Tensor]:
        return [sdpa(query, key, value, is_causal=True, enable_gqa=True)]

    pairs = batch * heads * tokens * (tokens + 1) // 2
    size = (query.numel() + key.numel()) * kind.itemsize + 4 * (lse.numel() + key.numel() // dim)
    work = Work(2 * pairs * dim, size)
    needed = batch * heads * tokens**2 * (2 * kind.itemsize + 4)

    def provider(run: Callable[[], list[Tensor]], why_not: str | None = None) -> Provider:
        def step() -> list[Tensor]:
            with torch.no_grad():
                return run()

        return Provider(lambda: step, step, why_not=why_not, work=work)

    def fastprompt(impl: str) -> Step:
        return lambda: [key_scores(query, key, lse, impl=impl)]

    providers = {
        "eager": provider(lambda: matrix(tokens), too_large(needed, device)),
        "chunked": provider(lambda: matrix(CHUNK)),
    }
    for impl in IMPLS:
        # The reference holds float32 matrices of scores, weights and masks.
        why_not = too_large(batch * heads * tokens**2 * 16, device) if impl == "reference" else None
        providers["fastprompt" if impl == "auto" else f"fastprompt/{impl}"] = provider(fastprompt(impl), why_not)
    providers["flash"] = Provider(lambda: flash)
    providers["forward"] = Provider(lambda: forward)
    elsewhere = "composed of CUDA kernels" if device == "cpu" else None
    for name in LIBRARIES:
        library = partial(forward, by_library(name))
        providers[f"forward/{name}"] = Provider(
            lambda library=library: library, lambda library=library: [key_scores(query, key, library()[1])], elsewhere
        )
    providers |= composed(device, providers)
    params = {"tokens": tokens, "batch": batch, "heads": heads, "heads_kv": heads_kv, "dim": dim, "dtype": dtype}
    bound = max(torch.finfo(kind).eps, 1e-4)
    return Case("key_scores", providers, "chunked", lambda: matrix(CHUNK, exact=True), bound, params, device_time=True)
