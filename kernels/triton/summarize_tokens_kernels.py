# SPDX-License-Identifier: Apache-2.0
"""The kernels of `summarize_tokens`: forward, weights and slopes for the backward, and the tokens' gradient.

One head over the full width. With the lse L of a row: P = exp(scale sel x - L), delta = rowsum(dU * U),
dS = scale P * (dU x^T - delta), dsel = sum_b dS x, dx = dS^T sel + P^T dU. Rows are those of all tasks: row r is
summary ``r % S`` of task ``r // S``, so that a tile is full also where S is small.
"""

import triton
import triton.language as tl

from .diffuse_prompts_kernels import load_columns, store_columns
from .tiles import LN2, LOG2E, SIZES, load_tile, matmul_input, online_softmax, safe_lse, store_tile


@triton.jit
def rows_at(rows, b, summaries, strides):
    """Where rows of ``[T,B,S,...]`` begin in sample ``b``."""
    return (rows // summaries).to(tl.int64) * strides[0] + b * strides[1] + (rows % summaries) * strides[2]


@triton.jit(do_not_specialize=SIZES)
def summarize_kernel(
    selectors, x, out, lse, sx, so, sl, summaries, rows_total, tokens, tiles, scale,
    UPCAST: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Summaries of BLOCK_M rows of one sample; each of its tokens is read once, as key and as value."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < rows_total
    # Float32 selectors beside half precision count as rounded to it.
    sel = matmul_input(load_tile(selectors, rows, live, C, 1, C, BLOCK_C).to(x.dtype.element_ty), UPCAST)
    x += b * sx[0]
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for n in range(0, tokens, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        there = cols < tokens
        tile = matmul_input(load_tile(x, cols, there, sx[1], sx[2], C, BLOCK_C), UPCAST)
        scores = tl.dot(sel, tile.T, input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(there[None, :], scores, float("-inf"))
        acc, peak, total = online_softmax(acc, peak, total, scores, tile)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    store_tile(out, acc / total[:, None], rows_at(rows, b, summaries, so), live, 1, so[3], C, BLOCK_C)
    level = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN2)
    tl.store(lse + rows_at(rows, b, summaries, sl), level, mask=live)


@triton.jit(do_not_specialize=SIZES)
def summarize_slopes_kernel(
    selectors, x, out, grad_out, lse, kept_weight, kept_slope, sx, so, sdo, sl, summaries, rows_total, pitch, tokens,
    tiles, row_tiles, scale,
    UPCAST: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Weights P and slopes dS of BLOCK_N tokens of a sample and BLOCK_M rows, for the sums over either."""
    pid = tl.program_id(0)
    b = (pid // (tiles * row_tiles)).to(tl.int64)
    cols = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (pid // tiles) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    there, live = cols < tokens, rows < rows_total
    x_at, sel_at = b * sx[0] + cols.to(tl.int64) * sx[1], rows.to(tl.int64) * C
    do_at, own_at = rows_at(rows, b, summaries, sdo), rows_at(rows, b, summaries, so)
    dtype: tl.constexpr = x.dtype.element_ty
    scores = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    slope = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for c in range(0, C, BLOCK_C):
        tile = matmul_input(load_columns(x, x_at, there, c, sx[2], C, BLOCK_C), UPCAST)
        sel = matmul_input(load_columns(selectors, sel_at, live, c, 1, C, BLOCK_C).to(dtype), UPCAST)
        scores = tl.dot(tile, sel.T, scores, input_precision="ieee")
        do = load_columns(grad_out, do_at, live, c, sdo[3], C, BLOCK_C)
        slope = tl.dot(tile, matmul_input(do, UPCAST).T, slope, input_precision="ieee")
        own = load_columns(out, own_at, live, c, so[3], C, BLOCK_C)
        delta += tl.sum(do.to(tl.float32) * own.to(tl.float32), 1)
    level = safe_lse(tl.load(lse + rows_at(rows, b, summaries, sl), mask=live, other=float("-inf")))
    weight = tl.exp2(scores * (scale * LOG2E) - level[None, :])
    # Up to the pitch, whose numbers past the last row are 0.
    kept = (b * tokens + cols) * pitch
    address = kept[:, None] + rows[None, :]
    inside = there[:, None] & (rows < pitch)[None, :]
    if kept_weight is not None:
        tl.store(kept_weight + address, weight.to(dtype), mask=inside)
    tl.store(kept_slope + address, (scale * weight * (slope - delta[None, :])).to(dtype), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def summarize_tokens_kernel(
    selectors, grad_out, kept_weight, kept_slope, grad_x, sdo, sdx, summaries, rows_total, pitch, tokens, tiles,
    column_tiles,
    UPCAST: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_C columns of the gradient dx of BLOCK_N tokens of one sample: loops over the rows of all tasks."""
    pid = tl.program_id(0)
    b = (pid // (tiles * column_tiles)).to(tl.int64)
    cols = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    start = (pid // tiles) % column_tiles * BLOCK_C
    there = cols < tokens
    kept = (b * tokens + cols) * pitch
    dtype: tl.constexpr = kept_slope.dtype.element_ty
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for m in range(0, rows_total, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        live = rows < rows_total
        sel = load_columns(selectors, rows.to(tl.int64) * C, live, start, 1, C, BLOCK_C).to(dtype)
        slope = load_columns(kept_slope, kept, there, m, 1, pitch, BLOCK_M)
        acc = tl.dot(matmul_input(slope, UPCAST), matmul_input(sel, UPCAST), acc, input_precision="ieee")
        do = load_columns(grad_out, rows_at(rows, b, summaries, sdo), live, start, sdo[3], C, BLOCK_C)
        weight = load_columns(kept_weight, kept, there, m, 1, pitch, BLOCK_M)
        acc = tl.dot(matmul_input(weight, UPCAST), matmul_input(do, UPCAST), acc, input_precision="ieee")
    store_columns(grad_x, acc, b * sdx[0] + cols.to(tl.int64) * sdx[1], there, start, sdx[2], C, BLOCK_C)
