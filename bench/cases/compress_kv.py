# SPDX-License-Identifier: Apache-2.0
"""`compress_kv` as LOOK-M compresses a cache: a fifth of the keys stays, the rest merges into them.

Providers: `published` (LOOK-M's code: the matrix of similarities, and a scattered mean), the reference, plain PyTorch
that never holds that matrix, and fastprompt. Which survivor is most similar is a matter of rounding where two nearly
are; the tests compare the choices. Counted are the search's products, keys and values read once, what stays written.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.case import Case, Provider, Step, Work
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

    kept = int(keep * tokens)
    numbers = batch * heads_kv * dim
    work = Work(2 * numbers * (tokens - kept) * kept, 2 * numbers * (tokens + kept) * kind.itemsize)

    def rows(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, dim))

    @torch.no_grad()
    def published() -> list[Tensor]:
        index = scores.topk(kept, dim=-1).indices.sort(dim=-1).values
        gone = scores.topk(tokens - kept, dim=-1, largest=False).indices
        similarity = normalize(rows(key, gone), dim=-1) @ normalize(rows(key, index), dim=-1).mT
        nearest = similarity.argmax(dim=-1)
        target, found = nearest.unsqueeze(-1).expand(-1, -1, -1, dim), []
        for x in (key, value):
            stays = rows(x, index)
            moved = (rows(x, gone) + rows(stays, nearest)) / 2
            found.append(stays.scatter_reduce(2, target, moved, "mean", include_self=True))
        return found

    def provider(impl: str) -> Provider:
        @torch.no_grad()
        def step() -> list[Tensor]:
            return list(compress_kv(key, value, scores, int(keep * tokens), merge=merge, impl=impl)[:2])

        def built() -> Step:
            step()  # an implementation that cannot run says so here
            return step

        return Provider(built, work=work)

    other = None if merge == "pivot" else "published with merge=pivot"
    providers = {"published": Provider(lambda: published, why_not=other, work=work)}
    providers |= {"fastprompt" if impl == "auto" else f"fastprompt/{impl}": provider(impl) for impl in IMPLS}
    params = {"tokens": tokens, "batch": batch, "heads_kv": heads_kv, "dim": dim, "keep": keep, "merge": merge,
              "dtype": dtype}  # fmt: skip
    return Case("compress_kv", providers, "fastprompt/reference", list, 0.0, params, device_time=True)
