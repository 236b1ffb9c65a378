# SPDX-License-Identifier: Apache-2.0
"""The kernels of `summarize_tokens`: forward, a split's share of the selectors' gradient, and the tokens' gradient.

One head over the full width. With the lse L of a row: P = exp(scale sel x - L), delta = rowsum(dU * U),
dS = scale P * (dU x^T - delta), dsel = sum_b dS x, dx = dS^T sel + P^T dU. Rows are those of all tasks: row r is
summary ``r % S`` of task ``r // S``, so that a tile is full also where S is small.
"""

import triton
import triton.language as tl

from .tiles import LN2, LOG2E, SIZES, load_tile, matmul_input, online_softmax, safe_lse, store_tile


@triton.jit
def rows_at(rows, b, summaries, strides):
    """Where rows of ``[T,B,S,...]`` begin in sample ``b``."""
    return (rows // summaries).to(tl.int64) * strides[0] + b * strides[1] + (rows % summaries) * strides[2]


@triton.jit
def load_selectors(selectors, rows, live, DTYPE: tl.constexpr, UPCAST: tl.constexpr, C: tl.constexpr,
                   BLOCK_C: tl.constexpr):  # fmt: skip
    """A tile of selectors; float32 selectors beside half precision count as rounded to it."""
    return matmul_input(load_tile(selectors, rows, live, C, 1, C, BLOCK_C).to(DTYPE), UPCAST)


@triton.jit(do_not_specialize=SIZES)
def summarize_kernel(
    selectors, x, out, lse, sx, so, sl, summaries, rows_total, tokens, tiles, scale,
    UPCAST: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Summaries of BLOCK_M rows of one sample; each of its tokens is read once, as key and as value."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < rows_total
    sel = load_selectors(selectors, rows, live, x.dtype.element_ty, UPCAST, C, BLOCK_C)
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


@triton.jit
def weigh(sel, tile, do, level, delta, there, scale):
    """Weights P and slopes dS of a tile of rows and a tile of tokens."""
    scores = tl.dot(sel, tile.T, input_precision="ieee") * (scale * LOG2E)
    weight = tl.where(there[None, :], tl.exp2(scores - level[:, None]), 0.0)
    slope = tl.dot(do, tile.T, input_precision="ieee") - delta[:, None]
    return weight, scale * weight * slope


@triton.jit(do_not_specialize=SIZES)
def summarize_selectors_kernel(
    selectors, x, out, grad_out, lse, delta, work, sx, so, sdo, sl, summaries, rows_total, tokens, splits, size, scale,
    UPCAST: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split's share of dsel of BLOCK_M rows, in float32, and the delta of those rows in its samples.

    Every split takes an equal run of the ``size`` samples, so the order of the sum depends on shapes alone.
    """
    part, tile_of = tl.program_id(0) % splits, tl.program_id(0) // splits
    rows = tile_of * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < rows_total
    sel = load_selectors(selectors, rows, live, x.dtype.element_ty, UPCAST, C, BLOCK_C)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    run = tl.cdiv(size, splits)
    for sample in range(part * run, tl.minimum(size, part * run + run)):
        b = tl.cast(sample, tl.int64)
        do = load_tile(grad_out, rows_at(rows, b, summaries, sdo), live, 1, sdo[3], C, BLOCK_C)
        own = load_tile(out, rows_at(rows, b, summaries, so), live, 1, so[3], C, BLOCK_C)
        base = tl.sum(do.to(tl.float32) * own.to(tl.float32), 1)
        at = rows_at(rows, b, summaries, sl)
        if delta is not None:
            tl.store(delta + at, base, mask=live)
        if work is not None:
            do = matmul_input(do, UPCAST)
            level = safe_lse(tl.load(lse + at, mask=live, other=float("-inf")))
            for n in range(0, tokens, BLOCK_N):
                cols = n + tl.arange(0, BLOCK_N)
                there = cols < tokens
                tile = matmul_input(load_tile(x + b * sx[0], cols, there, sx[1], sx[2], C, BLOCK_C), UPCAST)
                _, slope = weigh(sel, tile, do, level, base, there, scale)
                acc = tl.dot(slope.to(tile.dtype), tile, acc, input_precision="ieee")
    if work is not None:
        store_tile(work + part.to(tl.int64) * rows_total * C, acc, rows, live, C, 1, C, BLOCK_C)


@triton.jit(do_not_specialize=SIZES)
def summarize_tokens_kernel(
    selectors, x, grad_out, lse, delta, grad_x, sx, sdo, sl, sdx, summaries, rows_total, tokens, tiles, scale,
    UPCAST: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient dx of BLOCK_N tokens of one sample: loops over the rows of all tasks."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    there = cols < tokens
    tile = matmul_input(load_tile(x + b * sx[0], cols, there, sx[1], sx[2], C, BLOCK_C), UPCAST)
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for m in range(0, rows_total, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        live = rows < rows_total
        sel = load_selectors(selectors, rows, live, x.dtype.element_ty, UPCAST, C, BLOCK_C)
        do = load_tile(grad_out, rows_at(rows, b, summaries, sdo), live, 1, sdo[3], C, BLOCK_C)
        do = matmul_input(do, UPCAST)
        at = rows_at(rows, b, summaries, sl)
        level = safe_lse(tl.load(lse + at, mask=live, other=float("-inf")))
        base = tl.load(delta + at, mask=live, other=0.0)
        weight, slope = weigh(sel, tile, do, level, base, there, scale)
        acc = tl.dot(slope.to(sel.dtype).T, sel, acc, input_precision="ieee")
        acc = tl.dot(weight.to(do.dtype).T, do, acc, input_precision="ieee")
    store_tile(grad_x + b * sdx[0], acc, cols, there, sdx[1], sdx[2], C, BLOCK_C)
