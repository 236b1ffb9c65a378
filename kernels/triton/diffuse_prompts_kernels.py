# SPDX-License-Identifier: Apache-2.0
"""The kernels of `diffuse_prompts`: forward, backward of a tile of tokens, and a split's share of prompt gradients.

With S = x K^T, A = act(S), m the row maximum of A (a constant) and f = exp(log_scale): out = f (base + m A P). With
T = G P^T for the gradient G of out: dS = f m T where S > 0 (softmax: f m A (T - rowsum(A T))), dx = dS K, dK = dS^T x,
dP = A^T (f m G), dbase = f G, dlog_scale = f (sum(G base) + sum(m A T)). A program holds all scores of its tokens.
"""

import triton
import triton.language as tl

from .tiles import LOG2E, SIZES, matmul_input


@triton.jit
def row_offsets(rows, tokens, strides):
    """Where rows of ``[B,N,C]`` begin; row r is token ``r % N`` of sample ``r // N``."""
    return (rows // tokens).to(tl.int64) * strides[0] + (rows % tokens).to(tl.int64) * strides[1]


@triton.jit
def load_columns(x, offsets, live, start, stride, C, BLOCK_C: tl.constexpr):
    """Columns ``start`` to ``start + BLOCK_C`` of the rows at ``offsets``: zero in dead rows and past column C."""
    cols = start + tl.arange(0, BLOCK_C)
    address = x + offsets[:, None] + cols[None, :] * stride
    return tl.load(address, mask=live[:, None] & (cols < C)[None, :], other=0.0)


@triton.jit
def store_columns(x, tile, offsets, live, start, stride, C, BLOCK_C: tl.constexpr):
    """The reverse of `load_columns`, cast to the dtype of ``x``."""
    cols = start + tl.arange(0, BLOCK_C)
    address = x + offsets[:, None] + cols[None, :] * stride
    tl.store(address, tile.to(x.dtype.element_ty), mask=live[:, None] & (cols < C)[None, :])


@triton.jit
def activate(scores, there, SOFTMAX: tl.constexpr, ROWMAX: tl.constexpr):
    """Activations of rows of scores, 0 where there is no prompt, and each row's weight."""
    if SOFTMAX:
        scores = tl.where(there[None, :], scores, float("-inf"))
        active = tl.exp2((scores - tl.max(scores, 1)[:, None]) * LOG2E)
        active = active / tl.sum(active, 1)[:, None]
    else:
        active = tl.maximum(scores, 0.0)
    peak = tl.max(active, 1) if ROWMAX else tl.full([scores.shape[0]], 1.0, tl.float32)
    return active, peak


@triton.jit(do_not_specialize=SIZES)
def diffuse_kernel(
    x, base, values, keys, log_scale, out, sx, sb, so, tokens, rows_total, count,
    SOFTMAX: tl.constexpr, ROWMAX: tl.constexpr, UPCAST: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Output of BLOCK_M tokens."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < rows_total
    at = tl.arange(0, BLOCK_P)
    there = at < count
    learned = at * C
    x_at = row_offsets(rows, tokens, sx)
    scores = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    for c in range(0, C, BLOCK_C):
        x_tile = matmul_input(load_columns(x, x_at, live, c, sx[2], C, BLOCK_C), UPCAST)
        k = matmul_input(load_columns(keys, learned, there, c, 1, C, BLOCK_C), UPCAST)
        scores = tl.dot(x_tile, k.T, scores, input_precision="ieee")
    active, peak = activate(scores, there, SOFTMAX, ROWMAX)
    active = matmul_input(active.to(x.dtype.element_ty), UPCAST)
    factor = tl.exp(tl.load(log_scale))
    base_at, out_at = row_offsets(rows, tokens, sb), row_offsets(rows, tokens, so)
    for c in range(0, C, BLOCK_C):
        p = matmul_input(load_columns(values, learned, there, c, 1, C, BLOCK_C), UPCAST)
        read = tl.dot(active, p, input_precision="ieee")
        own = load_columns(base, base_at, live, c, sb[2], C, BLOCK_C).to(tl.float32)
        store_columns(out, factor * (own + peak[:, None] * read), out_at, live, c, so[2], C, BLOCK_C)


@triton.jit(do_not_specialize=SIZES)
def diffuse_rows_kernel(
    grad_out, x, base, values, keys, log_scale, grad_x, grad_base, kept_active, kept_slope, kept_weight, partial,
    sg, sx, sb, sdx, sdb, tokens, rows_total, count, pitch,
    SOFTMAX: tl.constexpr, ROWMAX: tl.constexpr, UPCAST: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Everything of BLOCK_M tokens: dx, dbase, a share of dlog_scale; A, dS and f m for the sums over tokens."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < rows_total
    at = tl.arange(0, BLOCK_P)
    there = at < count
    learned = at * C
    g_at, x_at = row_offsets(rows, tokens, sg), row_offsets(rows, tokens, sx)
    factor = tl.exp(tl.load(log_scale))
    scores = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    slope = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for c in range(0, C, BLOCK_C):
        x_tile = matmul_input(load_columns(x, x_at, live, c, sx[2], C, BLOCK_C), UPCAST)
        k = matmul_input(load_columns(keys, learned, there, c, 1, C, BLOCK_C), UPCAST)
        scores = tl.dot(x_tile, k.T, scores, input_precision="ieee")
        g = load_columns(grad_out, g_at, live, c, sg[2], C, BLOCK_C)
        p = matmul_input(load_columns(values, learned, there, c, 1, C, BLOCK_C), UPCAST)
        slope = tl.dot(matmul_input(g, UPCAST), p.T, slope, input_precision="ieee")
        if grad_base is not None:
            base_at = row_offsets(rows, tokens, sdb)
            store_columns(grad_base, factor * g.to(tl.float32), base_at, live, c, sdb[2], C, BLOCK_C)
        if partial is not None:
            own = load_columns(base, row_offsets(rows, tokens, sb), live, c, sb[2], C, BLOCK_C)
            total += tl.sum(g.to(tl.float32) * own.to(tl.float32), 1)
    active, peak = activate(scores, there, SOFTMAX, ROWMAX)
    if partial is not None:
        total += peak * tl.sum(active * slope, 1)
        tl.store(partial + tl.program_id(0), factor * tl.sum(tl.where(live, total, 0.0), 0))
    weight = factor * peak
    # Up to the pitch, whose numbers past the last prompt are 0.
    kept = rows.to(tl.int64) * pitch
    if kept_active is not None:
        store_columns(kept_active, active, kept, live, 0, 1, pitch, BLOCK_P)
        tl.store(kept_weight + rows, weight, mask=live)
    if SOFTMAX:
        slope = active * (slope - tl.sum(active * slope, 1)[:, None])
    else:
        slope = tl.where(scores > 0, slope, 0.0)
    slope = slope * weight[:, None]
    if kept_slope is not None:
        store_columns(kept_slope, slope, kept, live, 0, 1, pitch, BLOCK_P)
    if grad_x is not None:
        slope = matmul_input(slope.to(x.dtype.element_ty), UPCAST)
        dx_at = row_offsets(rows, tokens, sdx)
        for c in range(0, C, BLOCK_C):
            k = matmul_input(load_columns(keys, learned, there, c, 1, C, BLOCK_C), UPCAST)
            store_columns(grad_x, tl.dot(slope, k, input_precision="ieee"), dx_at, live, c, sdx[2], C, BLOCK_C)


@triton.jit(do_not_specialize=SIZES)
def diffuse_prompt_kernel(
    left, right, weight, work, sr, tokens, rows_total, count, pitch, tiles, splits,
    FLAT: tl.constexpr, UPCAST: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One split's share of ``left^T (weight * right)`` for BLOCK_P prompts and BLOCK_C columns, in float32.

    A row of ``left`` has ``pitch`` numbers, a multiple of 16 for loads of 16 bytes. Rows of ``right`` that are evenly
    spaced (FLAT) are found without a division. Every split takes an equal run of tiles of rows, so the order of the sum
    depends on shapes alone.
    """
    pid = tl.program_id(0)
    part, tile = pid % splits, pid // splits
    start = (tile % tiles) * BLOCK_C
    at = (tile // tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    run = tl.cdiv(tl.cdiv(rows_total, BLOCK_M), splits) * BLOCK_M
    begin = part * run
    end = tl.minimum(rows_total, begin + run)
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for m in range(begin, end, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        live = rows < end
        address = left + rows.to(tl.int64)[None, :] * pitch + at[:, None]
        a = matmul_input(tl.load(address, mask=(at < pitch)[:, None] & live[None, :], other=0.0), UPCAST)
        r_at = rows.to(tl.int64) * sr[1] if FLAT else row_offsets(rows, tokens, sr)
        r = load_columns(right, r_at, live, start, sr[2], C, BLOCK_C)
        if weight is not None:
            scaled = r.to(tl.float32) * tl.load(weight + rows, mask=live, other=0.0)[:, None]
            r = scaled.to(r.dtype)
        acc = tl.dot(a, matmul_input(r, UPCAST), acc, input_precision="ieee")
    work += part.to(tl.int64) * count * C
    store_columns(work, acc, at * C, at < count, start, 1, C, BLOCK_C)
