# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens over caches whose heads keep different numbers of keys (``csrc/core/decode.h``)."""

from __future__ import annotations

from torch import Tensor, float32

from fastprompt.ops.cpp.extension import isa_number, operations
from fastprompt.ops.layouts import dense_rows

#: Query rows of a key head up to which it is the fast path, as `suits_decode` in ``csrc/core/decode.cpp`` has it: more
#: would keep a partial result each for every 512 keys.
MOST_ROWS = 16


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    ends: Tensor,
    scale: float,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B,Hq,Tq,D]`` and lse ``[B,Hq,Tq]`` of queries that see two sets of keys in one softmax.

    Args:
        query: ``[B,Hq,Tq,D]``.
        key: ``[B,Hkv,Tk,D]``, keys that every head of a sample has as many of.
        value: ``[B,Hkv,Tk,D]``.
        block_key: ``[N,D]``, the other keys of all heads; head h of sample s has the rows from ``ends[i]`` to
            ``ends[i + 1]``, ``i = s * Hkv + h``.
        block_value: ``[N,D]``.
        ends: int64 ``[B * Hkv + 1]``.
        scale: Softmax scale.
        isa: Forces a level of the kernels, for tests.
    """
    batch, heads, tq, dim = query.shape
    out = query.new_empty(batch, tq, heads, dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, tq, dtype=float32)
    tensors = map(dense_rows, (query, key, value, block_key, block_value))
    operations().decode_blocks(*tensors, ends, scale, isa_number(isa), out, lse)
    return out, lse
