# SPDX-License-Identifier: Apache-2.0
"""`decoupled_attention`: separate softmaxes over separate key sets, added with weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastprompt.ops import reference
from fastprompt.ops.checks import (
    autocast,
    check_attn_mask,
    check_device,
    check_dtypes,
    check_scale,
    check_tensor,
    without_autocast,
)
from fastprompt.ops.direct import Direct, run_backward
from fastprompt.ops.dispatch import LIBRARY, Choice, backend, choose

# Lists hold the tensors there are, since PyTorch finds no gradient in a list with a None; ``weighted`` and ``masked``
# mark the branches they belong to.
_INPUTS = (
    "Tensor query, Tensor[] keys, Tensor[] values, Tensor[] weights, Tensor[] attn_masks, bool[] weighted, "
    "bool[] masked, float[] factors, bool[] is_causal, float scale"
)
LIBRARY.define(f"decoupled_attention({_INPUTS}, bool keep, str impl) -> (Tensor out, Tensor[] states)")
LIBRARY.define(
    f"decoupled_attention_backward(Tensor grad_out, {_INPUTS}, Tensor[] states, bool[] needs, str impl) -> Tensor[]"
)


def decoupled_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Sequence[float | Tensor],
    *,
    attn_masks: Sequence[Tensor | None] | None = None,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend over several key sets, each with a softmax of its own, and add the results with weights.

    ``out = sum_j weights[j] * softmax(scale * q k_j^T + mask_j) v_j``: branches do not compete for attention, and the
    weights need not sum to 1. B batch, Hq query heads, Hkv key heads (``Hq % Hkv == 0``; query head h reads key head
    ``h // (Hq / Hkv)``), Tq queries, T_j keys of branch j, D head size.

    Args:
        query: ``[B,Hq,Tq,D]``, any strides.
        keys: One ``[B,Hkv,T_j,D]`` a branch; ``[1,Hkv,T_j,D]`` is shared by the batch and never copied for a sample.
        values: Like ``keys``.
        weights: One number or tensor a branch. A tensor broadcasts to ``[B,Hq,Tq]`` (a learned scale, a gate, a lambda
            a head, a spatial mask), may be float32 beside half-precision queries, and gets a gradient, also where it
            is 0. A branch whose weight is the number 0 is not computed.
        attn_masks: None, or one mask or None a branch: bool (True = may attend) or additive float, broadcastable to
            ``[B,Hq,Tq,T_j]``; gets no gradient.
        is_causal: For all branches, or one a branch: query i sees key ``j <= i + T_j - Tq`` (bottom-right aligned).
        scale: Softmax scale; None means ``D ** -0.5``.
        impl: ``"auto"``, or ``"reference"``, ``"triton"``, ``"cpp"``, which never fall back.

    Returns:
        ``out [B,Hq,Tq,D]`` in the query dtype. Where a row has nothing to attend in a branch, that branch adds 0.
        Differentiable in the query and in every key, value and weight; gradients of shared keys and values, and of
        weights, are accumulated in float32 and cast once.

    Raises:
        TypeError: wrong type or mixed dtypes.
        ValueError: wrong number of branches, wrong rank, shape, device, weight or scale.
        ImplUnavailableError: an explicit ``impl`` cannot run these inputs.

    Example:
        >>> import torch
        >>> from fastprompt.ops import decoupled_attention
        >>> query, text, image = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 7, 16), torch.randn(1, 4, 3, 16)
        >>> decoupled_attention(query, [text, image], [text, image], [1.0, torch.tensor(0.6)]).shape
        torch.Size([2, 4, 9, 16])

    The maths of IP-Adapter's cross-attention, https://arxiv.org/abs/2308.06721, and of decoupled prompt learning,
    https://arxiv.org/abs/2308.10061.
    """
    args = _prepare(query, keys, values, weights, attn_masks, is_causal, scale)
    chosen = choose("decoupled_attention", args[:1], impl, composed=True).impl
    if chosen == "reference":
        with without_autocast(query.device.type):
            return reference.decoupled_attention(*args)
    query, keys, values, learned, factors, masks, causal, scale = args
    there = [[x for x in part if x is not None] for part in (learned, masks)]
    marks = [[x is not None for x in part] for part in (learned, masks)]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (query, *keys, *values, *there[0]))
    return _run(query, keys, values, *there, *marks, factors, causal, scale, keep, chosen)[0]


def _resolve(
    query, keys, values, weights, *, attn_masks=None, is_causal=False, scale=None, impl="auto"
) -> Choice:  # fmt: skip
    args = _prepare(query, keys, values, weights, attn_masks, is_causal, scale)
    return choose("decoupled_attention", args[:1], impl, composed=True)


decoupled_attention.resolve = _resolve  # type: ignore[attr-defined]


def _prepare(query, keys, values, weights, attn_masks, is_causal, scale):
    """Check everything, apply autocast, and part weights into tensors and numbers."""
    check_tensor("query", query)
    if query.dim() != 4:
        raise ValueError(f"query: got rank {query.dim()} (shape {list(query.shape)}), expected [B,Hq,Tq,D]")
    keys = _branches("keys", keys)
    if not keys:
        raise ValueError("keys: got no branch, expected at least one [B or 1,Hkv,T,D]")
    count = len(keys)
    values, weights = _branches("values", values, count), _branches("weights", weights, count)
    attn_masks = [None] * count if attn_masks is None else _branches("attn_masks", attn_masks, count)
    is_causal = [is_causal] * count if isinstance(is_causal, bool) else _branches("is_causal", is_causal, count)
    scale = check_scale(scale, query.shape[3])
    names = [f"{name}[{j}]" for name in ("keys", "values") for j in range(count)]
    for name, x in zip(names, keys + values, strict=True):
        check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name}: got rank {x.dim()} (shape {list(x.shape)}), expected [B or 1,Hkv,T,D]")
    weights = [_weight(f"weights[{j}]", w, query) for j, w in enumerate(weights)]
    learned, factors = [w for w, _ in weights], [f for _, f in weights]
    masks = {f"attn_masks[{j}]": x for j, x in enumerate(attn_masks)}
    others = {f"weights[{j}]": x for j, x in enumerate(learned)} | masks
    check_device(query=query, **dict(zip(names, keys + values, strict=True)), **others)
    query, *both = autocast(query, *keys, *values)
    check_dtypes(("query", *names), (query, *both))
    keys, values = both[:count], both[count:]
    _check_shapes(query, keys, values)
    learned = [w if w is None else _like(f"weights[{j}]", w, query) for j, w in enumerate(learned)]
    attn_masks = [
        check_attn_mask(name, mask, (*query.shape[:3], key.shape[2]))
        for (name, mask), key in zip(masks.items(), keys, strict=True)
    ]
    return query, keys, values, learned, factors, attn_masks, [bool(x) for x in is_causal], scale


def _branches(name: str, given: object, count: int | None = None) -> list:
    """A list of ``count`` branches."""
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name}: got {type(given).__name__}, expected a list or tuple with one entry a branch")
    if count is not None and len(given) != count:
        raise ValueError(f"{name}: got {len(given)} entries, expected {count}, one for each of keys")
    return list(given)


def _weight(name: str, weight: object, query: Tensor) -> tuple[Tensor | None, float]:
    """A weight as a tensor to differentiate, or None and a number."""
    if isinstance(weight, (int, float)):
        if not -math.inf < weight < math.inf:
            raise ValueError(f"{name}: got {weight!r}, expected a finite number or a tensor")
        return None, float(weight)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: got {type(weight).__name__}, expected a number or a torch.Tensor")
    check_tensor(name, weight)
    full = query.shape[:3]
    shape = (1,) * (3 - weight.dim()) + tuple(weight.shape)
    if len(shape) != 3 or any(got != 1 and got != want for got, want in zip(shape, full, strict=True)):
        raise ValueError(
            f"{name}: got shape {list(weight.shape)}, expected one that broadcasts to [B,Hq,Tq] = {list(full)}"
        )
    return weight, 1.0


def _like(name: str, weight: Tensor, query: Tensor) -> Tensor:
    """A weight under autocast, in the query's dtype or float32 beside half precision."""
    weight = weight if weight.dtype == torch.float32 and query.dtype != torch.float64 else autocast(weight)[0]
    check_dtypes(("query", name), (query, weight), prompts=(name,))
    return weight


def _check_shapes(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
    batch, heads, _, dim = query.shape
    heads_kv = keys[0].shape[1]
    for j, (key, value) in enumerate(zip(keys, values, strict=True)):
        # Not `in (1, batch)`: torch.compile takes a symbolic size and an equal constant for different there.
        fits = key.shape[0] == 1 or key.shape[0] == batch
        if not fits or key.shape[1] != heads_kv or key.shape[3] != dim:
            raise ValueError(
                f"keys[{j}]: got shape {list(key.shape)}, expected [{batch} or 1,{heads_kv},T,{dim}] to match query "
                f"{list(query.shape)}" + (" and keys[0]" if j else "")
            )
        if value.shape != key.shape:
            raise ValueError(f"values[{j}]: got shape {list(value.shape)}, expected {list(key.shape)} like keys[{j}]")
    if heads_kv == 0 or heads % heads_kv:
        raise ValueError(
            f"query: got {heads} heads for {heads_kv} key heads, expected a multiple (grouped-query attention)"
        )


def _by_branch(weights, attn_masks, weighted, masked):
    """Weights and masks with None where a branch has none."""
    parts = zip(map(iter, (weights, attn_masks)), (weighted, masked), strict=True)
    return [[next(there) if has else None for has in marks] for there, marks in parts]


def _forward(query, keys, values, weights, attn_masks, weighted, masked, factors, is_causal, scale, keep, impl):
    weights, attn_masks = _by_branch(weights, attn_masks, weighted, masked)
    run = backend("decoupled_attention", impl).forward
    return run(query, keys, values, weights, factors, attn_masks, is_causal, scale, keep)


def _backward(
    grad_out, query, keys, values, weights, attn_masks, weighted, masked, factors, is_causal, scale, states, needs, impl
):
    weights, attn_masks = _by_branch(weights, attn_masks, weighted, masked)
    run = backend("decoupled_attention", impl).backward
    return run(grad_out, query, keys, values, weights, factors, attn_masks, is_causal, scale, states, needs)


LIBRARY.impl("decoupled_attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("decoupled_attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastprompt::decoupled_attention", lib=LIBRARY)
def _fake(query, keys, values, weights, attn_masks, weighted, masked, factors, is_causal, scale, keep, impl):
    batch, heads, tq, dim = query.shape

    def out():
        return query.new_empty(batch, tq, heads, dim).transpose(1, 2)

    dtype = torch.promote_types(query.dtype, torch.float32)
    if impl == "triton":
        return out(), [query.new_empty(len(keys), batch, heads, tq, dtype=dtype)]
    # Branch by branch each leaves its log-sum-exp and its output, if there is a backward.
    if not keep or (impl == "cpp" and backend("decoupled_attention", impl).in_one_pass(keys, masked, is_causal)):
        return out(), []
    return out(), [query.new_empty(batch, heads, tq, dtype=dtype) for _ in keys] + [out() for _ in keys]


@torch.library.register_fake("fastprompt::decoupled_attention_backward", lib=LIBRARY)
def _fake_backward(grad_out, query, keys, values, weights, *rest):
    *_, needs, impl = rest
    # A sum over splits is written densely.
    dense = torch.contiguous_format if impl == "triton" else torch.preserve_format
    grads = [torch.empty_like(query), *(torch.empty_like(x, memory_format=dense) for x in (*keys, *values))]
    grads += [torch.empty_like(x) for x in weights]
    return [x for x, need in zip(grads, needs, strict=True) if need]


def _setup_context(ctx, inputs, output):
    query, *lists = inputs[:5]
    ctx.sizes, ctx.options = [len(x) for x in lists], inputs[5:]
    ctx.save_for_backward(query, *(x for part in lists for x in part), *output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, grad_states):
    needs = [ctx.needs_input_grad[0], *(need for part in ctx.needs_input_grad[1:4] for need in part)]
    found: list[Tensor | None] = [None] * len(needs)
    if any(needs) and grad_out is not None:
        query, *saved = ctx.saved_tensors
        *lists, states = _parts(saved, ctx.sizes)
        *options, _, impl = ctx.options
        args = (grad_out, query, *lists, *options, states, needs, impl)
        given = iter(run_backward(torch.ops.fastprompt.decoupled_attention_backward, _backward, *args))
        found = [next(given) if need else None for need in needs]
    *lists, _ = _parts(found[1:], ctx.sizes[:3])
    return found[0], *lists, [None] * ctx.sizes[3], *([None] * len(ctx.options))


def _parts(flat: Sequence, sizes: list[int]) -> list[list]:
    """A flat list cut into lists of ``sizes``, and the rest."""
    ends = list(accumulate(sizes, initial=0))
    return [list(flat[a:b]) for a, b in zip(ends, [*ends[1:], len(flat)], strict=True)]


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "decoupled_attention: the fast implementations have no second derivative; use impl='reference' for it"
    )


torch.library.register_autograd("fastprompt::decoupled_attention", _autograd, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("fastprompt::decoupled_attention_backward", _no_second_derivative, lib=LIBRARY)
_run = Direct("decoupled_attention", _forward, _setup_context, _autograd)
