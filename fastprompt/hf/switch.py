# SPDX-License-Identifier: Apache-2.0
"""What compressing caches share of a model: its decoder's attention, and a hook that tells a cache what is coming."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from fastprompt.errors import AttachError, UnsupportedModelError
from fastprompt.hf.attention import NAME, register
from fastprompt.hf.holds import OwnConfigs
from fastprompt.hf.sites import Tower, find_towers

#: Config fields that name the tokens which stand for image patches.
IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")

_switches: dict[int, Switch] = {}
_lock = threading.RLock()


class Switch:
    """A decoder that runs our attention while at least one cache (or context) holds it.

    Attributes:
        model: The model.
        decoder: The tower whose keys and values are cached.
        make: Gives a forward without a compressing cache one; None leaves it alone.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.decoder = _decoder(model)
        plain_layers(model)
        self.make: Callable[[Mapping[str, Any]], Any] | None = None
        self.holders = 0
        self._names = list(inspect.signature(model.forward).parameters)
        register()
        self._configs = OwnConfigs(model)
        self._configs.switch(self.decoder.module, NAME)
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)

    def release(self) -> None:
        """Let go; the last one puts back what was switched."""
        with _lock:
            self.holders -= 1
            if not self.holders:
                self._hook.remove()
                self._configs.release()
                del _switches[id(self.model)]

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Swap in a cache where one is to be made, and tell it what this forward brings."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        cache: Any = given.get("past_key_values")
        owner = getattr(cache, "switch", None)
        if owner is None:
            if self.make is None:
                return None
            cache = self.make(given)
            place = self._names.index("past_key_values") if "past_key_values" in self._names else len(args)
            if place < len(args):
                args = (*args[:place], cache, *args[place + 1 :])
            else:
                kwargs = kwargs | {"past_key_values": cache}
        elif owner is not self:
            raise AttachError(
                f"past_key_values: got a cache made for another model ({type(owner.model).__name__}), or one that is "
                f"closed; make one with fastprompt.PromptCache(model, policy) for this {type(model).__name__}"
            )
        name = cast(PreTrainedModel, self.decoder.module).config._attn_implementation
        if name != NAME:
            raise AttachError(
                f"model: got attention {name!r} in a decoder whose cache is compressed, expected {NAME!r}; call "
                f"set_attn_implementation({NAME!r}), or make a new PromptCache"
            )
        cache.announce(given)
        return args, kwargs


def engage(model: PreTrainedModel) -> Switch:
    """Take hold of a model's decoder; every call needs a `Switch.release`.

    Raises:
        TypeError: no transformers model.
        UnsupportedModelError: the model has no decoder with a cache that our attention reaches.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, expected a transformers PreTrainedModel")
    with _lock:
        switch = _switches.get(id(model)) or Switch(model)
        _switches[id(model)] = switch
        switch.holders += 1
    return switch


def image_tokens(model: PreTrainedModel) -> list[int]:
    """Ids of the tokens that stand for image patches; empty for a model that reads text alone."""
    found = {getattr(model.config, name, None) for name in IMAGE_TOKENS}
    return sorted(i for i in found if isinstance(i, int))


def plain_layers(model: PreTrainedModel) -> list:
    """The layers of a plain cache of the decoder, at least one of which grows with the prompt (`DynamicLayer`).

    Raises:
        UnsupportedModelError: none does, or layers share their keys.
    """
    config = model.config.get_text_config(decoder=True)
    shared = getattr(config, "num_kv_shared_layers", None)
    if shared:
        raise UnsupportedModelError(
            f"model: the last {shared} layers of {type(model).__name__} read keys that another layer keeps "
            "(num_kv_shared_layers), which a compressing cache does not know"
        )
    layers = DynamicCache(config=config).layers
    if not any(type(x) is DynamicLayer for x in layers):
        raise UnsupportedModelError(
            f"model: the cache of {type(model).__name__} has {', '.join(sorted({type(x).__name__ for x in layers}))} "
            "alone, which does not grow with the prompt; there is nothing to compress"
        )
    return layers


def _decoder(model: PreTrainedModel) -> Tower:
    """The only text tower that takes a cache."""
    towers = [] if getattr(model.config, "is_encoder_decoder", False) else find_towers(model)
    found = [
        t for t in towers if t.kind == "text" and "past_key_values" in inspect.signature(t.module.forward).parameters
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"model: {type(model).__name__} has {len(found) or 'no'} decoders whose layers have one self-attention "
            "each that goes through transformers' attention interface and takes past_key_values, expected 1; encoders "
            "and encoder-decoder models have no cache to compress"
        )
    return found[0]
