# SPDX-License-Identifier: Apache-2.0
"""The kernels of decoupled attention: all branches in one pass over the query; dK and dV of one branch at a time.

With the lse L_j of a branch alone: P_j = exp(scale q k_j - L_j), delta_j = rowsum(P_j * dO V_j^T), which is also the
gradient of w_j; dS_j = w_j P_j * (dO V_j^T - delta_j), dQ = scale sum_j dS_j K_j, dK_j = scale dS_j^T Q,
dV_j = (w_j P_j)^T dO. No kernel adds into memory that another writes.
"""

import triton
import triton.language as tl

from .tiles import (
    LN2,
    LOG2E,
    SIZES,
    exponent,
    load_rows,
    load_tile,
    mask_scores,
    matmul_input,
    online_softmax,
    safe_lse,
    split,
    store_tile,
)


@triton.jit
def load_weight(weight, factor, rows, live, strides):
    """The weight of every row, or the number that all rows have."""
    return factor if weight is None else load_rows(weight, rows, live, strides[2], 0.0).to(tl.float32)


@triton.jit
def score_keys(
    q, key, mask, rows, cols, live, sk, sm, length, tq, factor,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of keys, and the tile; with a mask they are in powers of 2 (see `unit`)."""
    k = matmul_input(load_tile(key, cols, cols < length, sk[2], sk[3], D, BLOCK_D), UPCAST)
    scores = tl.dot(q, k.T, input_precision="ieee")
    if mask is None and not CAUSAL:
        scores = tl.where((cols < length)[None, :], scores, float("-inf"))
    else:
        scores = scores if mask is None else scores * factor
        scores = mask_scores(scores, mask, sm, rows[:, None], cols[None, :], live[:, None], length, length - tq, CAUSAL)
    return scores, k


@triton.jit
def unit(mask, factor):
    """What makes powers of 2 of what `score_keys` returns: free where something is subtracted anyway."""
    return factor if mask is None else 1.0


@triton.jit
def last_key(start, length, tq, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """The end of the keys that a tile of rows may see."""
    return tl.minimum(length, start + BLOCK_M + length - tq) if CAUSAL else length


@triton.jit(do_not_specialize=SIZES)
def branches_kernel(
    query, keys, values, weights, masks, out, lse, sq, sk, sv, sw, sm, so, sl, factors, lengths,
    heads, groups, tiles, tq, scale,
    CAUSAL: tl.constexpr, BLOCKS: tl.constexpr, BRANCHES: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Output of BLOCK_M rows of one head, and their lse in every branch.

    The query is read once. Each branch runs an online softmax of its own, with tiles of its own size; keys that the
    batch shares have batch stride 0.
    """
    tile, head, b = split(tl.program_id(0), tiles, heads)
    kv = head // groups
    start = tile * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    live = rows < tq
    q = matmul_input(load_tile(query + b * sq[0] + head * sq[1], rows, live, sq[2], sq[3], D, BLOCK_D), UPCAST)
    factor = exponent(scale)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in tl.static_range(BRANCHES):
        key = keys[j] + b * sk[j][0] + kv * sk[j][1]
        value = values[j] + b * sv[j][0] + kv * sv[j][1]
        mask = masks[j] if masks[j] is None else masks[j] + b * sm[j][0] + head * sm[j][1]
        weight = weights[j] if weights[j] is None else weights[j] + b * sw[j][0] + head * sw[j][1]
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for n in range(0, last_key(start, lengths[j], tq, CAUSAL[j], BLOCK_M), BLOCKS[j]):
            cols = n + tl.arange(0, BLOCKS[j])
            scores, _ = score_keys(
                q, key, mask, rows, cols, live, sk[j], sm[j], lengths[j], tq, factor, CAUSAL[j], UPCAST, D, BLOCK_D
            )
            v = matmul_input(load_tile(value, cols, cols < lengths[j], sv[j][2], sv[j][3], D, BLOCK_D), UPCAST)
            acc, peak, total = online_softmax(acc, peak, total, scores, v, unit(mask, factor))
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        result += acc * (load_weight(weight, factors[j], rows, live, sw[j]) / total)[:, None]
        level = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN2)
        tl.store(lse + j * sl[0] + b * sl[1] + head * sl[2] + rows.to(tl.int64) * sl[3], level, mask=live)
    store_tile(out + b * so[0] + head * so[1], result, rows, live, so[2], so[3], D, BLOCK_D)


@triton.jit
def sweep(
    acc, base, again, q, do, key, value, mask, rows, live, level, w, sk, sv, sm, length, end, tq, factor,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Once over the keys of a branch: sums its delta, ``base``; when ``again``, adds to dQ (without its scale)."""
    for n in range(0, end, BLOCK):
        cols = n + tl.arange(0, BLOCK)
        scores, k = score_keys(q, key, mask, rows, cols, live, sk, sm, length, tq, factor, CAUSAL, UPCAST, D, BLOCK_D)
        v = matmul_input(load_tile(value, cols, cols < length, sv[2], sv[3], D, BLOCK_D), UPCAST)
        p = tl.exp2(scores * unit(mask, factor) - level)
        slope = tl.dot(do, v.T, input_precision="ieee")
        if again:
            ds = p * (slope - base[:, None]) * w
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
        else:
            base += tl.sum(p * slope, 1)
    return acc, base


@triton.jit(do_not_specialize=SIZES)
def branches_query_kernel(
    query, keys, values, weights, masks, grad_out, lse, delta, grad_query, sq, sk, sv, sw, sm, sdo, sl, sdq,
    factors, lengths, heads, groups, tiles, tq, scale,
    CAUSAL: tl.constexpr, BLOCKS: tl.constexpr, BRANCHES: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The delta of BLOCK_M rows of one head in every branch, and their dQ.

    A first sweep over a branch's keys, few as a rule, sums delta; that costs less than an output a branch would, kept
    from the forward.
    """
    tile, head, b = split(tl.program_id(0), tiles, heads)
    kv = head // groups
    start = tile * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    live = rows < tq
    q = matmul_input(load_tile(query + b * sq[0] + head * sq[1], rows, live, sq[2], sq[3], D, BLOCK_D), UPCAST)
    do = load_tile(grad_out + b * sdo[0] + head * sdo[1], rows, live, sdo[2], sdo[3], D, BLOCK_D)
    do = matmul_input(do, UPCAST)
    factor = exponent(scale)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in tl.static_range(BRANCHES):
        key = keys[j] + b * sk[j][0] + kv * sk[j][1]
        value = values[j] + b * sv[j][0] + kv * sv[j][1]
        mask = masks[j] if masks[j] is None else masks[j] + b * sm[j][0] + head * sm[j][1]
        weight = weights[j] if weights[j] is None else weights[j] + b * sw[j][0] + head * sw[j][1]
        state = j * sl[0] + b * sl[1] + head * sl[2]
        level = safe_lse(load_rows(lse + state, rows, live, sl[3], float("-inf")))[:, None]
        end = last_key(start, lengths[j], tq, CAUSAL[j], BLOCK_M)
        w = load_weight(weight, factors[j], rows, live, sw[j])
        w = w if weight is None else w[:, None]
        base = tl.zeros([BLOCK_M], tl.float32)
        if SPLIT:
            acc, base = sweep(
                acc, base, 0, q, do, key, value, mask, rows, live, level, w, sk[j], sv[j], sm[j], lengths[j], end, tq,
                factor, CAUSAL[j], UPCAST, D, BLOCK_D, BLOCKS[j],
            )  # fmt: skip
            if grad_query is not None:
                acc, base = sweep(
                    acc, base, 1, q, do, key, value, mask, rows, live, level, w, sk[j], sv[j], sm[j], lengths[j], end,
                    tq, factor, CAUSAL[j], UPCAST, D, BLOCK_D, BLOCKS[j],
                )  # fmt: skip
        else:
            # One code for both sweeps: products of float32 take long to compile.
            for again in range(0, 1 if grad_query is None else 2):
                acc, base = sweep(
                    acc, base, again, q, do, key, value, mask, rows, live, level, w, sk[j], sv[j], sm[j], lengths[j],
                    end, tq, factor, CAUSAL[j], UPCAST, D, BLOCK_D, BLOCKS[j],
                )  # fmt: skip
        tl.store(delta + state + rows.to(tl.int64) * sl[3], base, mask=live)
    if grad_query is not None:
        store_tile(grad_query + b * sdq[0] + head * sdq[1], acc * scale, rows, live, sdq[2], sdq[3], D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def branch_kernel(
    query, key, value, weight, mask, grad_out, lse, delta, work_key, work_value, sq, sk, sv, sw, sm, sdo, sl,
    factor, heads_kv, groups, tiles, splits, bank, tq, rows_total, length, scale,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split's share of dK and dV of BLOCK_N keys of one branch and key head, into its own float32 workspace.

    ``bank`` is the batch of the keys: 1 where all rows of all samples read them. Row r is row ``r % tq`` of sample
    ``r // tq``; every split takes an equal run of tiles of the rows that read the keys, so the order of the sum depends
    on shapes alone.
    """
    pid = tl.program_id(0)
    tile, kv, g = split(pid // splits, tiles, heads_kv)
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there = cols < length
    share = rows_total // bank
    run = tl.cdiv(tl.cdiv(share, BLOCK_M), splits) * BLOCK_M
    begin = g.to(tl.int32) * share
    end = tl.minimum(begin + share, begin + (pid % splits + 1) * run)
    begin += pid % splits * run

    k = load_tile(key + g * sk[0] + kv * sk[1], cols, there, sk[2], sk[3], D, BLOCK_D)
    v = load_tile(value + g * sv[0] + kv * sv[1], cols, there, sv[2], sv[3], D, BLOCK_D)
    k = matmul_input(k, UPCAST)
    v = matmul_input(v, UPCAST)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(0, groups):
        head = kv * groups + member
        for m in range(begin, end, BLOCK_M):
            rows = m + tl.arange(0, BLOCK_M)
            live = rows < end
            sample = (rows // tq).to(tl.int64)
            rows = (rows % tq).to(tl.int64)
            q_rows = sample * sq[0] + head * sq[1] + rows * sq[2]
            q = matmul_input(load_tile(query, q_rows, live, 1, sq[3], D, BLOCK_D), UPCAST)
            do_rows = sample * sdo[0] + head * sdo[1] + rows * sdo[2]
            do = matmul_input(load_tile(grad_out, do_rows, live, 1, sdo[3], D, BLOCK_D), UPCAST)
            state = sample * sl[0] + head * sl[1] + rows * sl[2]
            level = safe_lse(load_rows(lse, state, live, 1, float("-inf")))[None, :]
            scores = tl.dot(k, q.T, input_precision="ieee") * (scale * LOG2E)
            # Keys past the end get weights too, but keys do not mix here, and theirs are not stored.
            if mask is not None or CAUSAL:
                here = mask if mask is None else mask + (sample * sm[0] + head * sm[1])[None, :]
                scores = mask_scores(
                    scores, here, sm, rows[None, :], cols[:, None], live[None, :], length, length - tq, CAUSAL
                )
            p = tl.exp2(scores - level)
            if weight is None:
                p *= factor
            else:
                w_rows = sample * sw[0] + head * sw[1] + rows * sw[2]
                p *= load_rows(weight, w_rows, live, 1, 0.0).to(tl.float32)[None, :]
            if work_value is not None:
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            if work_key is not None:
                base = load_rows(delta, state, live, 1, 0.0)[None, :]
                ds = p * (tl.dot(v, do.T, input_precision="ieee") - base)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    # Workspace [splits, bank, Hkv, T, D].
    slot = (((pid % splits).to(tl.int64) * bank + g) * heads_kv + kv) * length * D
    if work_key is not None:
        store_tile(work_key + slot, dk * scale, cols, there, D, 1, D, BLOCK_D)
    if work_value is not None:
        store_tile(work_value + slot, dv, cols, there, D, 1, D, BLOCK_D)
