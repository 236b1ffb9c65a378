# SPDX-License-Identifier: Apache-2.0
"""`decoupled_attention` on IP-Adapter's cross-attention shapes: text and image tokens, each with a softmax of its own.

Providers: `sdpa` (one call a branch, the image branch scaled and added, as diffusers computes it; on the backend that
PyTorch chooses, and on each by name), `xformers`, `flex` and `fastprompt/prompt_attention` (likewise), the reference
`compiled`, and fastprompt. `floor` is the text branch alone. `shape` is ``sd15`` (8 heads of 40, 4 image tokens) or
``sdxl`` (10 heads of 64, 16 image tokens), at 4096 queries a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.case import Case, Provider, Step, Work, attention_work, composed, tolerance
from bench.peers import backends, flex, missing, no_flex, on_backend, xformers
from fastprompt.ops import decoupled_attention, prompt_attention
from fastprompt.ops.dispatch import IMPLS

SHAPES = {"sd15": (8, 40, 4), "sdxl": (10, 64, 16)}
MODES = ("forward", "forward+backward")
WEIGHT = 0.6


def build(
    device: str, shape: str = "sdxl", batch: int = 2, tokens: int = 4096, text: int = 77, heads: int = 0,
    dtype: str = "bfloat16", mode: str = "forward",
) -> Case:  # fmt: skip
    """The case; ``batch`` 2 is one image with and without guidance, ``heads`` 0 those of the model."""
    if shape not in SHAPES:
        raise ValueError(f"shape: got {shape!r}, expected one of {', '.join(SHAPES)}")
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    of_model, dim, image = SHAPES[shape]
    heads = heads or of_model
    kind, train = getattr(torch, dtype), mode == "forward+backward"
    torch.manual_seed(0)

    def tensor(rows: int) -> Tensor:
        """``[B,H,rows,D]`` with the strides that a projection leaves."""
        return torch.randn(batch, rows, heads, dim, device=device).to(kind).transpose(1, 2).requires_grad_(train)

    inputs = [tensor(rows) for rows in (tokens, text, text, image, image)]
    grad = tensor(tokens).detach()

    def step(function: Callable[..., Tensor], given: list[Tensor] = inputs, grad: Tensor = grad) -> Step:
        def run() -> list[Tensor]:
            out = function(*given)
            return [out.detach(), *(torch.autograd.grad(out, given, grad) if train else ())]

        return run

    def work(keys: int) -> Work:
        queries = batch * heads * tokens
        return attention_work(queries, batch * heads * keys, queries * keys, dim, kind.itemsize, train)

    def two_calls(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v, ki, vi: attend(q, k, v) + WEIGHT * attend(q, ki, vi)

    def provider(function: Callable[..., Tensor], why_not: str | None = None) -> Provider:
        return Provider(lambda: step(function), step(function), why_not, work(text + image))

    def fastprompt(impl: str) -> Callable[..., Tensor]:
        return lambda q, k, v, ki, vi: decoupled_attention(q, [k, ki], [v, vi], [1.0, WEIGHT], impl=impl)

    def compiled(make: Callable[[], Callable[..., Tensor]], why_not: str | None = None) -> Provider:
        made = cache(lambda: step(make()))  # once, for the check and the clock
        return Provider(made, lambda: made()(), why_not, work(text + image))

    providers = {
        "floor": Provider(lambda: step(sdpa, inputs[:3]), work=work(text)),
        "sdpa": provider(two_calls(sdpa)),
        **{f"sdpa/{n}": provider(on_backend(n, two_calls(sdpa)), no) for n, no in backends(device).items()},
        "flex": compiled(lambda: two_calls(flex()), no_flex(device, train)),
        "xformers": provider(two_calls(xformers), missing("xformers", device)),
        "fastprompt/prompt_attention": provider(two_calls(_without_prompts)),
        "compiled": compiled(lambda: torch.compile(fastprompt("reference"), dynamic=False)),
    }
    for impl in IMPLS:
        providers["fastprompt" if impl == "auto" else f"fastprompt/{impl}"] = provider(fastprompt(impl))

    def reference() -> list[Tensor]:
        exact = [x.detach().double().requires_grad_(train) for x in inputs]
        return step(two_calls(sdpa), exact, grad.double())()

    providers |= composed(device, providers)
    params = {"shape": shape, "batch": batch, "tokens": tokens, "text": text, "heads": heads, "dim": dim,
              "image": image, "dtype": dtype, "mode": mode}  # fmt: skip
    return Case("decoupled_attention", providers, "sdpa", reference, tolerance(kind), params, device_time=True)


def _without_prompts(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    none = query.new_empty(1, key.shape[1], 0, query.shape[3])
    return prompt_attention(query, key, value, none, none)
