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

#: Of every argument: 1 a tensor, None what is none, and below zero a list of tensors (-1 an empty one).
Layout = tuple[int | None, ...]


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
        tensors, layout = _apart(args)
        if not _plain(tensors):
            return self.operation(*args)
        if self.function is None or not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            return self.forward(*args)
        of_outputs: list[Layout] = []
        outputs = self.function(args, layout, of_outputs, *tensors)
        return outputs if isinstance(outputs, Tensor) else tuple(_nest(outputs, of_outputs[0]))


def run_backward(operation: Callable, launcher: Callable, *args: Any) -> Any:
    """What ``operation(*args)`` gives, by its launcher where nobody sees it; under ``create_graph`` autograd does."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _watched() or not _plain(_apart(args)[0]):
        return operation(*args)
    return launcher(*args)


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether memory holds what the tensors say: of ``z.conj().imag`` it holds the negative, which PyTorch's dispatcher
    resolves.
    """
    return PLAIN.issuperset(map(type, tensors)) and not any(map(Tensor.is_neg, tensors))


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

    def run(ctx, args, layout, of_outputs, *tensors):
        ctx.needs_input_grad = tuple(_nest(ctx.needs_input_grad[3:], layout))
        outputs = forward(*args)
        setup_context(ctx, args, outputs)
        found, its_layout = _apart((outputs,) if isinstance(outputs, Tensor) else outputs)
        ctx.layouts = layout, its_layout
        of_outputs.append(its_layout)
        return outputs if isinstance(outputs, Tensor) else tuple(found)

    def back(ctx, *grads):
        layout, of_outputs = ctx.layouts
        found: list[Any] = [None, None, None]
        for part, size in zip(backward(ctx, *_nest(grads, of_outputs)), layout, strict=True):
            if size == 1:
                found.append(part)
            elif size is not None:
                found += part
        return tuple(found)

    function: Any = type(name, (Function,), {"forward": staticmethod(run), "backward": staticmethod(back)})
    return function.apply


def _apart(args: Sequence[Any]) -> tuple[list[Tensor], Layout]:
    """The tensors among arguments and in the lists among them, and where they were."""
    tensors: list[Tensor] = []
    layout: list[int | None] = []
    for x in args:
        if isinstance(x, Tensor):
            tensors.append(x)
            layout.append(1)
        elif type(x) is list and all(isinstance(t, Tensor) for t in x):
            tensors += x
            layout.append(~len(x))
        else:
            layout.append(None)
    return tensors, tuple(layout)


def _nest(flat: Sequence[Any], layout: Layout) -> list[Any]:
    """What `_apart` took apart; None for what is no tensor."""
    rest = iter(flat)
    return [
        None if size is None else next(rest) if size == 1 else [next(rest) for _ in range(~size)] for size in layout
    ]
