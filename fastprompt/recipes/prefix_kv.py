# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning: learned keys and values in every layer's attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastprompt.nn.prefix import EncodedPrefix, Prefix, PrefixEncoder
from fastprompt.recipes.card import Card
from fastprompt.recipes.layers import checked_layers, choose_layers, is_count

if TYPE_CHECKING:
    from fastprompt.hf.sites import Site

#: Standard deviation of the initial keys and values.
INITS = {"normal": 0.02, "ptuning": 1.0}

CARD = Card(
    title="Prefix-Tuning: Optimizing Continuous Prompts for Generation; P-Tuning v2",
    paper="https://arxiv.org/abs/2101.00190",
    tier=1,
    family="prefix",
    use="attach",
    status="exact",
    trains=("layers.*.key", "layers.*.value", "layers.*.encoder.*"),
    repo="XiangLi1999/PrefixTuning",
    deviations=(
        "Positions are not shifted and learned keys not rotated; the released code shifts positions by P.",
        "No identity setting: a prompt's key takes part in every softmax, whatever it holds.",
    ),
)


@dataclass(frozen=True)
class PrefixKV:
    """Prefix tuning (Li & Liang, 2021, https://arxiv.org/abs/2101.00190) and P-Tuning v2 (Liu et al., 2022,
    https://arxiv.org/abs/2110.07602): every query also attends to P learned keys and values in every layer.

    One softmax over ``[K_p; K]`` for decoders and encoders, text and vision. Learned keys are never rotated, no
    position is shifted and no mask widened; every token sees every prompt, under a causal mask, padding or a sliding
    window. They need no projection of the model, so that it may be quantised in any way; to learn, its layers must pass
    gradients on (int8 weights do; PyTorch's dynamic int8 does not, and serves inference alone).

    Args:
        length: Prompts a layer, P >= 1.
        reparam: None learns ``K_p, V_p [Hkv,P,D]`` of every layer (P-Tuning v2). ``"mlp"`` learns a prompt ``[P,C]`` (C
            the model's width) and the network ``W_2 tanh(W_1 p)`` that gives the keys and values of all layers (prefix
            tuning), run once a step; ``handle.bake()`` folds it into plain keys and values.
        init: For ``reparam=None``: ``"normal"``: N(0, 0.02²), as CLIP prompts start; ``"ptuning"``: N(0, 1) as in
            P-Tuning v2; or P token ids: the keys and values that the frozen text tower itself computes of them (keys
            rotated to positions 0 to P-1), the start from real words of prefix tuning. ``"mlp"`` starts as published:
            prompt N(0, 1), linear layers as PyTorch makes them.
        layers: Layer numbers from 0 (negative counts from the end) that get prompts; None is every layer.
        hidden: Width between the two layers of ``"mlp"`` (the paper's default is 512).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import fastprompt, torch
        >>> config = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...                      intermediate_size=64, vocab_size=50)
        >>> model = LlamaForCausalLM(config)
        >>> with fastprompt.attach(model, fastprompt.PrefixKV(length=5)) as handle:
        ...     handle.num_trainable, model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape[0]
        (320, 1)
    """

    length: int
    reparam: str | None = None
    init: str | Sequence[int] = "normal"
    layers: Sequence[int] | None = None
    hidden: int = 512

    kind = None
    projects = False
    outputs = False

    def __post_init__(self):
        for name in ("length", "hidden"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected an integer >= 1")
        if self.reparam not in (None, "mlp"):
            raise ValueError(f"reparam: got {self.reparam!r}, expected None or 'mlp'")
        object.__setattr__(self, "layers", checked_layers(self.layers))
        object.__setattr__(self, "init", self._checked_init())

    def _checked_init(self) -> str | tuple[int, ...]:
        init = self.init
        if self.reparam == "mlp" and init != "normal":
            raise ValueError(f"init: got {init!r}, but reparam='mlp' starts as published; leave init out")
        if isinstance(init, str) and init in INITS:
            return init
        ids = tuple(init) if isinstance(init, Sequence) and not isinstance(init, str) else ()
        if not ids or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise ValueError(f"init: got {init!r}, expected one of {', '.join(map(repr, INITS))}, or token ids")
        if len(ids) != self.length:
            raise ValueError(f"init: got {len(ids)} token ids, expected {self.length}, one for every prompt")
        return ids

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """The token ids to record keys and values of, if any."""
        return self.init if isinstance(self.init, tuple) else None

    def baked(self) -> PrefixKV:
        """The recipe of the prompts after ``handle.bake()``."""
        return replace(self, reparam=None)

    def build(self, sites: list[Site]) -> dict[int, nn.Module]:
        """One prompt module for every chosen layer."""
        chosen = choose_layers(self.layers, len(sites))
        if self.reparam is None:
            return {i: Prefix(*(x.to(*_place(sites[i])) for x in self._start(sites[i]))) for i in chosen}
        shapes = [(sites[i].heads, sites[i].head_dim) for i in chosen]
        encoder = PrefixEncoder(self.length, sites[0].width, self.hidden, shapes).to(*_place(sites[0]))
        return {i: EncodedPrefix(encoder, n, sites[i], owner=n == 0) for n, i in enumerate(chosen)}

    def _start(self, site: Site) -> tuple[Tensor, Tensor]:
        if isinstance(self.init, str):
            shape, std = (site.heads, self.length, site.head_dim), INITS[self.init]
            return std * torch.randn(shape), std * torch.randn(shape)
        if site.recorded is None:
            raise RuntimeError("recorded: nothing; find_sites records when it is given tokens")
        return site.recorded


def _place(site: Site) -> tuple[torch.device, torch.dtype]:
    """The layer's device, and float32 or, for a float64 model, float64."""
    return next(site.layer.parameters()).device, torch.promote_types(site.dtype, torch.float32)
