# SPDX-License-Identifier: Apache-2.0
"""`key_scores` in Triton: one program a tile of keys of a key head; queries stream by, nothing is added atomically."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import padded
from .launch import Launch, launch, upcast
from .prompt_attention import strides, tiles
from .tiles import LOG2E, SIZES, load_rows, load_tile, matmul_input, safe_lse, split


@triton.jit(do_not_specialize=SIZES)
def scores_kernel(
    query, key, lse, query_mask, key_mask, scores, sq, sk, sl, sqm, skm, ss, heads_kv, groups, tiles, tq, tk,
    query_start, scale,
    CAUSAL: tl.constexpr, VISIBLE: tl.constexpr, REDUCE: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_N keys of one key head: loops over its query heads and their row tiles."""
    tile, kv, b = split(tl.program_id(0), tiles, heads_kv)
    start = tile * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    there = cols < tk
    k = matmul_input(load_tile(key + b * sk[0] + kv * sk[1], cols, there, sk[2], sk[3], D, BLOCK_D), UPCAST)
    offset = tk - tq
    # The first counted row that may see a key of this tile.
    begin = tl.maximum(query_start, start - offset) if CAUSAL else query_start
    total = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.float32)
    for member in range(0, groups):
        head = kv * groups + member
        queries = query + b * sq[0] + head * sq[1]
        levels = lse + b * sl[0] + head * sl[1]
        mass = tl.zeros([BLOCK_N], tl.float32)
        for m in range(begin, tq, BLOCK_M):
            rows = m + tl.arange(0, BLOCK_M)
            live = rows < tq
            if query_mask is not None:
                live = live & (load_rows(query_mask + b * sqm[0], rows, live, sqm[1], 0) != 0)
            q = matmul_input(load_tile(queries, rows, live, sq[2], sq[3], D, BLOCK_D), UPCAST)
            level = safe_lse(load_rows(levels, rows, live, sl[2], float("-inf")))[None, :]
            seen = live[None, :] & there[:, None]
            if CAUSAL:
                seen = seen & (cols[:, None] <= rows[None, :] + offset)
            weight = tl.dot(k, q.T, input_precision="ieee") * (scale * LOG2E) - level
            mass += tl.sum(tl.exp2(tl.where(seen, weight, float("-inf"))), 1)
            if VISIBLE:
                count += tl.sum(seen.to(tl.float32), 1)
        total = tl.maximum(total, mass) if REDUCE == "max" else total + mass
    if REDUCE == "mean":
        total = total / groups
    if VISIBLE:
        # Every query head has counted the same rows.
        total = total / tl.maximum(count / groups, 1.0)
    if key_mask is not None:
        total = tl.where(load_rows(key_mask + b * skm[0], cols, there, skm[1], 0) != 0, total, 0.0)
    tl.store(scores + b * ss[0] + kv * ss[1] + cols * ss[2], total, mask=there)


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
    """Scores ``[B,Hkv,Tk]`` float32."""
    settings = (is_causal, query_start, scale, normalize, group_reduce)
    return launch(_forward, (query, key, lse, query_mask, key_mask), settings)[0]


def _forward(query, key, lse, query_mask, key_mask, *settings):
    scores = torch.empty(key.shape[:3], dtype=torch.float32, device=key.device)
    return [scores], [plan(query, key, lse, query_mask, key_mask, scores, *settings)]


def plan(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    scores: Tensor,
    is_causal: bool,
    query_start: int,
    scale: float,
    normalize: str,
    group_reduce: str,
) -> Launch:
    """The launch."""
    batch, heads, tq, dim = query.shape
    heads_kv, tk = key.shape[1:3]
    config = configs.choose("scores", query, dim, tq - query_start, tk)
    masks = [None if x is None else x.view(torch.uint8) for x in (query_mask, key_mask)]
    count = tiles(tk, config.keys)
    arguments = {
        "query": query, "key": key, "lse": lse, "query_mask": masks[0], "key_mask": masks[1], "scores": scores,
        "sq": strides(query), "sk": strides(key), "sl": strides(lse), "sqm": strides(masks[0]),
        "skm": strides(masks[1]), "ss": strides(scores),
        "heads_kv": heads_kv, "groups": heads // heads_kv, "tiles": count, "tq": tq, "tk": tk,
        "query_start": query_start, "scale": scale,
    }  # fmt: skip
    constants = {
        "CAUSAL": is_causal, "VISIBLE": normalize == "visible", "REDUCE": group_reduce, "UPCAST": upcast(query.dtype),
        "D": dim, "BLOCK_D": padded(dim), "BLOCK_M": config.rows, "BLOCK_N": config.keys,
    }  # fmt: skip
    return Launch(scores_kernel, count * heads_kv * batch, arguments, constants, config)
