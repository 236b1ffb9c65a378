# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention_varlen`: prompt attention over sequences of any lengths, packed without padding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops import reference
from fastprompt.ops.checks import (
    check_attention,
    check_index,
    check_scale,
    has_values,
    readable,
    without_autocast,
)
from fastprompt.ops.direct import Direct, run_backward
from fastprompt.ops.dispatch import LIBRARY, Choice, backend, choose
from fastprompt.ops.layouts import empty_grads

LIBRARY.define(
    "prompt_attention_varlen(Tensor query, Tensor key, Tensor value, Tensor prompt_key, Tensor prompt_value, "
    "Tensor cu_seqlens, Tensor? prompt_index, SymInt max_seqlen, bool is_causal, float scale, str impl) "
    "-> (Tensor out, Tensor lse)"
)
LIBRARY.define(
    "prompt_attention_varlen_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor prompt_key, Tensor prompt_value, Tensor cu_seqlens, Tensor? prompt_index, Tensor out, Tensor lse, "
    "SymInt max_seqlen, bool is_causal, float scale, bool[5] needs, str impl) -> Tensor[]"
)


def prompt_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    prompt_index: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend over prompts and the keys of one's own sequence, in sequences packed one after the other.

    For the rows i of sequence s, ``cu_seqlens[s] <= i < cu_seqlens[s + 1]``:
    ``out_i = softmax(scale * q_i [K_p; K_s]^T) [V_p; V_s]``. Every row sees every key of its prompt; causality applies
    within the sequence. T rows in all, S sequences, Hq query heads, Hkv key heads (``Hq % Hkv == 0``; query head h
    reads key head ``h // (Hq / Hkv)``), P prompts, D head size, G prompts in a bank.

    CoOp's classes are the sequences and its context their shared prompt (G=1); CoCoOp has images times classes
    sequences and one prompt an image.

    Args:
        query: ``[T,Hq,D]``, any strides.
        key: ``[T,Hkv,D]``.
        value: ``[T,Hkv,D]``.
        prompt_key: ``[Hkv,P,D]`` or ``[G,Hkv,P,D]``: G=1 is shared by all, G=S is one a sequence. May be float32 beside
            half-precision queries (cast inside; its gradient returns in float32).
        prompt_value: Like ``prompt_key``.
        cu_seqlens: int32 ``[S+1]``, from 0 to T: where each sequence begins, and the end. No sequence is empty. Values
            are checked on CPU; on a GPU only with ``FASTPROMPT_DEBUG=1``, since reading them would wait for the device.
        max_seqlen: Rows of the longest sequence, or more. None reads it from ``cu_seqlens``, which on a GPU waits for
            the device: pass it there. Under ``torch.compile`` None means T.
        prompt_index: int64 ``[S]``, values in ``[0, G)``: which prompt of the bank a sequence reads; checked where
            ``cu_seqlens`` is.
        is_causal: Row i of a sequence sees its instance keys ``j <= i``.
        scale: Softmax scale; None means ``D ** -0.5``.
        return_lse: Also return the natural-log sum of exponentials of the scaled scores.
        impl: ``"auto"``, or ``"reference"``, ``"triton"``, ``"cpp"``, which never fall back.

    Returns:
        ``out [T,Hq,D]`` in the query dtype, or ``(out, lse)`` with ``lse [T,Hq]`` in float32 (float64 for float64
        inputs). Differentiable in the five tensors and through ``lse``; gradients of prompts are accumulated in float32
        over all sequences that read them, in fixed order, and cast once.

    Raises:
        TypeError: wrong type or mixed dtypes.
        ValueError: wrong rank, shape, device, scale or index; sequences that are empty or do not cover the rows.
        ImplUnavailableError: an explicit ``impl`` cannot run these inputs.

    Example:
        >>> import torch
        >>> from fastprompt.ops import prompt_attention_varlen
        >>> q = k = v = torch.randn(9, 4, 16)
        >>> prompt = torch.randn(4, 3, 16)
        >>> ends = torch.tensor([0, 2, 9], dtype=torch.int32)
        >>> prompt_attention_varlen(q, k, v, prompt, prompt, ends, is_causal=True).shape
        torch.Size([9, 4, 16])

    The prompts of CoOp and CoCoOp: https://arxiv.org/abs/2109.01134, https://arxiv.org/abs/2203.05557.
    """
    tensors = (query, key, value, prompt_key, prompt_value)
    args = _prepare(*tensors, cu_seqlens, prompt_index, max_seqlen, is_causal, scale)
    chosen = choose("prompt_attention_varlen", args[:5], impl, composed=True).impl
    if chosen == "reference":
        with without_autocast(query.device.type):
            out, lse = reference.prompt_attention_varlen(*args)
    else:
        out, lse = _run(*args, chosen)
    return (out, lse) if return_lse else out


def _resolve(
    query, key, value, prompt_key, prompt_value, cu_seqlens, *, impl="auto", return_lse=False, **kwargs
) -> Choice:
    kwargs = {"max_seqlen": None, "prompt_index": None, "is_causal": False, "scale": None, **kwargs}
    args = _prepare(query, key, value, prompt_key, prompt_value, cu_seqlens, **kwargs)
    return choose("prompt_attention_varlen", args[:5], impl, composed=True)


prompt_attention_varlen.resolve = _resolve  # type: ignore[attr-defined]


def _prepare(
    query, key, value, prompt_key, prompt_value, cu_seqlens, prompt_index, max_seqlen, is_causal, scale
):  # fmt: skip
    """Check everything, apply autocast, give prompts their bank axis and ``max_seqlen`` a value."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: got {type(cu_seqlens).__name__}, expected a torch.Tensor")
    tensors = check_attention(
        query, key, value, prompt_key, prompt_value, "[T,H,D]", cu_seqlens=cu_seqlens, prompt_index=prompt_index
    )
    rows, _, dim = query.shape
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: got dtype {cu_seqlens.dtype}, expected torch.int32; use .int()")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens: got shape {list(cu_seqlens.shape)}, expected [S+1]: where each of S sequences begins, "
            "and the end of the last"
        )
    sequences = cu_seqlens.shape[0] - 1
    if readable(cu_seqlens):
        _check_sequences(cu_seqlens, rows)
    max_seqlen = _longest(cu_seqlens, max_seqlen, rows, sequences)
    check_index(prompt_index, sequences, tensors[3].shape[0])
    return *tensors, cu_seqlens, prompt_index, max_seqlen, bool(is_causal), check_scale(scale, dim)


def _check_sequences(cu_seqlens: Tensor, rows: int) -> None:
    """The values of ``cu_seqlens``: from 0 to ``rows``, each sequence with at least one row."""
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != rows:
        raise ValueError(
            f"cu_seqlens: got {first} first and {last} last, expected 0 and {rows} (the rows of query): sequence s is "
            "rows cu_seqlens[s] to cu_seqlens[s + 1]"
        )
    wrong = torch.nonzero(cu_seqlens.diff() <= 0)
    if not len(wrong):
        return
    s = int(wrong[0])
    start, end = cu_seqlens[s : s + 2].tolist()
    if start > end:
        raise ValueError(f"cu_seqlens: got {start} before {end} at [{s}], expected increasing values")
    raise ValueError(f"cu_seqlens: got sequence {s} empty (rows {start} to {end}), expected at least one row; drop it")


def _longest(cu_seqlens: Tensor, max_seqlen: int | None, rows: int, sequences: int) -> int:
    """``max_seqlen`` checked, or its value where it is None."""
    if max_seqlen is None:
        return int(cu_seqlens.diff().max()) if sequences and has_values(cu_seqlens) else rows
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(f"max_seqlen: got {type(max_seqlen).__name__}, expected an int or None")
    if readable(cu_seqlens) and sequences:
        longest = int(cu_seqlens.diff().max())
        if max_seqlen < longest:
            raise ValueError(f"max_seqlen: got {max_seqlen}, expected at least {longest} (the longest sequence)")
    elif max_seqlen * sequences < rows or max_seqlen < 0:
        least = -(-rows // max(sequences, 1))
        raise ValueError(
            f"max_seqlen: got {max_seqlen}, expected at least {least}, since {sequences} sequences hold {rows} rows"
        )
    return max_seqlen


def _forward(*args):
    return backend("prompt_attention_varlen", args[-1]).forward(*args[:-1])


def _backward(*args):
    return backend("prompt_attention_varlen", args[-1]).backward(*args[:-1])


LIBRARY.impl("prompt_attention_varlen", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("prompt_attention_varlen_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastprompt::prompt_attention_varlen", lib=LIBRARY)
def _fake(query, *_):
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=dtype)


@torch.library.register_fake("fastprompt::prompt_attention_varlen_backward", lib=LIBRARY)
def _fake_backward(grad_out, grad_lse, query, key, value, prompt_key, prompt_value, *rest):
    return empty_grads((query, key, value, prompt_key, prompt_value), *rest[-2:])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.max_seqlen, ctx.is_causal, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, grad_lse):
    needs = list(ctx.needs_input_grad[:5])
    *inputs, out, lse = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 11
    if any(needs) and not (grad_out is None and grad_lse is None):
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        args = (grad_out, grad_lse, *inputs, out, lse, ctx.max_seqlen, ctx.is_causal, ctx.scale, needs, ctx.impl)
        found = iter(run_backward(torch.ops.fastprompt.prompt_attention_varlen_backward, _backward, *args))
        grads[:5] = [next(found) if need else None for need in needs]
    return tuple(grads)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "prompt_attention_varlen: the fast implementations have no second derivative; use impl='reference' for it"
    )


torch.library.register_autograd(
    "fastprompt::prompt_attention_varlen", _autograd, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd("fastprompt::prompt_attention_varlen_backward", _no_second_derivative, lib=LIBRARY)
_run = Direct("prompt_attention_varlen", _forward, _setup_context, _autograd)
