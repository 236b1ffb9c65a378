# SPDX-License-Identifier: Apache-2.0
"""A small LLaVA of two assets, DINOv2-S and SmolLM2-135M, and the projector that ships with fastprompt.

The projector was trained by ``examples/train_tiny_llava.py`` on OpenMoji drawings; both towers are as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import (
    BatchFeature,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from fastprompt.data import assets
from fastprompt.data.pictures import IMAGE
from fastprompt.errors import CheckpointError
from fastprompt.hf.dinov2_onnx import load_dinov2_small
from fastprompt.hf.images import IMAGENET
from fastprompt.hf.smollm2 import load_smollm2

FOLDER = Path(__file__).parents[1] / "data" / "tiny_llava"
#: Names of the assets that the towers are.
ASSETS = ("dinov2-small", "smollm2-135m")
WEIGHTS, ATTRIBUTION = "projector.safetensors", "ATTRIBUTION.md"
#: Pixels a side of a picture, and tokens that it takes.
IMAGE_SIZE, IMAGE_TOKENS = 112, 64
# A token of source code data sets that no text of ours holds stands for a patch.
_IMAGE_TOKEN = "<empty_output>"

_ATTRIBUTION_TEXT = """\
# Attribution

`projector.safetensors` was trained on drawings of OpenMoji 17.0.0 and derives from them.

All emojis designed by OpenMoji (https://openmoji.org), the open-source emoji and icon project. License: CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/). The weights are shared under the same licence; the code that
made them, `examples/train_tiny_llava.py`, is not derived from OpenMoji and has the licence of this project.

It joins DINOv2 ViT-S/14 (Meta, Apache-2.0) and SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), which are not in this
folder; subcategories of emoji are from emoji-data by Cal Henderson (MIT).
"""


@dataclass(frozen=True)
class TinyLlavaProcessor:
    """Texts with ``<image>``, and pictures, as inputs of the model.

    Args:
        tokenizer: of the language model.
        image_token: its id at every patch.
        image_tokens: patches a picture.
        image_size: pixels a side.
    """

    tokenizer: PreTrainedTokenizerBase
    image_token: int
    image_tokens: int = IMAGE_TOKENS
    image_size: int = IMAGE_SIZE

    def __call__(self, text: str | Sequence[str], images: Sequence[Any] = ()) -> BatchFeature:
        """Return ``input_ids`` and ``attention_mask`` ``[B,T]``, padded on the left, and ``pixel_values`` [N,3,H,W].

        Args:
            text: one or B texts; every ``<image>`` becomes the tokens of one picture.
            images: RGB ``PIL.Image``, in the order of ``<image>`` over all texts.

        Raises:
            ValueError: there are more or fewer pictures than places for them.
        """
        rows = [self.ids(one) for one in ([text] if isinstance(text, str) else text)]
        places = sum(row.count(self.image_token) for row in rows) // self.image_tokens
        if places != len(images):
            raise ValueError(f"images: got {len(images)}, expected {places}, as many as the text has {IMAGE}")
        longest, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        data = {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }
        if images:
            data["pixel_values"] = torch.stack([self.pixels(image) for image in images])
        return BatchFeature(data)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text."""
        pieces = [self.tokenizer(part, add_special_tokens=False).input_ids for part in text.split(IMAGE)]
        picture = [self.image_token] * self.image_tokens
        return [*pieces[0], *(token for piece in pieces[1:] for token in (*picture, *piece))]

    def pixels(self, image: Any) -> Tensor:
        """Return the normalised pixels ``[3,H,W]`` (float32) of a picture, resized to a square, not cropped."""
        import numpy as np

        square = image.convert("RGB")
        if square.size != (self.image_size, self.image_size):
            square = square.resize((self.image_size, self.image_size), resample=3)
        return normalised(torch.from_numpy(np.array(square)).permute(2, 0, 1))


def normalised(pixels: Tensor) -> Tensor:
    """Pixels ``[...,3,H,W]`` of 0 to 255 with ImageNet's mean and standard deviation, which DINOv2 was trained with."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in IMAGENET)
    return (pixels / 255 - mean) / std


def load_tiny_llava(
    folder: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
) -> tuple[LlavaForConditionalGeneration, TinyLlavaProcessor]:
    """Load the small LLaVA (evaluation mode) and its processor; nothing is downloaded.

    Args:
        folder: as ``save_tiny_llava`` writes it; default the one in the package.
        dtype: of the weights in memory.
        cache_dir: folder of all assets; default ``assets.default_cache_dir()``.

    Returns:
        The model, and ``processor(text, images)``.

    Raises:
        AssetError: ``dinov2-small`` or ``smollm2-135m`` is not there; the message holds the command that fetches it.
        CheckpointError: the folder has no whole projector.
        ImportError: ``onnx``, ``gguf`` or ``accelerate`` is not installed.
    """
    built: Any = build_tiny_llava(cache_dir=cache_dir)
    model, processor = built
    source = (FOLDER if folder is None else Path(folder)) / WEIGHTS
    try:
        tensors = safetensors.torch.load_file(source)
        model.model.multi_modal_projector.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"folder: {source} is no whole projector ({error}); expected what save_tiny_llava writes"
        ) from error
    return model.to(dtype), processor


def save_tiny_llava(model: LlavaForConditionalGeneration, folder: str | Path) -> Path:
    """Write the projector (float16) and its attribution; return the folder, which is made if it is not there."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    weights = model.model.multi_modal_projector.state_dict()
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(tensors, target / WEIGHTS)
    (target / ATTRIBUTION).write_text(_ATTRIBUTION_TEXT, encoding="utf-8")
    return target


def build_tiny_llava(
    *, cache_dir: str | Path | None = None
) -> tuple[LlavaForConditionalGeneration, TinyLlavaProcessor]:
    """The two towers in one model, frozen and in float32, with a projector that is drawn from torch's generator."""
    vision = load_dinov2_small(assets.entry("dinov2-small", cache_dir=cache_dir))
    language, tokenizer = load_smollm2(assets.entry("smollm2-135m", cache_dir=cache_dir))
    image_token: Any = tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
    return join_towers(vision, language, image_token), TinyLlavaProcessor(tokenizer, image_token)


def join_towers(vision: PreTrainedModel, language: PreTrainedModel, image_token: int) -> LlavaForConditionalGeneration:
    """Put two models into one LLaVA, whose parts they are from then on; only the projector can be trained.

    Args:
        vision: a backbone whose last hidden states begin with a CLS token.
        language: a causal language model.
        image_token: id of its vocabulary that stands for a patch.
    """
    config = LlavaConfig(
        vision_config=vision.config, text_config=language.config, image_token_index=image_token,
        image_seq_length=IMAGE_TOKENS, vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = vision, language.model, language.lm_head
    model.requires_grad_(False)
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    model.generation_config.pad_token_id = language.config.pad_token_id
    model.generation_config.eos_token_id = language.config.eos_token_id
    return model.eval()
