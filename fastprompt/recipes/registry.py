# SPDX-License-Identifier: Apache-2.0
"""Recipes by name, and loading saved prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastprompt.errors import CheckpointError
from fastprompt.recipes.apt import APT
from fastprompt.recipes.cocoop import CoCoOp
from fastprompt.recipes.coop import CoOp
from fastprompt.recipes.ivlp import IVLP
from fastprompt.recipes.maple import MaPLe
from fastprompt.recipes.multi_lane import MultiLane
from fastprompt.recipes.prefix_kv import PrefixKV
from fastprompt.recipes.vpt import VPT
from fastprompt.recipes.zero_shot import ZeroShot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastprompt.hf.attach import Handle

#: Every recipe by the name that saved files carry.
RECIPES = {recipe.__name__: recipe for recipe in (VPT, PrefixKV, APT)}

#: Every recipe of a `CLIPClassifier`.
CLIP_RECIPES = {recipe.__name__: recipe for recipe in (CoOp, CoCoOp, MaPLe, IVLP, ZeroShot)}

#: Every recipe of `TaskPathways`.
PATHWAY_RECIPES = {recipe.__name__: recipe for recipe in (MultiLane,)}


def load(model: PreTrainedModel, directory: str | Path) -> Handle:
    """Attach prompts that ``handle.save(directory)`` wrote; on any mismatch the model stays as it was.

    Args:
        model: The base model they were trained on (same weights; another float dtype is fine).
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
    from fastprompt.hf.attach import attach
    from fastprompt.hf.checkpoint import check_base, check_tensors, read

    content, tensors = read(Path(directory))
    recipe = RECIPES.get(content["method"])
    if content["method"] in CLIP_RECIPES:
        raise CheckpointError(
            f"method: got {content['method']!r}, expected prompts of a handle; load a classifier with "
            "fastprompt.CLIPClassifier.load(clip, tokenizer, directory)"
        )
    if content["method"] in PATHWAY_RECIPES:
        raise CheckpointError(
            f"method: got {content['method']!r}, expected prompts of a handle; load pathways with "
            "fastprompt.TaskPathways.load(model, directory)"
        )
    if recipe is None:
        raise CheckpointError(f"method: got {content['method']!r}, expected one of {', '.join(RECIPES)}")
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
