# SPDX-License-Identifier: Apache-2.0
"""Operations without PyTorch's dispatcher, where nobody listens to it: a GPU waits for a slow host.

The registered operation is what `torch.compile`, tensor subclasses, dispatch modes and tracing see. A plain eager call
runs the same launchers under the same formula of autograd, without what it costs to box arguments on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

#: Types without a dispatch of their own.
PLAIN = frozenset((Tensor, nn.Parameter))


class Direct:
    """A registered operation that plain eager calls run directly.

    Args:
        name: Name of the operation; what a profiler and ``grad_fn`` show.
        forward: The launcher, with the operation's arguments.
        setup_context: What `torch.library.register_autograd` was given; None for an operation without gradient.
        backward: Likewise.
    """

    def __init__(
        self, name: str, forward: Callable, setup_context: Callable | None = None, backward: Callable | None = None
    ):
        self.operation = getattr(torch.ops.fastprompt, name).default
        self.forward, self.function = forward, None
        if setup_context is not None and backward is not None:
            self.function = _function(name, forward, setup_context, backward)

    def __call__(self, *args: Any) -> Any:
        """The outputs of the operation."""
        if torch.compiler.is_compiling() or _watched():
            return self.operation(*args)
        tensors = _flat(args)
        if not _plain(tensors):
            return self.operation(*args)
        if self.function is None or not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            return self.forward(*args)
        layout: list[tuple] = []
        outputs = self.function(args, layout, *tensors)
        return outputs if isinstance(outputs, Tensor) else tuple(_nest(outputs, layout[0]))


def run_backward(operation: Callable, launcher: Callable, *args: Any) -> Any:
    """What ``operation(*args)`` gives, by its launcher where nobody sees it; under ``create_graph`` autograd does."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _watched() or not _plain(_flat(args)):
        return operation(*args)
    return launcher(*args)


def _watched() -> bool:
    """Whether something beside autograd sees which operations run."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def _function(name: str, forward: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """The operation for autograd, which sees the tensors alone: arguments and outputs may be lists of them."""

    def run(ctx, args, layout, *tensors):
        inputs = _layout(args)
        ctx.needs_input_grad = tuple(_nest(ctx.needs_input_grad[2:], inputs))
        outputs = forward(*args)
        setup_context(ctx, args, outputs)
        ctx.layouts = inputs, _layout(outputs)
        layout.append(ctx.layouts[1])
        return outputs if isinstance(outputs, Tensor) else tuple(_flat(outputs))

    def back(ctx, *grads):
        inputs, outputs = ctx.layouts
        found = backward(ctx, *_nest(grads, outputs))
        return None, None, *(x for part, size in zip(found, inputs, strict=True) for x in _entries(part, size))

    return type(name, (Function,), {"forward": staticmethod(run), "backward": staticmethod(back)}).apply


def _flat(args: Sequence[Any]) -> list[Tensor]:
    """The tensors among arguments, and in the lists among them."""
    found = []
    for x in args:
        if isinstance(x, Tensor):
            found.append(x)
        elif type(x) is list:
            found += [t for t in x if isinstance(t, Tensor)]
    return found


def _layout(args: Any) -> tuple[int | None, ...]:
    """How `_flat` found them: 1 a tensor, None what is none, and a list's length below zero (-1 is empty)."""
    if isinstance(args, Tensor):
        return (1,)
    return tuple(
        1 if isinstance(x, Tensor) else ~len(x) if type(x) is list and all(isinstance(t, Tensor) for t in x) else None
        for x in args
    )


def _nest(flat: Sequence[Any], layout: tuple[int | None, ...]) -> list[Any]:
    """What `_flat` took apart; None for what is no tensor."""
    rest = iter(flat)
    return [
        None if size is None else next(rest) if size == 1 else [next(rest) for _ in range(~size)] for size in layout
    ]


def _entries(part: Any, size: int | None) -> Sequence[Any]:
    return () if size is None else (part,) if size == 1 else part


def _plain(tensors: Sequence[Tensor]) -> bool:
    return all(type(x) in PLAIN for x in tensors)
