# SPDX-License-Identifier: Apache-2.0
"""Prompts that a layer's tokens read after its attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastprompt.nn.joint import Joint
from fastprompt.ops.checks import without_autocast
from fastprompt.ops.diffuse_prompts import diffuse, prompt_keys


class DiffusedPrompt(nn.Module):
    """Approximated prompt tuning of one attention layer, between its output projection and whatever follows.

    ``out = exp(s) * (base + m * (a V))`` with ``a = act(x K^T)``, ``K = P + (P W_1^T) W_2^T`` and ``V = P``, or
    ``V = g P`` with a learned gate that starts at 0; see `fastprompt.ops.diffuse_prompts`. Prompts start as N(0, 0.02²)
    and ``W_1`` as N(0, 1); ``W_2`` and s start as 0, as released.

    Args:
        length: Number of prompts P.
        width: Width C of the layer.
        rank: Rank of the key map.
        activation: ``"relu"`` or ``"softmax"``.
        weight: ``"rowmax"`` or ``"none"``.
        scale_trainable: Learn s; else it stays 0.
        gated: Learn the gate.

    Example:
        >>> import torch
        >>> layer = DiffusedPrompt(5, 16, 4)
        >>> layer(torch.randn(2, 7, 16), torch.randn(2, 7, 16)).shape
        torch.Size([2, 7, 16])

    https://arxiv.org/abs/2306.15706
    """

    inserted = False

    def __init__(
        self,
        length: int,
        width: int,
        rank: int,
        *,
        activation: str = "relu",
        weight: str = "rowmax",
        scale_trainable: bool = True,
        gated: bool = False,
    ):
        super().__init__()
        self.activation, self.weight = activation, weight
        self.prompt = nn.Parameter(0.02 * torch.randn(length, width))
        self.down = nn.Parameter(torch.randn(rank, width))
        self.up = nn.Parameter(torch.zeros(width, rank))
        self.log_scale: Tensor
        if scale_trainable:
            self.log_scale = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("log_scale", torch.zeros(()), persistent=False)
        self.gate = nn.Parameter(torch.zeros(())) if gated else None
        # What `bake` keeps; buffers move with the model.
        self.values: Tensor | None
        self.keys: Tensor | None
        self.register_buffer("values", None, persistent=False)
        self.register_buffer("keys", None, persistent=False)
        self._entered: Tensor | None = None
        self.joint: JointKeys | None = None

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        length, width = self.prompt.shape
        return f"length={length}, width={width}, rank={len(self.down)}, {self.activation!r}, {self.weight!r}"

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """The layer's output ``[B,N,C]`` from what its attention read and gave."""
        values, keys = self.values, self.keys
        if values is None or keys is None:
            values, keys = self._read()
        x = x.to(base.dtype)
        options = {"activation": self.activation, "weight": self.weight}
        if x.dim() == 2:  # packed images
            return diffuse(x[None], base[None], values, keys, self.log_scale, **options)[0]
        return diffuse(x, base, values, keys, self.log_scale, **options)

    def _read(self) -> tuple[Tensor, Tensor]:
        """Values and keys ``[P,C]`` of this step."""
        values = self.prompt if self.gate is None else self.gate * self.prompt
        keys = None if self.joint is None else self.joint.share(self)
        return values, prompt_keys(self.prompt, self.down, self.up) if keys is None else keys

    def key_value(self) -> None:
        """No prompt enters the softmax."""

    def enter(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        """A hook before the attention module: what it reads."""
        self._entered = args[0] if args else kwargs["hidden_states"]

    def leave(self, projection: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """A hook behind its output projection."""
        x, self._entered = self._entered, None
        if x is None:
            raise RuntimeError("attention: its output projection ran without it; detach the prompts first")
        return self(x, output)

    def bake(self) -> None:
        """Freeze everything and keep values and keys."""
        self.requires_grad_(False)
        with torch.no_grad():
            self.values, self.keys = (t.clone() for t in self._read())


class JointKeys(Joint[DiffusedPrompt, Tensor]):
    """Keys ``[P,C]`` of the prompts of many layers, in one batched key map: see `fastprompt.nn.joint.Joint`."""

    def compute(self) -> Sequence[Tensor] | None:
        """Keys of every layer; None where they are baked, or layers differ in shape."""
        if any(p.keys is not None for p in self.members):
            return None
        maps = [(p.prompt, p.down, p.up) for p in self.members]
        kinds = {tuple((x.shape, x.dtype, x.device) for x in of_layer) for of_layer in maps}
        if len(kinds) > 1:
            return None
        with without_autocast(maps[0][0].device.type):
            return prompt_keys(*(torch.stack(x) for x in zip(*maps, strict=True))).unbind()
