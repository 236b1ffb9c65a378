# SPDX-License-Identifier: Apache-2.0
"""`key_scores` on CPU: blocks of rows as batched matrix products in float32, each block small enough for the caches."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores of one block (elements).
TILE = 1 << 19


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
) -> Tensor:
    """Scores ``[B,Hkv,Tk]``."""
    batch, heads, tq, dim = query.shape
    heads_kv, tk = key.shape[1:3]
    groups = heads // heads_kv
    sums = lse.new_zeros(batch * heads_kv, groups, tk)
    if sums.numel() and tq > query_start and dim:
        # exp(score - inf) = 0: a row that sees nothing, or is not counted.
        level = lse.masked_fill(lse == -torch.inf, torch.inf)
        if query_mask is not None:
            level = level.masked_fill(~query_mask.unsqueeze(1), torch.inf)
        keys = key.to(lse.dtype).flatten(0, 1).transpose(1, 2)
        rows = query.unflatten(1, (heads_kv, -1)).flatten(0, 1)
        _accumulate(sums, rows, keys, level.unflatten(1, (heads_kv, -1)).flatten(0, 1), is_causal, query_start, scale)
    if normalize == "visible":
        counts = _visible(query_mask, is_causal, query_start, tq, tk, key.device).clamp_(min=1)
        sums.view(batch, heads_kv, groups, tk).div_(counts[:, None, None])
    found = sums.amax(dim=1) if group_reduce == "max" else sums.sum(dim=1)
    if group_reduce == "mean":
        found /= groups
    found = found.view(batch, heads_kv, tk)
    return found if key_mask is None else found.masked_fill_(~key_mask.unsqueeze(1), 0.0)


def _accumulate(
    sums: Tensor, query: Tensor, keys: Tensor, level: Tensor, is_causal: bool, query_start: int, scale: float
) -> None:
    """Add to ``sums [S,G,Tk]`` what rows of ``query [S,G,Tq,D]`` give; ``keys [S,D,Tk]``, ``level [S,G,Tq]``."""
    count, groups, tq, _ = query.shape
    tk = keys.shape[2]
    offset = tk - tq
    # A row i sees keys 0..i+offset; rows before see none.
    first = max(query_start, -offset) if is_causal else query_start
    while first < tq:
        last = first + max(1, min(tq - first, TILE // (count * groups * tk)))
        visible = min(tk, last + offset) if is_causal else tk
        rows = query[:, :, first:last].to(level.dtype).flatten(1, 2)
        shift = level[:, :, first:last].flatten(1, 2).unsqueeze(2)
        scores = torch.baddbmm(shift, rows, keys[:, :, :visible], beta=-1, alpha=scale).exp_()
        scores = scores.unflatten(1, (groups, last - first))
        if is_causal:
            # The block's own diagonal: what is right of it is written over, not multiplied, as it may be infinite.
            begin = first + offset
            scores[..., begin:].tril_()
        sums[..., :visible] += scores.sum(dim=2)
        first = last


def _visible(
    query_mask: Tensor | None, is_causal: bool, query_start: int, tq: int, tk: int, device: torch.device
) -> Tensor:
    """How many counted rows may see each key: ``[B|1,Tk]``."""
    counted = torch.ones(1, tq, dtype=torch.bool, device=device) if query_mask is None else query_mask.clone()
    counted[:, :query_start] = False
    if not is_causal:
        return counted.sum(dim=1, keepdim=True).expand(-1, tk).clone()
    # Rows from j - (tk - tq) on see key j.
    later = torch.nn.functional.pad(counted.flip(1).cumsum(1).flip(1), (0, 1))
    return later[:, (torch.arange(tk, device=device) - (tk - tq)).clamp(0, tq)]
