# SPDX-License-Identifier: Apache-2.0
"""The cross-attention layers of a UNet, and what an adapter puts there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import ImageProjection
from torch import nn

from fastprompt.diffusers.processors import DecoupledAttnProcessor
from fastprompt.diffusers.projections import ImageProjections
from fastprompt.diffusers.swap import is_cross, layers_of
from fastprompt.errors import UnsupportedModelError


@dataclass(frozen=True)
class Site:
    """A cross-attention layer.

    Args:
        index: Its number, in the order of ``unet.attn_processors`` without self-attention.
        name: Its module's name.
        attention: The module.
    """

    index: int
    name: str
    attention: Attention

    @property
    def shape(self) -> tuple[int, int]:
        """Width C of its keys, and width Cc of the text it reads."""
        return self.attention.to_k.out_features, self.attention.to_k.in_features

    @property
    def dtype(self) -> torch.dtype:
        """The layer's dtype."""
        return self.attention.to_k.weight.dtype

    def processor(self, num_tokens: int, scale: float) -> DecoupledAttnProcessor:
        """A processor with one adapter; its weights are at least float32."""
        processor = DecoupledAttnProcessor(*self.shape, num_tokens=(num_tokens,), scale=scale)
        return processor.to(*self._place())

    def projections(self, image_width: int, num_tokens: int) -> ImageProjections:
        """The image projections of a UNet with this layer, for one adapter."""
        layer = ImageProjection(image_width, self.shape[1], num_tokens)
        return ImageProjections([layer]).to(*self._place())

    def _place(self) -> tuple[torch.device, torch.dtype]:
        return self.attention.to_k.weight.device, torch.promote_types(self.dtype, torch.float32)


def find_sites(unet: UNet2DConditionModel) -> list[Site]:
    """Every cross-attention layer.

    Raises:
        UnsupportedModelError: there is none, one has no plain projections, or they read text of several widths.
    """
    found = [(name, attn) for name, attn in layers_of(unet).items() if is_cross(name, attn)]
    bad = [name for name, attn in found if not isinstance(attn.to_k, nn.Linear) or attn.added_kv_proj_dim is not None]
    widths = {attn.to_k.in_features for _, attn in found if isinstance(attn.to_k, nn.Linear)}
    if not found or bad:
        raise UnsupportedModelError(
            f"unet: got no plain key projection (to_k) in {', '.join(bad) or 'any layer'}, expected cross-attention "
            "layers with linear to_k and to_v"
        )
    if len(widths) > 1:
        raise UnsupportedModelError(f"unet: its layers read text of widths {sorted(widths)}, expected one width")
    return [Site(i, name, attn) for i, (name, attn) in enumerate(found)]
