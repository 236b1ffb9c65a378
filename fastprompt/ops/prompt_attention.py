# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention`: one softmax over prompt keys that a batch shares and the keys of each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops import reference
from fastprompt.ops.checks import check_attention, check_attn_mask, check_index, check_scale, without_autocast
from fastprompt.ops.cuda import wins
from fastprompt.ops.direct import Direct, run_backward
from fastprompt.ops.dispatch import LIBRARY, Choice, backend, choose
from fastprompt.ops.layouts import empty_grads

LIBRARY.define(
    "prompt_attention(Tensor query, Tensor key, Tensor value, Tensor prompt_key, Tensor prompt_value, "
    "Tensor? prompt_index, Tensor? attn_mask, bool is_causal, float scale, str impl) -> (Tensor out, Tensor lse)"
)
LIBRARY.define(
    "prompt_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor prompt_key, Tensor prompt_value, Tensor? prompt_index, Tensor? attn_mask, Tensor out, Tensor lse, "
    "bool is_causal, float scale, bool[5] needs, str impl) -> Tensor[]"
)


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    prompt_index: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend over prompts and instance keys in one softmax, without copying a prompt for every sample.

    ``out = softmax(scale * q [K_p; K]^T + [0; mask]) [V_p; V]``: every query sees every prompt key; masks and
    causality apply to instance keys alone. B batch, Hq query heads, Hkv key heads (``Hq % Hkv == 0``; query head h
    reads key head ``h // (Hq / Hkv)``), Tq queries, Tk instance keys, P prompts, D head size, G prompts in a bank.

    Args:
        query: ``[B,Hq,Tq,D]``, any strides.
        key: ``[B,Hkv,Tk,D]``.
        value: ``[B,Hkv,Tk,D]``.
        prompt_key: ``[Hkv,P,D]`` or ``[G,Hkv,P,D]``: G=1 is shared by the batch, G=B is one a sample. May be float32
            beside half-precision queries (cast inside; its gradient returns in float32).
        prompt_value: Like ``prompt_key``.
        prompt_index: int64 ``[B]``, values in ``[0, G)``: which prompt of the bank a sample reads. Values are checked
            on CPU; on a GPU only with ``FASTPROMPT_DEBUG=1``, since reading them would wait for the device.
        attn_mask: bool (True = may attend) or additive float, broadcastable to ``[B,Hq,Tq,Tk]``; gets no gradient.
            Hide keys with False or -inf: where a row sees nothing but huge finite values such as -1e30, float32 cannot
            hold its lse, and implementations differ.
        is_causal: Query i sees instance key ``j <= i + Tk - Tq`` (bottom-right aligned).
        scale: Softmax scale; None means ``D ** -0.5``.
        return_lse: Also return the natural-log sum of exponentials of the scaled scores.
        impl: ``"auto"``, or ``"reference"``, ``"triton"``, ``"cpp"``, which never fall back.

    Returns:
        ``out [B,Hq,Tq,D]`` in the query dtype, or ``(out, lse)`` with ``lse [B,Hq,Tq]`` in float32 (float64 for float64
        inputs). A row with nothing to attend gives 0 and -inf. Differentiable in the five tensors and through ``lse``;
        gradients of prompts are accumulated in float32 over batch and rows and cast once.

    Raises:
        TypeError: wrong type or mixed dtypes.
        ValueError: wrong rank, shape, device, scale or index.
        ImplUnavailableError: an explicit ``impl`` cannot run these inputs.

    Example:
        >>> import torch
        >>> from fastprompt.ops import prompt_attention
        >>> q = k = v = torch.randn(2, 4, 7, 16)
        >>> prompt = torch.randn(4, 3, 16)
        >>> prompt_attention(q, k, v, prompt, prompt).shape
        torch.Size([2, 4, 7, 16])

    The maths is that of deep visual prompts and prefix tuning: https://arxiv.org/abs/2203.12119,
    https://arxiv.org/abs/2101.00190.
    """
    args = _prepare(query, key, value, prompt_key, prompt_value, prompt_index, attn_mask, is_causal, scale)
    chosen = _choose(args, impl).impl
    if chosen == "reference":
        with without_autocast(query.device.type):
            out, lse = reference.prompt_attention(*args)
    else:
        out, lse = _run(*args, chosen)
    return (out, lse) if return_lse else out


def _resolve(query, key, value, prompt_key, prompt_value, *, impl="auto", return_lse=False, **kwargs) -> Choice:
    kwargs = {"prompt_index": None, "attn_mask": None, "is_causal": False, "scale": None, **kwargs}
    return _choose(_prepare(query, key, value, prompt_key, prompt_value, **kwargs), impl)


prompt_attention.resolve = _resolve  # type: ignore[attr-defined]


def _choose(args: tuple, impl: str) -> Choice:
    """What runs the prepared arguments."""
    return choose("prompt_attention", args[:5], impl, composed=True, win=wins.find(args[:5], *args[6:]))


def _prepare(query, key, value, prompt_key, prompt_value, prompt_index, attn_mask, is_causal, scale):
    """Check everything, apply autocast, and give prompts their bank axis."""
    tensors = check_attention(
        query, key, value, prompt_key, prompt_value, "[B,H,T,D]", prompt_index=prompt_index, attn_mask=attn_mask
    )
    query, key, value, prompt_key, prompt_value = tensors
    batch, heads, tq, dim = query.shape
    check_index(prompt_index, batch, prompt_key.shape[0])
    full, note = (batch, heads, tq, key.shape[2]), "; prompt keys are always visible and take no mask column"
    attn_mask = check_attn_mask("attn_mask", attn_mask, full, note)
    return *tensors, prompt_index, attn_mask, bool(is_causal), check_scale(scale, dim)


def _forward(*args):
    return backend("prompt_attention", args[-1]).forward(*args[:-1])


def _backward(*args):
    return backend("prompt_attention", args[-1]).backward(*args[:-1])


LIBRARY.impl("prompt_attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("prompt_attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastprompt::prompt_attention", lib=LIBRARY)
def _fake(query, *_):
    batch, heads, tq, dim = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(batch, tq, heads, dim).transpose(1, 2), query.new_empty(batch, heads, tq, dtype=dtype)


@torch.library.register_fake("fastprompt::prompt_attention_backward", lib=LIBRARY)
def _fake_backward(grad_out, grad_lse, query, key, value, prompt_key, prompt_value, *rest):
    return empty_grads((query, key, value, prompt_key, prompt_value), *rest[-2:])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.is_causal, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, grad_lse):
    needs = list(ctx.needs_input_grad[:5])
    *inputs, out, lse = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 10
    if any(needs) and not (grad_out is None and grad_lse is None):
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        args = (grad_out, grad_lse, *inputs, out, lse, ctx.is_causal, ctx.scale, needs, ctx.impl)
        found = iter(run_backward(torch.ops.fastprompt.prompt_attention_backward, _backward, *args))
        grads[:5] = [next(found) if need else None for need in needs]
    return tuple(grads)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "prompt_attention: the fast implementations have no second derivative; use impl='reference' for it"
    )


torch.library.register_autograd("fastprompt::prompt_attention", _autograd, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("fastprompt::prompt_attention_backward", _no_second_derivative, lib=LIBRARY)
_run = Direct("prompt_attention", _forward, _setup_context, _autograd)
