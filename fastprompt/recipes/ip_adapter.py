# SPDX-License-Identifier: Apache-2.0
"""IP-Adapter: an image prompt for a text-to-image model, in a softmax of its own beside the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastprompt.recipes.card import Card
from fastprompt.recipes.layers import is_count

if TYPE_CHECKING:
    from fastprompt.diffusers.processors import DecoupledAttnProcessor
    from fastprompt.diffusers.projections import ImageProjections
    from fastprompt.diffusers.sites import Site


@dataclass(frozen=True)
class IPAdapter:
    """IP-Adapter (Ye et al., 2023, https://arxiv.org/abs/2308.06721): in every cross-attention layer of a UNet, queries
    also attend to M image tokens, in a second softmax that is added: ``out = text + scale * softmax(s q k_i^T) v_i``.

    Image tokens are a linear map and a LayerNorm of one image embedding; keys and values of them start as copies of the
    frozen layer's own projections. Those projections and the map learn, nothing else.

    Args:
        num_tokens: Image tokens M >= 1.
        image_width: Width of the image embedding (the paper: 1024, of CLIP ViT-H/14).
        scale: Weight of the image branch, while training and after; 0 leaves it out, bit for bit.

    Example:
        >>> import torch, fastprompt.diffusers
        >>> from diffusers import UNet2DConditionModel
        >>> from fastprompt.recipes.ip_adapter import IPAdapter
        >>> unet = UNet2DConditionModel(
        ...     sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        ...     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=24,
        ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ... )
        >>> images = {"image_embeds": [torch.randn(2, 1, 16)]}
        >>> with fastprompt.diffusers.attach(unet, IPAdapter(image_width=16)) as handle:
        ...     noise = unet(torch.randn(2, 4, 8, 8), 10, torch.randn(2, 7, 24), added_cond_kwargs=images).sample
        >>> noise.shape, handle.num_trainable
        (torch.Size([2, 4, 8, 8]), 9360)
    """

    num_tokens: int = 4
    image_width: int = 1024
    scale: float = 1.0

    kind = "unet"

    def __post_init__(self):
        for name in ("num_tokens", "image_width"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected an integer >= 1")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"scale: got {self.scale!r}, expected a finite number")

    def build(self, sites: Sequence[Site]) -> tuple[ImageProjections, list[DecoupledAttnProcessor]]:
        """The image projections of a UNet, and one processor for every cross-attention layer."""
        processors = []
        for site in sites:
            processor = site.processor(self.num_tokens, self.scale)
            with torch.no_grad():
                processor.to_k_ip[0].weight.copy_(site.attention.to_k.weight)
                processor.to_v_ip[0].weight.copy_(site.attention.to_v.weight)
            processors.append(processor)
        return sites[0].projections(self.image_width, self.num_tokens), processors


CARD = Card(
    title="IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models",
    paper="https://arxiv.org/abs/2308.06721",
    row=21,
    tier=3,
    family="cross-attention",
    use="diffusers",
    status="exact",
    headline="22M parameters, comparable to or better than a fully fine-tuned image prompt model",
    repo="tencent-ailab/IP-Adapter",
    trains=("projection.*", "layers.*.to_k_ip.*", "layers.*.to_v_ip.*"),
    identity={"scale": 0.0},
    deviations=(
        "The base variant trains; Plus (a resampler of patch features) loads from files and runs.",
        "FaceID files take diffusers' own loader first, which needs peft for them; no test has one.",
        "Dropping the image, the text or both (0.05 each in the paper) is left to the training loop.",
    ),
    needs=("diffusers",),
)
