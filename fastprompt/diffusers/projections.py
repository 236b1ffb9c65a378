# SPDX-License-Identifier: Apache-2.0
"""Image embeddings to image tokens, once a generation."""

from __future__ import annotations

from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from torch import Tensor, nn

from fastprompt.diffusers.constants import Constants

# The others read more than their argument.
_PURE = (
    ImageProjection, IPAdapterFaceIDImageProjection, IPAdapterFullImageProjection, IPAdapterPlusImageProjection,
)  # fmt: skip


class ImageProjections(MultiIPAdapterImageProjection):
    """Diffusers' projection of every adapter; without gradients, unchanged embeddings give the same tokens object.

    Embeddings with batch 1 stay so, and those expanded over the batch are projected once and expanded again: layers
    then share their keys. The state dict is that of diffusers.

    Args:
        layers: One projection an adapter.

    Example:
        >>> import torch
        >>> from diffusers.models.embeddings import ImageProjection
        >>> from fastprompt.diffusers import ImageProjections
        >>> project = ImageProjections([ImageProjection(16, 24, num_image_text_embeds=4)])
        >>> project([torch.randn(2, 1, 16)])[0].shape
        torch.Size([2, 1, 4, 24])
    """

    def __init__(self, layers):
        super().__init__(layers)
        self.constants = Constants()

    def forward(self, image_embeds: Tensor | list[Tensor]) -> list[Tensor]:
        """Tokens ``[B,images,M,Cc]`` of embeddings ``[B,images,...]`` for every adapter (one tensor: of one image)."""
        layers = self.image_projection_layers
        given = image_embeds if isinstance(image_embeds, list) else [image_embeds]
        if len(given) != len(layers):
            raise ValueError(
                f"image_embeds: got {len(given)} entries, expected {len(layers)}, one for every adapter of this UNet"
            )
        found = []
        for i, (embeds, layer) in enumerate(zip(given, layers, strict=True)):
            images = embeds if isinstance(image_embeds, list) else embeds.unsqueeze(1)
            if isinstance(layer, ImageProjection) and images.shape[2:] != (layer.image_embeds.in_features,):
                raise ValueError(
                    f"image_embeds[{i}]: got shape {list(images.shape)}, expected "
                    f"[B,images,{layer.image_embeds.in_features}], the width of what this adapter reads"
                )
            project = lambda x=images, to=layer: _project(x, to)  # noqa: E731
            pure = isinstance(layer, _PURE)
            found.append(self.constants.get(i, embeds, [layer], (), project) if pure else project())
        return found


def _project(embeds: Tensor, layer: nn.Module) -> Tensor:
    own = embeds[:1] if embeds.stride(0) == 0 else embeds
    tokens = layer(own.flatten(0, 1)).unflatten(0, own.shape[:2])
    return tokens.expand(len(embeds), *[-1] * (tokens.dim() - 1))
