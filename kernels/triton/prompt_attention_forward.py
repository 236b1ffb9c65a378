# SPDX-License-Identifier: Apache-2.0
"""The forward kernel of prompt attention, for batches and for packed sequences."""

import triton
import triton.language as tl

from .tiles import (
    LN2,
    LOG2E,
    SIZES,
    extent,
    load_prompt,
    load_tile,
    mask_scores,
    matmul_input,
    online_softmax,
    split,
    store_tile,
)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, value, prompt_key, prompt_value, prompt_index, mask, cu_seqlens, out, lse,
    sq, sk, sv, spk, spv, sm, so, sl, heads, groups, tiles, tq, tk, prompts, scale,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output and lse of BLOCK_M rows of one head: the key loop visits prompt tiles first, then the sample's own.

    A shared prompt has batch stride 0 and a bank is gathered by ``prompt_index``, so nothing is copied; one online
    softmax runs through both segments, so nothing is merged.
    """
    tile, head, b = split(tl.program_id(0), tiles, heads)
    first, tq = extent(cu_seqlens, b, tq)
    if cu_seqlens is not None:
        tk = tq
    start = tile * BLOCK_M
    if start < tq:
        g = b if prompt_index is None else tl.load(prompt_index + b)
        query += b * sq[0] + head * sq[1] + first * sq[2]
        out += b * so[0] + head * so[1] + first * so[2]
        lse += b * sl[0] + head * sl[1] + first * sl[2]
        kv = head // groups
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
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)

        for p in range(0, prompts, BLOCK_P):
            cols = p + tl.arange(0, BLOCK_P)
            there = cols < prompts
            k = matmul_input(load_prompt(prompt_key, cols, there, spk, dtype, D, BLOCK_D), UPCAST)
            scores = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2E)
            scores = tl.where(there[None, :], scores, float("-inf"))
            v = matmul_input(load_prompt(prompt_value, cols, there, spv, dtype, D, BLOCK_D), UPCAST)
            acc, peak, total = online_softmax(acc, peak, total, scores, v)

        offset = tk - tq
        end = tl.minimum(tk, start + BLOCK_M + offset) if CAUSAL else tk
        for n in range(0, end, BLOCK_N):
            cols = n + tl.arange(0, BLOCK_N)
            there = cols < tk
            k = matmul_input(load_tile(key, cols, there, sk[2], sk[3], D, BLOCK_D), UPCAST)
            scores = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2E)
            scores = mask_scores(scores, mask, sm, rows[:, None], cols[None, :], live[:, None], tk, offset, CAUSAL)
            v = matmul_input(load_tile(value, cols, there, sv[2], sv[3], D, BLOCK_D), UPCAST)
            acc, peak, total = online_softmax(acc, peak, total, scores, v)

        empty = total == 0.0
        acc = acc / tl.where(empty, 1.0, total)[:, None]
        store_tile(out, acc, rows, live, so[2], so[3], D, BLOCK_D)
        result = tl.where(empty, float("-inf"), (peak + tl.log2(tl.where(empty, 1.0, total))) * LN2)
        tl.store(lse + rows.to(tl.int64) * sl[2], result, mask=live)
