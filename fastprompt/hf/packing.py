# SPDX-License-Identifier: Apache-2.0
"""Texts of classes as packed rows: what all share once, then every class's own rows, and no row that nobody reads.

A causal text tower gives the start token and a shared context the same states in every class, and reads nothing behind
the end token (identity I3). So the shared prefix is computed once (or once an image), and the classes' suffixes are
packed sequences that read the prefix as prompt keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fastprompt.ops import prompt_attention_varlen


def shared_length(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that all sequences begin with; at least the last token of each is its own."""
    shortest = min(map(len, sequences)) - 1
    first = sequences[0]
    for i in range(shortest):
        if any(s[i] != first[i] for s in sequences):
            return i
    return shortest


def _side_by_side(places: Sequence[int]) -> tuple[int, int] | None:
    """Where places that follow each other begin and end."""
    first, end = (places[0], places[-1] + 1) if places else (0, 0)
    return (first, end) if 0 < len(places) == end - first else None


class Packed(NamedTuple):
    """The rows of one pass: the prefixes of G groups, then the suffixes of every class for each group.

    Attributes:
        groups: G: 1, or the images where each has a context of its own.
        prefix: Rows of one prefix.
        cu_seqlens: int32 ``[G*C+1]``, where suffixes begin, counted from the end of the prefixes.
        prompt_index: int64 ``[G*C]``, the group of a suffix; None for one group.
        ends: int64 ``[G*C]``, the row of each end token among the suffixes.
        slot_rows: int64, every row that holds a slot of the context.
        slots: int64, the slot that each of them holds.
        longest: Rows of the longest suffix.
        context: Where slots begin and end in every text, if they stand side by side; else None.
        causal: Whether a row sees the rows before it alone.
    """

    groups: int
    prefix: int
    cu_seqlens: Tensor
    prompt_index: Tensor | None
    ends: Tensor
    slot_rows: Tensor
    slots: Tensor
    longest: int
    context: tuple[int, int] | None
    causal: bool

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``[R,...]`` of the prefixes and of the suffixes."""
        count = self.groups * self.prefix
        shared, own = rows.split([count, rows.shape[0] - count])
        return shared, own

    def attend(self, shared: Sequence[Tensor], own: Sequence[Tensor], scale: float | None, *, last: bool) -> Tensor:
        """Attention of packed rows ``[R,H,D]``; in the last layer that of the suffixes alone.

        Args:
            shared: Queries, keys and values of the prefixes.
            own: Those of the suffixes.
            scale: Softmax scale.
            last: Nothing reads the prefix's rows any more.
        """
        query, key, value = own
        if not self.causal:
            query, key, value = (x.unflatten(0, (-1, self.longest)).transpose(1, 2) for x in own)
            return sdpa(query, key, value, scale=scale).transpose(1, 2).flatten(0, 1)
        prefix_query, prefix_key, prefix_value = (
            x.unflatten(0, (self.groups, self.prefix)).transpose(1, 2) for x in shared
        )
        out: Any = prompt_attention_varlen(
            query, key, value, prefix_key, prefix_value, self.cu_seqlens,
            max_seqlen=self.longest, prompt_index=self.prompt_index, is_causal=True, scale=scale,
        )  # fmt: skip
        if last or not self.prefix:
            return out
        shared_out = sdpa(prefix_query, prefix_key, prefix_value, is_causal=True, scale=scale)
        return torch.cat([shared_out.transpose(1, 2).flatten(0, 1), out])

    def put(self, rows: Tensor, prompt: Tensor) -> Tensor:
        """Rows ``[R,W]`` with slot m of every text replaced by row m of ``prompt [M,W]``."""
        return rows.index_copy(0, self.slot_rows, prompt.to(rows.dtype).index_select(0, self.slots))


class Packing(nn.Module):
    """The sequences of some classes, ready to be packed for any number of groups; index tensors move with the module.

    Args:
        sequences: One a class: token ids, and slot m of a learned context as ``-1 - m``.
        prefix: Tokens that all sequences begin with and that are computed once.
        causal: False for a tower that is not: sequences have one length and ``prefix`` is 0.
    """

    ids: Tensor
    positions: Tensor
    lengths: Tensor
    slot_rows: Tensor
    slots: Tensor

    def __init__(self, sequences: Sequence[Sequence[int]], prefix: int, causal: bool = True):
        super().__init__()
        self.classes, self.prefix, self.causal = len(sequences), prefix, causal
        own = [s[prefix:] for s in sequences]
        self.longest = max(map(len, own))
        rows = [*sequences[0][:prefix], *(i for s in own for i in s)]
        at = [row for row, i in enumerate(rows) if i < 0]
        self.slots_in_suffix = any(row >= prefix for row in at)
        self.context = _side_by_side([i for i, x in enumerate(sequences[0]) if x < 0])
        numbers = {
            "ids": [max(i, 0) for i in rows],
            "positions": [*range(prefix), *(i for s in own for i in range(prefix, prefix + len(s)))],
            "lengths": [len(s) for s in own],
            "slot_rows": at,
            "slots": [-1 - rows[row] for row in at],
        }
        for name, values in numbers.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"classes={self.classes}, prefix={self.prefix}, rows={len(self.ids)}, causal={self.causal}"

    def pack(self, frozen: Tensor, context: Tensor | None) -> tuple[Tensor, Packed]:
        """The rows ``[R,W]`` that enter the first layer, and what the layers need to know of them.

        Args:
            frozen: ``[n,W]``: embeddings of one group's rows; slots hold their position's alone.
            context: ``[G,slots,W]``; None where no sequence has slots.
        """
        rows, groups = frozen.unsqueeze(0), 1
        if context is not None:
            groups = context.shape[0]
            values = context.to(frozen.dtype).index_select(1, self.slots)
            rows = rows.expand(groups, -1, -1).index_add(1, self.slot_rows, values)
        prefixes, suffixes = rows.split([self.prefix, rows.shape[1] - self.prefix], dim=1)
        hidden = torch.cat([prefixes.flatten(0, 1), suffixes.flatten(0, 1)])
        return hidden, self._describe(groups)

    def _describe(self, groups: int) -> Packed:
        own = len(self.ids) - self.prefix
        group = torch.arange(groups, device=self.ids.device)
        ends = (self.lengths.cumsum(0) + group[:, None] * own).flatten()
        in_prefix = self.slot_rows < self.prefix
        first = torch.where(in_prefix, 0, (groups - 1) * self.prefix)
        step = torch.where(in_prefix, self.prefix, own)
        return Packed(
            groups, self.prefix,
            cu_seqlens=torch.nn.functional.pad(ends, (1, 0)).int(),
            prompt_index=group.repeat_interleave(self.classes) if groups > 1 else None,
            ends=ends - 1,
            slot_rows=(self.slot_rows + first + group[:, None] * step).flatten(),
            slots=self.slots.repeat(groups),
            longest=self.longest,
            context=self.context,
            causal=self.causal,
        )  # fmt: skip
