# SPDX-License-Identifier: Apache-2.0
"""`key_scores`: how much attention every key receives, without the attention matrix (identity I4)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops import reference
from fastprompt.ops.checks import autocast, check_device, check_dtypes, check_scale, check_tensor, without_autocast
from fastprompt.ops.direct import Direct
from fastprompt.ops.dispatch import LIBRARY, Choice, backend, choose

NORMALIZE = ("none", "visible")
REDUCE = ("mean", "sum", "max")

LIBRARY.define(
    "key_scores(Tensor query, Tensor key, Tensor lse, Tensor? query_mask, Tensor? key_mask, bool is_causal, "
    "int query_start, float scale, str normalize, str group_reduce, str impl) -> Tensor"
)


def key_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    is_causal: bool = True,
    query_start: int = 0,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    normalize: str = "none",
    group_reduce: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Column sums of the softmax that a forward pass has computed: the attention that each key has received.

    ``c[b,h,j] = sum_i exp(scale * q_i k_j - lse_i)`` over the counted rows i that may see key j, for every query head
    h; then one number for the query heads of a key head. A second sweep over the scores, with the row sums known:
    nothing of size ``Tq x Tk`` is stored. B batch, Hq query heads, Hkv key heads (``Hq % Hkv == 0``; query head h
    reads key head ``h // (Hq / Hkv)``), Tq queries, Tk keys, D head size.

    Args:
        query: ``[B,Hq,Tq,D]``, as it entered attention (rotated).
        key: ``[B,Hkv,Tk,D]``, likewise.
        lse: ``[B,Hq,Tq]``, the natural log of each row's sum of exponentials, float32 (float64 for float64 inputs), as
            `prompt_attention` returns it. A row with -inf has seen nothing and counts for no sum.
        is_causal: Query i sees key ``j <= i + Tk - Tq`` (bottom-right aligned).
        query_start: Rows from here on are counted: 0 for all, ``Tq - w`` for the last w.
        query_mask: bool ``[B,Tq]``, True for rows to count (text alone, say; no padding).
        key_mask: bool ``[B,Tk]``; keys with False score 0. Rows' sums are as ``lse`` says, whatever the mask.
        scale: Softmax scale of the forward pass; None means ``D ** -0.5``.
        normalize: ``"visible"`` divides by the number of rows that ``query_start``, ``query_mask`` and ``is_causal``
            let count for key j (none: 0), so that early keys are not favoured; ``"none"`` keeps sums.
        group_reduce: ``"mean"``, ``"sum"`` or ``"max"`` of the query heads of a key head.
        impl: ``"auto"``, or ``"reference"``, ``"triton"``, ``"cpp"``, which never fall back.

    Returns:
        ``[B,Hkv,Tk]``, float32 (float64 for float64 inputs), without gradient.

    Raises:
        TypeError: wrong type or mixed dtypes.
        ValueError: wrong rank, shape, device, scale, or option.
        ImplUnavailableError: an explicit ``impl`` cannot run these inputs.

    Example:
        >>> import torch
        >>> from fastprompt.ops import key_scores
        >>> x = torch.randn(1, 2, 5, 8)
        >>> lse = (x @ x.mT * 8**-0.5).logsumexp(-1)
        >>> scores = key_scores(x, x, lse, is_causal=False)
        >>> round(scores.sum().item(), 4)  # every row of both heads gives away 1
        10.0

    The scores of H2O (https://arxiv.org/abs/2306.14048), SnapKV (https://arxiv.org/abs/2404.14469) and LOOK-M
    (https://arxiv.org/abs/2406.18139).
    """
    args = _prepare(query, key, lse, query_mask, key_mask, is_causal, query_start, scale, normalize, group_reduce)
    chosen = choose("key_scores", args[:2], impl, composed=True).impl
    with torch.no_grad(), without_autocast(query.device.type):
        if chosen == "reference":
            return reference.key_scores(*args)
        return _run(*args, chosen)


def _resolve(
    query, key, lse, *, is_causal=True, query_start=0, query_mask=None, key_mask=None, scale=None, normalize="none",
    group_reduce="mean", impl="auto",
) -> Choice:  # fmt: skip
    args = _prepare(query, key, lse, query_mask, key_mask, is_causal, query_start, scale, normalize, group_reduce)
    return choose("key_scores", args[:2], impl, composed=True)


key_scores.resolve = _resolve  # type: ignore[attr-defined]


def _prepare(query, key, lse, query_mask, key_mask, is_causal, query_start, scale, normalize, group_reduce):
    """Check everything and apply autocast; the result carries no gradient."""
    tensors = {"query": query, "key": key, "lse": lse}
    for name, x in tensors.items():
        check_tensor(name, x)
        if x.dim() != (3 if name == "lse" else 4):
            layout = "[B,Hq,Tq]" if name == "lse" else "[B,H,T,D]"
            raise ValueError(f"{name}: got rank {x.dim()} (shape {list(x.shape)}), expected {layout}")
    check_device(**tensors, query_mask=query_mask, key_mask=key_mask)
    query, key = autocast(query.detach(), key.detach())
    check_dtypes(("query", "key"), (query, key))
    batch, heads, tq, dim = query.shape
    heads_kv, tk = key.shape[1:3]
    if key.shape != (batch, heads_kv, tk, dim):
        raise ValueError(
            f"key: got shape {list(key.shape)}, expected [{batch},Hkv,Tk,{dim}] to match query {list(query.shape)}"
        )
    if heads_kv == 0 or heads % heads_kv:
        raise ValueError(
            f"query: got {heads} heads for {heads_kv} key heads, expected a multiple (grouped-query attention)"
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    if lse.dtype != dtype:
        raise TypeError(f"lse: got dtype {lse.dtype}, expected {dtype} beside query in {query.dtype}")
    if lse.shape != (batch, heads, tq):
        raise ValueError(f"lse: got shape {list(lse.shape)}, expected {[batch, heads, tq]} to match query")
    check_mask("query_mask", query_mask, (batch, tq))
    check_mask("key_mask", key_mask, (batch, tk))
    if type(query_start) is not int or not 0 <= query_start <= tq:
        raise ValueError(f"query_start: got {query_start!r}, expected an integer from 0 to {tq}, the number of queries")
    for name, value, allowed in (("normalize", normalize, NORMALIZE), ("group_reduce", group_reduce, REDUCE)):
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")
    scale = check_scale(scale, dim)
    return query, key, lse.detach(), query_mask, key_mask, bool(is_causal), query_start, scale, normalize, group_reduce


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, int]) -> None:
    """A bool mask of ``shape``, or None."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: got dtype {mask.dtype}, expected torch.bool of shape {list(shape)}; use .bool()")
    if mask.shape != shape:
        raise ValueError(f"{name}: got shape {list(mask.shape)}, expected {list(shape)}")


def _forward(*args):
    return backend("key_scores", args[-1]).forward(*args[:-1])


LIBRARY.impl("key_scores", _forward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastprompt::key_scores", lib=LIBRARY)
def _fake(query, key, lse, *_):
    return lse.new_empty(key.shape[:3])


_run = Direct("key_scores", _forward)
