# SPDX-License-Identifier: Apache-2.0
"""A tiny language model in a folder, with a tokenizer built in code, and texts that it can learn to tell apart."""

import csv
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = {
    "fruit": ("apple", "pear", "plum", "grape", "fig", "lime"),
    "metal": ("iron", "tin", "zinc", "lead", "gold", "brass"),
}
FILLERS = ("the", "a", "some", "one", "and", "of")
VOCABULARY = ["<pad>", "<unk>", ":", "Label", *WORDS, *WORDS["fruit"], *WORDS["metal"], *FILLERS]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


def language_model() -> LlamaForCausalLM:
    """Two layers, random weights large enough that attention is not flat."""
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=len(VOCABULARY), max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(std=p.shape[-1] ** -0.5)
    return model.eval()


def save_model(folder: Path) -> Path:
    """What ``--model`` takes."""
    language_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentence(rng: random.Random, kind: str) -> str:
    words = [rng.choice(FILLERS) for _ in range(rng.randint(1, 6))] + [rng.choice(WORDS[kind]) for _ in range(2)]
    rng.shuffle(words)
    return " ".join(words)


def write_csv(file: Path, count: int = 30) -> Path:
    """``count`` different sentences of each class."""
    rng = random.Random(0)
    rows: dict[str, str] = {}
    for kind in WORDS:
        while sum(label == kind for label in rows.values()) < count:
            rows.setdefault(sentence(rng, kind), kind)
    with open(file, "w", newline="", encoding="utf-8") as target:
        writer = csv.writer(target)
        writer.writerow(["id", "label", "text"])
        writer.writerows((i, label, text) for i, (text, label) in enumerate(rows.items()))
    return file
