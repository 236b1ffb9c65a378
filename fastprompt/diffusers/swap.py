# SPDX-License-Identifier: Apache-2.0
"""Attention processors of a UNet put in the place of others, and taken out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffusers.models.attention_processor import Attention

from fastprompt.diffusers.constants import Constants
from fastprompt.diffusers.projections import ImageProjections

PROJECTION = "encoder_hid_proj"


class Swap:
    """Processors of some layers of a UNet, and its image projections, until `undo`.

    Args:
        unet: The model.
        processors: The new processor of each layer.
        projections: The new image projections, or None for those there are.
    """

    def __init__(self, unet: Any, processors: Mapping[Attention, Any], projections: ImageProjections | None):
        self._unet, self.processors = unet, dict(processors)
        self._old = {attn: attn.processor for attn in processors}
        self._projections, self._projection = projections, getattr(unet, PROJECTION, None)
        self._kind = unet.config.encoder_hid_dim_type
        for attn, processor in processors.items():
            attn.set_processor(processor)
        if projections is not None:
            setattr(unet, PROJECTION, projections)
            # As diffusers marks a UNet with adapters.
            unet.config.encoder_hid_dim_type = "ip_image_proj"

    def undo(self) -> None:
        """Put back what was there, except where somebody has put something else since."""
        for attn, processor in self._old.items():
            if attn.processor is self.processors[attn]:
                # Diffusers' own setter logs that weights are lost.
                delattr(attn, "processor")
                attn.processor = processor
        if self._projections is not None and getattr(self._unet, PROJECTION) is self._projections:
            delattr(self._unet, PROJECTION)
            setattr(self._unet, PROJECTION, self._projection)
            self._unet.config.encoder_hid_dim_type = self._kind

    def constants(self) -> Iterator[Constants]:
        """What all of them keep."""
        for module in (*self.processors.values(), self._projections):
            if module is not None:
                yield module.constants


def layers_of(unet: Any) -> dict[str, Attention]:
    """Every attention layer by name, in the order of ``unet.attn_processors``, without those of image projections."""
    modules = dict(unet.named_modules())
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return {name: modules[name] for name in names if not name.startswith(PROJECTION)}


def is_cross(name: str, attn: Attention) -> bool:
    """A layer that reads text, as diffusers chooses those that an adapter extends."""
    return attn.is_cross_attention and not name.endswith("attn1") and "motion_modules" not in name
