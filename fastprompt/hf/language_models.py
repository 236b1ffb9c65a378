# SPDX-License-Identifier: Apache-2.0
"""Causal language models by name: SmolLM2-135M of the assets, or a local folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fastprompt.data import assets
from fastprompt.hf.smollm2 import load_smollm2

SMOLLM2 = "smollm2-135m"


def load_language_model(
    model: str, *, dtype: torch.dtype = torch.float32, cache_dir: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, and its tokenizer; nothing is downloaded.

    Args:
        model: ``"smollm2-135m"`` (an asset), or a local folder that ``save_pretrained`` has written.
        dtype: Of the weights in memory.
        cache_dir: Where assets are; None is the default cache.

    Raises:
        AssetError: the asset is not there.
        FileNotFoundError: no such folder.
    """
    if model == SMOLLM2:
        return load_smollm2(assets.entry(SMOLLM2, cache_dir=cache_dir), dtype=dtype)
    if not Path(model, "config.json").is_file():
        raise FileNotFoundError(
            f"model: got {model!r}, expected {SMOLLM2!r} or a local folder with a config.json and a tokenizer as "
            "save_pretrained writes them"
        )
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True).eval(), tokenizer
