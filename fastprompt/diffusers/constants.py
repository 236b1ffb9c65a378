# SPDX-License-Identifier: Apache-2.0
"""Results kept from one denoising step to the next, and computed again when anything they are made of has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# Guidance by two calls a step, with and without the prompt, alternates between two sources.
KEPT = 2
# Modules of other packages may hold numbers that are no tensors, such as the scale of a low-rank adapter.
_KNOWN = ("torch.nn.modules.", "diffusers.models.")


class Constants:
    """Results of a constant tensor under frozen modules, as long as nothing has changed.

    A result is used again only for the same tensor object, with the same storage and version counter, under the same
    parameters and buffers, with theirs, and under the same autocast. It is freed with the tensor it was made of.
    Nothing is kept while gradients are enabled, under a compiler or a capture, for tensors without a version counter
    (those made in inference mode), or of modules with hooks. What PyTorch itself does not count, a write through
    ``x.data`` or ``x.numpy()``, needs `clear`.

    Example:
        >>> import torch
        >>> constants, layer, x = Constants(), torch.nn.Linear(3, 2), torch.ones(1, 3)
        >>> with torch.no_grad():
        ...     first, second = (constants.get("key", x, [layer], (), lambda: layer(x)) for _ in range(2))
        >>> first is second
        True
    """

    def __init__(self):
        self._kept: dict[Hashable, list[_Kept]] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def get(
        self,
        name: Hashable,
        source: Tensor,
        modules: Sequence[nn.Module],
        options: Hashable,
        compute: Callable[[], Any],
    ) -> Any:
        """``compute()``, or what it gave when everything was as it is now.

        Args:
            name: What is computed.
            source: The tensor it is computed of.
            modules: The modules it goes through.
            options: Whatever else it depends on.
            compute: Computes it.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return compute()
        if torch.is_grad_enabled():
            self._kept.clear()
            return compute()
        weights = [x for m in modules for x in (*m.parameters(), *m.buffers())]
        if not (all(map(_countable, (source, *weights))) and all(map(_known, modules)) and not _capturing(source)):
            return compute()
        autocast = torch.is_autocast_enabled(source.device.type) and torch.get_autocast_dtype(source.device.type)
        options = options, autocast
        key = name, tuple(map(id, modules))
        entries = self._kept.setdefault(key, [])
        for entry in entries:
            if entry.is_of(source, modules, weights, options):
                return entry.result
        me = weakref.ref(self)

        def forget(_: weakref.ref) -> None:
            constants = me()
            if constants is not None:
                constants._forget(key)

        fresh = _Kept(source, forget, modules, weights, options, compute())
        entries[:] = [fresh, *(entry for entry in entries if entry.source() is not source)][:KEPT]
        return fresh.result

    def _forget(self, key: Hashable) -> None:
        """Drop what was made of tensors that are gone."""
        left = [entry for entry in self._kept.pop(key, []) if entry.source() is not None]
        if left:
            self._kept[key] = left

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def __deepcopy__(self, memo: dict) -> Constants:
        return Constants()

    def __reduce__(self):
        return Constants, ()


class _Kept:
    """A result, and the state of what it was made of."""

    def __init__(self, source, forget, modules, weights, options, result):
        self.source = weakref.ref(source, forget)
        # Held, so that nothing new can have their identity; a weak reference to a weight would forbid swapping it.
        self._modules, self._weights = list(modules), weights
        self._states = [_State(x) for x in (source, *weights)]
        self._options, self.result = options, result

    def is_of(self, source: Tensor, modules: Sequence[nn.Module], weights: Sequence[Tensor], options: Hashable) -> bool:
        """Whether the same tensors went through the same modules, and none has changed."""
        return (
            self.source() is source
            and self._options == options
            and _same(self._modules, modules)
            and _same(self._weights, weights)
            and all(state.holds(x) for state, x in zip(self._states, (source, *weights), strict=True))
        )


class _State:
    """A tensor's version, layout and storage; the storage is held weakly: a model may be moved to free its memory."""

    def __init__(self, x: Tensor):
        self._version, self._layout = x._version, _layout(x)
        # While this lives, no other storage can have the same number.
        self._storage = StorageWeakRef(x.untyped_storage())

    def holds(self, x: Tensor) -> bool:
        return (
            self._version == x._version
            and self._layout == _layout(x)
            and self._storage.cdata == StorageWeakRef(x.untyped_storage()).cdata
        )


def _layout(x: Tensor) -> tuple:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether these are the same objects."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _countable(x: Tensor) -> bool:
    """A plain tensor whose changes are counted."""
    return type(x) in (Tensor, nn.Parameter) and not x.is_inference() and x.device.type != "meta"


def _known(module: nn.Module) -> bool:
    """A module whose result follows from its parameters and buffers."""
    return all(
        type(m).__module__.startswith(_KNOWN)
        and "forward" not in vars(m)
        and not m._forward_hooks
        and not m._forward_pre_hooks
        for m in module.modules()
    )


def _capturing(x: Tensor) -> bool:
    """A CUDA graph would read what is kept here after it was freed."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
