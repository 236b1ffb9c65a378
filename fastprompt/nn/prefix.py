# SPDX-License-Identifier: Apache-2.0
"""Modules that hold learned keys and values: as they are, or as a shared network gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Layer(Protocol):
    """What an encoded prefix needs to know of its layer."""

    @property
    def checkpointed(self) -> bool:
        """The layer computes its forward again in the backward pass."""


class Prefix(nn.Module):
    """Learned keys and values of one layer, which no projection and no rotation touches.

    Args:
        key: Initial keys ``[Hkv, P, D]``; the parameter keeps their dtype.
        value: Initial values ``[Hkv, P, D]``.

    Example:
        >>> import torch
        >>> keys, values = Prefix(torch.zeros(2, 5, 8), torch.zeros(2, 5, 8)).key_value()
        >>> keys.shape
        torch.Size([2, 5, 8])

    https://arxiv.org/abs/2101.00190, https://arxiv.org/abs/2110.07602
    """

    inserted = False

    def __init__(self, key: Tensor, value: Tensor):
        super().__init__()
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        heads, length, dim = self.key.shape
        return f"length={length}, kv_heads={heads}, head_dim={dim}"

    def key_value(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[Hkv,P,D]``."""
        return self.key, self.value

    def bake(self) -> None:
        """Freeze keys and values."""
        self.requires_grad_(False)


class PrefixEncoder(nn.Module):
    """Keys and values of every layer from one prompt: ``W_2 tanh(W_1 p + b_1) + b_2``, cut into layers.

    The prompt starts as N(0, 1) and the two linear layers as PyTorch makes them, as published. Where nothing needs a
    gradient, the result is kept until a parameter changes.

    Args:
        length: Number of prompts P.
        width: Width C of the prompt.
        hidden: Width between the two linear layers.
        shapes: ``(Hkv, D)`` of every layer.

    Example:
        >>> encoder = PrefixEncoder(5, 32, 16, [(2, 8), (2, 8)])
        >>> [tuple(x.shape) for x in encoder.key_value(1)]
        [(2, 5, 8), (2, 5, 8)]

    https://arxiv.org/abs/2101.00190
    """

    def __init__(self, length: int, width: int, hidden: int, shapes: Sequence[tuple[int, int]]):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(length, width))
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, sum(2 * heads * dim for heads, dim in shapes))
        self.shapes = list(shapes)
        self._kept: tuple[tuple, list[tuple[Tensor, Tensor]]] | None = None

    def __getstate__(self) -> dict:
        # What is kept belongs to an autograd graph, which neither copies nor pickles.
        return {**super().__getstate__(), "_kept": None}

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"length={self.prompt.shape[0]}, width={self.prompt.shape[1]}, layers={len(self.shapes)}"

    def begin(self, *args) -> None:
        """A hook before the tower's forward: a graph serves one backward pass, so that a step starts a new one."""
        if self._kept is not None and self._kept[1][0][0].requires_grad:
            self._kept = None

    def key_value(self, place: int, alone: bool = False) -> tuple[Tensor, Tensor]:
        """Keys and values ``[Hkv,P,D]`` of layer number ``place``, computed once a step for all layers.

        ``alone`` computes those of this layer only, for a layer that runs again in the backward pass: what it reads
        must be computed inside it.
        """
        if alone or torch.compiler.is_compiling():  # a compiler merges what the layers share
            return self._encode(place, place + 1)[0]
        stamp = self._stamp()
        if self._kept is None or self._kept[0] != stamp:
            self._kept = (stamp, self._encode(0, len(self.shapes)))
        return self._kept[1][place]

    def _encode(self, first: int, end: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of a range of layers, in the dtype of the parameters whatever autocast says."""
        sizes = [2 * heads * dim for heads, dim in self.shapes]
        columns = slice(sum(sizes[:first]), sum(sizes[:end]))
        with torch.autocast(self.prompt.device.type, enabled=False):
            rows = torch.tanh(self.inner(self.prompt))
            rows = nn.functional.linear(rows, self.outer.weight[columns], self.outer.bias[columns])
        parts = zip(self.shapes[first:end], rows.split(sizes[first:end], dim=-1), strict=True)
        pairs = [x.unflatten(-1, (2, *shape)).permute(1, 2, 0, 3) for shape, x in parts]
        return [(pair[0], pair[1]) for pair in pairs]

    def _stamp(self) -> tuple:
        """Changes with the parameters, and with what autograd may do with the result."""
        state = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        return (*state, *((x.data_ptr(), x._version, x.dtype, x.requires_grad) for x in self.parameters()))


class EncodedPrefix(nn.Module):
    """One layer's share of a `PrefixEncoder`; ``bake`` makes it a plain prefix.

    Args:
        encoder: The network that all layers share; one of them registers it.
        place: The layer's number in it.
        layer: The layer.
        owner: This one registers the encoder.
    """

    inserted = False
    key: nn.Parameter | None
    value: nn.Parameter | None

    def __init__(self, encoder: PrefixEncoder, place: int, layer: Layer, owner: bool):
        super().__init__()
        self.register_parameter("key", None)
        self.register_parameter("value", None)
        if owner:
            self.encoder: PrefixEncoder | None = encoder
        self.place, self.layer = place, layer
        # In a list it is not a submodule, so that a model's state dict holds it once.
        self._encoder = [encoder]

    def key_value(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[Hkv,P,D]`` of this step."""
        if self.key is not None and self.value is not None:
            return self.key, self.value
        return self._encoder[0].key_value(self.place, alone=self.layer.checkpointed)

    def bake(self) -> None:
        """Keep keys and values as they are now and drop the encoder."""
        if self.key is not None:
            return
        with torch.no_grad():
            self.key, self.value = (nn.Parameter(x.clone(), requires_grad=False) for x in self.key_value())
        self._encoder = []
        self._modules.pop("encoder", None)
