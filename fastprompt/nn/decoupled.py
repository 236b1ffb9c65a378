# SPDX-License-Identifier: Apache-2.0
"""Decoupled prompt learning: what instance and prompt rows read of their own kind and of the other, weighed by λ."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.nn.dual_prompt import DualPrompt
from fastprompt.ops import decoupled_attention, prompt_attention

#: How λ is found: as the joint softmax has it, given, or learned.
MODES = ("exact", "constant", "learned", "per_head")

#: Rows that read (x instance, p prompt), then the keys that they read.
BRANCHES = ("xx", "xp", "pp", "px")

KeyValue = tuple[Tensor, Tensor]


def split_attention(
    query: Tensor,
    own: KeyValue,
    other: KeyValue,
    lam: float | Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attend over the keys of one's own kind and over those of the other kind, each with a softmax of its own.

    ``out = (1 - λ) softmax(q K_own^T) V_own + λ softmax(q K_other^T) V_other``. With ``λ = λ* = σ(L_other - L_own)``, L
    the log-sum-exp of a row's scores, that is one softmax over all keys; any other λ is off by ``(λ - λ*)`` times the
    difference of the two outputs.

    Args:
        query: ``[B,Hq,Tq,D]``.
        own: Keys and values ``[B,Hkv,T,D]``.
        other: Keys and values ``[B,Hkv,P,D]``; of batch 1 they are shared, never copied.
        lam: λ: a number; a tensor that broadcasts to ``[B,Hq,Tq]``, which gets a gradient; None is λ*.
        is_causal: Query i sees its own kind's key ``j <= i + T - Tq``, and all keys of the other.
        scale: Softmax scale; None means ``D ** -0.5``.

    Returns:
        ``[B,Hq,Tq,D]`` in the query dtype.

    Example:
        >>> import torch
        >>> image, prompt = torch.randn(2, 4, 9, 16), torch.randn(1, 4, 3, 16)
        >>> split_attention(image, (image, image), (prompt, prompt), 0.1).shape
        torch.Size([2, 4, 9, 16])

    https://arxiv.org/abs/2308.10061
    """
    if lam is None:
        joint: Any = prompt_attention(query, *own, *other, is_causal=is_causal, scale=scale)
        return joint
    keys, values = zip(own, other, strict=True)
    return decoupled_attention(query, keys, values, [1 - lam, lam], is_causal=[is_causal, False], scale=scale)


def exact_lambda(
    query: Tensor, own: Tensor, other: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """``λ* = σ(L_other - L_own) [B,Hq,Tq]``: the weight that the joint softmax gives the keys of the other kind.

    Args:
        query: ``[B,Hq,Tq,D]``.
        own: Keys ``[B,Hkv,T,D]``, causal or not as in `split_attention`.
        other: Keys ``[B or 1,Hkv,P,D]``.
        is_causal: As in `split_attention`.
        scale: As in `split_attention`.

    Returns:
        float32 (float64 for float64 inputs).

    Example:
        >>> import torch
        >>> exact_lambda(torch.zeros(2, 4, 9, 16), torch.zeros(2, 4, 9, 16), torch.zeros(1, 4, 3, 16))[0, 0, 0]
        tensor(0.2500)
    """
    none = own.new_empty(own.shape[1], 0, own.shape[3])
    other = other.expand(len(own), -1, -1, -1)
    options: Any = {"scale": scale, "return_lse": True}
    mine = prompt_attention(query, own, own, none, none, is_causal=is_causal, **options)[1]
    theirs = prompt_attention(query, other, other, none, none, **options)[1]
    return torch.sigmoid(theirs - mine)


class Split(nn.Module):
    """How the rows of one layer read each other: λ_X of its instance rows and λ_P of its prompt rows.

    Args:
        instance: λ_X, the weight of the prompts: None (exact), a number, or a tensor ``[]`` or ``[H]`` to learn: it
            stands for the difference ``L_XP - L_XX`` of the log-sum-exps, ``λ_X = σ(instance)``.
        prompt: λ_P, the weight of the instance, likewise.
        alive: Something reads the prompt rows behind this layer; else (identity I2) they are not computed and have
            no λ_P.
    """

    def __init__(self, instance: float | Tensor | None, prompt: float | Tensor | None, alive: bool):
        super().__init__()
        self.alive = alive
        given = (instance, prompt if alive else None)
        self.instance, self.prompt = (nn.Parameter(x) if isinstance(x, Tensor) else x for x in given)

    def instance_rows(self, query: Tensor, own: KeyValue, prompts: KeyValue, **options: Any) -> Tensor:
        """``(1 - λ_X) A_XX V_X + λ_X A_XP V_P`` of instance rows; arguments as in `split_attention`."""
        return split_attention(query, own, prompts, weight(self.instance), **options)

    def prompt_rows(self, query: Tensor, own: KeyValue, instance: KeyValue, **options: Any) -> Tensor:
        """``(1 - λ_P) A_PP V_P + λ_P A_PX V_X`` of prompt rows; zeros if they are dead."""
        if not self.alive:
            return torch.zeros_like(query)
        return split_attention(query, own, instance, weight(self.prompt), **options)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prompt: KeyValue | None, length: int, scale: float | None
    ) -> Tensor:
        """Attention ``[B,Hq,T,D]`` of a layer whose prompts are keys and values alone, or else its first rows.

        Args:
            query: ``[B,Hq,T,D]``.
            key: ``[B,Hkv,T,D]``.
            value: Like ``key``.
            prompt: Keys and values ``[Hkv,P,D]``; None: the first P rows are prompts.
            length: P.
            scale: Softmax scale.
        """
        if prompt is not None:
            shared = (prompt[0].unsqueeze(0), prompt[1].unsqueeze(0))
            return self.instance_rows(query, (key, value), shared, scale=scale)
        (prompts, rows), *both = (x.tensor_split([length], dim=2) for x in (query, key, value))
        own, instance = zip(*both, strict=True)
        read = self.instance_rows(rows, instance, own, scale=scale)
        return torch.cat([self.prompt_rows(prompts, own, instance, scale=scale), read], dim=2)


def weight(given: float | Tensor | None) -> float | Tensor | None:
    """λ of what a `Split` holds, as `split_attention` takes it: a learned one is ``[1 or H, 1]``."""
    return given.sigmoid().reshape(-1, 1) if isinstance(given, Tensor) else given


def tower_splits(
    layers: int, depth: int, heads: int, dtype: torch.dtype, *, mode: str, value: float, branches: tuple[str, ...]
) -> list[Split]:
    """A `Split` for every layer of a tower whose first ``depth`` layers get fresh prompts; none for one softmax.

    A constant λ is ``value``, a learned one starts there. Prompt rows are alive where no fresh prompt follows, up to
    the layer before the last.
    """
    if not depth or (mode == "exact" and set(branches) == set(BRANCHES)):
        return []

    def lam(own: str, other: str) -> float | Tensor | None:
        if own not in branches or other not in branches:
            return float(other in branches)
        shape = {"learned": (), "per_head": (heads,)}.get(mode)
        if shape is None:
            return None if mode == "exact" else value
        return torch.full(shape, math.log(value / (1 - value)), dtype=dtype)

    return [Split(lam("xx", "xp"), lam("pp", "px"), depth - 1 <= i < layers - 1) for i in range(layers)]


class DecoupledPrompt(DualPrompt):
    """A `DualPrompt` whose layers weigh what their rows read, and whose text prompts may depend on the class.

    Args:
        context: ``[M,W]``.
        deep_text: J-1 tensors ``[M,W]``.
        vision: J tensors ``[Mv,Wv]``.
        text_split: A `Split` for every text layer, or none.
        vision_split: A `Split` for every vision layer, or none.
        names: The mean ``[C,W]`` of every class name's frozen token embeddings; None: prompts do not depend on it.

    With names n, a network h of two layers (W to W/16 to W, whose last starts at zero) shifts all text prompts of class
    c, in every layer, by ``h(n_c)``.
    """

    names: Tensor | None

    def __init__(
        self,
        context: Tensor | None,
        deep_text: list[Tensor],
        vision: list[Tensor],
        text_split: list[Split],
        vision_split: list[Split],
        names: Tensor | None = None,
    ):
        super().__init__(context, deep_text, vision=vision, text_split=text_split, vision_split=vision_split)
        self.register_buffer("names", names, persistent=False)
        self.generator = None
        if names is not None:
            width = names.shape[1]
            last = nn.Linear(max(width // 16, 1), width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            first = nn.Linear(width, last.in_features)
            self.generator = nn.Sequential(first, nn.ReLU(), last).to(names.dtype)

    def text(self, image: Tensor | None = None) -> Tensor | None:
        """The context ``[M,W]``, or ``[C,M,W]`` where it depends on the class."""
        return self.context if self.context is None else self._of_classes(self.context)

    def deep(self) -> list[Tensor]:
        """What the slots of all classes hold before text layers 1, 2, ...: ``[M,W]`` or ``[C*M,W]`` each."""
        return [self._of_classes(x).flatten(0, -2) for x in self.deep_text]

    def _of_classes(self, prompt: Tensor) -> Tensor:
        if self.generator is None:
            return prompt
        return prompt + self.generator(self.names).unsqueeze(1)
