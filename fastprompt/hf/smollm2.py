# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct from the GGUF file of the ``smollm2-135m`` asset, offline."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastprompt.data import assets


def load_smollm2(
    path: str | Path | None = None, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the real SmolLM2-135M-Instruct (Llama architecture, evaluation mode) and its tokenizer.

    The file holds four bits a weight; they are dequantised, as gradients flow through them.

    Args:
        path: the GGUF file; default that of the ``smollm2-135m`` asset.
        dtype: of the weights in memory.

    Returns:
        ``LlamaForCausalLM`` (30 layers, width 576, 9 query heads, 3 key heads) and the tokenizer.

    Raises:
        AssetError: the asset is not there.
        ImportError: ``gguf`` or ``accelerate`` is not installed.
    """
    file = assets.entry("smollm2-135m") if path is None else Path(path)
    try:
        import accelerate  # noqa: F401  transformers reads GGUF files through both, and asks for one at a time
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError(f'reading {file.name} needs gguf and accelerate: pip install "fastprompt[demo]"') from error
    options = {"gguf_file": file.name, "local_files_only": True}
    dequantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, quantization_config=dequantised, dtype=dtype, **options)
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, **options)
