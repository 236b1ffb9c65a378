# SPDX-License-Identifier: Apache-2.0
"""A pipeline's attention processors replaced by ours."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
)
from diffusers.models.embeddings import MultiIPAdapterImageProjection

from fastprompt.diffusers.processors import DecoupledAttnProcessor, PromptAttnProcessor
from fastprompt.diffusers.projections import ImageProjections
from fastprompt.diffusers.swap import PROJECTION, Swap, is_cross, layers_of
from fastprompt.errors import AttachError, UnsupportedModelError

# Subclasses may do something else, and the processors of before PyTorch 2 widen half precision where a layer says so.
_ADAPTERS = IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor


def accelerate(unet: Any) -> Acceleration:
    """Replace a UNet's cross-attention processors, in place: the same images, without the repeated work.

    The processors that ``pipeline.load_ip_adapter`` put there become `DecoupledAttnProcessor`, with their weights and
    scales; plain ones become `PromptAttnProcessor` without prompts. Both compute keys and values of text and image
    tokens once a generation, and the image projections run once. ``pipeline.set_ip_adapter_scale`` goes on working.

    Args:
        unet: ``pipeline.unet``.

    Returns:
        An `Acceleration`, also a context manager that takes the processors out again.

    Raises:
        AttachError: its processors are already ours.
        UnsupportedModelError: none of its cross-attention layers has a processor that ours can stand in for.

    Example:
        >>> import torch, fastprompt.diffusers
        >>> from diffusers import UNet2DConditionModel
        >>> unet = UNet2DConditionModel(
        ...     sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        ...     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=24,
        ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ... )
        >>> with torch.no_grad(), fastprompt.diffusers.accelerate(unet) as fast:
        ...     fast.layers, unet(torch.randn(2, 4, 8, 8), 10, torch.randn(2, 7, 24)).sample.shape
        (4, torch.Size([2, 4, 8, 8]))
    """
    if not hasattr(unet, "attn_processors"):
        raise TypeError(f"unet: got {type(unet).__name__}, expected a diffusers UNet such as pipeline.unet")
    layers = {name: attn for name, attn in layers_of(unet).items() if is_cross(name, attn)}
    new: dict = {}
    for attn in layers.values():
        processor = attn.processor
        if isinstance(processor, (DecoupledAttnProcessor, PromptAttnProcessor)):
            raise AttachError("unet: its attention processors are already fastprompt's; detach them first")
        if type(processor) in _ADAPTERS:
            new[attn] = DecoupledAttnProcessor.sharing(processor)
        elif type(processor) is AttnProcessor2_0:
            new[attn] = PromptAttnProcessor()
    if not new:
        found = sorted({type(attn.processor).__name__ for attn in layers.values()})
        raise UnsupportedModelError(
            f"unet: got cross-attention processors {', '.join(found) or 'none'}, expected those of an IP-Adapter or "
            "diffusers' plain ones"
        )
    projection: Any = getattr(unet, PROJECTION, None)
    plain = type(projection) is MultiIPAdapterImageProjection
    return Acceleration(Swap(unet, new, ImageProjections(projection.image_projection_layers) if plain else None))


class Acceleration:
    """Our processors in a UNet, until `detach`.

    Attributes:
        layers: How many layers have one.
    """

    def __init__(self, swap: Swap):
        self._swap = swap
        self.layers = len(swap.processors)

    def clear(self) -> None:
        """Forget kept keys and values: needed only after writes that PyTorch does not count, through ``x.data``."""
        for constants in self._swap.constants():
            constants.clear()

    def detach(self) -> None:
        """Put the processors back that were there."""
        self._swap.undo()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *exc) -> None:
        self.detach()
