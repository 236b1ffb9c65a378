# SPDX-License-Identifier: Apache-2.0
"""The small CLIP that ships with fastprompt: made by ``examples/pretrain_openmoji_clip.py`` from OpenMoji drawings."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from fastprompt.data import assets
from fastprompt.errors import CheckpointError
from fastprompt.hf.clip_tokenizer import load_clip_tokenizer

FOLDER = Path(__file__).parents[1] / "data" / "openmoji_clip"
CONFIG, WEIGHTS, ATTRIBUTION = "config.json", "model.safetensors", "ATTRIBUTION.md"
ROWS, EMBEDDING = "token_rows", "text_model.embeddings.token_embedding.weight"
_VOCABULARY, _START, _END = 49408, 49406, 49407

_ATTRIBUTION_TEXT = """\
# Attribution

`model.safetensors` was trained on drawings of OpenMoji 17.0.0 and derives from them.

All emojis designed by OpenMoji (https://openmoji.org), the open-source emoji and icon project. License: CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/). The weights are shared under the same licence; the code that
made them, `examples/pretrain_openmoji_clip.py`, is not derived from OpenMoji and has the licence of this project.

Names and categories are from emoji-data by Cal Henderson (MIT); the tokenizer is that of CLIP (OpenAI, MIT), and its
vocabulary is not in this folder.
"""


def load_openmoji_clip(
    folder: str | Path | None = None, *, cache_dir: str | Path | None = None
) -> tuple[CLIPModel, CLIPTokenizer]:
    """Load the shipped CLIP (float32, evaluation mode) and CLIP's tokenizer, which is the ``clip-bpe`` asset.

    Only token rows that pretraining saw are stored; the others are zero, so that a token that it never saw adds
    nothing but its position.

    Args:
        folder: as ``save_openmoji_clip`` writes it; default the one in the package.
        cache_dir: folder of all assets; default ``assets.default_cache_dir()``.

    Returns:
        The model, for drawings ``[B,3,64,64]`` prepared with CLIP's mean and standard deviation, and the tokenizer.

    Raises:
        CheckpointError: the folder is not whole.
        AssetError: the ``clip-bpe`` asset is not there; the message holds the command that fetches it.
    """
    source = FOLDER if folder is None else Path(folder)
    try:
        config = CLIPConfig.from_json_file(source / CONFIG)
        tensors = safetensors.torch.load_file(source / WEIGHTS)
        rows, stored = tensors.pop(ROWS).long(), tensors[EMBEDDING]
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"folder: {source} has no whole model ({error}); expected {CONFIG} and {WEIGHTS}, "
            "as save_openmoji_clip writes them"
        ) from error
    embedding = torch.zeros(_VOCABULARY, stored.shape[1])
    embedding[rows] = stored.float()
    model = CLIPModel(config)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()} | {EMBEDDING: embedding})
    return model.eval(), load_clip_tokenizer(assets.entry("clip-bpe", cache_dir=cache_dir))


def save_openmoji_clip(model: CLIPModel, rows: Tensor, folder: str | Path) -> Path:
    """Write configuration, weights (float16) and attribution of a CLIP that was trained with few token rows.

    Args:
        model: its vocabulary is ``rows``.
        rows: int64 ``[R]``, ascending ids of CLIP's vocabulary; the last two are the start and the end of text.
        folder: made if it is not there.

    Returns:
        The folder.

    Raises:
        ValueError: ``rows`` does not fit the model or does not end with start and end.
    """
    weights = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    if len(rows) != len(weights[EMBEDDING]) or rows[-2:].tolist() != [_START, _END]:
        raise ValueError(
            f"rows: got {len(rows)} ids that end with {rows[-2:].tolist()}, expected {len(weights[EMBEDDING])}, as in "
            f"the model, that end with {[_START, _END]}"
        )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    settings = model.config.to_dict()
    tokens = {"vocab_size": _VOCABULARY, "bos_token_id": _START, "eos_token_id": _END, "pad_token_id": _END}
    settings["text_config"] |= tokens
    CLIPConfig.from_dict(settings | {"architectures": ["CLIPModel"]}).to_json_file(target / CONFIG)
    safetensors.torch.save_file(weights | {ROWS: rows.int()}, target / WEIGHTS)
    (target / ATTRIBUTION).write_text(_ATTRIBUTION_TEXT, encoding="utf-8")
    return target
