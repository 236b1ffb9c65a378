# SPDX-License-Identifier: Apache-2.0
"""Recipes by name, and loading saved prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastprompt.errors import CheckpointError
from fastprompt.recipes import (
    apt,
    cocoop,
    compression,
    coop,
    dpl,
    ip_adapter,
    ivlp,
    maple,
    multi_lane,
    prefix_kv,
    vpt,
    zero_shot,
)
from fastprompt.recipes.card import Card

#: Every recipe and its card.
CARDS: dict[type, Card] = {
    vpt.VPT: vpt.CARD,
    prefix_kv.PrefixKV: prefix_kv.CARD,
    apt.APT: apt.CARD,
    coop.CoOp: coop.CARD,
    cocoop.CoCoOp: cocoop.CARD,
    maple.MaPLe: maple.CARD,
    ivlp.IVLP: ivlp.CARD,
    dpl.DPL: dpl.CARD,
    zero_shot.ZeroShot: zero_shot.CARD,
    multi_lane.MultiLane: multi_lane.CARD,
    ip_adapter.IPAdapter: ip_adapter.CARD,
    **compression.CARDS,
}

#: Every recipe of a handle, by the name that saved files carry; those of DPL's vision prompts alone are among them.
RECIPES: dict[str, Any] = {r.__name__: r for r, card in CARDS.items() if card.use == "attach" or r is dpl.DPL}

#: Every recipe of a `CLIPClassifier`.
CLIP_RECIPES: dict[str, Any] = {r.__name__: r for r, card in CARDS.items() if card.use == "classifier"}

#: Every recipe of a diffusers UNet.
UNET_RECIPES: dict[str, Any] = {r.__name__: r for r, card in CARDS.items() if card.use == "diffusers"}

#: Every recipe of `TaskPathways`.
PATHWAY_RECIPES: dict[str, Any] = {r.__name__: r for r, card in CARDS.items() if card.use == "pathways"}


def load(model: Any, directory: str | Path) -> Any:
    """Attach prompts that ``handle.save(directory)`` wrote; on any mismatch the model stays as it was.

    Args:
        model: The base model they were trained on (same weights; another float dtype is fine), a diffusers UNet for
            an image adapter.
        directory: Holds ``prompt_config.json`` and ``prompts.safetensors``.

    Returns:
        The `Handle`, with parameters trained under ``train=`` put into the model (``detach`` takes them out).

    Raises:
        CheckpointError: missing, truncated or changed file; unknown recipe; another base model; other shapes.

    Example:
        >>> import tempfile, torch, fastprompt
        >>> from transformers import ViTConfig, ViTModel
        >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                            intermediate_size=64, image_size=32, patch_size=16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with fastprompt.attach(model, fastprompt.VPT(length=4)) as handle:
        ...         handle.save(folder)
        ...     fastprompt.load(model, folder).num_trainable
        256
    """
    from fastprompt import diffusers
    from fastprompt.hf.attach import attach
    from fastprompt.hf.checkpoint import check_base, check_tensors, read

    content, tensors = read(Path(directory))
    recipe = RECIPES.get(content["method"])
    if content["tower"] == "clip":
        raise CheckpointError(
            f"method: got {content['method']!r}, expected prompts of a handle; load a classifier with "
            "fastprompt.CLIPClassifier.load(clip, tokenizer, directory)"
        )
    if content["method"] in UNET_RECIPES:
        return diffusers.restore(model, UNET_RECIPES[content["method"]], content, tensors)
    if content["method"] in PATHWAY_RECIPES:
        raise CheckpointError(
            f"method: got {content['method']!r}, expected prompts of a handle; load pathways with "
            "fastprompt.TaskPathways.load(model, directory)"
        )
    if recipe is None:
        raise CheckpointError(
            f"method: got {content['method']!r}, expected one of {', '.join([*RECIPES, *UNET_RECIPES])}"
        )
    try:
        config = recipe(**content["config"])
        with torch.random.fork_rng([]):  # the initial prompts are drawn, and then replaced
            handle = attach(model, config, tower=content["tower"], train=content["train"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"model: the saved prompts do not fit {type(model).__name__}: {error}") from error
    try:
        check_base(content, handle)
        check_tensors(tensors, dict(handle.named_parameters()), type(model).__name__)
        with torch.no_grad():
            for name, parameter in handle.named_parameters():
                parameter.copy_(tensors[name])
    except BaseException:
        handle.detach()
        raise
    return handle
