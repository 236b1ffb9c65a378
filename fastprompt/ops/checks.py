# SPDX-License-Identifier: Apache-2.0
"""What every attention operation checks before anything runs; each message says argument, got, expected, fix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastprompt import config
from fastprompt.ops.direct import PLAIN

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: The device whose tensors have no values, and no autocast: PyTorch raises when asked about it.
SHAPES_ALONE = "meta"

#: The five tensors of prompt attention.
NAMES = ("query", "key", "value", "prompt_key", "prompt_value")

#: Signatures that are remembered before all are forgotten.
MOST_SIGNATURES = 4096

_passed: set[tuple] = set()


def check_tensor(name: str, x: object) -> None:
    """A floating point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected one of {', '.join(map(str, FLOATS))}; cast it first")


def check_device(**tensors: Tensor | None) -> None:
    """All tensors (or None), on one device."""
    first, where = "", None
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
        if where is None:
            first, where = name, x.device
        elif x.device != where:
            raise ValueError(
                f"{name}: got device {x.device}, expected {where} (the device of {first}); "
                f"move it with {name}.to({str(where)!r})"
            )


def check_dtypes(names: tuple[str, ...], tensors: tuple[Tensor, ...], prompts: tuple[str, ...] = ()) -> None:
    """One dtype; the tensors named in ``prompts`` may be float32 beside half precision."""
    dtype = tensors[0].dtype
    half = dtype in (torch.float16, torch.bfloat16)
    for name, x in zip(names, tensors, strict=True):
        if x.dtype == dtype or (name in prompts and half and x.dtype == torch.float32):
            continue
        allowed = f"{dtype}" + (" (or torch.float32)" if name in prompts and half else "")
        raise TypeError(
            f"{name}: got dtype {x.dtype}, expected {allowed} like {names[0]}; cast with {name}.to({dtype}) "
            "or run under torch.autocast"
        )


def check_scale(scale: float | None, dim: int) -> float:
    """The softmax scale; ``dim ** -0.5`` if None."""
    if scale is None:
        return dim**-0.5 if dim else 1.0
    if not isinstance(scale, (int, float)) or not 0 <= scale < math.inf:
        raise ValueError(f"scale: got {scale!r}, expected a finite number >= 0 (None means head_dim ** -0.5)")
    return float(scale)


def check_index(prompt_index: Tensor | None, batch: int, bank: int) -> None:
    """``prompt_index`` ``[B]`` int64 in ``[0, bank)``; values are read where that costs no synchronisation."""
    if prompt_index is None:
        # Not `in (1, batch)`: torch.compile takes a symbolic size and an equal constant for different there.
        if bank != 1 and bank != batch:
            raise ValueError(
                f"prompt_key: got a bank of {bank} prompts for a batch of {batch} and no prompt_index; expected "
                f"1 (shared), {batch} (one a sample), or pass prompt_index=int64[{batch}]"
            )
        return
    if prompt_index.dtype != torch.int64:
        raise TypeError(f"prompt_index: got {prompt_index.dtype}, expected int64 of shape [{batch}]; use .long()")
    if prompt_index.shape != (batch,):
        raise ValueError(f"prompt_index: got shape {list(prompt_index.shape)}, expected [{batch}] (one a sample)")
    if not batch or not readable(prompt_index):
        return
    low, high = (int(x) for x in prompt_index.aminmax())
    if low < 0 or high >= bank:
        raise ValueError(f"prompt_index: got values in [{low}, {high}], expected [0, {bank - 1}] (bank of {bank})")


def check_attn_mask(name: str, mask: Tensor | None, full: tuple[int, ...], note: str = "") -> Tensor | None:
    """A bool or additive mask that broadcasts to ``full``, ``[B,Hq,Tq,Tk]``, without gradient; ``note`` ends errors."""
    if mask is None:
        return None
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {mask.dtype}, expected bool (True = may attend) or additive float")
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(got != 1 and got != want for got, want in zip(shape, full, strict=True)):
        raise ValueError(
            f"{name}: got shape {list(mask.shape)}, expected one that broadcasts to [B,Hq,Tq,Tk] = {list(full)}{note}"
        )
    return mask.detach()


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor, layout: str, **others
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five tensors of prompt attention under autocast, prompts with their bank axis, all checked against another.

    ``layout`` is that of the query, ``"[B,H,T,D]"`` or ``"[T,H,D]"``; ``others`` must be on the same device.
    """
    known = signature((query, key, value, prompt_key, prompt_value, *others.values()), layout)
    if not passed(known):
        _check_attention(query, key, value, prompt_key, prompt_value, layout, others)
        remember(known)
    query, key, value, prompt_key, prompt_value = _as_kernels_read(query, key, value, prompt_key, prompt_value)
    if config.DEBUG and not torch.compiler.is_compiling():
        check_finite(prompt_key, name="prompt_key")
        check_finite(prompt_value, name="prompt_value")
    return query, key, value, prompt_key, prompt_value


def signature(tensors: Sequence[Any], *settings: Any) -> tuple | None:
    """What checks of shapes, dtypes, devices and hashable settings depend on; None where there is more to it.

    A call like one that passed is not checked again: checks cost the host more than a launch.
    """
    if torch.compiler.is_compiling() or type(tensors[0]) not in PLAIN:
        return None
    found = [settings, autocast_dtype(tensors[0].device.type)]
    for x in tensors:
        if type(x) in PLAIN:
            found += (x.shape, x.dtype, x.device)
        elif x is None:
            found.append(None)
        else:
            return None
    return tuple(found)


def passed(known: tuple | None) -> bool:
    """Whether a call of this `signature` passed its checks before."""
    return known is not None and known in _passed


def remember(known: tuple | None) -> None:
    """Checks passed for this `signature`."""
    if known is not None:
        if len(_passed) >= MOST_SIGNATURES:
            _passed.clear()
        _passed.add(known)


def _check_attention(query, key, value, prompt_key, prompt_value, layout: str, others: dict) -> None:
    tensors = (query, key, value, prompt_key, prompt_value)
    rank = layout.count(",") + 1
    for name, x in zip(NAMES, tensors, strict=True):
        check_tensor(name, x)
        is_prompt = name.startswith("prompt")
        if x.dim() not in ((3, 4) if is_prompt else (rank,)):
            expected = "[Hkv,P,D] or [G,Hkv,P,D]" if is_prompt else layout
            raise ValueError(f"{name}: got rank {x.dim()} (shape {list(x.shape)}), expected {expected}")
    given = (key, value, prompt_key, prompt_value)
    query, key, value, prompt_key, prompt_value = _as_kernels_read(*tensors)
    check_dtypes(NAMES, (query, key, value, prompt_key, prompt_value), prompts=NAMES[3:])
    check_device(**dict(zip(NAMES, tensors, strict=True)), **others)
    heads, heads_kv = query.shape[1], key.shape[1]
    # Packed keys have the rows of the query; those of a batch have their own number.
    instance = (*query.shape[:1], heads_kv, *key.shape[2:-1], query.shape[-1])
    prompts = (prompt_key.shape[0], heads_kv, prompt_key.shape[2], query.shape[-1])
    shapes = (instance, instance, prompts, prompts)
    checked = (key, value, prompt_key, prompt_value)
    for name, x, original, shape in zip(NAMES[1:], checked, given, shapes, strict=True):
        if x.shape != shape:
            raise ValueError(
                f"{name}: got shape {list(original.shape)}, expected {list(shape)[x.dim() - original.dim() :]} "
                f"to match query {list(query.shape)}"
                + (" and key" if name == "value" else " and prompt_key" if name == "prompt_value" else "")
            )
    if heads_kv == 0 or heads % heads_kv:
        raise ValueError(
            f"query: got {heads} heads for {heads_kv} key heads, expected a multiple (grouped-query attention)"
        )


def _as_kernels_read(query, key, value, *prompts):
    """The five tensors of prompt attention under autocast, prompts with their bank axis."""
    learned = (p if p.dtype == torch.float32 else autocast(p)[0] for p in prompts)
    return *autocast(query, key, value), *(p if p.dim() == 4 else p.unsqueeze(0) for p in learned)


def has_values(x: Tensor) -> bool:
    """False while compiling and for meta and fake tensors, which carry shapes alone."""
    if torch.compiler.is_compiling() or isinstance(x, torch._subclasses.FakeTensor):
        return False
    return x.device.type != SHAPES_ALONE


def readable(x: Tensor) -> bool:
    """Whether values may be read to check them: on a GPU that would wait for the device, so only in debug mode."""
    return (x.device.type == "cpu" or config.DEBUG) and has_values(x)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast float32 tensors to the autocast dtype, where autocast is on, as PyTorch's own attention does."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to on this kind of device; None where it is off."""
    return torch.get_autocast_dtype(device) if device != SHAPES_ALONE and torch.is_autocast_enabled(device) else None


def without_autocast(device: str) -> AbstractContextManager:
    """Keep autocast from casting inside an operation that chose its dtypes with `autocast`."""
    # A context costs the host as much as a launch; where autocast is off there is nothing to keep it from.
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def check_finite(*tensors: Tensor, name: str = "prompts") -> None:
    """Raise unless every element is finite; costs a pass over the data (and a synchronisation on a GPU).

    Args:
        *tensors: Floating point tensors of any shape.
        name: What to call them in the message.

    Raises:
        ValueError: with the number of NaN and infinite elements and where the first one is.

    Example:
        >>> import torch, fastprompt
        >>> fastprompt.check_finite(torch.ones(3))
        >>> fastprompt.check_finite(torch.tensor([1.0, float("nan")]), name="prompt_key")
        Traceback (most recent call last):
        ...
        ValueError: prompt_key: got 1 NaN and 0 infinite of 2 elements (first at [1]), expected finite values; ...
    """
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"tensors: got {type(x).__name__}, expected tensors; pass *handle.parameters() of a handle")
        good = torch.isfinite(x)
        if bool(good.all()):
            continue
        first = torch.nonzero(~good)[0].tolist()
        label = name if len(tensors) == 1 else f"{name}[{i}]"
        raise ValueError(
            f"{label}: got {int(torch.isnan(x).sum())} NaN and {int(torch.isinf(x).sum())} infinite of {x.numel()} "
            f"elements (first at {first}), expected finite values; lower the learning rate or reload the last "
            "checkpoint"
        )
