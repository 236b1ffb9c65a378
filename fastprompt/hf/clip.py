# SPDX-License-Identifier: Apache-2.0
"""CLIP's text tower on packed rows: the model's own frozen layers, without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprompt.errors import UnsupportedModelError
from fastprompt.hf.attention import dropout_fields
from fastprompt.hf.packing import Packed, Packing, shared_length
from fastprompt.hf.sites import choose_tower
from fastprompt.hf.split_texts import attend_split
from fastprompt.nn.frozen_mlp import is_frozen_quick, run_mlp

#: Parts of a text tower and of its layers, as CLIP, MetaCLIP 2 and SigLIP name them.
PARTS = ("embeddings.token_embedding", "embeddings.position_embedding", "encoder.layers", "final_layer_norm")
LAYER_PARTS = (
    "layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm2",
    "mlp",
)  # fmt: skip


@dataclass(frozen=True)
class ClipSites:
    """What a recipe needs to know of a CLIP to build its prompts.

    Args:
        text_width: W.
        vision_width: Wv.
        feature_width: D, of projected features.
        text_layers: Layers of the text tower.
        vision_layers: Layers of the vision tower.
        text_heads: Heads of a text layer.
        vision_heads: Heads of a vision layer.
        classnames: The C classes.
        dtype: Of learned tensors: float32, or float64 for a float64 model.
        embed: Token embeddings ``[n,W]`` of a text without special tokens.
    """

    text_width: int
    vision_width: int
    feature_width: int
    text_layers: int
    vision_layers: int
    text_heads: int
    vision_heads: int
    classnames: tuple[str, ...]
    dtype: torch.dtype
    embed: Callable[[str], Tensor]

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return len(self.classnames)

    @classmethod
    def of(cls, clip: Any, tower: TextTower, classnames: tuple[str, ...], embed: Callable[[str], Tensor]) -> ClipSites:
        """The sites of a CLIP-like model."""
        vision: Any = choose_tower(clip, "vision")
        width = vision.module.config.hidden_size
        heads = (tower.text.config.num_attention_heads, vision.module.config.num_attention_heads)
        feature = clip.config.projection_dim if hasattr(clip, "visual_projection") else width
        dtype = torch.promote_types(tower.text.embeddings.token_embedding.weight.dtype, torch.float32)
        layers = (len(tower.layers), len(vision.layers))
        return cls(tower.width, width, feature, *layers, *heads, classnames, dtype, embed)


class FrozenRows(NamedTuple):
    """What no prompt changes of a packing's rows, for one group.

    Attributes:
        rows: Token and position embeddings ``[n,W]``; slots hold their position alone.
        projected: Queries, keys and values of the suffixes in the first layer, if they hold no slot.
    """

    rows: Tensor
    projected: list[Tensor] | None


class TextTower:
    """The text tower of a CLIP-like model, run on packed rows through its own norms, projections and MLPs.

    Rows are ``[R,W]``: shared prefixes once, then every class's own tokens (`Packing`); there is no padding, and in the
    last layer only the end tokens go on behind attention. A tower that is not causal (SigLIP) gets whole padded texts.

    Args:
        model: ``CLIPModel``, ``CLIPTextModel``, ``CLIPTextModelWithProjection`` or a model with the same parts.

    Raises:
        UnsupportedModelError: parts are missing, or running them gives something else than the model does.
    """

    def __init__(self, model: PreTrainedModel):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"clip: got {type(model).__name__}, expected a transformers model such as CLIPModel")
        text: Any = getattr(model, "text_model", model)
        layers = _part(text, "encoder.layers") or ()
        missing = [name for name in PARTS if _part(text, name) is None]
        missing += [f"encoder.layers.{i}.{n}" for i, x in enumerate(layers) for n in LAYER_PARTS if _part(x, n) is None]
        if missing:
            raise UnsupportedModelError(
                f"clip: {type(model).__name__} has no text tower like CLIP's; missing: {', '.join(missing[:5])}"
            )
        dropout = dropout_fields(text.config)
        if dropout:
            raise ValueError(
                "clip: attention dropout is on, which the text tower does not draw here; set "
                + ", ".join(f"text_config.{name} = 0.0 (got {value})" for name, value in dropout.items())
            )
        self.text, self.layers = text, list(layers)
        self.projection = getattr(model, "text_projection", None) or getattr(text, "head", None)
        # How the rows of a layer read prompts (DPL's `Split`); none: in one softmax with all else.
        self.splits: Sequence[Any] = ()
        self.causal = self._find_causality()

    @property
    def width(self) -> int:
        """Width W of a row."""
        return self.text.embeddings.token_embedding.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tower is."""
        return self.text.embeddings.token_embedding.weight.device

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding."""
        return self.text.embeddings.token_embedding.weight.shape[0]

    @property
    def limit(self) -> int:
        """The longest text, in tokens."""
        return self.text.embeddings.position_embedding.weight.shape[0]

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Token embeddings ``[n,W]``, without positions."""
        weight = self.text.embeddings.token_embedding.weight
        return weight.detach()[torch.tensor(ids, dtype=torch.int64, device=weight.device)].clone()

    def frozen_rows(self, packing: Packing) -> FrozenRows:
        """What no prompt changes of a packing's rows."""
        tokens = self.text.embeddings.token_embedding(packing.ids)
        tokens = tokens.index_fill(0, packing.slot_rows, 0)
        rows = tokens + self.text.embeddings.position_embedding(packing.positions)
        if not packing.prefix or packing.slots_in_suffix:
            return FrozenRows(rows, None)
        first = self.layers[0]
        return FrozenRows(rows, _project(first.self_attn, first.layer_norm1(rows[packing.prefix :])))

    def encode(
        self,
        packing: Packing,
        context: Tensor | None = None,
        deep: Sequence[Tensor] = (),
        frozen: FrozenRows | None = None,
    ) -> Tensor:
        """Projected features ``[G*C,D]`` of the end tokens, group by group.

        Args:
            packing: The classes' texts.
            context: What the slots hold at the embeddings, ``[G,slots,W]``.
            deep: What they hold before layers 1, 2, ...: ``[slots,W]`` each.
            frozen: `frozen_rows`, if they are at hand.
        """
        rows, projected = self.frozen_rows(packing) if frozen is None else frozen
        hidden, packed = packing.pack(rows, context)
        for index, layer in enumerate(self.layers):
            if 0 < index <= len(deep):
                hidden = packed.put(hidden, deep[index - 1])
            known = projected if index == 0 else None
            split = self.splits[index] if self.splits and packed.context else None
            hidden = _run_layer(layer, hidden, packed, known, split, last=index == len(self.layers) - 1)
        hidden = self.text.final_layer_norm(hidden)
        return hidden if self.projection is None else self.projection(hidden)

    def weights(self) -> list[Tensor]:
        """Every tensor that `encode` reads."""
        return [*self.text.parameters(), *(() if self.projection is None else self.projection.parameters())]

    def bytes_a_row(self) -> int:
        """Bytes that a row keeps alive for the backward pass, all layers together, estimated from the widths."""
        hidden = getattr(self.text.config, "intermediate_size", 4 * self.width)
        kept = 1 if is_frozen_quick(self.layers[0].mlp) else 2
        return len(self.layers) * (6 * self.width + kept * hidden) * self.text.final_layer_norm.weight.element_size()

    def _find_causality(self) -> bool:
        """Whether a text's first row ignores its last token; the tower must agree with the model on the last row."""
        ids = [i % self.vocabulary for i in range(3, 3 + min(8, self.limit))]
        other = [*ids[:-1], (ids[-1] + 1) % self.vocabulary]
        weight = self.text.embeddings.token_embedding.weight
        texts = torch.tensor([ids, other], device=weight.device)
        # Eager attention takes its softmax in float32, whatever the weights are.
        eps = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
        projection, modes = self.projection, {m: m.training for m in self.text.modules()}
        try:
            self.text.eval()
            self.projection = None
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                rows = self.text(input_ids=texts).last_hidden_state.float()
                causal = bool((rows[0, 0] - rows[1, 0]).abs().max() <= eps * rows.abs().max())
                packing = Packing([ids], shared_length([ids]) if causal else 0, causal).to(weight.device)
                want = rows[0, -1]
                difference = float((self.encode(packing)[0].float() - want).abs().max())
        finally:
            self.projection = projection
            for module, training in modes.items():
                module.training = training
        bound = 64 * eps * len(self.layers) * float(want.abs().max())
        if not difference <= bound:
            raise UnsupportedModelError(
                f"clip: the parts of {type(self.text).__name__} give other rows than the model (difference "
                f"{difference:.3g}, expected at most {bound:.3g}); prompts attached to its text tower, or "
                "layers that do more than CLIP's, cannot be packed"
            )
        return causal


def _part(module: nn.Module, path: str) -> Any:
    """The module at a dotted path, or None."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _project(attention: Any, normed: Tensor) -> list[Tensor]:
    """Queries, keys and values ``[R,H,D]`` of rows ``[R,W]`` behind the norm."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return [project(normed).unflatten(-1, (attention.num_heads, -1)) for project in projections]


def _run_layer(
    layer: Any, hidden: Tensor, packed: Packed, known: list[Tensor] | None, split: Any, last: bool
) -> Tensor:
    """One pre-norm layer on packed rows; of the last one only what the end tokens need.

    ``known`` are the suffixes' queries, keys and values in the first layer, of one group.
    """
    attention = layer.self_attn
    if known is None:
        parts = [packed.split(x) for x in _project(attention, layer.layer_norm1(hidden))]
        shared, own = ([part[i] for part in parts] for i in (0, 1))
    else:
        shared = _project(attention, layer.layer_norm1(packed.split(hidden)[0]))
        own = [x.repeat(packed.groups, 1, 1) for x in known]
    if split is None:
        mixed = packed.attend(shared, own, attention.scale, last=last)
    else:
        mixed = attend_split(packed, split, shared, own, attention.scale, last=last)
    if last:
        mixed = mixed.index_select(0, packed.ends)
        hidden = hidden.index_select(0, packed.ends + packed.groups * packed.prefix)
    hidden = hidden + attention.out_proj(mixed.flatten(1))
    return hidden + run_mlp(layer.mlp, layer.layer_norm2(hidden))


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / x.norm(dim=-1, keepdim=True)
