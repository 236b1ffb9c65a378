# SPDX-License-Identifier: Apache-2.0
"""The work of `prefill_compress` by kvpress (https://github.com/NVIDIA/kvpress), in an environment of its own.

kvpress wants an older transformers than fastprompt, so the two are compared through the plain prefill of their runs,
on the same PyTorch:

    python -m venv runs/kvpress && runs/kvpress/bin/pip install torch kvpress
    runs/kvpress/bin/python -m bench.run prefill_kvpress

Providers: `plain`, `observed attention` (H2O's scores, from eager attention as it asks for) and `SnapKV`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bench.case import CannotRun, Case, Provider, Step
from bench.cases.prefill_compress import MODELS, decoder
from bench.measure import too_large


def build(
    device: str, tokens: int = 4096, keep: float = 0.2, layers: int = 0, width: int = 0, vocab: int = 0,
    dtype: str = "bfloat16", kvpress: str = "installed",
) -> Case:  # fmt: skip
    """The case; ``layers``, ``width`` and ``vocab`` make a quick version; ``kvpress`` is for the record."""
    kind, shape = getattr(torch, dtype), MODELS["SmolLM2-135M"][2].sized(layers, width, vocab)
    ids = torch.randint(shape.vocab, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)

    def prefill(chosen: torch.dtype = kind, press: str | None = None, attention: str = "sdpa") -> Step:
        lm: Any = decoder(device, chosen, "SmolLM2-135M", shape, tokens)
        lm.set_attn_implementation(attention)
        hooks = _press(press, 1 - keep) if press else None

        def run() -> list[Tensor]:
            cache = DynamicCache(config=lm.config)
            with torch.no_grad():
                if hooks is None:
                    return [lm(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits]
                with hooks(lm):
                    return [lm(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits]

        return run

    def provider(press: str | None = None, attention: str = "sdpa", why_not: str | None = None) -> Provider:
        step = lambda: prefill(press=press, attention=attention)  # noqa: E731
        return Provider(step, lambda: step()(), why_not, tokens=tokens)

    matrix = shape.heads * tokens**2 * (2 * kind.itemsize + 4)
    providers = {
        "plain": provider(),
        "observed attention": provider("ObservedAttentionPress", "eager", too_large(matrix, device)),
        "SnapKV": provider("SnapKVPress"),
    }
    params = {"tokens": tokens, "keep": keep, "layers": shape.layers, "width": shape.width, "vocab": shape.vocab,
              "dtype": dtype}  # fmt: skip
    params["kvpress"] = _version()
    bound = 8 * shape.layers**0.5 * torch.finfo(kind).eps
    return Case("prefill_kvpress", providers, "plain", lambda: prefill(torch.float32)(), bound, params)


def _press(name: str, ratio: float) -> Callable[[Any], Any]:
    try:
        import kvpress
    except ImportError as error:
        raise CannotRun("kvpress is not installed here; it has an environment of its own") from error
    return getattr(kvpress, name)(compression_ratio=ratio)


def _version() -> str:
    try:
        return version("kvpress")
    except PackageNotFoundError:
        return "absent"
