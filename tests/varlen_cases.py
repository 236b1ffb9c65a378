# SPDX-License-Identifier: Apache-2.0
"""Inputs of packed prompt attention, and one check against the oracle of one sequence at a time."""

import oracles
import torch
from attention_cases import ALL, TRITON_DEVICE, leaves, lse_dtype, to_device
from oracles import NAMES, Attention, assert_close, tolerance

from fastprompt.ops import prompt_attention_varlen

IMPLS = ("cpu", "reference")
LENGTHS = (3, 1, 7, 3, 2)


def ends(lengths):
    """``cu_seqlens`` of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make(dtype=torch.float64, lengths=LENGTHS, heads=4, heads_kv=2, prompts=3, dim=16, bank=None):
    """The five tensors; ``bank=None`` gives prompts ``[Hkv,P,D]``."""
    lead = () if bank is None else (bank,)
    rows = sum(lengths)
    shapes = [(rows, heads, dim), *[(rows, heads_kv, dim)] * 2, *[(*lead, heads_kv, prompts, dim)] * 2]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def grads_of(inputs, with_lse=True):
    """Random gradients of out and of lse (or None)."""
    query = inputs[0]
    return torch.randn_like(query), torch.randn(query.shape[:2]).to(lse_dtype(query.dtype)) if with_lse else None


def run(inputs, lengths, grad_out, grad_lse=None, needs=ALL, **kwargs):
    """`prompt_attention_varlen` and the gradients asked for (None elsewhere)."""
    device = TRITON_DEVICE if kwargs.get("impl") == "triton" else "cpu"
    inputs, grad_out, grad_lse, kwargs = to_device((leaves(inputs, needs), grad_out, grad_lse, kwargs), device)
    out, lse = prompt_attention_varlen(*inputs, ends(lengths).to(device), return_lse=True, **kwargs)
    pairs = [(x, g) for x, g in ((out, grad_out), (lse, grad_lse)) if g is not None]
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True))
    actual = Attention(out.detach(), lse.detach(), tuple(next(found) if need else None for need in needs))
    return to_device(actual, "cpu")


def by_sequence(inputs, lengths, grad_out, grad_lse, prompt_index=None, **kwargs):
    """Exact values, plain PyTorch in the dtype, and rounding noise: the oracles of each sequence, put together.

    Gradients of a prompt are summed over the sequences that read it, in float64; the squares of the noise likewise.
    """
    query, key, value, *prompts = inputs
    bank = [p if p.dim() == 4 else p[None] for p in prompts]
    starts = ends(lengths).tolist()
    parts = []
    for s, rows in enumerate(map(slice, starts, starts[1:])):
        g = int(prompt_index[s]) if prompt_index is not None else s if len(bank[0]) == len(lengths) else 0
        one = [x[rows].transpose(0, 1)[None] for x in (query, key, value)] + [p[g : g + 1] for p in bank]
        grads = [None if x is None else x[rows].transpose(0, 1)[None] for x in (grad_out, grad_lse)]
        exact, noise = oracles.prompt_attention(*one, *grads, **kwargs)
        parts.append((g, exact, oracles.plain_prompt_attention(*one, *grads, **kwargs), noise))
    for which, power in ((1, 1), (2, 1), (3, 2)):
        sums = [torch.zeros_like(p, dtype=torch.float64) for p in bank]
        for g, *part in parts:
            for total, grad in zip(sums, part[which - 1].grads[3:], strict=True):
                total[g] += grad[0].double() ** power
        # The sums of the plain way are of its dtype: it rounds them once, too.
        sums = [(x ** (1 / power)).view_as(p) for x, p in zip(sums, prompts, strict=True)]
        sums = [x.to(p.dtype) if which == 2 else x for x, p in zip(sums, prompts, strict=True)]
        tensors = ((part[which].out, part[which].lse, *part[which].grads[:3]) for part in parts)
        out, lse, *grads = (torch.cat([x[0].transpose(0, 1) for x in xs]) for xs in zip(*tensors, strict=True))
        yield Attention(out, lse, (*grads, *sums))


def check(inputs, lengths=LENGTHS, grad_out=None, grad_lse=None, needs=ALL, impl="auto", **kwargs):
    """Output, lse and gradients against the oracle, with their shapes and dtypes."""
    if grad_out is None and grad_lse is None:
        grad_out, grad_lse = grads_of(inputs)
    actual = run(inputs, lengths, grad_out, grad_lse, needs, impl=impl, **kwargs)
    kwargs.pop("max_seqlen", None)
    assert (actual.out.dtype, actual.lse.dtype) == (inputs[0].dtype, lse_dtype(inputs[0].dtype))
    exact, plain, noise = (x.named() for x in by_sequence(inputs, lengths, grad_out, grad_lse, **kwargs))
    for name, x in actual.named().items():
        if x is not None:
            assert_close(name, x, exact[name], tolerance(exact[name], plain[name], noise[name]))
    for name, x, grad in zip(NAMES, inputs, actual.grads, strict=True):
        assert grad is None or grad.dtype == x.dtype, name
    return actual
