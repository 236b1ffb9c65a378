# SPDX-License-Identifier: Apache-2.0
"""`key_scores` on the C++ kernels (``csrc/core/key_scores.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops.cpp.extension import isa_number, operations
from fastprompt.ops.layouts import dense_rows

#: In the order of ``GroupReduce``.
_REDUCE = ("mean", "sum", "max")


def forward(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    is_causal: bool,
    query_start: int,
    scale: float,
    normalize: str,
    group_reduce: str,
    isa: str | None = None,
) -> Tensor:
    """Scores ``[B,Hkv,Tk]``; ``isa`` forces a level of the kernels, for tests."""
    scores = query.new_empty(key.shape[:3], dtype=torch.float32)
    masks = (query_mask, key_mask)
    options = (is_causal, query_start, scale, normalize == "visible", _REDUCE.index(group_reduce), isa_number(isa))
    operations().key_scores(dense_rows(query), dense_rows(key), lse, *masks, *options, scores)
    return scores
