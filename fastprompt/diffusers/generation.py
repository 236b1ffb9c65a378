# SPDX-License-Identifier: Apache-2.0
"""Pictures from a saved pipeline, an adapter and an image prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection

from fastprompt.diffusers.processors import DecoupledAttnProcessor
from fastprompt.diffusers.projections import ImageProjections
from fastprompt.diffusers.swap import PROJECTION
from fastprompt.errors import AttachError, CheckpointError

if TYPE_CHECKING:
    from PIL.Image import Image

_ENCODER, _EXTRACTOR = "image_encoder", "feature_extractor"


def load_pipeline(
    directory: str | Path,
    *,
    image_encoder: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Any:
    """A text-to-image pipeline that can take image prompts, from local files alone.

    Args:
        directory: What ``pipeline.save_pretrained`` wrote, with a UNet.
        image_encoder: A folder of the ``CLIPVisionModelWithProjection`` that the adapter to come was trained with,
            where the pipeline's folder holds none.
        dtype: Of the pipeline.
        device: Where it goes.

    Raises:
        FileNotFoundError: there is no pipeline in the folder.
        ValueError: no UNet, or no image encoder.
    """
    directory = Path(directory)
    if not (directory / "model_index.json").is_file():
        raise FileNotFoundError(
            f"pipeline: no {directory / 'model_index.json'}, expected a folder that pipeline.save_pretrained wrote"
        )
    # What it holds is its class's business.
    pipeline: Any = DiffusionPipeline.from_pretrained(directory, dtype=dtype, local_files_only=True)
    if not hasattr(pipeline, "unet") or not hasattr(pipeline, _ENCODER):
        raise ValueError(f"pipeline: got {type(pipeline).__name__}, expected one with a UNet that takes image prompts")
    _add_image_encoder(pipeline, image_encoder, dtype)
    return pipeline.to(device)


def _add_image_encoder(pipeline: Any, folder: str | Path | None, dtype: torch.dtype) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    if folder is not None:
        encoder = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=dtype, local_files_only=True)
        pipeline.register_modules(**{_ENCODER: encoder})
    elif getattr(pipeline, _ENCODER) is None:
        raise ValueError(
            "image_encoder: the pipeline's folder holds none; name the folder of the CLIP vision model with projection "
            "that the adapter was trained with"
        )
    if getattr(pipeline, _EXTRACTOR) is None:
        size = pipeline.image_encoder.config.image_size
        extractor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        pipeline.register_modules(**{_EXTRACTOR: extractor})


def _check_encoder(pipeline: Any) -> None:
    """The image encoder gives embeddings of the width that the adapter reads."""
    projections, config = getattr(pipeline.unet, PROJECTION), pipeline.image_encoder.config
    if not isinstance(projections, ImageProjections):
        raise AttachError("pipeline: its UNet has no image adapter of ours; call load_ip_adapter(pipeline.unet, file)")
    layer = projections.image_projection_layers[0]
    if isinstance(layer, ImageProjection):
        width, got = layer.image_embeds.in_features, config.projection_dim
    elif isinstance(layer, IPAdapterPlusImageProjection):
        width, got = layer.proj_in.in_features, config.hidden_size
    else:
        return
    if width != got:
        raise CheckpointError(
            f"image_encoder: gives embeddings of width {got}, but the adapter reads width {width}; use the image "
            "encoder it was trained with"
        )


def generate(
    pipeline: Any, prompt: str, images: Sequence[Image], *,
    negative_prompt: str | None = None, scale: float | None = None, steps: int = 30, guidance: float = 7.5,
    size: tuple[int, int] | None = None, count: int = 1, seed: int = 0,
) -> list[Image]:  # fmt: skip
    """``count`` pictures of a prompt and one or several image prompts, the same for the same seed.

    Args:
        pipeline: With an image encoder (see `load_pipeline`), and an adapter in its UNet (see `load_ip_adapter`).
        prompt: The text.
        images: The image prompts; their tokens share one softmax.
        negative_prompt: What to keep away from, under guidance.
        scale: Weight of the image; None leaves that of the adapter.
        steps: Denoising steps.
        guidance: Weight of classifier-free guidance; 1 is none.
        size: Height and width in pixels; None is the model's.
        count: Pictures.
        seed: Of the noise, drawn on the CPU, so that every device draws the same.

    Raises:
        AttachError: the UNet has no adapter.
        CheckpointError: the adapter was trained with another image encoder.
    """
    _check_encoder(pipeline)
    if scale is not None:
        for processor in pipeline.unet.attn_processors.values():
            if isinstance(processor, DecoupledAttnProcessor):
                processor.scale[:] = [scale] * len(processor.scale)
    height, width = size or (None, None)
    return pipeline(
        prompt, negative_prompt=negative_prompt, ip_adapter_image=[list(images)], num_inference_steps=steps,
        guidance_scale=guidance, height=height, width=width, num_images_per_prompt=count,
        generator=torch.Generator("cpu").manual_seed(seed),
    ).images  # fmt: skip
