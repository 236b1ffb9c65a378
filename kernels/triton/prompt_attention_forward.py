# SPDX-License-Identifier: Apache-2.0
"""The forward kernel of prompt attention, for batches and for packed sequences."""

import triton
import triton.language as tl

from .tiles import (
    LN2,
    SIZES,
    exponent,
    extent,
    key_spans,
    load_keys,
    load_tile,
    mask_columns,
    matmul_input,
    online_softmax,
    split,
    store_tile,
)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query, key, value, prompt_key, prompt_value, prompt_index, mask, cu_seqlens, out, lse,
    sq, sk, sv, spk, spv, sm, so, sl, heads, groups, tiles, tq, tk, prompts, scale,
    CAUSAL: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output and lse of BLOCK_M rows of one head: the sample's keys, then the prompt's, are one run of columns.

    A shared prompt has batch stride 0 and a bank is gathered by ``prompt_index``, so nothing is copied; one online
    softmax runs through both, so nothing is merged. Tiles that all of the rows see whole come first, without masks.
    """
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
        q = matmul_input(q, UPCAST)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)

        factor = exponent(scale)
        offset = tk - tq
        masked: tl.constexpr = mask is not None
        end, seen, skip, whole, ragged = key_spans(start, tk, offset, prompts, masked, CAUSAL, SPLIT, BLOCK_M, BLOCK_N)
        if SPLIT:
            for i in range(0, whole):
                n = tl.where(i < seen, i, i + skip) * BLOCK_N
                k = load_keys(key, prompt_key, n, end, prompts, sk, spk, True, D, BLOCK_D, BLOCK_N)
                scores = tl.dot(q, matmul_input(k, UPCAST).T, input_precision="ieee")
                v = load_keys(value, prompt_value, n, end, prompts, sv, spv, True, D, BLOCK_D, BLOCK_N)
                acc, peak, total = online_softmax(acc, peak, total, scores, matmul_input(v, UPCAST), factor)
        for i in range(0, ragged):
            n = tl.where(i < skip, i + seen, i + whole) * BLOCK_N
            k = load_keys(key, prompt_key, n, end, prompts, sk, spk, False, D, BLOCK_D, BLOCK_N)
            scores = tl.dot(q, matmul_input(k, UPCAST).T, input_precision="ieee") * factor
            cols = n + tl.arange(0, BLOCK_N)
            scores = mask_columns(scores, mask, sm, rows, cols, live, end, prompts, offset, CAUSAL)
            v = load_keys(value, prompt_value, n, end, prompts, sv, spv, False, D, BLOCK_D, BLOCK_N)
            acc, peak, total = online_softmax(acc, peak, total, scores, matmul_input(v, UPCAST))

        empty = total == 0.0
        acc = acc / tl.where(empty, 1.0, total)[:, None]
        store_tile(out, acc, rows, live, so[2], so[3], D, BLOCK_D)
        result = tl.where(empty, float("-inf"), (peak + tl.log2(tl.where(empty, 1.0, total))) * LN2)
        tl.store(lse + rows.to(tl.int64) * sl[2], result, mask=live)
