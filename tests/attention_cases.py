# SPDX-License-Identifier: Apache-2.0
"""Inputs of prompt attention, and one check of outputs and all gradients against the oracle."""

import oracles
import torch
from oracles import NAMES, Attention, assert_close, tolerance

from fastprompt.ops import prompt_attention
from fastprompt.ops.cuda.libraries import LIBRARIES

#: "cpu" is the composition of PyTorch's CPU kernels, see conftest.py; C++ and Triton have files of their own.
IMPLS = ("cpu", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = DTYPES[2:]
ALL = (True,) * 5
#: Where Triton kernels run: on the GPU, or interpreted.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS_ONLY = (False, False, False, True, True)

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "bthd": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "sliced": lambda x: torch.cat([x, x, x], dim=-2)[..., x.shape[-2] : 2 * x.shape[-2], :],
}


def lse_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def make(dtype=torch.float64, batch=2, heads=4, heads_kv=2, tq=5, tk=9, prompts=3, dim=16, bank=None):
    """The five tensors; ``bank=None`` gives prompts ``[Hkv,P,D]``."""
    lead = () if bank is None else (bank,)
    shapes = [(batch, heads, tq, dim), *[(batch, heads_kv, tk, dim)] * 2, *[(*lead, heads_kv, prompts, dim)] * 2]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def grads_of(inputs, with_lse=True):
    """Random gradients of out and of lse (or None)."""
    query = inputs[0]
    return torch.randn_like(query), torch.randn(query.shape[:3]).to(lse_dtype(query.dtype)) if with_lse else None


def leaves(inputs, needs=ALL):
    return [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]


def run(inputs, grad_out, grad_lse=None, needs=ALL, **kwargs):
    """`prompt_attention` and the gradients asked for (None elsewhere)."""
    device = TRITON_DEVICE if kwargs.get("impl") in ("triton", *LIBRARIES) else "cpu"
    inputs, grad_out, grad_lse, kwargs = to_device((leaves(inputs, needs), grad_out, grad_lse, kwargs), device)
    out, lse = prompt_attention(*inputs, return_lse=True, **kwargs)
    pairs = [(x, g) for x, g in ((out, grad_out), (lse, grad_lse)) if g is not None]
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True))
    actual = Attention(out.detach(), lse.detach(), tuple(next(found) if need else None for need in needs))
    return to_device(actual, "cpu")


def to_device(x, device):
    """Move every tensor inside, keeping strides (`Tensor.to` makes a strided view dense) and which ones are leaves."""
    if isinstance(x, dict):
        return {name: to_device(v, device) for name, v in x.items()}
    if isinstance(x, tuple | list):
        moved = [to_device(v, device) for v in x]
        return type(x)(*moved) if isinstance(x, Attention) else type(x)(moved)
    if not isinstance(x, torch.Tensor) or x.device.type == device:
        return x
    dense = x.detach()[tuple(slice(0, 1 if stride == 0 else None) for stride in x.stride())]
    moved = torch.empty_strided(dense.shape, dense.stride(), dtype=x.dtype, device=device).copy_(dense)
    return moved.expand_as(x).requires_grad_(x.requires_grad)


def check(inputs, grad_out=None, grad_lse=None, needs=ALL, impl="auto", **kwargs):
    """Output, lse and gradients against the oracle, with their shapes and dtypes."""
    if grad_out is None and grad_lse is None:
        grad_out, grad_lse = grads_of(inputs)
    actual = run(inputs, grad_out, grad_lse, needs, impl=impl, **kwargs)
    assert (actual.out.dtype, actual.lse.dtype) == (inputs[0].dtype, lse_dtype(inputs[0].dtype))
    exact, noise = oracles.prompt_attention(*inputs, grad_out, grad_lse, **kwargs)
    plain = oracles.plain_prompt_attention(*inputs, grad_out, grad_lse, **kwargs)
    parts = (x.named() for x in (actual, exact, plain, noise))
    for (name, x), want, low, allowed in zip(next(parts).items(), *(p.values() for p in parts), strict=True):
        if x is not None:
            assert_close(name, x, want, tolerance(want, low, allowed))
    for name, x, grad in zip(NAMES, inputs, actual.grads, strict=True):
        assert grad is None or grad.dtype == x.dtype, name
    return actual


def compiled_equals_eager(function, inputs, keywords=None, **options):
    """Outputs and gradients of ``function`` in one graph are those of eager mode."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", **options)
    for x, kwargs in zip(inputs, keywords or [{}] * len(inputs), strict=True):
        eager, graph = function(*x, **kwargs), compiled(*x, **kwargs)
        torch.testing.assert_close(graph, eager)
        wanted = [t for t in x if t.requires_grad]
        torch.testing.assert_close(
            torch.autograd.grad([t.float().sum() for t in graph], wanted),
            torch.autograd.grad([t.float().sum() for t in eager], wanted),
        )
