# SPDX-License-Identifier: Apache-2.0
"""Task pathways: what one task learns, and what an attention module computes for the lanes of many tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.ops import prompt_attention, summarize_tokens


class Lane(nn.Module):
    """What one task learns: selectors, prompt keys and values, and a linear head on its unit feature.

    Args:
        summaries: Selectors S.
        length: Prompts K of a prompted layer.
        layers: Prompted layers L.
        width: C.
        heads: Key heads Hkv.
        head_dim: D.
        classes: Classes of the task.

    Example:
        >>> lane = Lane(summaries=3, length=2, layers=4, width=16, heads=2, head_dim=8, classes=5)
        >>> [tuple(p.shape) for p in lane.parameters()]
        [(3, 16), (4, 2, 2, 8), (4, 2, 2, 8), (5, 16), (5,)]
    """

    def __init__(
        self, *, summaries: int, length: int, layers: int, width: int, heads: int, head_dim: int, classes: int
    ):
        super().__init__()
        # As released, where `orthogonal_` makes one unit vector of all numbers of a task's selectors, and one of the
        # keys and one of the values of all tasks; how many those will be is not known here, so of a layer of this task.
        self.selectors = nn.Parameter(torch.randn(summaries, width) / (summaries * width) ** 0.5)
        shape = (layers, heads, length, head_dim)
        std = max(1, heads * length * head_dim) ** -0.5
        self.keys, self.values = (nn.Parameter(std * torch.randn(shape)) for _ in range(2))
        self.head = nn.Linear(width, classes)

    def follow(self, other: Lane) -> None:
        """Start with the selectors and prompts of another task."""
        with torch.no_grad():
            for own, theirs in (
                (self.selectors, other.selectors),
                (self.keys, other.keys),
                (self.values, other.values),
            ):
                own.copy_(theirs)


@dataclass
class LanePass:
    """The lanes of T tasks at one attention module, for the length of one call of its layer.

    Lanes are rows of a batch: row ``t * B + b`` is the class token of sample b in task t. Summaries that the next layer
    replaces matter only as keys and values, so no row runs for them; selectors that a layer changes do not depend on
    the sample: T * S rows of one token each follow the lanes, and get their own input for the attention's output.

    Args:
        stream: ``[B,N,C]``, what the attention of the frozen stream reads.
        tasks: T.
        projections: The layer's own, to keys and values.
        prompt: Keys and values ``[T,Hkv,K,D]``, or None.
        selectors: ``[T,S,C]`` as the attention would read them; None where they are rows behind the lanes.
        pools: False where lanes draw no summaries here.
    """

    stream: Tensor
    tasks: int
    projections: Any
    prompt: tuple[Tensor, Tensor] | None
    selectors: Tensor | None = None
    pools: bool = True
    entered: Tensor | None = field(default=None, init=False)

    @property
    def rows(self) -> int:
        """Lanes of all samples."""
        return self.tasks * len(self.stream)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention ``[R,Tq,Hq,D]`` of lanes over their prompts, themselves and their summaries."""
        rows = self.rows
        own_query, own_key, own_value = (x[:rows] for x in (query, key, value))
        if self.pools:
            pairs = zip((own_key, own_value), self.projections.heads(self.summaries()), strict=True)
            own_key, own_value = (torch.cat([own, drawn.to(own.dtype)], dim=2) for own, drawn in pairs)
        empty = key.new_empty(key.shape[1], 0, key.shape[3])
        prompt = (empty, empty) if self.prompt is None else self.prompt
        index = None
        if self.prompt is not None and self.tasks > 1:
            index = torch.arange(self.tasks, device=key.device).repeat_interleave(len(self.stream))
        out: Any = prompt_attention(own_query, own_key, own_value, *prompt, prompt_index=index, scale=scaling)
        # Selectors' rows need some output, which `leave` replaces.
        return torch.cat([out, query[rows:]]).transpose(1, 2).contiguous()

    def summaries(self) -> Tensor:
        """Summaries ``[T*B,S,C]``."""
        selectors = self.selectors
        if selectors is None and self.entered is not None:
            selectors = self.entered[self.rows :, 0].unflatten(0, (self.tasks, -1))
        if selectors is None:
            raise RuntimeError("selectors: none at this layer")
        return summarize_tokens(selectors.to(self.stream.dtype), self.stream).flatten(0, 1)

    def leave(self, output: Tensor) -> Tensor:
        """Drop and replace: what leaves the attention at the places of selectors is what entered it there."""
        if self.entered is None or len(output) == self.rows:
            return output
        return torch.cat([output[: self.rows], self.entered[self.rows :].to(output.dtype)])


class StreamEnds(Exception):
    """The frozen stream ran as far as lanes read it: nobody needs what its last layer makes of its tokens."""


class LaneAttention(nn.Module):
    """The child of an attention module that notes what the frozen stream reads, and lets lanes through.

    Args:
        last: Nothing is read behind this attention: end the stream in front of it.

    Attributes:
        reads: Whether what runs is the frozen stream; else the model runs by itself, or lanes do.
        lanes: What happens to the rows of the current call; None while the frozen stream runs.
        called: Arguments of the layer in the frozen stream, of all tokens the class token alone.
        stream: What its attention read there.
    """

    inserted = False

    def __init__(self, last: bool = False):
        super().__init__()
        self.last, self.reads = last, False
        self.lanes: LanePass | None = None
        self.called: tuple[tuple, dict] | None = None
        self.stream: Tensor | None = None

    def key_value(self) -> None:
        """The frozen stream has no prompts."""

    def begin(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """A hook before the layer."""
        if self.reads:
            # Lanes start at the class token; all tokens of every layer would be held until the last lane is through.
            token = (args[0] if args else kwargs["hidden_states"])[:, :1].clone()
            self.called = ((token, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": token})

    def enter(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        """A hook before the attention module."""
        x = args[0] if args else kwargs["hidden_states"]
        if self.lanes is not None:
            self.lanes.entered = x
        elif self.reads:
            self.stream = x
            if self.last:
                raise StreamEnds

    def leave(self, projection: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """A hook behind the attention's output projection."""
        return output if self.lanes is None else self.lanes.leave(output)

    def read(self) -> Tensor:
        """What the attention read in the frozen stream ``[B,N,C]``."""
        if self.stream is None:
            raise RuntimeError("stream: it did not run")
        return self.stream

    def clear(self) -> None:
        """Let go of the tensors of a forward."""
        self.lanes = self.called = self.stream = None
        self.reads = False
