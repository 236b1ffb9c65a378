# SPDX-License-Identifier: Apache-2.0
"""The backward kernels of prompt attention: delta, dQ, dK and dV, dK_p and dV_p, and the sum over splits.

With the joint lse L: P = exp(scale q k - L), delta = rowsum(dO * O) - dL, dS = P * (dO V^T - delta), dQ = scale dS K,
dK = scale dS^T Q, dV = P^T dO; the same for prompt and instance keys. No kernel adds into memory that another writes.
A row's level is its lse in powers of 2, +inf where it attends to nothing: `delta` writes it too, so that a score costs
one multiply-add before exp2. Rows that are not there are rows of zeros: whatever weight they get, they add nothing.
"""

import triton
import triton.language as tl

from .tiles import (
    SIZES,
    exponent,
    extent,
    key_spans,
    load_keys,
    load_rows,
    load_tile,
    mask_columns,
    mask_scores,
    matmul_input,
    safe_lse,
    split,
    store_tile,
)


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    out, grad_out, grad_lse, lse, cu_seqlens, level, delta, so, sdo, sdl, sl, ss, heads, tiles, tq,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Row numbers: delta = rowsum(grad_out * out) - grad_lse, and the level, float32."""
    tile, head, b = split(tl.program_id(0), tiles, heads)
    first, tq = extent(cu_seqlens, b, tq)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < tq
    o = load_tile(out + b * so[0] + head * so[1] + first * so[2], rows, live, so[2], so[3], D, BLOCK_D)
    do = load_tile(grad_out + b * sdo[0] + head * sdo[1] + first * sdo[2], rows, live, sdo[2], sdo[3], D, BLOCK_D)
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if grad_lse is not None:
        total -= load_rows(grad_lse + b * sdl[0] + head * sdl[1] + first * sdl[2], rows, live, sdl[2], 0.0)
    state = b * ss[0] + head * ss[1] + (first + rows) * ss[2]
    tl.store(delta + state, total, mask=live)
    at = lse + b * sl[0] + head * sl[1] + first * sl[2]
    tl.store(level + state, safe_lse(load_rows(at, rows, live, sl[2], 0.0)), mask=live)


@triton.jit
def add_query(acc, scores, do, k, v, shift, base):
    """Add one tile of keys to dQ (without its scale) of a tile of rows."""
    ds = tl.exp2(scores - shift[:, None]) * (tl.dot(do, v.T, input_precision="ieee") - base[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    query, key, value, prompt_key, prompt_value, prompt_index, mask, cu_seqlens, grad_out, level, delta, grad_query,
    sq, sk, sv, spk, spv, sm, sdo, ss, sdq, heads, groups, tiles, tq, tk, prompts, scale,
    CAUSAL: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient dQ of BLOCK_M rows of one head: the forward's key loop again, with weights from the saved lse."""
    tile, head, b = split(tl.program_id(0), tiles, heads)
    if CAUSAL:
        # The last rows read the most keys; what is heavy starts first.
        tile = tiles - 1 - tile
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
        state = b * ss[0] + head * ss[1] + first * ss[2]
        key += b * sk[0] + kv * sk[1] + first * sk[2]
        value += b * sv[0] + kv * sv[1] + first * sv[2]
        prompt_key += g * spk[0] + kv * spk[1]
        prompt_value += g * spv[0] + kv * spv[1]
        if mask is not None:
            mask += b * sm[0] + head * sm[1]

        rows = start + tl.arange(0, BLOCK_M)
        live = rows < tq
        q = load_tile(query, rows, live, sq[2], sq[3], D, BLOCK_D)
        q = matmul_input(q, UPCAST)
        do = matmul_input(load_tile(grad_out, rows, live, sdo[2], sdo[3], D, BLOCK_D), UPCAST)
        shift = load_rows(level + state, rows, live, ss[2], 0.0)
        base = load_rows(delta + state, rows, live, ss[2], 0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

        factor = exponent(scale)
        offset = tk - tq
        masked: tl.constexpr = mask is not None
        end, seen, skip, whole, ragged = key_spans(start, tk, offset, prompts, masked, CAUSAL, SPLIT, BLOCK_M, BLOCK_N)
        if SPLIT:
            for i in range(0, whole):
                n = tl.where(i < seen, i, i + skip) * BLOCK_N
                k = load_keys(key, prompt_key, n, end, prompts, sk, spk, True, D, BLOCK_D, BLOCK_N)
                k = matmul_input(k, UPCAST)
                v = load_keys(value, prompt_value, n, end, prompts, sv, spv, True, D, BLOCK_D, BLOCK_N)
                scores = tl.dot(q, k.T, input_precision="ieee")
                acc = add_query(acc, scores * factor, do, k, matmul_input(v, UPCAST), shift, base)
        for i in range(0, ragged):
            n = tl.where(i < skip, i + seen, i + whole) * BLOCK_N
            k = load_keys(key, prompt_key, n, end, prompts, sk, spk, False, D, BLOCK_D, BLOCK_N)
            k = matmul_input(k, UPCAST)
            v = load_keys(value, prompt_value, n, end, prompts, sv, spv, False, D, BLOCK_D, BLOCK_N)
            scores = tl.dot(q, k.T, input_precision="ieee") * factor
            cols = n + tl.arange(0, BLOCK_N)
            scores = mask_columns(scores, mask, sm, rows, cols, live, end, prompts, offset, CAUSAL)
            acc = add_query(acc, scores, do, k, matmul_input(v, UPCAST), shift, base)

        store_tile(grad_query, acc * scale, rows, live, sdq[2], sdq[3], D, BLOCK_D)


@triton.jit
def accumulate(dk, dv, q, do, k, v, scores, shift, base, NEED_K: tl.constexpr, NEED_V: tl.constexpr):
    """Add one tile of rows to dK (without its scale) and dV of a tile of keys; ``scores`` is ``[keys, rows]``."""
    weight = tl.exp2(scores - shift[None, :])
    if NEED_V:
        dv = tl.dot(weight.to(do.dtype), do, dv, input_precision="ieee")
    if NEED_K:
        ds = weight * (tl.dot(v, do.T, input_precision="ieee") - base[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def key_value_kernel(
    query, key, value, mask, cu_seqlens, grad_out, level, delta, grad_key, grad_value,
    sq, sk, sv, sm, sdo, ss, sdk, sdv, heads_kv, groups, tiles, tq, tk, scale,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
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
        factor = exponent(scale)
        offset = tk - tq
        # The first row that may see a key of this tile, and the first of those that see all of them.
        begin = tl.maximum(0, start - offset) // BLOCK_M * BLOCK_M if CAUSAL else 0
        whole = begin
        if mask is not None or (CAUSAL and not SPLIT):
            whole = tq
        elif CAUSAL:
            whole = tl.minimum(tq, tl.cdiv(tl.maximum(begin, start + BLOCK_N - 1 - offset), BLOCK_M) * BLOCK_M)
        for member in range(0, groups):
            head = kv * groups + member
            queries = query + b * sq[0] + head * sq[1] + first * sq[2]
            grads = grad_out + b * sdo[0] + head * sdo[1] + first * sdo[2]
            state = b * ss[0] + head * ss[1] + first * ss[2]
            if mask is not None or CAUSAL:
                here = mask if mask is None else mask + head * sm[1]
                for m in range(begin, whole, BLOCK_M):
                    rows = m + tl.arange(0, BLOCK_M)
                    live = rows < tq
                    q = matmul_input(load_tile(queries, rows, live, sq[2], sq[3], D, BLOCK_D), UPCAST)
                    do = matmul_input(load_tile(grads, rows, live, sdo[2], sdo[3], D, BLOCK_D), UPCAST)
                    shift = load_rows(level + state, rows, live, ss[2], 0.0)
                    base = load_rows(delta + state, rows, live, ss[2], 0.0)
                    scores = tl.dot(k, q.T, input_precision="ieee") * factor
                    scores = mask_scores(
                        scores, here, sm, rows[None, :], cols[:, None], live[None, :], tk, offset, CAUSAL
                    )
                    dk, dv = accumulate(dk, dv, q, do, k, v, scores, shift, base, NEED_K, NEED_V)
            if mask is None and (SPLIT or not CAUSAL):
                for m in range(whole, tq, BLOCK_M):
                    rows = m + tl.arange(0, BLOCK_M)
                    live = rows < tq
                    q = matmul_input(load_tile(queries, rows, live, sq[2], sq[3], D, BLOCK_D), UPCAST)
                    do = matmul_input(load_tile(grads, rows, live, sdo[2], sdo[3], D, BLOCK_D), UPCAST)
                    shift = load_rows(level + state, rows, live, ss[2], 0.0)
                    base = load_rows(delta + state, rows, live, ss[2], 0.0)
                    # Keys past the end get weights too, but keys do not mix here, and theirs are not stored.
                    scores = tl.dot(k, q.T, input_precision="ieee") * factor
                    dk, dv = accumulate(dk, dv, q, do, k, v, scores, shift, base, NEED_K, NEED_V)
        if NEED_K:
            grad_key += b * sdk[0] + kv * sdk[1] + first * sdk[2]
            store_tile(grad_key, dk * scale, cols, there, sdk[2], sdk[3], D, BLOCK_D)
        if NEED_V:
            grad_value += b * sdv[0] + kv * sdv[1] + first * sdv[2]
            store_tile(grad_value, dv, cols, there, sdv[2], sdv[3], D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def prompt_kernel(
    query, prompt_key, prompt_value, order, starts, grad_out, level, delta, work_key, work_value,
    sq, spk, spv, sdo, ss, heads_kv, groups, tiles, splits, bank, tq, rows_total, prompts, scale,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, FLAT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One split's share of dK_p and dV_p of BLOCK_P keys of one prompt and key head, into its own float32 workspace.

    A prompt is read by rows of many samples: row r is row ``r % tq`` of sample ``r // tq``; where rows of all samples
    are evenly spaced (FLAT), nothing is divided. Prompt g of a bank is read
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

    k = load_tile(prompt_key + g * spk[0] + kv * spk[1], cols, there, spk[2], spk[3], D, BLOCK_D)
    v = load_tile(prompt_value + g * spv[0] + kv * spv[1], cols, there, spv[2], spv[3], D, BLOCK_D)
    k = matmul_input(k, UPCAST)
    v = matmul_input(v, UPCAST)
    dk = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    factor = exponent(scale)
    for member in range(0, groups):
        head = kv * groups + member
        queries, grads = query + head * sq[1], grad_out + head * sdo[1]
        for m in range(begin, end, BLOCK_M):
            rows = m + tl.arange(0, BLOCK_M)
            live = rows < end
            if order is not None:
                rows = tl.load(order + rows, mask=live, other=0)
            if FLAT:
                q = load_tile(queries, rows, live, sq[2], sq[3], D, BLOCK_D)
                do = load_tile(grads, rows, live, sdo[2], sdo[3], D, BLOCK_D)
            else:
                sample, row = (rows // tq).to(tl.int64), (rows % tq).to(tl.int64)
                q = load_tile(queries, sample * sq[0] + row * sq[2], live, 1, sq[3], D, BLOCK_D)
                do = load_tile(grads, sample * sdo[0] + row * sdo[2], live, 1, sdo[3], D, BLOCK_D)
            q, do = matmul_input(q, UPCAST), matmul_input(do, UPCAST)
            # What `delta` writes is evenly spaced.
            shift = load_rows(level + head * ss[1], rows, live, ss[2], 0.0)
            base = load_rows(delta + head * ss[1], rows, live, ss[2], 0.0)
            scores = tl.dot(k, q.T, input_precision="ieee") * factor
            # Keys past the end get weights too, but keys do not mix here, and theirs are not stored.
            dk, dv = accumulate(dk, dv, q, do, k, v, scores, shift, base, NEED_K, NEED_V)
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
