# SPDX-License-Identifier: Apache-2.0
"""`key_scores` on CPU: one forward pass of PyTorch's flash attention in which queries and keys have changed places.

``log c_j = log sum_i exp(scale * k_j q_i - lse_i)`` is the log-sum-exp of a row of attention whose query is
``[k_j, 1]`` and whose keys are ``[q_i, -lse_i / scale]``. In reverse order of both, what key j may be seen by is what
a causal row may see, for any ``Tq`` and ``Tk``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# The level of a row that is not counted: exp(scale * LEAST) is 0 for scales above NO_SCALE; below, all scores are 0.
LEAST, NO_SCALE = -1e30, 1e-20


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
    batch, heads, tq, _ = query.shape
    heads_kv, tk = key.shape[1:3]
    groups = heads // heads_kv
    if query.numel() and key.numel() and tq > query_start:
        level = lse if query_mask is None else lse.masked_fill(~query_mask.unsqueeze(1), -torch.inf)
        rows = slice(query_start, None)
        sums = _sums(query[:, :, rows], key, level[:, :, rows], is_causal, scale)
    else:
        sums = lse.new_zeros(batch, heads_kv, groups, tk)
    if normalize == "visible":
        counts = _visible(query_mask, is_causal, query_start, tq, tk, key.device).clamp_(min=1)
        sums.div_(counts[:, None, None])
    found = sums.amax(dim=2) if group_reduce == "max" else sums.sum(dim=2)
    if group_reduce == "mean":
        found /= groups
    return found if key_mask is None else found.masked_fill_(~key_mask.unsqueeze(1), 0.0)


def _sums(query: Tensor, key: Tensor, level: Tensor, is_causal: bool, scale: float) -> Tensor:
    """Column sums ``[B,Hkv,G,Tk]`` over the last rows ``query [B,Hq,R,D]``; ``level [B,Hq,R]``, -inf: not counted."""
    batch, heads_kv, tk, dim = key.shape
    groups = query.shape[1] // heads_kv
    if scale < NO_SCALE:
        query, scale = torch.zeros_like(query), 1.0
    dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
    # bfloat16 holds a level in three parts. AMX likes rows of whole 16 bytes.
    parts, step = (3, 8) if dtype == torch.bfloat16 else (1, 1)
    width = -(-(dim + parts) // step) * step
    level = level.flip(2)
    hidden = level.isinf()
    rows = query.new_zeros(*query.shape[:3], width, dtype=dtype)
    # What is not counted may be anything, NaN in padding too.
    rows[..., :dim] = query.flip(2).masked_fill_(hidden.unsqueeze(-1), 0.0)
    rest = (level / -scale).masked_fill_(hidden, LEAST)
    for column in range(dim, dim + parts):
        rows[..., column] = rest
        rest = rest - rows[..., column].to(rest.dtype)
    keys = key.new_zeros(batch, heads_kv, tk, width, dtype=dtype)
    keys[..., :dim] = key.flip(2)
    keys[..., dim : dim + parts] = 1
    # A key head as the queries of its whole group; the output is not used.
    keys = keys.flatten(0, 1).unsqueeze(1).expand(-1, groups, -1, -1)
    rows = rows.view(batch * heads_kv, groups, -1, width)
    sums = _flash(keys, rows, rows, 0.0, is_causal, scale=scale)[1].exp()
    return sums.view(batch, heads_kv, groups, tk).flip(3)


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
