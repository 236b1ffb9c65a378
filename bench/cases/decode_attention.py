# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token over a long cache, grouped-query: `prompt_attention` where a key head has few query rows.

Providers: `sdpa` (PyTorch's, grouped), `sdpa/repeated` (keys and values repeated for every query head, as
transformers does), `sdpa/folded` (the query heads of a key head as rows of one head), `flex` (compiled
flex_attention, grouped), `flashinfer` (its kernels for decoding, on the CUDA cores or the tensor cores), fastprompt,
and the C++ `kernel` without the operation's checks, as attention over a compressed cache calls it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.case import Case, Provider, Step, attention_work, composed, tolerance
from bench.peers import flashinfer_decode, flex, missing
from fastprompt.ops import prompt_attention
from fastprompt.ops.cpp import extension
from fastprompt.ops.dispatch import backend


def build(
    device: str, batch: int = 1, tokens: int = 8192, heads: int = 9, heads_kv: int = 3, dim: int = 64,
    dtype: str = "bfloat16",
) -> Case:  # fmt: skip
    """The case; keys as a cache holds them, ``[B,Hkv,T,D]``."""
    kind, groups = getattr(torch, dtype), heads // heads_kv
    torch.manual_seed(0)
    query = torch.randn(batch, heads, 1, dim, device=device).to(kind)
    key, value = (torch.randn(batch, heads_kv, tokens, dim, device=device).to(kind) for _ in range(2))
    none = key.new_empty(heads_kv, 0, dim)
    work = attention_work(batch * heads, batch * heads_kv * tokens, batch * heads * tokens, dim, kind.itemsize, False)

    def repeated() -> Tensor:
        return sdpa(query, *(x.repeat_interleave(groups, dim=1) for x in (key, value)))

    def folded() -> Tensor:
        return sdpa(query.view(batch, heads_kv, groups, dim), key, value).view(query.shape)

    forms = {
        "sdpa": lambda: sdpa(query, key, value, enable_gqa=True),
        "sdpa/repeated": repeated,
        "sdpa/folded": folded,
        "fastprompt": lambda: prompt_attention(query, key, value, none, none),
    }

    def provider(form, why_not: str | None = None) -> Provider:
        @torch.no_grad()
        def step() -> list[Tensor]:
            return [form()]

        return Provider(lambda: step, step, why_not, work)

    @cache  # compiled once, for the check and the clock
    def flexed() -> Step:
        compiled = flex()

        @torch.no_grad()
        def step() -> list[Tensor]:
            return [compiled(query, key, value, enable_gqa=True)]

        return step

    providers = {name: provider(form) for name, form in forms.items()}
    providers["flex"] = Provider(flexed, lambda: flexed()(), work=work)
    for name, tensor_cores in (("flashinfer", False), ("flashinfer/tensor_cores", True)):
        form = lambda on=tensor_cores: flashinfer_decode(query, key, value, on)  # noqa: E731
        providers[name] = provider(form, missing("flashinfer", device))
    providers |= composed(device, providers)
    bank, no_kernel = none.unsqueeze(0), extension.missing() if device == "cpu" else "the C++ kernels run on the CPU"
    providers["kernel"] = provider(
        lambda: backend("prompt_attention", "cpp").forward(query, key, value, bank, bank, None, None, False, dim**-0.5)[
            0
        ],
        no_kernel or None,
    )

    def reference() -> list[Tensor]:
        k, v = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
        return [(query.double() @ k.mT * dim**-0.5).softmax(-1) @ v]

    params = {"batch": batch, "tokens": tokens, "heads": heads, "heads_kv": heads_kv, "dim": dim, "dtype": dtype}
    return Case("decode_attention", providers, "sdpa", reference, tolerance(kind), params, device_time=True)
