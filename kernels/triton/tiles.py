# SPDX-License-Identifier: Apache-2.0
"""What every attention kernel does with a tile: load it, score it, fold it into an online softmax, differentiate it."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: Arguments whose value should not make Triton compile a kernel again.
SIZES = ("heads", "heads_kv", "tiles", "tq", "tk", "prompts", "splits", "bank", "rows_total", "size",
         "query_start", "length", "count", "kept_count", "tokens", "summaries",
         "row_tiles", "column_tiles")  # fmt: skip


@triton.jit
def split(pid, tiles, heads):
    """Tile, head and sample of a one-dimensional grid, tiles fastest; what multiplies strides is int64."""
    return pid % tiles, ((pid // tiles) % heads).to(tl.int64), (pid // (tiles * heads)).to(tl.int64)


@triton.jit
def extent(cu_seqlens, b, length):
    """First row and length of sample ``b``: a slice of packed rows, or all ``length`` rows of its own."""
    if cu_seqlens is None:
        first = tl.zeros((), tl.int64)
        size = length
    else:
        first = tl.load(cu_seqlens + b).to(tl.int64)
        size = (tl.load(cu_seqlens + b + 1) - first).to(tl.int32)
    return first, size


@triton.jit
def load_tile(x, rows, live, stride_row, stride_col, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[len(rows), BLOCK_D]`` of the matrix at ``x``: zero in dead rows and past column D."""
    cols = tl.arange(0, BLOCK_D)
    address = x + rows.to(tl.int64)[:, None] * stride_row + cols[None, :] * stride_col
    return tl.load(address, mask=live[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def store_tile(x, tile, rows, live, stride_row, stride_col, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of `load_tile`, cast to the dtype of ``x``."""
    cols = tl.arange(0, BLOCK_D)
    address = x + rows.to(tl.int64)[:, None] * stride_row + cols[None, :] * stride_col
    tl.store(address, tile.to(x.dtype.element_ty), mask=live[:, None] & (cols < D)[None, :])


@triton.jit
def load_prompt(x, rows, live, strides, DTYPE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of prompts; float32 prompts beside half precision count as rounded to it."""
    return load_tile(x, rows, live, strides[2], strides[3], D, BLOCK_D).to(DTYPE)


@triton.jit
def matmul_input(x, UPCAST: tl.constexpr):
    """The interpreter multiplies the bit patterns of bfloat16, so there (UPCAST) it is float32 from the load on."""
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def mask_scores(scores, mask, strides, rows, cols, live, tk, offset, CAUSAL: tl.constexpr):
    """Scores (in powers of 2) of instance keys: plus the mask, -inf where a key may not be seen.

    ``rows`` and ``cols`` are tensors that broadcast to the tile, so that a transposed tile needs no other code.
    """
    visible = live & (cols < tk)
    if mask is not None:
        address = mask + rows.to(tl.int64) * strides[2] + cols.to(tl.int64) * strides[3]
        value = tl.load(address, mask=visible, other=0)
        if mask.dtype.element_ty == tl.uint8:
            visible = visible & (value != 0)
        else:
            scores += value.to(tl.float32) * LOG2E
    if CAUSAL:
        visible = visible & (cols <= rows + offset)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def online_softmax(acc, peak, total, scores, value):
    """Fold a tile of scores and values into (unnormalised output, running maximum, running sum)."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen nothing keeps peak = -inf; shifting it by 0 avoids -inf - -inf.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(peak - shift)
    acc = tl.dot(weight.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total * decay + tl.sum(weight, 1)


@triton.jit
def load_rows(x, rows, live, stride, other):
    """One number a row."""
    return tl.load(x + rows.to(tl.int64) * stride, mask=live, other=other)


@triton.jit
def safe_lse(lse):
    """In powers of 2, with +inf for rows that attend to nothing: their weights are 0, not exp(-inf - -inf)."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
