# SPDX-License-Identifier: Apache-2.0
"""CLIP's tokenizer from the byte-pair vocabulary of the ``clip-bpe`` asset, offline."""

import gzip
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from fastprompt.data import assets
from fastprompt.errors import AssetError

START, END = "<|startoftext|>", "<|endoftext|>"
# 256 bytes, the same at the end of a word, and the two tokens above; the merges are the rest.
_VOCABULARY = 49408
_MERGES = _VOCABULARY - 2 * 256 - 2


def load_clip_tokenizer(path: str | Path | None = None) -> CLIPTokenizer:
    """Build the tokenizer of OpenAI's CLIP models (49,408 tokens, at most 77 in a text).

    Radford et al., 2021 (https://arxiv.org/abs/2103.00020).

    Args:
        path: ``bpe_simple_vocab_16e6.txt.gz``; default that of the ``clip-bpe`` asset.

    Raises:
        AssetError: the asset is not there, or the file holds too few merges.
    """
    file = assets.entry("clip-bpe") if path is None else Path(path)
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        # The first line is a comment; the file holds more merges than CLIP uses.
        # transformers annotates strings, and takes pairs.
        merges: Any = [tuple(line.split()) for line in lines.read().split("\n")[1 : 1 + _MERGES]]
    if len(merges) < _MERGES or any(len(merge) != 2 for merge in merges):
        raise AssetError(f"{file}: got {len(merges)} merges, expected {_MERGES} pairs; fetch the clip-bpe asset again")
    letters = _byte_letters()
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *map("".join, merges),
        START,
        END,
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in CLIP's order: bytes that print as themselves first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + index) for index in range(256 - len(printable)))]
