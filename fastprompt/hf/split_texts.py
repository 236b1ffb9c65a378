# SPDX-License-Identifier: Apache-2.0
"""Decoupled attention of packed texts: words and prompt slots weigh what they read of their own kind and of the other.

A text is rows before its slots (the start token), the slots, and the words behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fastprompt.nn.decoupled import weight
from fastprompt.ops import prompt_attention_varlen

if TYPE_CHECKING:
    from fastprompt.hf.packing import Packed
    from fastprompt.nn.decoupled import Split


def attend_split(
    packed: Packed, split: Split, shared: Sequence[Tensor], own: Sequence[Tensor], scale: float | None, *, last: bool
) -> Tensor:
    """Attention of packed rows ``[R,H,D]``; in the last layer that of the suffixes alone.

    Args:
        packed: The texts, of one group; slots stand side by side.
        split: λ of the layer.
        shared: Queries, keys and values of the prefix, which holds all slots or has no rows.
        own: Those of the suffixes.
        scale: Softmax scale.
        last: Nothing reads the prefix's rows any more.
    """
    if not packed.prefix:
        rows, places = _pad(packed, len(own[0]))
        texts = [x[rows].transpose(1, 2) for x in own]
        return _texts(packed, split, texts, scale).transpose(1, 2).flatten(0, 1).index_select(0, places)
    prefix = [x.transpose(0, 1).unsqueeze(0) for x in shared]
    out = _suffixes(packed, split, prefix[1:], own, scale)
    if last:
        return out
    return torch.cat([_texts(packed, split, prefix, scale)[0].transpose(0, 1), out])


def _suffixes(
    packed: Packed, split: Split, prefix: Sequence[Tensor], own: Sequence[Tensor], scale: float | None
) -> Tensor:
    """Words ``[T,H,D]`` that read those before them, and slots in the prefix ``[1,H,prefix,D]``."""
    query, key, value = own
    lam = weight(split.instance)
    prompts, words = zip(*(_kinds(packed, x) for x in prefix), strict=True)
    read = prefix if lam is None else words
    out: Any = prompt_attention_varlen(
        query, key, value, read[0], read[1], packed.cu_seqlens,
        max_seqlen=packed.longest, is_causal=True, scale=scale,
    )  # fmt: skip
    if lam is None:
        return out
    other = sdpa(query.transpose(0, 1).unsqueeze(0), prompts[0], prompts[1], scale=scale)[0].transpose(0, 1)
    return (out + lam * (other - out)).to(out.dtype)


def _texts(packed: Packed, split: Split, texts: Sequence[Tensor], scale: float | None) -> Tensor:
    """Attention ``[S,H,T,D]`` of whole texts, or of what all share; what a text is padded with comes last."""
    before, query, behind = texts[0].tensor_split(_context(packed), dim=2)
    (key, word_key), (value, word_value) = (_kinds(packed, x) for x in texts[1:])
    prompts, words = (key, value), (word_key, word_value)
    # What a causal tower lets slots see, which are not seen there.
    first = (word_key[:, :, : before.shape[2]], word_value[:, :, : before.shape[2]])
    options: dict[str, Any] = {"is_causal": packed.causal, "scale": scale}
    found = [
        sdpa(before, *first, **options),
        split.prompt_rows(query, prompts, first if packed.causal else words, **options),
        split.instance_rows(behind, words, prompts, **options),
    ]
    return torch.cat(found, dim=2)


def _context(packed: Packed) -> tuple[int, int]:
    if packed.context is None:
        raise ValueError("packed: got slots that stand apart, expected a context in one piece")
    return packed.context


def _kinds(packed: Packed, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of ``[S,H,T,D]``, and the words on both sides of them."""
    before, slots, behind = rows.tensor_split(_context(packed), dim=2)
    return slots, torch.cat([before, behind], dim=2)


def _pad(packed: Packed, count: int) -> tuple[Tensor, Tensor]:
    """The row ``[S,longest]`` at every place of padded texts, and the place ``[R]`` of all ``count`` rows."""
    starts, ends = packed.cu_seqlens[:-1].long(), packed.cu_seqlens[1:].long()
    places = torch.arange(packed.longest, device=starts.device)
    rows = (starts[:, None] + places).clamp(max=count - 1)
    every = torch.arange(count, device=starts.device)
    text = torch.bucketize(every, ends, right=True)
    return rows, text * packed.longest + every - starts[text]
