# SPDX-License-Identifier: Apache-2.0
"""`compress_kv` as LOOK-M compresses a cache: a fifth of the keys stays, the rest merges into them.

Providers: the reference, plain PyTorch that never holds the whole matrix of similarities, and fastprompt. Which
survivor is most similar is a matter of rounding where two nearly are; the tests compare the choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.case import Case, Provider, Step
from fastprompt.ops import compress_kv
from fastprompt.ops.dispatch import IMPLS


def build(
    device: str, tokens: int = 4096, batch: int = 1, heads_kv: int = 3, dim: int = 64, keep: float = 0.2,
    merge: str = "pivot", dtype: str = "bfloat16",
) -> Case:  # fmt: skip
    """The case."""
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    key, value = (torch.randn(batch, heads_kv, tokens, dim, device=device).to(kind) for _ in range(2))
    scores = torch.rand(batch, heads_kv, tokens, device=device)

    def provider(impl: str) -> Provider:
        @torch.no_grad()
        def step() -> list[Tensor]:
            return list(compress_kv(key, value, scores, int(keep * tokens), merge=merge, impl=impl)[:2])

        def built() -> Step:
            step()  # an implementation that cannot run says so here
            return step

        return Provider(built)

    providers = {"fastprompt" if impl == "auto" else f"fastprompt/{impl}": provider(impl) for impl in IMPLS}
    params = {"tokens": tokens, "batch": batch, "heads_kv": heads_kv, "dim": dim, "keep": keep, "merge": merge,
              "dtype": dtype}  # fmt: skip
    return Case("compress_kv", providers, "fastprompt/reference", list, 0.0, params, device_time=True)
