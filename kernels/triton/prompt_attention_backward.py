# SPDX-License-Identifier: Apache-2.0
"""The backward kernels of prompt attention: delta, dQ, dK and dV, dK_p and dV_p, and the sum over splits.

With the joint lse L: P = exp(scale q k - L), delta = rowsum(dO * O) - dL, dS = P * (dO V^T - delta), dQ = scale dS K,
dK = scale dS^T Q, dV = P^T dO; the same for prompt and instance keys. No kernel adds into memory that another writes.
"""

import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    SIZES,
    extent,
    load_prompt,
    load_rows,
    load_tile,
    mask_scores,
    matmul_input,
    safe_lse,
    split,
    store_tile,
)


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    out, grad_out, grad_lse, cu_seqlens, delta, so, sdo, sdl, sl, heads, tiles, tq,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Row numbers: delta = rowsum(grad_out * out) - grad_lse, float32."""
    tile, head, b = split(tl.program_id(0), tiles, heads)
    first, tq = extent(cu_seqlens, b, tq)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < tq
    o = load_tile(out + b * so[0] + head * so[1] + first * so[2], rows, live, so[2], so[3], D, BLOCK_D)
    do = load_tile(grad_out + b * sdo[0] + head * sdo[1] + first * sdo[2], rows, live, sdo[2], sdo[3], D, BLOCK_D)
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if grad_lse is not None:
        total -= load_rows(grad_lse + b * sdl[0] + head * sdl[1] + first * sdl[2], rows, live, sdl[2], 0.0)
    tl.store(delta + b * sl[0] + head * sl[1] + (first + rows) * sl[2], total, mask=live)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    query, key, value, prompt_key, prompt_value, prompt_index, mask, cu_seqlens, grad_out, lse, delta, grad_query,
    sq, sk, sv, spk, spv, sm, sdo, sl, sdq, heads, groups, tiles, tq, tk, prompts, scale,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient dQ of BLOCK_M rows of one head: the forward's key loop again, with weights from the saved lse."""
    tile, head, b = split(tl.program_id(0), tiles, heads)
    first, tq = extent(cu_seqlens, b, tq)
    if cu_seqlens is not None:
        tk = tq
    start = tile * BLOCK_M
    if start < tq:
        g = b if prompt_index is None else tl.load(prompt_index + b)
        kv = head // groups
        query += b * sq[0] + head * sq[1] + first * sq[2]
        grad_out += b * sdo[0] + head * sdo[1] + first * sdo[2]
        grad_query += b * sdq[0] + head * sdq[1] + first * sdq[2]
        state = b * sl[0] + head * sl[1] + first * sl[2]
        key += b * sk[0] + kv * sk[1] + first * sk[2]
        value += b * sv[0] + kv * sv[1] + first * sv[2]
        prompt_key += g * spk[0] + kv * spk[1]
        prompt_value += g * spv[0] + kv * spv[1]
        if mask is not None:
            mask += b * sm[0] + head * sm[1]

        rows = start + tl.arange(0, BLOCK_M)
        live = rows < tq
        q = load_tile(query, rows, live, sq[2], sq[3], D, BLOCK_D)
        dtype: tl.constexpr = q.dtype
        q = matmul_input(q, UPCAST)
        do = matmul_input(load_tile(grad_out, rows, live, sdo[2], sdo[3], D, BLOCK_D), UPCAST)
        level = safe_lse(load_rows(lse + state, rows, live, sl[2], float("-inf")))[:, None]
        base = load_rows(delta + state, rows, live, sl[2], 0.0)[:, None]
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

        for p in range(0, prompts, BLOCK_P):
            cols = p + tl.arange(0, BLOCK_P)
            there = cols < prompts
            k = matmul_input(load_prompt(prompt_key, cols, there, spk, dtype, D, BLOCK_D), UPCAST)
            v = matmul_input(load_prompt(prompt_value, cols, there, spv, dtype, D, BLOCK_D), UPCAST)
            scores = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2E)
            # Keys past the end are zero, so whatever weight their scores get adds nothing to dQ.
            weight = tl.exp2(tl.where(there[None, :], scores, float("-inf")) - level)
            ds = weight * (tl.dot(do, v.T, input_precision="ieee") - base)
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")

        offset = tk - tq
        end = tl.minimum(tk, start + BLOCK_M + offset) if CAUSAL else tk
        for n in range(0, end, BLOCK_N):
            cols = n + tl.arange(0, BLOCK_N)
            there = cols < tk
            k = matmul_input(load_tile(key, cols, there, sk[2], sk[3], D, BLOCK_D), UPCAST)
            v = matmul_input(load_tile(value, cols, there, sv[2], sv[3], D, BLOCK_D), UPCAST)
            scores = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2E)
            scores = mask_scores(scores, mask, sm, rows[:, None], cols[None, :], live[:, None], tk, offset, CAUSAL)
            ds = tl.exp2(scores - level) * (tl.dot(do, v.T, input_precision="ieee") - base)
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")

        store_tile(grad_query, acc * scale, rows, live, sdq[2], sdq[3], D, BLOCK_D)


@triton.jit
def accumulate(dk, dv, q, do, k, v, scores, level, base, NEED_K: tl.constexpr, NEED_V: tl.constexpr):
    """Add one tile of rows to dK (without its scale) and dV of a tile of keys; ``scores`` is ``[keys, rows]``."""
    weight = tl.exp2(scores - level)
    if NEED_V:
        dv = tl.dot(weight.to(do.dtype), do, dv, input_precision="ieee")
    if NEED_K:
        ds = weight * (tl.dot(v, do.T, input_precision="ieee") - base)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def key_value_kernel(
    query, key, value, mask, cu_seqlens, grad_out, lse, delta, grad_key, grad_value,
    sq, sk, sv, sm, sdo, sl, sdk, sdv, heads_kv, groups, tiles, tq, tk, scale,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients dK and dV of BLOCK_N instance keys of one key head: loops over its query heads and their row tiles."""
    tile, kv, b = split(tl.program_id(0), tiles, heads_kv)
    first, tk = extent(cu_seqlens, b, tk)
    if cu_seqlens is not None:
        tq = tk
    start = tile * BLOCK_N
    if start < tk:
        if mask is not None:
            mask += b * sm[0]
        cols = start + tl.arange(0, BLOCK_N)
        there = cols < tk
        k = load_tile(key + b * sk[0] + kv * sk[1] + first * sk[2], cols, there, sk[2], sk[3], D, BLOCK_D)
        v = load_tile(value + b * sv[0] + kv * sv[1] + first * sv[2], cols, there, sv[2], sv[3], D, BLOCK_D)
        k = matmul_input(k, UPCAST)
        v = matmul_input(v, UPCAST)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        offset = tk - tq
        # The first row that may see a key of this tile.
        begin = tl.maximum(0, start - offset) // BLOCK_M * BLOCK_M if CAUSAL else 0
        for member in range(0, groups):
            head = kv * groups + member
            queries = query + b * sq[0] + head * sq[1] + first * sq[2]
            grads = grad_out + b * sdo[0] + head * sdo[1] + first * sdo[2]
            state = b * sl[0] + head * sl[1] + first * sl[2]
            for m in range(begin, tq, BLOCK_M):
                rows = m + tl.arange(0, BLOCK_M)
                live = rows < tq
                q = matmul_input(load_tile(queries, rows, live, sq[2], sq[3], D, BLOCK_D), UPCAST)
                do = matmul_input(load_tile(grads, rows, live, sdo[2], sdo[3], D, BLOCK_D), UPCAST)
                level = safe_lse(load_rows(lse + state, rows, live, sl[2], float("-inf")))[None, :]
                base = load_rows(delta + state, rows, live, sl[2], 0.0)[None, :] if NEED_K else 0.0
                scores = tl.dot(k, q.T, input_precision="ieee") * (scale * LOG2E)
                here = mask if mask is None else mask + head * sm[1]
                scores = mask_scores(scores, here, sm, rows[None, :], cols[:, None], live[None, :], tk, offset, CAUSAL)
                dk, dv = accumulate(dk, dv, q, do, k, v, scores, level, base, NEED_K, NEED_V)
        if NEED_K:
            grad_key += b * sdk[0] + kv * sdk[1] + first * sdk[2]
            store_tile(grad_key, dk * scale, cols, there, sdk[2], sdk[3], D, BLOCK_D)
        if NEED_V:
            grad_value += b * sdv[0] + kv * sdv[1] + first * sdv[2]
            store_tile(grad_value, dv, cols, there, sdv[2], sdv[3], D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def prompt_kernel(
    query, prompt_key, prompt_value, order, starts, grad_out, lse, delta, work_key, work_value,
    sq, spk, spv, sdo, sl, heads_kv, groups, tiles, splits, bank, tq, rows_total, prompts, scale,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, UPCAST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One split's share of dK_p and dV_p of BLOCK_P keys of one prompt and key head, into its own float32 workspace.

    A prompt is read by rows of many samples: row r is row ``r % tq`` of sample ``r // tq``. Prompt g of a bank is read
    by rows ``starts[g]`` to ``starts[g + 1]`` of the list ``order``; without a list, rows are in order and prompts read
    equal shares. Every split takes an equal run of tiles of those rows, so the order of the sum depends on shapes
    and on the index alone.
    """
    pid = tl.program_id(0)
    part = pid % splits
    tile, kv, g = split(pid // splits, tiles, heads_kv)
    cols = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    there = cols < prompts
    if order is None:
        share = rows_total // bank
        begin = (g * share).to(tl.int32)
        end = begin + share
    else:
        begin = tl.load(starts + g).to(tl.int32)
        end = tl.load(starts + g + 1).to(tl.int32)
    run = tl.cdiv(tl.cdiv(end - begin, BLOCK_M), splits) * BLOCK_M
    begin += part * run
    end = tl.minimum(end, begin + run)

    dtype: tl.constexpr = query.dtype.element_ty
    k = load_prompt(prompt_key + g * spk[0] + kv * spk[1], cols, there, spk, dtype, D, BLOCK_D)
    v = load_prompt(prompt_value + g * spv[0] + kv * spv[1], cols, there, spv, dtype, D, BLOCK_D)
    k = matmul_input(k, UPCAST)
    v = matmul_input(v, UPCAST)
    dk = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for member in range(0, groups):
        head = kv * groups + member
        for m in range(begin, end, BLOCK_M):
            rows = m + tl.arange(0, BLOCK_M)
            live = rows < end
            if order is not None:
                rows = tl.load(order + rows, mask=live, other=0)
            sample = (rows // tq).to(tl.int64)
            rows = (rows % tq).to(tl.int64)
            q_rows = sample * sq[0] + head * sq[1] + rows * sq[2]
            q = matmul_input(load_tile(query, q_rows, live, 1, sq[3], D, BLOCK_D), UPCAST)
            do_rows = sample * sdo[0] + head * sdo[1] + rows * sdo[2]
            do = matmul_input(load_tile(grad_out, do_rows, live, 1, sdo[3], D, BLOCK_D), UPCAST)
            state = sample * sl[0] + head * sl[1] + rows * sl[2]
            level = safe_lse(load_rows(lse, state, live, 1, float("-inf")))[None, :]
            base = load_rows(delta, state, live, 1, 0.0)[None, :] if NEED_K else 0.0
            scores = tl.dot(k, q.T, input_precision="ieee") * (scale * LOG2E)
            # Keys past the end get weights too, but rows of keys do not mix here, and theirs are not stored.
            dk, dv = accumulate(dk, dv, q, do, k, v, scores, level, base, NEED_K, NEED_V)
    # Workspace [splits, G, Hkv, P, D].
    slot = ((part.to(tl.int64) * bank + g) * heads_kv + kv) * prompts * D
    if NEED_K:
        store_tile(work_key + slot, dk * scale, cols, there, D, 1, D, BLOCK_D)
    if NEED_V:
        store_tile(work_value + slot, dv, cols, there, D, 1, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def reduce_kernel(work, grad, splits, size, BLOCK: tl.constexpr):
    """Sum ``work [splits, size]`` over splits, in their order, in float32, and cast once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, splits):
        total += tl.load(work + at, mask=live, other=0.0)
        work += size
    tl.store(grad + at, total.to(grad.dtype.element_ty), mask=live)
