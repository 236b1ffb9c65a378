# SPDX-License-Identifier: Apache-2.0
"""`merge_states`: attention over a union of key sets from attention over each set (identity I1)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops import reference
from fastprompt.ops.checks import check_device, check_tensor
from fastprompt.ops.dispatch import LIBRARY, Choice, choose

LIBRARY.define("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)")
# A composite: PyTorch traces, differentiates and compiles the reference itself.
LIBRARY.impl("merge_states", reference.merge_states, "CompositeImplicitAutograd")


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint key sets into attention over their union.

    ``lse = log(exp(lse_a) + exp(lse_b))``, ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``: associative and
    commutative; a side with no keys is ``(0, -inf)``.

    Args:
        out_a: ``[..., D]``, float.
        lse_a: ``[...]``, natural log, float32 (float64 for float64 outputs); +inf is not an empty side (map it to
            -inf first where a library marks empty rows so).
        out_b: Like ``out_a``.
        lse_b: Like ``lse_a``.
        impl: ``"auto"``, or ``"reference"``, ``"triton"``, ``"cpp"``, which never fall back.

    Returns:
        ``(out, lse)`` in the shapes and dtypes of the inputs; differentiable in all four.

    Raises:
        TypeError: wrong type or mixed dtypes.
        ValueError: shapes or devices that do not match.
        ImplUnavailableError: an explicit ``impl`` cannot run these inputs.

    Example:
        >>> import torch
        >>> from fastprompt.ops import merge_states
        >>> out, lse = torch.ones(2, 3), torch.zeros(2)
        >>> merge_states(out, lse, 3 * out, lse)[0]
        tensor([[2., 2., 2.],
                [2., 2., 2.]])

    The algebra of cascade and Hydragen attention: https://arxiv.org/abs/2402.05099.
    """
    _check(out_a, lse_a, out_b, lse_b)
    choose("merge_states", (out_a,), impl)
    return torch.ops.fastprompt.merge_states(out_a, lse_a, out_b, lse_b)


def _resolve(out_a, lse_a, out_b, lse_b, *, impl="auto") -> Choice:
    _check(out_a, lse_a, out_b, lse_b)
    return choose("merge_states", (out_a,), impl)


merge_states.resolve = _resolve  # type: ignore[attr-defined]


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    tensors = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in tensors.items():
        check_tensor(name, x)
    check_device(**tensors)
    lse_dtype = torch.promote_types(out_a.dtype, torch.float32)
    for name, x in tensors.items():
        dtype, shape = (lse_dtype, out_a.shape[:-1]) if name.startswith("lse") else (out_a.dtype, out_a.shape)
        if x.dtype != dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {dtype} beside out_a in {out_a.dtype}")
        if x.shape != shape:
            raise ValueError(
                f"{name}: got shape {list(x.shape)}, expected {list(shape)} beside out_a {list(out_a.shape)}"
            )
