# SPDX-License-Identifier: Apache-2.0
"""The attention function that transformers calls: prompts inside attention, the model's own keys untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from fastprompt.cache import Blocks
from fastprompt.errors import UnsupportedModelError
from fastprompt.ops import merge_states, prompt_attention
from fastprompt.ops.dispatch import backend, calls_cpp

#: The registered name; without "sdpa", "flash" or "/", which transformers gives a meaning.
NAME = "fastprompt"

#: The child module that carries a layer's prompt, on its attention module.
CHILD = "fastprompt"

#: The attribute that carries a compressing cache's layer, on the key tensor that it returns.
LAYER = "fastprompt_layer"

#: What a model may pass that changes the result, and that prompts inside attention do not know.
CHANGES = ("softcap", "s_aux", "position_bias", "cache")

_observers: list[Callable] = []


class CacheLayer(Protocol):
    """What attention asks of a layer of a compressing cache, and tells it."""

    @property
    def blocks(self) -> Blocks | None:
        """Keys that the layer holds apart from those that it returned; every query sees those of its head."""

    @property
    def compressed(self) -> bool:
        """Whether it holds fewer keys than it has seen; until then generation is the plain model's, bit for bit."""

    @property
    def wanted(self) -> int | None:
        """How many of the last queries, with their log-sum-exp, the layer reads; None for all."""

    def mask(self, query: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """The mask over the keys that the layer holds, which the model does not know."""

    def attended(self, query: Tensor | None = None, lse: Tensor | None = None, scale: float | None = None) -> None:
        """Attention over the layer's keys ran."""


def register() -> None:
    """Register the attention function with its mask function; one without the other drops every mask silently."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def observe(observer: Callable[[nn.Module, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``observer(module, query, key, value)`` at every attention call inside the context."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer as transformers calls it; a module without prompts runs PyTorch's own attention.

    Args:
        module: The attention module; its child `CHILD`, if any, gives this layer's prompt keys and values.
        query: ``[B,Hq,Tq,D]``.
        key: ``[B,Hkv,Tk,D]``, rotated, from the cache; a compressing cache hands its layer over with it.
        value: ``[B,Hkv,Tk,D]``.
        attention_mask: bool or additive ``[B,1,Tq,Tk]`` over instance keys, or None.
        dropout: Must be 0 where prompts are.
        scaling: Softmax scale.
        is_causal: Beats ``module.is_causal``; as in transformers, an explicit mask beats both.
        **kwargs: What else the model passes, e.g. ``output_attentions``; only PyTorch's own attention reads it.

    Returns:
        ``([B,Tq,Hq,D], None)``.

    Raises:
        UnsupportedModelError: the model passes something else that changes attention (`CHANGES`).
    """
    unknown = [name for name in CHANGES if kwargs.get(name) is not None]
    if unknown:
        raise UnsupportedModelError(
            f"model: {type(module).__name__} passes {', '.join(unknown)} to attention, which {NAME!r} does not compute"
        )
    for observer in _observers:
        observer(module, query, key, value)
    layer = _claim(key)
    if layer is not None:
        attention_mask = layer.mask(query, attention_mask)
    child: Any = getattr(module, CHILD, None)
    lanes = getattr(child, "lanes", None)
    if lanes is not None:
        return lanes.attend(query, key, value, scaling), None
    prompt = None if child is None else child.key_value()
    split = getattr(child, "split", None)
    wanted, blocks = (0, None) if layer is None else (layer.wanted, layer.blocks)
    if prompt is None and split is None and wanted is not None and blocks is None:
        if layer is not None and layer.compressed and _decodes(query, key, value):
            step, level = _decode(query, key, value, attention_mask, scaling)
            layer.attended(query, level, scaling)
            return step.transpose(1, 2), None
        found = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        if layer is not None:
            layer.attended(*_last(query, key, attention_mask, scaling, wanted), scaling)
        return found
    if dropout:
        raise ValueError(
            f"dropout: got {dropout} at an attention module with prompts or a compressing cache, expected 0.0; call "
            "model.eval(), or set the attention dropout of the model's config to 0 before the model is built or loaded"
        )
    if split is not None:
        if attention_mask is not None:
            raise UnsupportedModelError(
                f"model: {type(module).__name__} masks keys, which decoupled prompts do not take; expected no mask"
            )
        out, lse = split.attend(query, key, value, prompt, child.length, scaling), None
    elif blocks is not None and prompt is None and attention_mask is None:
        # One new token for every sample, the usual step.
        out, lse = blocks.attend(query, scaling, key, value)
    else:
        out, lse = _attend(module, query, key, value, attention_mask, scaling, is_causal, prompt)
        if blocks is not None:
            out, lse = merge_states(out, lse, *blocks.attend(query, scaling))
    if layer is not None:
        layer.attended(query, lse, scaling)
    return out.transpose(1, 2).contiguous(), None


def _decodes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this is a step of generation that the C++ kernels were made for: they read grouped keys once."""
    one_row = query.shape[2] == 1 and value.shape == key.shape
    return one_row and calls_cpp("prompt_attention", query, key, value)


def _decode(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """What `prompt_attention` runs, without its checks, which would cost more than a short cache does."""
    none = key.new_empty(1, key.shape[1], 0, key.shape[3])
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return backend("prompt_attention", "cpp").forward(query, key, value, none, none, None, mask, False, scale)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    is_causal: bool | None,
    prompt: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B,Hq,Tq,D]`` and log-sum-exp over prompt and keys."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:
        # An empty static cache, filled from the front: what is behind the queries is not written yet.
        key, value = (x[:, :, : query.shape[2]] for x in (key, value))
    prompt = prompt or (_nothing(key),) * 2
    options: dict[str, Any] = {"attn_mask": attention_mask, "is_causal": causal, "scale": scaling, "return_lse": True}
    return cast(tuple[Tensor, Tensor], prompt_attention(query, key, value, *prompt, **options))


def _last(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float | None, rows: int
) -> tuple[Tensor | None, Tensor | None]:
    """The last queries and their log-sum-exp, in a pass of its own over a few rows."""
    if not rows:
        return None, None
    query, none = query[:, :, -rows:], _nothing(key)
    mask = None if attention_mask is None else attention_mask[:, :, -rows:]
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None, "scale": scaling, "return_lse": True}
    # Values are read for the output alone, which is not.
    return query, prompt_attention(query, key, key, none, none, **options)[1]


def _nothing(key: Tensor) -> Tensor:
    """An empty prompt."""
    return key.new_empty(key.shape[1], 0, key.shape[3])


@torch.compiler.disable
def hand_over(key: Tensor, layer: CacheLayer) -> None:
    """Let the attention function know that this very tensor comes from a layer of a compressing cache."""
    vars(key)[LAYER] = layer


def _claim(key: Tensor) -> CacheLayer | None:
    """The cache layer that handed this tensor over; once, so that the two do not keep each other alive."""
    # Compiled code may not look into tensors; the layer then finds that nobody claimed its keys, and says so.
    return None if torch.compiler.is_compiling() else vars(key).pop(LAYER, None)


def dropout_fields(config: object) -> dict[str, float]:
    """Names and values of the attention dropout fields of a model config that are not 0."""
    fields = vars(config)
    return {
        name: value
        for name, value in fields.items()
        if "att" in name and "drop" in name and isinstance(value, float) and value > 0
    }
