# SPDX-License-Identifier: Apache-2.0
"""`diffuse_prompts`: prompts that every token reads after attention, without entering its softmax (APT)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt import config
from fastprompt.ops import reference
from fastprompt.ops.checks import autocast, check_device, check_dtypes, check_finite, check_tensor, without_autocast
from fastprompt.ops.direct import Direct, run_backward
from fastprompt.ops.dispatch import LIBRARY, Choice, backend, choose

ACTIVATIONS = ("relu", "softmax")
WEIGHTS = ("rowmax", "none")
NAMES = ("x", "base", "prompts", "down", "up", "log_scale")
LAYOUTS = {"x": "[B,N,C]", "base": "[B,N,C]", "prompts": "[P,C]", "down": "[r,C]", "up": "[C,r]"}

LIBRARY.define(
    "diffuse_prompts(Tensor x, Tensor base, Tensor prompts, Tensor keys, Tensor log_scale, str activation, "
    "str weight, str impl) -> Tensor"
)
LIBRARY.define(
    "diffuse_prompts_backward(Tensor grad_out, Tensor x, Tensor? base, Tensor prompts, Tensor keys, Tensor log_scale, "
    "str activation, str weight, bool[5] needs, str impl) -> Tensor[]"
)


def diffuse_prompts(
    x: Tensor,
    base: Tensor,
    prompts: Tensor,
    down: Tensor,
    up: Tensor,
    log_scale: Tensor,
    *,
    activation: str = "relu",
    weight: str = "rowmax",
    impl: str = "auto",
) -> Tensor:
    """Add to the output of a layer what its tokens read from shared prompts: approximated prompt tuning as released.

    ``out = exp(log_scale) * (base + m * (a prompts))`` with keys ``K = prompts + (prompts down^T) up^T``, computed once
    a call, activations ``a = act(x K^T)`` and a weight a token, ``m = max_j a_j``, that counts as a constant in the
    backward. One head over the full width, no ``C ** -0.5``. B batch, N tokens, C width, P prompts (0 gives
    ``exp(log_scale) * base``), r rank of the key map.

    Args:
        x: ``[B,N,C]``, what the attention layer read, any strides.
        base: ``[B,N,C]``, what it gave after its output projection.
        prompts: ``[P,C]``. Like the three that follow, it may be float32 beside half-precision ``x``: keys are computed
            in float32, rounded once, and gradients return in float32.
        down: ``[r,C]``, the map from width to rank.
        up: ``[C,r]``, and back; zeros make keys and prompts the same.
        log_scale: One number, ``[]`` or ``[1]``.
        activation: ``"relu"``, as released; ``"softmax"`` over prompts.
        weight: ``"rowmax"``, as released; ``"none"`` for m = 1.
        impl: ``"auto"``, or ``"reference"``, ``"triton"``, ``"cpp"``, which never fall back.

    Returns:
        ``[B,N,C]`` in the dtype of ``x``, contiguous. Differentiable in the six tensors; nothing of size ``[B,N,P]`` is
        kept for the backward, ``base`` only where ``log_scale`` needs a gradient. Gradients of prompts and of the key
        map are accumulated in float32 over batch and tokens and cast once. Where a score is 0, ReLU's derivative is 0.

    Raises:
        TypeError: wrong type or mixed dtypes.
        ValueError: wrong rank, shape, device or option.
        ImplUnavailableError: an explicit ``impl`` cannot run these inputs.

    Example:
        >>> import torch
        >>> from fastprompt.ops import diffuse_prompts
        >>> x, base = torch.randn(2, 2, 7, 16)
        >>> prompts, down, up = torch.randn(3, 16), torch.randn(4, 16), torch.zeros(16, 4)
        >>> diffuse_prompts(x, base, prompts, down, up, torch.zeros(())).shape
        torch.Size([2, 7, 16])

    Approximated prompt tuning: https://arxiv.org/abs/2306.15706; ReLU and the row maximum are those of its code.
    """
    x, base, *learned, log_scale = _prepare(x, base, prompts, down, up, log_scale, activation, weight)
    with without_autocast(x.device.type):
        keys = prompt_keys(*learned)
    return diffuse(x, base, learned[0], keys, log_scale, activation=activation, weight=weight, impl=impl)


def diffuse(
    x: Tensor,
    base: Tensor,
    values: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    *,
    activation: str = "relu",
    weight: str = "rowmax",
    impl: str = "auto",
) -> Tensor:
    """`diffuse_prompts` for keys ``[P,C]`` at hand and values ``[P,C]`` that need not be the prompts."""
    x, base = autocast(x, base)
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    chosen = choose("diffuse_prompts", (x, values), impl, composed=True).impl
    with without_autocast(x.device.type):
        arguments = (x, base, values.to(keys.dtype), keys, log_scale.to(keys.dtype).reshape(()), activation, weight)
        if chosen == "reference":
            return reference.diffuse_prompts(*arguments)
        return _run(*arguments, chosen)


def _resolve(
    x, base, prompts, down, up, log_scale, *, activation="relu", weight="rowmax", impl="auto"
) -> Choice:  # fmt: skip
    inputs = _prepare(x, base, prompts, down, up, log_scale, activation, weight)
    return choose("diffuse_prompts", inputs[:3:2], impl, composed=True)


diffuse_prompts.resolve = _resolve  # type: ignore[attr-defined]


def prompt_keys(prompts: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Keys ``[...,P,C]`` of prompts, of one layer or of many: ``prompts + (prompts down^T) up^T``, in float32 (float64
    for float64 prompts).
    """
    prompts, down, up = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in (prompts, down, up))
    multiply = torch.addmm if prompts.dim() == 2 else torch.baddbmm
    return multiply(prompts, prompts @ down.mT, up.mT)


def _prepare(x, base, prompts, down, up, log_scale, activation, weight) -> tuple[Tensor, ...]:
    """Check everything and apply autocast."""
    tensors = (x, base, prompts, down, up, log_scale)
    named = dict(zip(NAMES, tensors, strict=True))
    for name, tensor in named.items():
        check_tensor(name, tensor)
    for name, layout in LAYOUTS.items():
        if named[name].dim() != layout.count(",") + 1:
            raise ValueError(
                f"{name}: got rank {named[name].dim()} (shape {list(named[name].shape)}), expected {layout}"
            )
    check_device(**named)
    width = x.shape[2]
    rank, count = down.shape[0], prompts.shape[0]
    shapes = {"base": list(x.shape), "prompts": [count, width], "down": [rank, width], "up": [width, rank]}
    for name, shape in shapes.items():
        if list(named[name].shape) != shape:
            also = f" and down {list(down.shape)}" if name == "up" else ""
            raise ValueError(
                f"{name}: got shape {list(named[name].shape)}, expected {shape} to match x {list(x.shape)}{also}"
            )
    if log_scale.shape not in ((), (1,)):
        raise ValueError(f"log_scale: got shape {list(log_scale.shape)}, expected one number, [] or [1]")
    for name, value, allowed in (("activation", activation, ACTIVATIONS), ("weight", weight, WEIGHTS)):
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")
    learned = (p if p.dtype == torch.float32 else autocast(p)[0] for p in tensors[2:])
    cast = (*autocast(x, base), *learned)
    check_dtypes(NAMES, cast, prompts=NAMES[2:])
    if config.DEBUG and not torch.compiler.is_compiling():
        check_finite(prompts)
    return cast


def _forward(*args):
    return backend("diffuse_prompts", args[-1]).forward(*args[:-1])


def _backward(*args):
    return backend("diffuse_prompts", args[-1]).backward(*args[:-1])


LIBRARY.impl("diffuse_prompts", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("diffuse_prompts_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastprompt::diffuse_prompts", lib=LIBRARY)
def _fake(x, *_):
    return x.new_empty(x.shape)


@torch.library.register_fake("fastprompt::diffuse_prompts_backward", lib=LIBRARY)
def _fake_backward(grad_out, x, base, prompts, keys, log_scale, activation, weight, needs, impl):
    return [
        like.new_empty(like.shape) for like, need in zip((x, x, prompts, keys, log_scale), needs, strict=True) if need
    ]


def _setup_context(ctx, inputs, output):
    x, base, *others, ctx.activation, ctx.weight, ctx.impl = inputs
    # The gradient of base is exp(log_scale) times that of out: base itself matters for log_scale alone.
    ctx.save_for_backward(x, base if ctx.needs_input_grad[4] else None, *others)


def _autograd(ctx, grad_out):
    needs = list(ctx.needs_input_grad[:5])
    args = (grad_out, *ctx.saved_tensors, ctx.activation, ctx.weight, needs, ctx.impl)
    found = iter(run_backward(torch.ops.fastprompt.diffuse_prompts_backward, _backward, *args))
    return *(next(found) if need else None for need in needs), None, None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "diffuse_prompts: the fast implementations have no second derivative; use impl='reference' for it"
    )


torch.library.register_autograd("fastprompt::diffuse_prompts", _autograd, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("fastprompt::diffuse_prompts_backward", _no_second_derivative, lib=LIBRARY)
_run = Direct("diffuse_prompts", _forward, _setup_context, _autograd)
