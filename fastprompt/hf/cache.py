# SPDX-License-Identifier: Apache-2.0
"""A transformers cache that keeps of a prompt what a policy keeps, in any batch, for any decoder."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from fastprompt.cache import Policy
from fastprompt.errors import AttachError
from fastprompt.hf.cache_layer import CompressedLayer, Tokens
from fastprompt.hf.switch import engage, image_tokens, plain_layers


@dataclass(frozen=True)
class LayerStats:
    """What one layer of a cache holds: tokens ``seen``, slots ``kept`` a key head, and ``nbytes`` of memory.

    Where heads keep different numbers ``kept`` is their mean, rounded up; where samples do, it is that of the largest.
    """

    layer: int
    seen: int
    kept: int
    nbytes: int


class PromptCache(Cache):
    """A cache for ``past_key_values`` that compresses the prompt once it is over; prefill is exact.

    Full-attention layers keep all states until the first forward of one token (or `finalize`), then what the policy
    keeps; sliding and linear layers are as transformers makes them. Positions go on from the tokens seen, padding is
    never kept nor seen, and a budget of at least the prompt's length changes nothing. While the cache lives, the
    model's decoder runs our attention (its config is its own copy); `close` or the end of the cache puts that back.
    A prompt may come in chunks; a chunk of one token counts as generated. For inference.

    Args:
        model: Any transformers decoder or multimodal model; its forward, not that of a part, must be called.
        policy: What to keep, e.g. ``fastprompt.LookM()``.
        image_mask: bool ``[B,T]``, True at image tokens of the prompt; None finds them by the model's config.

    Raises:
        TypeError: wrong model, policy or mask.
        UnsupportedModelError: the model has no decoder with a cache, or no full-attention layer.
        ValueError: the policy ranks text before images, and the model's config names no image token.

    Example:
        >>> import torch, fastprompt
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...                                      num_key_value_heads=2, intermediate_size=64, vocab_size=50))
        >>> cache = fastprompt.PromptCache(model, fastprompt.H2O(recent=0.1, important=0.1))
        >>> tokens = torch.arange(3, 43)[None]
        >>> model.generate(tokens, past_key_values=cache, max_new_tokens=5, eos_token_id=None).shape
        torch.Size([1, 45])
        >>> [(x.seen, x.kept) for x in cache.stats()]
        [(44, 12), (44, 12)]
        >>> cache.close()
    """

    def __init__(self, model: PreTrainedModel, policy: Policy, *, image_mask: Tensor | None = None):
        check_policy(model, policy, image_mask)
        self.policy = policy
        self.switch = engage(model)
        self._finalizer = weakref.finalize(self, self.switch.release)
        self._finalizer.atexit = False
        try:
            self._tokens = Tokens()
            super().__init__(
                layers=[
                    CompressedLayer(i, policy, self._tokens) if type(x) is DynamicLayer else x
                    for i, x in enumerate(plain_layers(model))
                ]
            )
        except BaseException:
            self.close()
            raise
        self._image_mask = image_mask
        self._image_tokens = image_tokens(model)
        self._settled = False

    @property
    def model(self) -> PreTrainedModel:
        """The model that this cache was made for."""
        return self.switch.model

    def announce(self, given: Mapping[str, Any]) -> None:
        """Take note of the inputs of a forward of the model; compresses before the first token after the prompt."""
        if not self._finalizer.alive:
            raise AttachError("past_key_values: got a closed PromptCache; make a new one")
        ids = given.get("input_ids")
        states = ids if ids is not None else given.get("inputs_embeds")
        if states is None:
            return
        batch, rows = states.shape[:2]
        tokens = self._tokens
        if tokens.length == 0 and self._image_mask is not None:
            # Beams and returned sequences repeat the batch.
            if batch % self._image_mask.shape[0]:
                raise _wrong_images(self._image_mask, batch, rows)
            tokens.images = self._image_mask.repeat_interleave(batch // self._image_mask.shape[0], dim=0)
        if rows == 1 and tokens.length:
            self.finalize()
        if self._settled:
            _check_prompt(given, tokens)
            tokens.follow(rows, _valid(given, batch, tokens.prompt, tokens.length - tokens.prompt + rows))
        else:
            text = None
            if ids is not None and self.policy.reads_text and self._image_mask is None:
                text = ~torch.isin(ids, torch.tensor(self._image_tokens, device=ids.device))
            tokens.extend(rows, _valid(given, batch, tokens.length, rows), text)

    def finalize(self) -> None:
        """Compress now what the prompt left, instead of at the first forward of one token."""
        tokens = self._tokens
        if not tokens.length:
            return
        if tokens.images is not None and not self._settled:
            if tokens.images.shape[1] not in (tokens.length, tokens.length + 1):  # the last token may be a chunk
                raise _wrong_images(tokens.images, len(tokens.images), tokens.length)
            tokens.text = ~tokens.images[:, : tokens.length]
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.settle()
        if not self._settled:
            tokens.end()
        self._settled = True

    def close(self) -> None:
        """Put the model's attention back; the cache cannot be used any more. Closing twice is fine."""
        self._finalizer()

    def nbytes(self) -> int:
        """Bytes of all states, with the room for generated tokens."""
        return sum(_nbytes(layer) for layer in self.layers)

    def stats(self) -> list[LayerStats]:
        """What every compressed layer holds."""
        return [
            LayerStats(i, x.seen, x.kept, x.nbytes())
            for i, x in enumerate(self.layers)
            if isinstance(x, CompressedLayer)
        ]

    # What transformers calls

    def reset(self) -> None:
        """Forget all tokens; the cache is as new."""
        super().reset()
        self._tokens.clear()
        self._settled = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give sample i of the batch the states of sample ``beam_idx[i]``."""
        super().reorder_cache(beam_idx)
        self._tokens.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        self._tokens.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these samples."""
        super().batch_select_indices(indices)
        self._tokens.map(lambda x: x[indices.to(x.device)])

    def activate_past_recording(self) -> None:
        """Not possible: assisted decoding would have to `crop`.

        Raises:
            ValueError: always.
        """
        self.crop(0)

    def crop(self, *args, **kwargs) -> None:
        """Not possible.

        Raises:
            ValueError: always; what was dropped cannot come back.
        """
        next(x for x in self.layers if isinstance(x, CompressedLayer)).crop()

    def __deepcopy__(self, memo: dict) -> PromptCache:
        """A copy of all states for the same model, to go on from a prompt in several ways."""
        other = PromptCache(self.model, self.policy, image_mask=self._image_mask)
        memo[id(self)], memo[id(self._tokens)] = other, other._tokens
        vars(other._tokens).update(copy.deepcopy(vars(self._tokens), memo))
        other.layers, other._settled = copy.deepcopy(self.layers, memo), self._settled
        return other

    def __repr__(self) -> str:
        return f"PromptCache({type(self.model).__name__}, {self.policy!r}, {self._tokens.length} tokens)"


def check_policy(model: PreTrainedModel, policy: Policy, image_mask: Tensor | None = None) -> None:
    """Raise unless the policy can work on this model."""
    if not isinstance(policy, Policy):
        raise TypeError(f"policy: got {policy!r}, expected a policy such as fastprompt.H2O()")
    if image_mask is not None:
        if not isinstance(image_mask, Tensor) or image_mask.dtype != torch.bool:
            got = image_mask.dtype if isinstance(image_mask, Tensor) else type(image_mask).__name__
            raise TypeError(f"image_mask: got {got}, expected a bool tensor [B,T], True at image tokens")
        if image_mask.dim() != 2:
            raise ValueError(f"image_mask: got shape {list(image_mask.shape)}, expected [B,T]")
    elif policy.reads_text and isinstance(model, PreTrainedModel) and not image_tokens(model):
        raise ValueError(
            f"policy: {type(policy).__name__}(text_prior=True) ranks text before images, but the config of "
            f"{type(model).__name__} names no image token; use text_prior=False, or PromptCache(..., image_mask=...)"
        )


def _wrong_images(mask: Tensor, batch: int, length: int) -> ValueError:
    return ValueError(
        f"image_mask: got shape {list(mask.shape)}, expected [{batch},{length}], one for every token of the prompt"
    )


def _check_prompt(given: Mapping[str, Any], tokens: Tokens) -> None:
    """A mask cannot hide what was compressed with the rest."""
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < tokens.length:
        return
    visible = mask[:, : tokens.prompt].bool().sum(dim=1)
    if bool((visible != (tokens.prompt if tokens.counted is None else tokens.counted.to(mask.device))).any()):
        raise ValueError(
            f"attention_mask: got other zeros among the {tokens.prompt} tokens of the prompt than when it was read, "
            "expected the same: compressed keys cannot be hidden; make a new PromptCache"
        )


def _valid(given: Mapping[str, Any], batch: int, seen: int, rows: int) -> Tensor | None:
    """Bool ``[B,rows]`` of the new tokens, False at padding; None where nothing is padded."""
    mask = given.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < seen + rows:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: got {got}, expected [{batch},{seen + rows}] with 0 at padding, for all tokens so far: a "
            "compressing cache must know what is padding"
        )
    valid = mask[:, seen : seen + rows].bool()
    return None if bool(valid.all()) else valid


def _nbytes(layer: Any) -> int:
    if isinstance(layer, CompressedLayer):
        return layer.nbytes()
    return sum(x.nbytes for x in vars(layer).values() if isinstance(x, Tensor))
