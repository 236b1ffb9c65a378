# SPDX-License-Identifier: Apache-2.0
"""`summarize_tokens`: learned selectors pool the tokens of a sample into a few summaries (MULTI-LANE)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt import config
from fastprompt.ops import reference
from fastprompt.ops.checks import (
    autocast,
    check_device,
    check_dtypes,
    check_finite,
    check_scale,
    check_tensor,
    without_autocast,
)
from fastprompt.ops.direct import Direct, run_backward
from fastprompt.ops.dispatch import LIBRARY, Choice, backend, choose

LIBRARY.define("summarize_tokens(Tensor selectors, Tensor x, float scale, str impl) -> (Tensor out, Tensor lse)")
LIBRARY.define(
    "summarize_tokens_backward(Tensor grad_out, Tensor selectors, Tensor x, Tensor out, Tensor lse, float scale, "
    "bool[2] needs, str impl) -> Tensor[]"
)


def summarize_tokens(selectors: Tensor, x: Tensor, *, scale: float | None = None, impl: str = "auto") -> Tensor:
    """Pool the tokens of every sample into a few summaries, once for every task.

    ``u[t,b,s] = sum_n softmax_n(scale * selectors[t,s] . x[b,n]) x[b,n]``: attention with one head over the full width,
    whose queries the batch shares and whose keys and values are the tokens themselves. T tasks, S summaries a task, B
    batch, N tokens, C width.

    Args:
        selectors: ``[T,S,C]``; may be float32 beside half-precision ``x``: then its gradient returns in float32.
        x: ``[B,N,C]``, any strides.
        scale: Softmax scale; None means ``C ** -0.5``, of the full width.
        impl: ``"auto"``, or ``"reference"``, ``"triton"``, ``"cpp"``, which never fall back.

    Returns:
        ``[T,B,S,C]`` in the dtype of ``x``, contiguous; zeros where there are no tokens. Differentiable in both
        tensors (detach ``x`` where it comes from a frozen model, as `fastprompt.TaskPathways` does); the gradient of
        the selectors is accumulated in float32 over batch and tokens and cast once. Nothing of size ``[T,B,S,N]`` is
        kept for the backward.

    Raises:
        TypeError: wrong type or mixed dtypes.
        ValueError: wrong rank, shape, device or scale.
        ImplUnavailableError: an explicit ``impl`` cannot run these inputs.

    Example:
        >>> import torch
        >>> from fastprompt.ops import summarize_tokens
        >>> summarize_tokens(torch.randn(2, 3, 16), torch.randn(4, 9, 16)).shape
        torch.Size([2, 4, 3, 16])

    The token summaries of MULTI-LANE: https://arxiv.org/abs/2405.15633.
    """
    selectors, x, scale = _prepare(selectors, x, scale)
    chosen = choose("summarize_tokens", (x,), impl, composed=True).impl
    with without_autocast(x.device.type):
        if chosen == "reference":
            return reference.summarize_tokens(selectors, x, scale)
        return _run(selectors, x, scale, chosen)[0]


def _resolve(selectors, x, *, scale=None, impl="auto") -> Choice:
    _, x, _ = _prepare(selectors, x, scale)
    return choose("summarize_tokens", (x,), impl, composed=True)


summarize_tokens.resolve = _resolve  # type: ignore[attr-defined]


def _prepare(selectors, x, scale) -> tuple[Tensor, Tensor, float]:
    """Check everything and apply autocast."""
    for name, tensor, layout in (("selectors", selectors, "[T,S,C]"), ("x", x, "[B,N,C]")):
        check_tensor(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name}: got rank {tensor.dim()} (shape {list(tensor.shape)}), expected {layout}")
    check_device(x=x, selectors=selectors)
    if selectors.shape[2] != x.shape[2]:
        raise ValueError(
            f"selectors: got shape {list(selectors.shape)}, expected [T,S,{x.shape[2]}] to match x {list(x.shape)}"
        )
    scale = check_scale(scale, x.shape[2])
    (x,) = autocast(x)
    selectors = selectors if selectors.dtype == torch.float32 else autocast(selectors)[0]
    check_dtypes(("x", "selectors"), (x, selectors), prompts=("selectors",))
    if config.DEBUG and not torch.compiler.is_compiling():
        check_finite(selectors, name="selectors")
    return selectors, x, scale


def _forward(*args):
    return backend("summarize_tokens", args[-1]).forward(*args[:-1])


def _backward(*args):
    return backend("summarize_tokens", args[-1]).backward(*args[:-1])


LIBRARY.impl("summarize_tokens", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("summarize_tokens_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastprompt::summarize_tokens", lib=LIBRARY)
def _fake(selectors, x, *_):
    tasks, count, width = selectors.shape
    shape = (tasks, len(x), count)
    return x.new_empty(*shape, width), x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.register_fake("fastprompt::summarize_tokens_backward", lib=LIBRARY)
def _fake_backward(grad_out, selectors, x, out, lse, scale, needs, impl):
    return [like.new_empty(like.shape) for like, need in zip((selectors, x), needs, strict=True) if need]


def _setup_context(ctx, inputs, output):
    selectors, x, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(selectors, x, *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, grad_lse):
    needs = list(ctx.needs_input_grad[:2])
    if grad_out is None or not any(needs):
        return None, None, None, None
    args = (grad_out, *ctx.saved_tensors, ctx.scale, needs, ctx.impl)
    found = iter(run_backward(torch.ops.fastprompt.summarize_tokens_backward, _backward, *args))
    return *(next(found) if need else None for need in needs), None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "summarize_tokens: the fast implementations have no second derivative; use impl='reference' for it"
    )


torch.library.register_autograd("fastprompt::summarize_tokens", _autograd, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("fastprompt::summarize_tokens_backward", _no_second_derivative, lib=LIBRARY)
_run = Direct("summarize_tokens", _forward, _setup_context, _autograd)
