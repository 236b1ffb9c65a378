# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastprompt import config
from fastprompt.errors import ImplUnavailableError

IMPLS = ("auto", "reference", "triton", "cpp")

#: One namespace for every registered operation; schemas and fakes need torch alone.
LIBRARY = torch.library.Library("fastprompt", "DEF")


@dataclass(frozen=True)
class Choice:
    """What `explain` returns: the implementation ``auto`` picks and the reasons against the others."""

    op: str
    impl: str
    why: str
    refused: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.impl} ({self.why})"]
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.refused.items()]
        return "\n".join(lines)


def check_impl(impl: str, name: str = "impl") -> None:
    """Raise ValueError unless `impl`, which the user gave as `name`, is one of `IMPLS`."""
    if impl not in IMPLS:
        raise ValueError(f"{name}: got {impl!r}, expected one of {', '.join(map(repr, IMPLS))}")


def reasons_against(op: str, impl: str, tensors: Sequence[Tensor]) -> list[str]:
    """Why `impl` cannot run `op` on these tensors; empty if it can."""
    device = tensors[0].device.type
    if impl == "reference":
        return []
    if impl == "cpu":
        return [] if device == "cpu" else [f"composed of PyTorch's CPU attention; the tensors are on {device}"]
    return [f"no {impl} kernel for {op} in this build"]


def choose(op: str, tensors: Sequence[Tensor], impl: str = "auto", composed: bool = False) -> Choice:
    """Resolve `impl` for `op`; an explicit impl never falls back.

    ``composed`` says that `op` has a composition of PyTorch's own CPU attention (impl name ``"cpu"``, reached by
    ``"auto"`` only).

    Raises:
        ImplUnavailableError: an explicit impl cannot run; the message lists every reason.
    """
    check_impl(impl)
    if impl == "auto" and config.IMPL != "auto":
        impl = config.IMPL
        check_impl(impl, "FASTPROMPT_IMPL")
    if impl != "auto":
        reasons = reasons_against(op, impl, tensors)
        if reasons:
            raise ImplUnavailableError(
                f"impl={impl!r} cannot run {op} here: {'; '.join(reasons)}. "
                'Use impl="auto" to let fastprompt choose, or impl="reference".'
            )
        return Choice(op, impl, "asked for by name")
    refused: dict[str, list[str]] = {}
    for name in ("triton", "cpp", "cpu") if composed else ("triton", "cpp"):
        reasons = reasons_against(op, name, tensors)
        if not reasons:
            return Choice(op, name, "first that can run these tensors", refused)
        refused[name] = reasons
    return Choice(op, "reference", "plain PyTorch runs everywhere", refused)


def explain(op: Callable, *args, **kwargs) -> Choice:
    """Tell which implementation ``op(*args, **kwargs)`` would use and why not the others.

    Args:
        op: An operation of `fastprompt.ops`, e.g. ``fastprompt.ops.prompt_attention``.
        *args: What the operation would be called with; nothing is computed.
        **kwargs: Likewise.

    Returns:
        A `Choice`; ``print`` it.

    Example:
        >>> import torch, fastprompt
        >>> x = torch.zeros(1, 2, 4, 8)
        >>> fastprompt.explain(fastprompt.ops.prompt_attention, x, x, x, x, x).impl
        'cpu'
    """
    resolve = getattr(op, "resolve", None)
    if resolve is None:
        raise TypeError(f"op: got {op!r}, expected an operation of fastprompt.ops")
    return resolve(*args, **kwargs)
