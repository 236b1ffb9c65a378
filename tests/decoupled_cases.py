# SPDX-License-Identifier: Apache-2.0
"""Inputs of decoupled attention, its float64 oracle, and one check of the output and all gradients against it."""

from typing import NamedTuple

import oracles
import torch
from attention_cases import TRITON_DEVICE, to_device
from oracles import Attention, assert_close, tolerance

from fastprompt.ops import decoupled_attention


class Given(NamedTuple):
    """The arguments that may need a gradient."""

    query: torch.Tensor
    keys: list
    values: list
    weights: list

    def tensors(self):
        """By name."""
        lists = {"keys": self.keys, "values": self.values, "weights": self.weights}
        named = {f"{name}[{j}]": x for name, part in lists.items() for j, x in enumerate(part)}
        return {"query": self.query} | {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}

    def map(self, function):
        """With every tensor replaced, in the order of `tensors`."""
        query = function(self.query)
        lists = [[function(x) if isinstance(x, torch.Tensor) else x for x in part] for part in self[1:]]
        return Given(query, *lists)


def make(
    dtype=torch.float64, batch=2, heads=4, heads_kv=2, tq=5, dim=16, lengths=(9, 3), shared=(False, True), weights=None
):
    """As many branches as ``lengths``; ``weights`` are numbers, shapes of tensors, or None for ones of every kind."""
    query = torch.randn(batch, heads, tq, dim).to(dtype)
    shapes = [(1 if one else batch, heads_kv, length, dim) for one, length in zip(shared, lengths, strict=True)]
    keys, values = ([torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2))
    if weights is None:
        weights = ([(heads, 1), 0.7, (batch, heads, tq), (), -1.5] * len(lengths))[: len(lengths)]
    weights = [torch.randn(w).to(dtype) if isinstance(w, tuple) else w for w in weights]
    return Given(query, keys, values, weights)


def per_branch(x, count):
    """An option of every branch."""
    return x if isinstance(x, list | tuple) else [x] * count


def _sum(parts, weights, grad_out, given):
    """Output and gradients from those of each branch alone: sums over branches, shared keys, and broadcast weights."""
    grads = {"query": sum(p.grads[0] for p in parts)}
    for name, position in (("keys", 1), ("values", 2)):
        for j, (p, x) in enumerate(zip(parts, getattr(given, name), strict=True)):
            grads[f"{name}[{j}]"] = p.grads[position].sum_to_size(x.shape)
    for j, (p, w) in enumerate(zip(parts, given.weights, strict=True)):
        if isinstance(w, torch.Tensor):
            grads[f"weights[{j}]"] = (grad_out * p.out).sum(-1).sum_to_size(w.shape)
    return {"out": sum(w[..., None] * p.out for w, p in zip(weights, parts, strict=True))} | grads


def oracle(given, grad_out, *, attn_masks=None, is_causal=False, scale=None):
    """Exact results, their rounding noise and those of plain PyTorch in the dtype: dicts of output and gradients.

    A branch is attention of its own, whose output gradient is ``w dO``. Everything above it is a sum, so the squares of
    the noise add up by the same sums, with squared factors. A branch's output may be rounded before it is weighted.
    """
    n, dtype = len(given.keys), given.query.dtype
    given = given.map(torch.Tensor.detach)
    wide = [torch.as_tensor(w).double().expand(given.query.shape[:3]) for w in given.weights]
    exact, noise, plain = [], [], []
    options = zip(per_branch(attn_masks, n), per_branch(is_causal, n), strict=True)
    for key, value, weight, (mask, causal) in zip(given.keys, given.values, wide, options, strict=True):
        key, value = (x.expand(len(given.query), -1, -1, -1) for x in (key, value))
        none = key.new_zeros(1, key.shape[1], 0, key.shape[3])
        inputs, grad = (given.query, key, value, none, none), weight[..., None] * grad_out
        options = {"attn_mask": mask, "is_causal": causal, "scale": scale}
        found, rounding = oracles.prompt_attention(*inputs, grad, **options)
        exact.append(found)
        out = rounding.out.square() + (torch.finfo(dtype).eps * found.out).square()
        noise.append(Attention(out, found.lse, tuple(x.square() for x in rounding.grads)))
        plain.append(oracles.plain_prompt_attention(*inputs, grad.to(dtype), **options))
    squares = _sum(noise, [w.square() for w in wide], grad_out.double().square(), given)
    low = _sum(plain, [w.to(dtype) for w in wide], grad_out, given)
    return _sum(exact, wide, grad_out.double(), given), {name: x.sqrt() for name, x in squares.items()}, low


def leaves(given, needs=None):
    """Detached; those named in ``needs`` (None: all) require a gradient."""
    names = iter(given.tensors())
    return given.map(lambda x: x.detach().requires_grad_((name := next(names)) in (needs or (name,))))


def run(given, grad_out, needs=None, **kwargs):
    """`decoupled_attention` and its gradients, for the tensors named in ``needs`` (None: all)."""
    device = TRITON_DEVICE if kwargs.get("impl") == "triton" else "cpu"
    given = leaves(given, needs).map(lambda x: to_device(x, device))
    out = decoupled_attention(*given, **to_device(kwargs, device))
    wanted = {name: x for name, x in given.tensors().items() if x.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), to_device(grad_out, device))
    return to_device({"out": out.detach()} | dict(zip(wanted, grads, strict=True)), "cpu")


def check(given, grad_out=None, needs=None, impl="auto", **kwargs):
    """Output and gradients against the oracle, with their dtypes."""
    grad_out = torch.randn_like(given.query) if grad_out is None else grad_out
    actual = run(given, grad_out, needs, impl=impl, **kwargs)
    exact, noise, plain = oracle(given, grad_out, **kwargs)
    tensors = {"out": given.query} | given.tensors()
    for name, x in actual.items():
        assert x.dtype == tensors[name].dtype, name
        assert_close(name, x, exact[name], tolerance(exact[name], plain[name], noise[name]))
    return actual
