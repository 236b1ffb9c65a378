# SPDX-License-Identifier: Apache-2.0
"""Text features of a CLIP's classes: what their texts share, how many are encoded at a time, and what is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastprompt.hf.class_texts import Words, check_classnames
from fastprompt.hf.clip import ClipSites, TextTower, unit
from fastprompt.hf.packing import Packing, shared_length
from fastprompt.nn.prompts import stamp_of

SHARES = ("all", "image", "none")

#: Bytes of text activations kept alive at once where no chunk is asked for; above it classes go in chunks.
TEXT_MEMORY = 2 << 30

#: Chunks that are laid out ahead, since torch.compile cannot trace their making; more are made when first needed.
LAID_OUT = 64

_CONTEXTS = {"all": "one context for all classes", "image": "one context an image", "none": "one context a class"}


class ClassEncoder(nn.Module):
    """The texts of C classes in front of a CLIP's text tower.

    Args:
        clip: The model.
        tokenizer: Its tokenizer.
        classnames: C names.
        class_chunk: Classes encoded at a time where gradients are needed; None is as many as fit `TEXT_MEMORY`.
    """

    def __init__(self, clip: Any, tokenizer: Any, classnames: Sequence[str], class_chunk: int | None):
        super().__init__()
        if class_chunk is not None and (type(class_chunk) is not int or class_chunk < 1):
            raise ValueError(f"class_chunk: got {class_chunk!r}, expected an integer >= 1, or None")
        self.classnames, self.class_chunk = check_classnames(classnames), class_chunk
        self.tower = TextTower(clip)
        self.words = Words(tokenizer, self.tower.vocabulary, self.tower.limit, self.tower.causal)
        self.share = "none"
        self._sequences: list[list[int]] = []
        self._prefix = 0
        self._packings = nn.ModuleDict()
        self._kept: dict[Any, tuple[tuple, Any]] = {}

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_kept": {}}

    def sites(self, clip: Any) -> ClipSites:
        """What a recipe needs to know of the model."""
        return ClipSites.of(clip, self.tower, self.classnames, lambda x: self.tower.embed(self.words.ids(x)))

    def lay_out(self, recipe: Any, length: int, share: str | None) -> None:
        """Lay out every class's text around a context of ``length`` tokens.

        Args:
            recipe: Its ``init`` (words beyond the context stay in the text), ``position``, ``csc`` and ``share``.
            length: Context tokens M.
            share: What texts share; None is the most that is exact.

        Raises:
            ValueError: a name that gives no token or is too long; a ``share`` that is not exact.
        """
        self.share = self._checked_share(recipe, share)
        for template in getattr(recipe, "templates", ()):
            for name in self.classnames:
                self.words.template_sequence(name, template)
        after = self.words.ids(recipe.init)[length:] if recipe.init else []
        found = [self.words.class_sequence(name, length, after, recipe.position) for name in self.classnames]
        if getattr(recipe, "csc", False):
            # One context a class is one long context, whose slots the classes share out.
            found = [[i - c * length if i < 0 else i for i in ids] for c, ids in enumerate(found)]
        self._sequences = found
        self._prefix = shared_length(found) if self.share != "none" else 0
        if self.class_chunk is not None:
            self._at_a_time(self.class_chunk)
        parts = 1
        while parts <= min(LAID_OUT, 2 * len(found) - 1):
            self._at_a_time(-(-len(found) // parts))
            parts *= 2

    def _checked_share(self, recipe: Any, share: str | None) -> str:
        if share is not None and share not in SHARES:
            raise ValueError(f"share: got {share!r}, expected one of {', '.join(map(repr, SHARES))}, or None")
        if not self.tower.causal:
            name = type(self.tower.text).__name__
            if share not in (None, "none"):
                raise ValueError(
                    f"share: got {share!r}, but the text tower of {name} is not causal: every token sees the class "
                    "name; expected 'none' or None"
                )
            warnings.warn(
                f"clip: the text tower of {name} is not causal, so every class is encoded whole, padding included",
                stacklevel=4,
            )
            return "none"
        if share not in (None, "none", recipe.share):
            raise ValueError(
                f"share: got {share!r}, but {recipe!r} has {_CONTEXTS[recipe.share]}; expected {recipe.share!r} or None"
            )
        return share or recipe.share

    def chunks(self, groups: int, tracked: bool) -> list[Packing]:
        """The classes' texts as packings to encode one after the other.

        Args:
            groups: Contexts G that every class is encoded with.
            tracked: What is encoded will need gradients.
        """
        if self.class_chunk is not None and tracked:
            return self._at_a_time(self.class_chunk)
        # Without a backward pass one layer's activations are alive at a time.
        bytes_a_row = self.tower.bytes_a_row() // (1 if tracked else len(self.tower.layers))
        needed = groups * sum(len(s) - self._prefix for s in self._sequences) * bytes_a_row
        parts = 1
        # Powers of two, so that few layouts serve every number of contexts.
        while parts * TEXT_MEMORY < needed and parts < len(self.classnames):
            parts *= 2
        return self._at_a_time(-(-len(self.classnames) // parts))

    def _at_a_time(self, size: int) -> list[Packing]:
        if str(size) not in self._packings:
            parts = [self._sequences[i : i + size] for i in range(0, len(self._sequences), size)]
            packings = nn.ModuleList(Packing(p, self._prefix, self.tower.causal) for p in parts)
            self._packings[str(size)] = packings.to(self.tower.device)
        return list(self._packings[str(size)].children())  # type: ignore[arg-type]

    def encode(self, packing: Packing, context: Tensor, deep: Sequence[Tensor]) -> Tensor:
        """Unit features ``[G,c,D]`` of a chunk of classes with contexts ``[G,slots,W]``."""
        frozen = self.keep(packing, (), lambda: self.tower.frozen_rows(packing))
        return unit(self.tower.encode(packing, context, deep, frozen)).unflatten(0, (-1, packing.classes))

    def encode_all(self, context: Tensor, deep: Sequence[Tensor]) -> Tensor:
        """Unit features ``[G,C,D]`` of all classes."""
        tracked = torch.is_grad_enabled() and context.requires_grad
        packings = self.chunks(len(context), tracked)
        parts = [recomputed(tracked and len(packings) > 1, self.encode, p, context, deep) for p in packings]
        # Never of one part: torch.compile drops that copy and lets the backward pass write to what the caller holds.
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def template_features(self, templates: Sequence[str]) -> Tensor:
        """Unit means ``[C,D]`` of the unit features of every class in each template."""
        with torch.no_grad():
            return self.keep(templates, (), lambda: unit(sum(map(self._in_template, templates))))  # type: ignore[arg-type]

    def _in_template(self, template: str) -> Tensor:
        sequences = [self.words.template_sequence(name, template) for name in self.classnames]
        packing = Packing(sequences, shared_length(sequences) if self.tower.causal else 0, self.tower.causal)
        return unit(self.tower.encode(packing.to(self.tower.device)))

    def keep(self, name: Any, sources: Iterable[Tensor], compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives of ``sources`` and the tower; from memory if none changed or needs a gradient."""
        sources = (*sources, *self.tower.weights())
        tracked = torch.is_grad_enabled() and any(x.requires_grad for x in sources)
        if tracked or torch.compiler.is_compiling():
            return compute()
        stamp = stamp_of(sources)
        if name not in self._kept or self._kept[name][0] != stamp:
            self._kept[name] = (stamp, compute())
        return self._kept[name][1]

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"classes={len(self.classnames)}, share={self.share!r}, prefix={self._prefix}"


def recomputed(on: bool, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``; if ``on``, keeping nothing for the backward pass but what to compute it again from."""
    if not on:
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
