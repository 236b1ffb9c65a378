# SPDX-License-Identifier: Apache-2.0
"""`key_scores` in Triton: one program a tile of keys of a key head; queries stream by, nothing is added atomically."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import padded
from .launch import Launch, launch, split, upcast
from .prompt_attention import PROGRAMS, strides, tiles
from .tiles import LOG2E, SIZES, load_rows, load_tile, matmul_input, safe_lse


@triton.jit
def visible_rows(
    query_mask, stride, cols, begin, tq, offset, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """How many of the rows from ``begin`` on may see every key."""
    if query_mask is None:
        first = tl.maximum(begin, cols - offset) if CAUSAL else begin + tl.zeros([BLOCK_N], tl.int32)
        return tl.maximum(tq - first, 0).to(tl.float32)
    count = tl.zeros([BLOCK_N], tl.float32)
    for m in range(begin, tq, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        counted = load_rows(query_mask, rows, rows < tq, stride, 0) != 0
        if CAUSAL:
            seen = counted[:, None] & (cols[None, :] <= rows[:, None] + offset)
        else:
            seen = counted[:, None] & (cols >= 0)[None, :]
        count += tl.sum(seen.to(tl.float32), 0)
    return count


@triton.jit
def load_level(lse, query_mask, rows, live, stride, mask_stride):
    """Rows' lse in powers of 2, +inf where they do not count: their weights are 0 without a mask."""
    level = safe_lse(load_rows(lse, rows, live, stride, float("-inf")))
    if query_mask is not None:
        level = tl.where(load_rows(query_mask, rows, live, mask_stride, 0) != 0, level, float("inf"))
    return level[:, None]


@triton.jit(do_not_specialize=SIZES)
def scores_kernel(
    query, key, lse, query_mask, key_mask, scores, sq, sk, sl, sqm, skm, ss, heads_kv, groups, tiles, splits, tq, tk,
    query_start, scale,
    CAUSAL: tl.constexpr, VISIBLE: tl.constexpr, REDUCE: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_N keys of one key head, by one split of its query heads: loops over their row tiles.

    Weights are added up where they are computed, tile by tile; only at the end do rows meet.
    """
    pid = tl.program_id(0)
    part, tile, kv = pid % splits, pid // splits, tl.zeros((), tl.int64)
    owners = tl.num_programs(0) // (splits * tiles)
    if CAUSAL:
        # The first keys are seen by the most rows; what is heavy starts first.
        owner, tile = tile % owners, tile // owners
    else:
        owner, tile = tile // tiles, tile % tiles
    kv, b = (owner % heads_kv).to(tl.int64), (owner // heads_kv).to(tl.int64)
    start = tile * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    there = cols < tk
    k = matmul_input(load_tile(key + b * sk[0] + kv * sk[1], cols, there, sk[2], sk[3], D, BLOCK_D), UPCAST)
    if query_mask is not None:
        query_mask += b * sqm[0]
    factor = scale * LOG2E
    offset = tk - tq
    # The first counted row that may see a key of this tile, and the first of those that see all of them.
    begin = query_start
    whole = begin
    if CAUSAL:
        begin = tl.maximum(query_start, start - offset)
        whole = begin + tl.cdiv(tl.maximum(0, start + BLOCK_N - 1 - offset - begin), BLOCK_M) * BLOCK_M
        whole = tl.minimum(whole, tq) if SPLIT else tq
    run = tl.cdiv(groups, splits)
    total = tl.zeros([BLOCK_N], tl.float32)
    mass = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for member in range(part * run, tl.minimum(groups, (part + 1) * run)):
        head = kv * groups + member
        queries = query + b * sq[0] + head * sq[1]
        levels = lse + b * sl[0] + head * sl[1]
        if REDUCE == "max":
            mass = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if CAUSAL:
            for m in range(begin, whole, BLOCK_M):
                rows = m + tl.arange(0, BLOCK_M)
                live = rows < tq
                q = matmul_input(load_tile(queries, rows, live, sq[2], sq[3], D, BLOCK_D), UPCAST)
                level = load_level(levels, query_mask, rows, live, sl[2], 0 if query_mask is None else sqm[1])
                power = tl.dot(q, k.T, input_precision="ieee") * factor - level
                seen = cols[None, :] <= (rows + offset)[:, None]
                mass += tl.exp2(tl.where(seen, power, float("-inf")))
        if SPLIT or not CAUSAL:
            for m in range(whole, tq, BLOCK_M):
                rows = m + tl.arange(0, BLOCK_M)
                live = rows < tq
                q = matmul_input(load_tile(queries, rows, live, sq[2], sq[3], D, BLOCK_D), UPCAST)
                level = load_level(levels, query_mask, rows, live, sl[2], 0 if query_mask is None else sqm[1])
                mass += tl.exp2(tl.dot(q, k.T, input_precision="ieee") * factor - level)
        if REDUCE == "max":
            total = tl.maximum(total, tl.sum(mass, 0))
    if REDUCE != "max":
        total = tl.sum(mass, 0)
    if REDUCE == "mean":
        total = total / groups
    if VISIBLE:
        stride = 0 if query_mask is None else sqm[1]
        count = visible_rows(query_mask, stride, cols, query_start, tq, offset, CAUSAL, BLOCK_M, BLOCK_N)
        total = total / tl.maximum(count, 1.0)
    if key_mask is not None:
        total = tl.where(load_rows(key_mask + b * skm[0], cols, there, skm[1], 0) != 0, total, 0.0)
    tl.store(scores + part.to(tl.int64) * ss[0] + b * ss[1] + kv * ss[2] + cols * ss[3], total, mask=there)


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
    scores = launch(_forward, (query, key, lse, query_mask, key_mask), settings)[0]
    if len(scores) == 1:
        return scores[0]
    return scores.amax(0) if group_reduce == "max" else scores.sum(0)


def _forward(query, key, lse, query_mask, key_mask, is_causal, query_start, *settings):
    scores = allocate(query, key, query_start)
    return [scores], [plan(query, key, lse, query_mask, key_mask, scores, is_causal, query_start, *settings)]


def allocate(query: Tensor, key: Tensor, query_start: int) -> Tensor:
    """Uninitialised shares ``[splits,B,Hkv,Tk]`` float32 of the scores.

    Long samples of few key heads are few programs: then several share the query heads of a key head. How many, and
    the order of the sum, depends on shapes alone.
    """
    batch, heads, tq, dim = query.shape
    heads_kv, tk = key.shape[1:3]
    config = configs.choose("scores", query, dim, tq - query_start, tk)
    programs = max(1, tiles(tk, config.keys) * heads_kv * batch)
    # More programs than a GPU holds at once even out by themselves; one that sees few rows is done before a share is.
    few = programs < PROGRAMS * 3 // 2 and tiles(tq - query_start, config.rows) >= 8
    splits = tiles(4 * PROGRAMS, programs) if few else 1
    members = tiles(max(1, heads // heads_kv), splits)
    shape = (tiles(max(1, heads // heads_kv), members), *key.shape[:3])
    return torch.empty(shape, dtype=torch.float32, device=key.device)


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
        "skm": strides(masks[1]), "ss": scores.stride(),
        "heads_kv": heads_kv, "groups": heads // heads_kv, "tiles": count, "splits": len(scores), "tq": tq, "tk": tk,
        "query_start": query_start, "scale": scale,
    }  # fmt: skip
    constants = {
        "CAUSAL": is_causal, "VISIBLE": normalize == "visible", "REDUCE": group_reduce,
        "SPLIT": split(query.dtype), "UPCAST": upcast(query.dtype),
        "D": dim, "BLOCK_D": padded(dim), "BLOCK_M": config.rows, "BLOCK_N": config.keys,
    }  # fmt: skip
    return Launch(scores_kernel, len(scores) * count * heads_kv * batch, arguments, constants, config)
