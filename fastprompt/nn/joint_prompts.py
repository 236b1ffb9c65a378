# SPDX-License-Identifier: Apache-2.0
"""Keys and values of many layers' prompts in one grouped product: no layer launches one of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastprompt.nn.joint import Joint
from fastprompt.nn.prompts import LayerPrompt, stamp_of


class Linear(NamedTuple):
    """A linear layer's weight ``[N,C]`` and bias ``[N]`` (or None), and which of its N outputs are read (None: all)."""

    weight: Tensor
    bias: Tensor | None
    outputs: Tensor | None

    def read(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, zero where there is none, of what is read."""
        bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
        if self.outputs is None:
            return self.weight, bias
        outputs = self.outputs.to(self.weight.device)
        return self.weight[outputs], bias[outputs]


@dataclass(frozen=True)
class Plain:
    """A layer's norm and projections as tensors: keys and values are ``layer_norm(rows) W^T + b``.

    Args:
        key: What gives the keys: ``Hkv D`` outputs are read.
        value: What gives the values.
        heads: Key heads Hkv.
        norm: Weight and bias ``[C]`` (or None) of the norm, and its epsilon; None without a norm.
    """

    key: Linear
    value: Linear
    heads: int
    norm: tuple[Tensor | None, Tensor | None, float] | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What is stacked."""
        return (*self.key, *self.value, *((None, None) if self.norm is None else self.norm[:2]))

    def alike(self) -> tuple:
        """What layers must have in common to be stacked."""
        kinds = tuple(None if x is None else (x.shape, x.dtype, x.device) for x in self.tensors())
        return kinds, self.heads, None if self.norm is None else self.norm[2]

    def linear(self) -> tuple[Tensor, Tensor]:
        """Weight ``[2 Hkv D, C]`` and bias ``[2 Hkv D]``, keys first."""
        weights, biases = zip(self.key.read(), self.value.read(), strict=True)
        return torch.cat(weights), torch.cat(biases)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift ``[1,C]`` of the norm, one and zero where it has none, in at least float32."""
        weight, bias, _ = self.norm or (None, None, 0.0)
        like = self.key.weight[:1]
        dtype = torch.promote_types(like.dtype, torch.float32)
        one, zero = torch.ones_like(like, dtype=dtype), torch.zeros_like(like, dtype=dtype)
        return one if weight is None else one * weight, zero if bias is None else zero + bias


class JointPrompts(Joint[LayerPrompt, tuple[Tensor, Tensor]]):
    """Keys and values ``[Hkv,P,D]`` of the prompts of many layers, where a step computes them anew.

    ``K_p, V_p = W_kv norm(p)`` of L layers are one stack of rows ``[L,P,C]``, one norm and one batched product with the
    layers' frozen weights, of which a stacked copy is kept (``2 L Hkv D C`` numbers) until one of them changes (a write
    through ``.data`` goes unseen). Layers that are more than a layer norm and linear projections, or differ in shape,
    compute their own.

    Args:
        prompts: In layer order; those whose rows run as tokens are left out.

    Example:
        >>> weight = torch.randn(2, 8, 8)
        >>> class Layer:
        ...     dtype = torch.float32
        ...     def project(self, rows): return (rows @ weight[0].T).unsqueeze(0), (rows @ weight[1].T).unsqueeze(0)
        ...     def weights(self): return tuple(weight)
        ...     def plain(self): return Plain(Linear(weight[0], None, None), Linear(weight[1], None, None), 1, None)
        >>> from fastprompt.nn.prompts import ProjectedPrompt
        >>> prompts = [ProjectedPrompt(torch.randn(5, 8), Layer()) for _ in range(3)]
        >>> joint = JointPrompts(prompts)
        >>> joint.begin()
        >>> keys, values = joint.share(prompts[2])
        >>> torch.allclose(keys, prompts[2].site.project(prompts[2].prompt)[0], atol=1e-5)
        True
    """

    def __init__(self, prompts: Sequence[LayerPrompt]):
        super().__init__([p for p in prompts if not p.inserted])
        self.weights: tuple[tuple, tuple[Tensor, ...]] | None = None

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "weights": None}

    def compute(self) -> Sequence[tuple[Tensor, Tensor]] | None:
        """Keys and values of every layer; None where nothing learns, since each layer then keeps its own."""
        if not all(p.tracked() and not p.drops() for p in self.members):
            return None
        plains = [p.site.plain() for p in self.members]
        first = plains[0]
        if first is None or any(x is None or x.alike() != first.alike() for x in plains):
            return None
        weight, bias, scale, shift = self._stacked([x for x in plains if x is not None])
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            rows = torch.stack([p.learned() for p in self.members]).to(self.members[0].site.dtype).to(wide)
            if first.norm is not None:
                rows = nn.functional.layer_norm(rows, rows.shape[-1:], eps=first.norm[2])
                rows = torch.addcmul(shift, rows, scale)
            both = torch.baddbmm(bias, rows.to(weight.dtype), weight.mT)
        both = both.unflatten(-1, (2, first.heads, -1))  # [L,P,2,Hkv,D]
        keys, values = (both[:, :, i].transpose(1, 2).unbind() for i in range(2))
        return list(zip(keys, values, strict=True))

    def _stacked(self, plains: list[Plain]) -> tuple[Tensor, ...]:
        """Weight ``[L,2 Hkv D,C]`` and bias ``[L,1,2 Hkv D]`` in the dtype that a linear layer multiplies in, scale and
        shift ``[L,1,C]`` of the norms.
        """
        stamp = stamp_of(x for plain in plains for x in plain.tensors() if x is not None)
        if self.weights is None or self.weights[0] != stamp:
            like = plains[0].key.weight
            kind = like.device.type
            autocast = torch.is_autocast_enabled(kind) and like.dtype != torch.float64
            dtype = torch.get_autocast_dtype(kind) if autocast else like.dtype
            with torch.no_grad():
                linears = zip(*(x.linear() for x in plains), strict=True)
                weight, bias = (torch.stack([x.to(dtype) for x in of_layers]) for of_layers in linears)
                scale, shift = (torch.stack(x) for x in zip(*(x.affine() for x in plains), strict=True))
            self.weights = stamp, (weight, bias.unsqueeze(1), scale, shift)
        return self.weights[1]
