# SPDX-License-Identifier: Apache-2.0
"""DPL: prompts in both towers of a CLIP whose attention is split in four and weighed by λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastprompt.nn.decoupled import BRANCHES, MODES, DecoupledPrompt, Split, tower_splits
from fastprompt.nn.dual_prompt import normal_prompt
from fastprompt.nn.prompts import CarriedPrompt, ProjectedPrompt
from fastprompt.recipes.card import Card
from fastprompt.recipes.dassl import dassl
from fastprompt.recipes.words import check_context, check_depth, initial_context

if TYPE_CHECKING:
    from fastprompt.hf.clip import ClipSites
    from fastprompt.hf.sites import Site

LAM_VALUE = 0.1

CARD = Card(
    title="DPL: Decoupled Prompt Learning for Vision-Language Models",
    paper="https://arxiv.org/abs/2308.10061",
    tier=1,
    family="approximated/decoupled attention",
    use="classifier",
    status="reconstruction",
    trains=("context", "deep_text.*", "vision.*", "text_split.*", "vision_split.*", "generator.*"),
    row=33,
    headline="best on three benchmarks of 15 data sets, without a number in the abstract",
    identity={"n_ctx": 0, "lam": "constant", "lam_value": 0.0},
    deviations=(
        "Of the abstract: attention over prompts and instance as four sub-processes, some of them approximated; text "
        "prompts conditioned on language; one modality or both; no other loss and no other data. All else is our "
        "reading: no code was found, and the full text was not read.",
        "Ours: which sub-processes are approximated and how. λ of instance and of prompt rows may be a constant, or "
        "σ(a) with a learned number a of a layer or head for the difference of log-sum-exps; branches can be off.",
        "Ours: λ starts at 0.1. With lam='exact' and all branches it is IVLP.",
        "Ours: where prompts enter and how deep they go (MaPLe's: fresh ones in the first 9 layers), and how many.",
        "Ours: language conditioning is a network on the mean of a class name's frozen token embeddings, which shifts "
        "all text prompts of the class; it starts as no shift, and is off unless asked for.",
        "Ours: the optimisation, which is that of IVLP's released code.",
    ),
)


@dataclass(frozen=True)
class DPL:
    """Decoupled prompt learning (Xu et al., 2023, https://arxiv.org/abs/2308.10061), a reconstruction from its
    abstract: `IVLP`'s prompts in both towers, whose attention is split in four.

    Instance rows x and prompt rows p each read their own kind and the other with a softmax of its own, weighed by λ:
    ``out_x = (1 - λ_x) A_xx V_x + λ_x A_xp V_p`` and ``out_p = (1 - λ_p) A_pp V_p + λ_p A_px V_x``. The joint softmax
    has ``λ* = σ(L_other - L_own)`` of the log-sum-exps, one a row and head; any other λ is off by ``λ - λ*`` times the
    difference of both reads. A learned λ is ``σ(a)``: one number a for ``L_other - L_own`` of all rows. With
    ``lam="exact"`` and all branches, logits and gradients are those of `IVLP`.

    Where the next layer gets fresh prompts, nothing reads what this layer's gather: pp and px are dead there, and are
    not computed. They are alive from the last of the ``depth`` layers to the last but one of the tower; with ``depth``
    at a tower's layers they are dead throughout. In the causal text tower prompts stand in front of the name and cannot
    see it: all that px reads there is the start token, which itself sees no prompt and reads words alone.

    It is a recipe of `CLIPClassifier`, and with ``n_ctx=0`` of ``attach`` for any vision tower, where its exact form is
    `VPT`'s.

    With a constant λ of 0 instance rows are those of the frozen model, to rounding: all image features, and text
    features of the words that remain, with the slots hidden from them.

    Args:
        n_ctx: Text prompts M of a layer; 0 leaves the text tower without, and classes to the words of ``init``.
        n_vision: Vision prompts of a layer; 0 leaves the vision tower without.
        depth: Layers, from the first, that get fresh prompts; at most those of a tower count.
        init: As in `IVLP`.
        lam: ``"exact"``; ``"constant"``; ``"learned"``: one λ_x, and where prompts are alive one λ_p, a layer;
            ``"per_head"``: one of each a head.
        lam_value: The constant λ, in [0, 1], or what a learned one starts at, in (0, 1); None is 0.1. Not for
            ``"exact"``.
        branches: Of ``"xx"``, ``"xp"``, ``"pp"``, ``"px"``, those that are on. The other branch of the rows gets the
            whole weight (a row that sees no row of the other kind reads its own in any case). ``"xp"`` must be on, else
            no prompt is read, and one of ``"pp"``, ``"px"``.
        conditioned: Text prompts depend on the class: a small network shifts them by what it reads in the frozen token
            embeddings of the name. Every class has a context of its own then, and texts share nothing.

    Example:
        >>> from fastprompt import DPL
        >>> DPL(lam="constant", lam_value=0.2).share, DPL(conditioned=True).share
        ('all', 'none')
        >>> from transformers import ViTConfig, ViTModel
        >>> import fastprompt
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=32, patch_size=16)
        >>> with fastprompt.attach(ViTModel(config), DPL(n_ctx=0, n_vision=4, depth=2, lam="per_head")) as handle:
        ...     [name for name, _ in handle.named_parameters()][2:]
        ['layers.0.lam.instance', 'layers.1.lam.instance', 'layers.1.lam.prompt', 'layers.2.lam.instance']
    """

    n_ctx: int = 2
    n_vision: int = 2
    depth: int = 9
    init: str | None = "a photo of a"
    lam: str = "learned"
    lam_value: float | None = None
    branches: Sequence[str] = BRANCHES
    conditioned: bool = False

    position = "end"
    kind = "vision"
    projects = True
    outputs = False
    tokens = None

    def __post_init__(self):
        for name in ("n_ctx", "n_vision"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}: got {value!r}, expected an integer >= 0")
        if not self.n_ctx and not self.n_vision:
            raise ValueError("n_vision: got 0 beside n_ctx=0, expected prompts in one tower at least")
        check_context(self.n_ctx or 1, self.init, counted=True)
        check_depth(self.depth)
        if self.lam not in MODES:
            raise ValueError(f"lam: got {self.lam!r}, expected one of {', '.join(map(repr, MODES))}")
        self._check_value()
        found = tuple(self.branches) if isinstance(self.branches, Sequence) else ()
        if not set(found) <= set(BRANCHES) or "xp" not in found or not {"pp", "px"} & set(found):
            raise ValueError(
                f"branches: got {self.branches!r}, expected some of {', '.join(map(repr, BRANCHES))}: 'xp', without "
                "which no prompt is read, and 'pp' or 'px', for prompts to read something"
            )
        object.__setattr__(self, "branches", tuple(b for b in BRANCHES if b in found))
        if not isinstance(self.conditioned, bool):
            raise ValueError(f"conditioned: got {self.conditioned!r}, expected True or False")
        if self.conditioned and not self.n_ctx:
            raise ValueError("conditioned: got True with n_ctx=0, expected text prompts to condition, n_ctx >= 1")

    def _check_value(self) -> None:
        value = self.lam_value
        if self.lam == "exact":
            if value is not None:
                raise ValueError(f"lam_value: got {value!r} with lam='exact', which finds λ itself; leave it out")
            return
        value = LAM_VALUE if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
            raise ValueError(f"lam_value: got {value!r}, expected a weight in [0, 1]")
        if self.lam != "constant" and value in (0, 1):
            raise ValueError(
                f"lam_value: got {value!r} with lam={self.lam!r}, expected a start between 0 and 1: λ = σ(a) reaches "
                "neither; lam='constant' does"
            )
        object.__setattr__(self, "lam_value", float(value))

    @property
    def csc(self) -> bool:
        """Every class has a context of its own."""
        return self.conditioned

    @property
    def share(self) -> str:
        """What texts can share."""
        return "none" if self.conditioned else "all"

    @property
    def templates(self) -> tuple[str, ...]:
        """The hand-written text of a class, which stands where there are no text prompts."""
        words = (self.init or "").replace("{", "{{").replace("}", "}}")
        return (f"{words} {{}}.".lstrip(),)

    def published(self, shots: int | None = None) -> dict[str, Any]:
        """The optimisation of `IVLP` (`dassl`), since the paper's is not known: options of a `TuneConfig`."""
        return dassl(lr=3.5e-3, batch_size=4, epochs=5)

    def baked(self) -> DPL:
        """The recipe of the prompts after ``handle.bake()``: this one."""
        return self

    def build(self, sites: ClipSites | list[Site]) -> DecoupledPrompt | dict[int, nn.Module]:
        """What is learned for a CLIP, or one module for every layer of a vision tower."""
        return self._for_tower(sites) if isinstance(sites, list) else self._for_clip(sites)

    def _splits(self, layers: int, depth: int, heads: int, dtype: torch.dtype) -> list[Split]:
        return tower_splits(
            layers, depth, heads, dtype, mode=self.lam, value=self.lam_value or 0.0, branches=tuple(self.branches)
        )

    def _for_tower(self, sites: list[Site]) -> dict[int, nn.Module]:
        if self.n_ctx:
            raise ValueError(f"n_ctx: got {self.n_ctx}, but one vision tower has no text prompts; expected n_ctx=0")
        first, count = sites[0], len(sites)
        depth = min(self.depth, count)
        if depth < count and first.packed:
            raise ValueError(
                f"depth: got {depth} of {count} layers, but prompts that no next layer replaces run as tokens, which a "
                f"tower of packed images cannot take; expected {count}"
            )
        device, dtype = next(first.layer.parameters()).device, torch.promote_types(first.dtype, torch.float32)
        splits = [split.to(device) for split in self._splits(count, depth, first.heads, dtype)]
        prompts: dict[int, nn.Module] = {
            i: ProjectedPrompt(
                normal_prompt(self.n_vision, sites[i].width).to(device, dtype), sites[i],
                inserted=i == depth - 1 < count - 1, split=splits[i] if splits else None,
            )
            for i in range(depth)
        }  # fmt: skip
        prompts |= {i: CarriedPrompt(self.n_vision, splits[i]) for i in range(depth, len(splits))}
        for i, split in enumerate(splits):
            prompts[i].add_module("lam", split)
        return prompts

    def _for_clip(self, sites: ClipSites) -> DecoupledPrompt:
        """Text and vision prompts of all layers, what weighs them, and what shifts those of a class."""
        text = min(self.depth, sites.text_layers) if self.n_ctx else 0
        vision = min(self.depth, sites.vision_layers) if self.n_vision else 0
        return DecoupledPrompt(
            initial_context(sites, self.n_ctx, self.init, words_may_remain=True) if text else None,
            [normal_prompt(self.n_ctx, sites.text_width).to(sites.dtype) for _ in range(text - 1)],
            [normal_prompt(self.n_vision, sites.vision_width).to(sites.dtype) for _ in range(vision)],
            self._splits(sites.text_layers, text, sites.text_heads, sites.dtype),
            self._splits(sites.vision_layers, vision, sites.vision_heads, sites.dtype),
            torch.stack([sites.embed(name).mean(0) for name in sites.classnames]).to(sites.dtype)
            if self.conditioned
            else None,
        )
