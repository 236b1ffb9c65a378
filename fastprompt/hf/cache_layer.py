# SPDX-License-Identifier: Apache-2.0
"""One layer of a compressing cache: exact while the prompt runs, then the kept keys in a buffer with room for more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from fastprompt.cache import Blocks, Observed, Policy, compress, split, suffices
from fastprompt.errors import AttachError, UnsupportedModelError
from fastprompt.hf.attention import NAME, hand_over
from fastprompt.ops import key_scores

#: Slots for generated tokens that a buffer gets at once.
ROOM = 64


class Tokens:
    """What a cache was told of its tokens, for all of its layers.

    Attributes:
        length: How many there are, those of the running forward included.
        valid: bool ``[B,length]``, False at padding; None where nothing is padded. Of the prompt alone.
        text: bool ``[B,length]``, False at image tokens; None where the policy does not ask, or ids were not given.
        images: bool ``[B,length]``, True at image tokens, where the user says which they are.
        prompt: How many tokens the prompt had, once it is over.
        counted: int64 ``[B]``, how many of those are no padding; None where nothing is padded.
        new: bool ``[B,length - prompt]`` of the tokens after the prompt; None where no mask ever hid one.
        causal_until: Up to which length the model's mask was seen to be causal.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self.length = 0
        self.valid: Tensor | None = None
        self.text: Tensor | None = None
        self.images: Tensor | None = None
        self.prompt = 0
        self.counted: Tensor | None = None
        self.new: Tensor | None = None
        self.causal_until = 0

    def extend(self, rows: int, valid: Tensor | None, text: Tensor | None) -> None:
        """Take note of the next tokens of the prompt."""
        some = self.valid if valid is None else valid
        if some is not None:
            old = some.new_ones(len(some), self.length) if self.valid is None else self.valid
            new = some.new_ones(len(some), rows) if valid is None else valid
            self.valid = torch.cat([old, new], dim=1)
        if self.length == 0:
            self.text = text
        else:
            self.text = None if text is None or self.text is None else torch.cat([self.text, text], dim=1)
        self.length += rows

    def end(self) -> None:
        """The prompt is over."""
        self.prompt = self.length
        self.counted = None if self.valid is None else self.valid.sum(dim=1)
        self.valid = self.text = None

    def follow(self, rows: int, valid: Tensor | None) -> None:
        """Take note of ``rows`` tokens after the prompt; ``valid`` tells of all since."""
        self.length += rows
        if valid is None and self.new is not None:
            valid = self.new.new_ones(len(self.new), self.length - self.prompt)
        self.new = valid

    def reach(self, rows: int) -> int:
        """How many of the last positions hold every sample's last ``rows`` tokens."""
        if self.valid is None:
            return min(rows, self.length)
        behind = self.valid.flip(-1).cumsum(dim=-1)
        wanted = behind[:, -1:].clamp(max=rows)
        return min(int((behind < wanted).sum(dim=-1).max()) + 1, self.length)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the batch."""
        for name in ("valid", "text", "images", "counted", "new"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, change(x))


class CompressedLayer(DynamicLayer):
    """Keys and values of one full-attention layer under a policy.

    Until `settle`, all states are kept and returned; attention hands over the queries that the policy reads. After it,
    what the policy keeps lies in a buffer ``[B,Hkv,capacity,D]`` in which new states are written in place. Where heads
    (or samples) keep different numbers of keys, whole blocks of them lie in ``blocks`` instead, which attention joins.
    Positions are never changed: `get_seq_length` is the number of tokens seen.
    """

    is_compileable = False
    is_croppable = False
    # Tensors once there are tokens.
    keys: Any
    values: Any

    def __init__(self, index: int, policy: Policy, tokens: Tokens):
        super().__init__()
        self.index, self.policy, self.tokens = index, policy, tokens
        self.interval = policy.interval
        self.rows = 0 if policy.keeps_all and self.interval is None else policy.rows
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = 0
        self.settled = False
        # Tokens written since keys were last dropped.
        self.since = 0
        self._waiting = False
        self.blocks: Blocks | None = None
        self._sums: Tensor | None = None
        self._query: Tensor | None = None
        self._lse: Tensor | None = None
        self._scale: float | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._valid: Tensor | None = None
        self._target: Tensor | None = None

    # What transformers calls

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take the states of new tokens; returns those that attention is to run over."""
        rows = key_states.shape[2]
        self._check(rows)
        if self.seen and len(key_states) != len(self.keys):
            raise ValueError(
                f"past_key_values: got {len(key_states)} samples, expected {len(self.keys)}, as many as the cache holds"
            )
        # Under autocast, rotation leaves keys wider than values.
        value_states = value_states.to(key_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.settled:
            self._append(key_states, value_states)
        elif self.seen == 0:
            self.keys, self.values = _own(key_states), _own(value_states)
        else:
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
        self.seen += rows
        self._waiting = True
        hand_over(self.keys, self)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """``(physical + query_length, seen - physical)``."""
        return self.physical + query_length, self.seen - self.physical

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give sample i of the batch the states of sample ``beam_idx[i]``."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these samples."""
        self._map(lambda x: x[indices.to(x.device)])

    def crop(self, *args, **kwargs) -> None:
        """Not possible.

        Raises:
            ValueError: always; what was dropped cannot come back.
        """
        raise ValueError(
            "crop: a compressing cache cannot go back, since dropped and merged keys are gone; assisted decoding needs "
            "a plain cache"
        )

    # What attention calls

    @property
    def compressed(self) -> bool:
        """Whether it holds fewer keys than it has seen."""
        return self.physical < self.seen

    @property
    def wanted(self) -> int | None:
        """How many of the last queries the policy still reads; None for all."""
        if self.settled:
            return self.rows if self.interval is not None else 0
        return self.tokens.reach(self.rows) if self.rows else self.rows

    def mask(self, query: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """The mask over the keys of this layer: the model's own during the prompt, then this layer's.

        Raises:
            UnsupportedModelError: the prompt's tokens see later ones, and the policy reads queries.
        """
        rows, length = query.shape[2], self.physical
        if not self.settled:
            if self.rows != 0 and attention_mask is not None and self.tokens.causal_until != self.tokens.length:
                self._check_causal(attention_mask.triu(length - rows + 1))
            return attention_mask
        valid = None if self._valid is None else self._valid[:, :, None, :length]
        if valid is not None and valid.shape[1] > 1:
            valid = valid.repeat_interleave(query.shape[1] // valid.shape[1], dim=1)
        if rows == 1:
            return valid
        causal = torch.ones(1, 1, rows, length, dtype=torch.bool, device=query.device).tril(length - rows)
        return causal if valid is None else causal & valid

    def attended(self, query: Tensor | None = None, lse: Tensor | None = None, scale: float | None = None) -> None:
        """Take what the policy reads of the queries ``[B,Hq,Tq,D]`` and their log-sum-exp ``[B,Hq,Tq]``."""
        self._waiting = False
        kept = self.wanted
        if query is None or lse is None or kept == 0:
            return
        self._scale = scale
        if kept is None:
            self._add_sums(query, lse)
            return
        self._query, self._lse = (
            _own((new if old is None else torch.cat([old, new], dim=2))[:, :, -kept:].detach())
            for old, new in ((self._query, query), (self._lse, lse))
        )

    def _add_sums(self, query: Tensor, lse: Tensor) -> None:
        valid = _on(self.tokens.valid, query)
        counted = None if valid is None else valid[:, -query.shape[2] :]
        sums = key_scores(query, self.keys, lse, query_mask=counted, key_mask=valid, scale=self._scale)
        if self._sums is not None:
            sums[:, :, : self._sums.shape[2]] += self._sums
        self._sums = sums

    # Compression

    @torch.no_grad()
    def settle(self) -> None:
        """Compress: the prompt once it is over, and what decoding added when its time has come."""
        if not self.seen or (self.settled and (self.interval is None or self.since < self.interval)):
            return
        self._check()
        physical, tokens = self.physical, self.tokens
        if self.settled:
            valid, text = None if self._valid is None else self._uniform(self._valid[:, :, :physical]), None
        else:
            valid, text = _on(tokens.valid, self.keys), _on(tokens.text, self.keys)
        seen = Observed(
            self.keys, self.values, valid, text, self._sums, self._query, self._lse, self._scale, self.index
        )  # fmt: skip
        budget = self._target if self._target is not None else self.policy.budget(seen)
        if self.interval is not None:
            self._target = torch.as_tensor(budget)
        if not suffices(budget, seen):
            key, value, index = compress(self.policy, seen, budget)
            if self.interval is None:
                self.blocks, key, value, index = split(key, value, index)
            kept = index >= 0
            self._store(key, value, None if bool(kept.all()) else kept)
        elif not self.settled:
            self._store(self.keys, self.values, None if valid is None else valid[:, None])
        self._sums = self._query = self._lse = None
        self.since, self.settled = 0, True

    def _uniform(self, valid: Tensor) -> Tensor:
        if bool((valid != valid[:, :1]).any()):
            raise ValueError(
                f"policy: {self.policy!r} gave the heads of layer {self.index} budgets of their own, which cannot be "
                "compressed again during decoding; use it without Decoding"
            )
        return valid[:, 0]

    def _store(self, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        """Move states into new buffers, with room for more."""
        length, room = key.shape[2], self.interval or ROOM
        buffers = []
        for x in (key, value):
            buffer = x.new_empty(*x.shape[:2], length + room, x.shape[3])
            buffer[:, :, :length] = x
            buffers.append(buffer)
        self._buffers = (buffers[0], buffers[1])
        self._valid = None if valid is None else torch.nn.functional.pad(valid, (0, room), value=True)
        self._show(length)

    def _append(self, key: Tensor, value: Tensor) -> None:
        """Write new states behind the others."""
        start, rows = self.physical, key.shape[2]
        # What inference mode made cannot be written to behind it.
        frozen = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        if self._buffers is None or frozen or start + rows > self._buffers[0].shape[2]:
            valid = None if self._valid is None else self._valid[:, :, :start]
            valid = None if valid is None else torch.nn.functional.pad(valid, (0, rows), value=True)
            self._store(torch.cat([self.keys, key], dim=2), torch.cat([self.values, value], dim=2), valid)
        else:
            for buffer, new in zip(self._buffers, (key, value), strict=True):
                buffer[:, :, start : start + rows] = new
            self._show(start + rows)
        self.since += rows
        if self.tokens.new is not None and self._buffers is not None:
            if self._valid is None:
                batch, _, capacity, _ = self._buffers[0].shape
                self._valid = torch.ones(batch, 1, capacity, dtype=torch.bool, device=key.device)
            # Masks may hide tokens of earlier turns later on.
            last = self.tokens.new[:, -self.since :].to(key.device)
            self._valid[:, :, start + rows - last.shape[1] : start + rows] = last[:, None]

    def _show(self, length: int) -> None:
        """Make ``keys`` and ``values`` views of the buffers' first slots."""
        if self._buffers is not None:
            self.keys, self.values = (x[:, :, :length] for x in self._buffers)

    @property
    def physical(self) -> int:
        """Number of slots that hold states, ``blocks`` apart."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def kept(self) -> int:
        """Number of slots a key head, those in ``blocks`` too: the mean of the heads, of the sample that has most."""
        if self.blocks is None:
            return self.physical
        most = max(sum(of_heads) for of_heads in self.blocks.counts) * self.blocks.key.shape[1]
        return self.physical + -(-most // self.keys.shape[1])

    def nbytes(self) -> int:
        """Bytes of all tensors that this layer holds."""
        states = (self.keys, self.values) if self._buffers is None else self._buffers
        held = (*states, self._sums, self._query, self._lse, self._valid)
        apart = 0 if self.blocks is None else self.blocks.nbytes()
        return apart + sum(x.nbytes for x in held if x is not None)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.seen:
            return
        length = self.physical
        if self.blocks is not None:
            self.blocks = self.blocks.select(change(torch.arange(len(self.keys))).tolist())
        for name in ("_sums", "_query", "_lse", "_valid", "_target"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, change(x))
        if self._buffers is None:
            self.keys, self.values = change(self.keys), change(self.values)
        else:
            self._buffers = (change(self._buffers[0]), change(self._buffers[1]))
            self._show(length)

    # Checks

    def _check(self, rows: int = 0) -> None:
        if self._waiting:
            raise AttachError(
                f"past_key_values: no {NAME!r} attention ran over the keys of layer {self.index} in the last forward; "
                "its attention implementation was switched, the forward failed, the model is compiled, or it changes "
                "keys behind its cache; the last two cannot be compressed. Make a new PromptCache"
            )
        if self.seen + rows != self.tokens.length:
            raise AttachError(
                f"past_key_values: layer {self.index} got {rows} tokens after {self.seen}, but its cache was told of "
                f"{self.tokens.length}; it was passed to another model than the one it was made for (or to a part of "
                "it), it is closed, or an earlier forward failed. Call that model, or make a new PromptCache"
            )

    def _check_causal(self, later: Tensor) -> None:
        if later.dtype != torch.bool or bool(later.any()):
            raise UnsupportedModelError(
                f"model: tokens of the prompt attend to later ones, which {type(self.policy).__name__} does not know; "
                "use a policy that reads no queries, such as KeyDiff or StreamingLLM"
            )
        self.tokens.causal_until = self.tokens.length


def _own(x: Tensor) -> Tensor:
    """The tensor, or a copy if it is a part of a larger one that would stay in memory."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)


def _on(x: Tensor | None, like: Tensor) -> Tensor | None:
    """On the device of a layer, which may be another than that of the inputs."""
    return None if x is None else x.to(like.device)
