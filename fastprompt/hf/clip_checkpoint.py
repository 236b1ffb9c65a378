# SPDX-License-Identifier: Apache-2.0
"""Saved CLIP classifiers: the two files of `fastprompt.hf.checkpoint`, with class names and both fingerprints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.errors import CheckpointError
from fastprompt.hf import checkpoint
from fastprompt.hf.sites import find_towers


def save(classifier: Any, directory: Path) -> None:
    """Write both files of a `CLIPClassifier`."""
    content = {
        "method": type(classifier.recipe).__name__,
        "config": asdict(classifier.recipe),
        "tower": "clip",
        "train": [],
        "classnames": list(classifier.classnames),
        "base": describe(classifier.clip),
    }
    checkpoint.write(directory, content, dict(classifier.learner.named_parameters()))


def describe(clip: Any) -> dict[str, Any]:
    """What identifies a CLIP: the shape of its text tower, and a few weights of every layer of both towers."""
    weights = {}
    for tower in find_towers(clip):
        attention: Any
        for index, attention in enumerate(tower.attentions):
            weights[f"{tower.kind}.{index}"] = checkpoint.sample(attention.k_proj.weight)
    config = clip.config.text_config
    return {
        "class": type(clip).__name__,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "kv_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "weights": weights,
    }


def read(directory: Path, recipes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files, verified, of one of the ``recipes``.

    Raises:
        CheckpointError: missing, truncated or changed files, or those of something else than a CLIP classifier.
    """
    content, tensors = checkpoint.read(directory)
    if content["method"] not in recipes or content["tower"] != "clip":
        raise CheckpointError(
            f"method: got {content['method']!r} on the {content['tower']} tower, expected one of {', '.join(recipes)}; "
            "prompts of a handle are loaded with fastprompt.load(model, directory)"
        )
    names = content.get("classnames")
    if not isinstance(names, list) or not names or any(not isinstance(n, str) for n in names):
        raise CheckpointError(f"{directory / checkpoint.CONFIG}: got classnames {names!r}, expected a list of names")
    return content, tensors


def check_base(content: dict[str, Any], clip: Any) -> None:
    """Raise CheckpointError unless ``clip`` is the model that the prompts were trained on."""
    checkpoint.compare_base(content["base"], describe(clip))


def fill(learner: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put saved tensors into the learner's parameters, whose names and shapes they must have."""
    parameters = dict(learner.named_parameters())
    checkpoint.check_tensors(tensors, parameters, type(learner).__name__)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
