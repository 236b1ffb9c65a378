# SPDX-License-Identifier: Apache-2.0
"""`compress_kv` in Triton: the search for the most similar survivor, and sums over each survivor's evicted pairs.

The search keeps a running best, so no matrix of similarities exists. Evicted pairs are sorted by survivor (by the
caller), so each survivor sums its own run, in order: no atomics, and results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import Config, padded
from .launch import Launch, launch, upcast
from .prompt_attention import strides, tiles
from .tiles import SIZES, load_rows, load_tile, matmul_input, split

#: Survivors of the widest tile that is tried.
NORMS = 128

# As torch.nn.functional.normalize has it.
EPSILON = tl.constexpr(1e-12)


@triton.jit
def inverse_norm(x):
    """1 / norm of every row, in float32."""
    wide = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), EPSILON)


@triton.jit(do_not_specialize=SIZES)
def norms_kernel(
    kept, index, norm, sc, si, sn, heads_kv, tiles, count,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The inverse norms of BLOCK_M survivors of one head; NaN, which no comparison prefers, where a slot holds none."""
    tile, kv, b = split(tl.program_id(0), tiles, heads_kv)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < count
    x = load_tile(kept + b * sc[0] + kv * sc[1], rows, live, sc[2], sc[3], D, BLOCK_D)
    held = load_rows(index + b * si[0] + kv * si[1], rows, live, si[2], -1) >= 0
    result = tl.where(held, inverse_norm(x), float("nan"))
    tl.store(norm + b * sn[0] + kv * sn[1] + rows, result)


@triton.jit(do_not_specialize=SIZES)
def nearest_kernel(
    key, kept, norm, survivor, similarity, sk, sc, sn, so, heads_kv, tiles, length, count,
    UPCAST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The best survivor of BLOCK_M keys of one head: ties go to the lowest slot.

    Every column of the tile keeps a best of its own, the first of equals; columns meet once, at the end.
    """
    tile, kv, b = split(tl.program_id(0), tiles, heads_kv)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < length
    k = matmul_input(load_tile(key + b * sk[0] + kv * sk[1], rows, live, sk[2], sk[3], D, BLOCK_D), UPCAST)
    kept += b * sc[0] + kv * sc[1]
    norm += b * sn[0] + kv * sn[1]
    best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    first = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for n in range(0, count, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        there = cols < count
        c = matmul_input(load_tile(kept, cols, there, sc[2], sc[3], D, BLOCK_D), UPCAST)
        scores = tl.dot(k, c.T, input_precision="ieee") * tl.load(norm + cols)[None, :]
        first = tl.where(scores > best, n, first)
        best = tl.maximum(best, scores)
    peak = tl.max(best, 1)
    slot = tl.where(best == peak[:, None], first + tl.arange(0, BLOCK_N)[None, :], 2147483647)
    slot = tl.where(peak == float("-inf"), 0, tl.min(slot, 1))
    at = b * so[0] + kv * so[1] + rows.to(tl.int64) * so[2]
    tl.store(survivor + at, slot.to(tl.int64), mask=live)
    tl.store(similarity + at, peak * inverse_norm(k), mask=live)


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    x, kept, order, starts, weight, merged, sx, sc, sp, ss, sw, so, heads_kv, kept_count, half,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One survivor: (own share of itself + the weighted sum of its run) / (length of the run + 1)."""
    slot, kv, b = split(tl.program_id(0), kept_count, heads_kv)
    x += b * sx[0] + kv * sx[1]
    order += b * sp[0] + kv * sp[1]
    weight += b * sw[0] + kv * sw[1]
    starts += b * ss[0] + kv * ss[1] + slot * ss[2]
    begin = tl.load(starts).to(tl.int32)
    end = tl.load(starts + ss[2]).to(tl.int32)
    parts = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(begin, end, BLOCK_M):
        places = n + tl.arange(0, BLOCK_M)
        live = places < end
        rows = load_rows(order, places, live, sp[2], 0)
        share = load_rows(weight, rows, live, sw[2], 0.0)
        parts += share[:, None] * load_tile(x, rows, live, sx[2], sx[3], D, BLOCK_D).to(tl.float32)
    # Rows of the tile meet once, not in every pass.
    total = tl.sum(parts, 0)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    own = tl.load(kept + b * sc[0] + kv * sc[1] + slot * sc[2] + columns * sc[3], mask=inside, other=0.0)
    count = (end - begin).to(tl.float32)
    total = (own.to(tl.float32) * (1.0 + half * count) + total) / (count + 1.0)
    address = merged + b * so[0] + kv * so[1] + slot * so[2] + columns * so[3]
    tl.store(address, total.to(merged.dtype.element_ty), mask=inside)


def nearest_survivor(key: Tensor, kept_key: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Slots ``[B,Hkv,Tk]`` int64 and similarities float32."""
    survivor, similarity = launch(_nearest, (key, kept_key, index))
    return survivor, similarity


def _nearest(key, kept_key, index):
    survivor = torch.empty(key.shape[:3], dtype=torch.int64, device=key.device)
    similarity = torch.empty(key.shape[:3], dtype=torch.float32, device=key.device)
    return [survivor, similarity], plan_nearest(key, kept_key, index, survivor, similarity)


def merge_evicted(x: Tensor, kept: Tensor, order: Tensor, starts: Tensor, weight: Tensor, half: float) -> Tensor:
    """Survivors ``[B,Hkv,K,D]`` with their runs merged into them."""
    return launch(_merge, (x, kept, order, starts, weight), (half,))[0]


def _merge(x, kept, order, starts, weight, half):
    merged = torch.empty_like(kept)
    return [merged], [plan_merge(x, kept, order, starts, weight, half, merged)]


def plan_nearest(key: Tensor, kept_key: Tensor, index: Tensor, survivor: Tensor, similarity: Tensor) -> list[Launch]:
    """The launches of the search: survivors' norms once, not in every program."""
    batch, heads_kv, length, dim = key.shape
    count = kept_key.shape[2]
    config = configs.choose("nearest", key, dim, length, count)
    # Up to a whole tile, so that the search loads it without a mask.
    norm = similarity.new_empty(*kept_key.shape[:2], tiles(count, NORMS) * NORMS)
    number = tiles(length, config.rows)
    arguments = {
        "key": key, "kept": kept_key, "norm": norm, "survivor": survivor, "similarity": similarity,
        "sk": strides(key), "sc": strides(kept_key), "sn": strides(norm), "so": strides(survivor),
        "heads_kv": heads_kv, "tiles": number, "length": length, "count": count,
    }  # fmt: skip
    constants = {
        "UPCAST": upcast(key.dtype), "D": dim, "BLOCK_D": padded(dim), "BLOCK_M": config.rows, "BLOCK_N": config.keys,
    }  # fmt: skip
    return [
        _plan_norms(kept_key, index, norm),
        Launch(nearest_kernel, number * heads_kv * batch, arguments, constants, config),
    ]


def _plan_norms(kept_key: Tensor, index: Tensor, norm: Tensor) -> Launch:
    batch, heads_kv, count, dim = kept_key.shape
    config = Config(rows=NORMS // 2, keys=0, warps=4, stages=1)
    number = norm.shape[2] // config.rows
    arguments = {
        "kept": kept_key, "index": index, "norm": norm, "sc": strides(kept_key), "si": strides(index),
        "sn": strides(norm), "heads_kv": heads_kv, "tiles": number, "count": count,
    }  # fmt: skip
    constants = {"D": dim, "BLOCK_D": padded(dim), "BLOCK_M": config.rows}
    return Launch(norms_kernel, number * heads_kv * batch, arguments, constants, config)


def plan_merge(
    x: Tensor, kept: Tensor, order: Tensor, starts: Tensor, weight: Tensor, half: float, merged: Tensor
) -> Launch:
    """The launch of the sums."""
    batch, heads_kv, count, dim = kept.shape
    # How long a run is, the GPU alone knows: the tile is not fitted to it.
    config = configs.choose("merge", x, dim, x.shape[2], 0)
    arguments = {
        "x": x, "kept": kept, "order": order, "starts": starts, "weight": weight, "merged": merged,
        "sx": strides(x), "sc": strides(kept), "sp": strides(order), "ss": strides(starts), "sw": strides(weight),
        "so": strides(merged), "heads_kv": heads_kv, "kept_count": count, "half": half,
    }  # fmt: skip
    constants = {"D": dim, "BLOCK_D": padded(dim), "BLOCK_M": config.rows}
    return Launch(merge_kernel, count * heads_kv * batch, arguments, constants, config)
