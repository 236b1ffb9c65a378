# SPDX-License-Identifier: Apache-2.0
"""PyTorch's attention kernels for CUDA, output and lse: one signature for all, and what each cannot take.

``forward(query, key, value, is_causal, scale) -> (out, lse)``, with ``lse [B,Hq,Tq]``, and
``backward(grad_out, query, key, value, out, lse, is_causal, scale) -> (dq, dk, dv)``. The backward takes out and lse as
the state of a softmax that may run over further keys: weights are exp(scale q k - lse), delta is rowsum(dO * O).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastprompt.ops.layouts import like, plain_strides

_aten = torch.ops.aten

#: The efficient kernel keeps its lse for a multiple of so many rows, +inf where there is no row.
ALIGNED = 32

#: Before, cuDNN's attention is wrong where a length is no multiple of 128 (https://github.com/pytorch/pytorch/issues/169849).
CUDNN = 91501


class Library(NamedTuple):
    """One of PyTorch's attention kernels.

    Attributes:
        name: What PyTorch calls its backend.
        forward: See above.
        backward: See above.
        dtypes: What it takes,
        head_size: and the largest head.
        grouped: Whether query heads may share key heads.
        offset: Whether causal attention may see more keys than there are queries, its last query the last key.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    dtypes: tuple[torch.dtype, ...]
    head_size: int
    grouped: bool
    offset: bool

    def reasons_against(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
    ) -> list[str]:
        """Why it cannot attend to these instance keys."""
        (batch, heads, tq, dim), (heads_kv, tk), reasons = query.shape, key.shape[1:3], []
        if query.dtype not in self.dtypes:
            reasons.append(f"{self.name} attention takes no {query.dtype}")
        if dim > self.head_size:
            reasons.append(f"head size {dim} is more than {self.name} attention's {self.head_size}")
        if heads != heads_kv and not self.grouped:
            reasons.append(f"{self.name} attention takes no grouped heads")
        if attn_mask is not None:
            reasons.append("a mask hides instance keys")
        if is_causal and tq != tk and not (self.offset and tq < tk):
            reasons.append(f"{self.name} attention aligns the diagonal of {tq} queries and {tk} keys otherwise")
        if not batch * tq or tk < (2 if self.name == "cudnn" else 1):
            reasons.append(f"{self.name} attention takes no {tq} queries and {tk} keys of {batch} samples")
        if scale <= 0:
            reasons.append(f"scale {scale} would be multiplied into the -inf of hidden keys")
        if self.name == "cudnn" and query.is_cuda and (torch.backends.cudnn.version() or 0) < CUDNN:
            reasons.append(f"cuDNN {torch.backends.cudnn.version()} is older than {CUDNN}")
        return reasons


def _flash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
    return out, lse


def _flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # The state of a dropout that there is not.
    rng = query.new_empty(2, dtype=torch.uint64), query.new_empty((), dtype=torch.uint64)
    return _aten._scaled_dot_product_flash_attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        is_causal,
        *rng,
        scale=scale,
    )


def _cudnn(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, is_causal, scale=scale)
    return out, lse.squeeze(-1)


def _cudnn_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # PyTorch keeps cuDNN's plans by the strides of query, key and value alone: those of out and its gradient have to be
    # what they are where PyTorch allocates them, or a plan for others runs.
    out, grad_out = like(query, out), like(query, grad_out)
    rng = query.new_empty((), dtype=torch.int64), query.new_empty((), dtype=torch.int64)
    return _aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, query, key, value, out, lse.unsqueeze(-1), *rng, None, None, None, query.shape[2], key.shape[2], 0.0,
        is_causal, scale=scale,
    )  # fmt: skip


def _efficient(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scale
    )
    return out, lse[..., : query.shape[2]]


def _efficient_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lse = pad(lse, (0, -query.shape[2] % ALIGNED), value=torch.inf)
    rng = query.new_empty((), dtype=torch.int64), query.new_empty((), dtype=torch.int64)
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        plain_strides(grad_out),
        query,
        key,
        value,
        None,
        out,
        lse,
        *rng,
        0.0,
        [True, True, True, False],
        is_causal,
        scale=scale,
    )
    return dq, dk, dv


_HALF = (torch.bfloat16, torch.float16)

#: By name, in the order in which a results table lists them.
LIBRARIES = {
    x.name: x
    for x in (
        Library("cudnn", _cudnn, _cudnn_backward, _HALF, 128, grouped=True, offset=False),
        Library("flash", _flash, _flash_backward, _HALF, 256, grouped=True, offset=True),
        Library("efficient", _efficient, _efficient_backward, (*_HALF, torch.float32), 256, False, False),
    )
}
