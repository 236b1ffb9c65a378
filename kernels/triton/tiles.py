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
def load_keys(
    key, prompt, n, end, prompts, strides, prompt_strides, WHOLE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK keys from column n of ``[key[:end]; prompt[:prompts]]``, which nobody writes anywhere; zero past its end.

    A WHOLE tile lies in one of both. Float32 prompts beside half precision count as rounded to it.
    """
    rows = n + tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    inside = (cols < D)[None, :]
    alike: tl.constexpr = key.dtype == prompt.dtype
    if WHOLE and alike:
        # Numbers are chosen, not tensors of addresses.
        own = n < end
        at = (tl.where(own, n, n - end) + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        address = tl.where(own, key, prompt) + at * tl.where(own, strides[2], prompt_strides[2])
        address += cols[None, :] * tl.where(own, strides[3], prompt_strides[3])
        return tl.load(address) if D == BLOCK_D else tl.load(address, mask=inside, other=0.0)
    inside = (rows < end + prompts)[:, None] & inside
    own = inside & (rows < end)[:, None]
    address = key + rows.to(tl.int64)[:, None] * strides[2] + cols[None, :] * strides[3]
    learned = prompt + (rows - end).to(tl.int64)[:, None] * prompt_strides[2] + cols[None, :] * prompt_strides[3]
    if alike:
        return tl.load(tl.where(own, address, learned), mask=inside, other=0.0)
    tile = tl.load(address, mask=own, other=0.0)
    return tl.where(own, tile, tl.load(learned, mask=inside & (own == 0), other=0.0).to(tile.dtype))


@triton.jit
def load_prompt(x, rows, live, strides, DTYPE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of prompts; float32 prompts beside half precision count as rounded to it."""
    return load_tile(x, rows, live, strides[2], strides[3], D, BLOCK_D).to(DTYPE)


@triton.jit
def matmul_input(x, UPCAST: tl.constexpr):
    """The interpreter multiplies the bit patterns of bfloat16, so there (UPCAST) it is float32 from the load on."""
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def exponent(scale):
    """What makes a power of 2 of a score. A scale of 0 becomes nearly 0: a key that nobody sees stays at -inf."""
    return tl.maximum(scale * LOG2E, 1e-30)


@triton.jit
def key_spans(
    start, tk, offset, prompts, MASKED: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What BLOCK_M rows from ``start`` on read: ``end`` instance keys, then the prompt's, as one run of columns.

    Of its tiles, ``whole`` lie in one of both and are seen by all of the rows: ``seen`` of them, then, past ``skip``
    others, the rest. The other ``ragged`` need masks: those ``skip``, and what is left. Where SPLIT is off, all do.
    """
    end = tk
    sure = tk
    if CAUSAL:
        end = tl.maximum(0, tl.minimum(tk, start + BLOCK_M + offset))
        sure = tl.maximum(0, tl.minimum(tk, start + 1 + offset))
    own = tl.cdiv(end, BLOCK_N)
    seen = own * 0 if MASKED or not SPLIT else sure // BLOCK_N
    whole = seen + (tl.maximum(own, (end + prompts) // BLOCK_N) - own if SPLIT else own * 0)
    return end, seen, own - seen, whole, tl.cdiv(end + prompts, BLOCK_N) - whole


@triton.jit
def mask_columns(scores, mask, strides, rows, cols, live, end, prompts, offset, CAUSAL: tl.constexpr):
    """Scores of rows and columns of `key_spans`, in powers of 2 if there is a mask: -inf where they may not meet."""
    own = cols < end
    there = cols < end + prompts
    visible = there[None, :]
    if CAUSAL:
        # One comparison a score: prompts come before every row, what is past the end after all.
        latest = tl.where(own, cols, tl.where(there, -2147483648, 2147483647))
        visible = latest[None, :] <= (rows + offset)[:, None]
    if mask is not None:
        address = mask + rows.to(tl.int64)[:, None] * strides[2] + cols.to(tl.int64)[None, :] * strides[3]
        read = live[:, None] & own[None, :]
        if mask.dtype.element_ty == tl.uint8:
            visible = visible & (tl.load(address, mask=read, other=1) != 0)
        else:
            scores += tl.load(address, mask=read, other=0).to(tl.float32) * LOG2E
    return tl.where(visible, scores, float("-inf"))


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
def online_softmax(acc, peak, total, scores, value, factor=1.0):
    """Fold a tile of scores and values into (unnormalised output, running maximum, running sum).

    ``factor`` times a score is its power of 2: multiplied where the maximum is subtracted, in one instruction.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
    # A row that has seen nothing keeps peak = -inf; shifting it by 0 avoids -inf - -inf.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp2(scores * factor - shift[:, None])
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
