# SPDX-License-Identifier: Apache-2.0
"""PyTorch's CUDA attention kernels on a CPU: stand-ins behind their own schemas that hold callers to what those ask.

What is asserted was read in PyTorch: `torch/_meta_registrations.py` of 2.12 and 2.13 for shapes, dtypes and layouts of
results, ATen's `attention_backward.cu` and `cudnn/MHA.cpp` for what a backward reads.
"""

import math
from contextlib import contextmanager

import torch
from torch.library import _scoped_library


def _hidden(tq, tk, is_causal, top_left):
    """Flash attention ends the diagonal in the bottom right corner, the others begin it in the top left one."""
    full = torch.ones(tq, tk, dtype=torch.bool)
    return full.triu_((0 if top_left else tk - tq) + 1) if is_causal else ~full


def _wide(query, *keys):
    """float32, key heads repeated."""
    groups = query.shape[1] // keys[0].shape[1]
    return [x.float().repeat_interleave(n, 1) for x, n in zip((query, *keys), (1, *[groups] * len(keys)), strict=True)]


def _attend(query, key, value, is_causal, scale, top_left):
    assert all(x.stride(-1) == 1 and 0 not in x.stride() for x in (query, key, value))
    q, k, v = _wide(query, key, value)
    scores = (q @ k.mT * scale).masked_fill(_hidden(*q.shape[2:3], *k.shape[2:3], is_causal, top_left), -torch.inf)
    return (scores.softmax(-1) @ v).to(query.dtype), scores.logsumexp(-1)


def _gradients(grad_out, query, key, value, out, lse, is_causal, scale, top_left):
    """From out and lse as they are given; those of key heads are summed over their query heads."""
    assert lse.dtype == torch.float32 and out.stride(-1) == 1
    q, k, v = _wide(query, key, value)
    do, o = grad_out.float(), out.float()
    p = ((q @ k.mT) * scale - lse[..., None]).exp()
    p = p.masked_fill(_hidden(*q.shape[2:3], *k.shape[2:3], is_causal, top_left), 0.0)
    ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True))
    grads = ds @ k * scale, ds.mT @ q * scale, p.mT @ do
    shapes = (x.unflatten(1, (y.shape[1], -1)).sum(2) for x, y in zip(grads, (query, key, value), strict=True))
    return [x.to(query.dtype) for x in shapes]


def _of(x, found):
    """In the layout that `empty_like` gives."""
    return torch.empty_like(x).copy_(found)


def _bthd(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    assert query.dtype.itemsize == 2 and not dropout_p
    out, lse = _attend(query, key, value, is_causal, scale, top_left=False)
    state = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), query.new_empty(0)
    return _of(query, out), lse, None, None, query.shape[2], key.shape[2], *state


def _flash_backward(
    grad_out, query, key, value, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None
):
    assert cum_q is None and cum_k is None and (max_q, max_k) == (query.shape[2], key.shape[2]) and not dropout_p
    assert lse.shape == query.shape[:3] and lse.is_contiguous() and seed.dtype == torch.uint64
    grads = _gradients(grad_out, query, key, value, out, lse, is_causal, scale, top_left=False)
    return tuple(map(_of, (query, key, value), grads))


def _cudnn(
    query, key, value, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    assert query.dtype.itemsize == 2 and bias is None and compute_log_sumexp and not dropout_p
    out, lse = _attend(query, key, value, is_causal, scale, top_left=True)
    seeds = torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)
    return _of(query, out), lse[..., None], None, None, query.shape[2], key.shape[2], *seeds, None


def _cudnn_backward(
    grad_out, query, key, value, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout_p, is_causal,
    *, scale=None,
):  # fmt: skip
    assert bias is cum_q is cum_k is None and (max_q, max_k) == (query.shape[2], key.shape[2]) and not dropout_p
    assert lse.shape == (*query.shape[:3], 1) and lse.is_contiguous() and seed.dtype == torch.int64
    layout = [n for n, size in zip(torch.empty_like(query).stride(), query.shape, strict=True) if size > 1]
    for x in (out, grad_out):
        assert [n for n, size in zip(x.stride(), x.shape, strict=True) if size > 1] == layout
    grads = _gradients(grad_out, query, key, value, out, lse[..., 0], is_causal, scale, top_left=True)
    return tuple(map(_of, (query, key, value), grads))


def _efficient(query, key, value, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    assert key.shape[1] == query.shape[1] and bias is None and compute_log_sumexp and not dropout_p
    out, lse = _attend(query, key, value, is_causal, scale, top_left=True)
    rows = math.ceil(query.shape[2] / 32) * 32
    padded = torch.full((*query.shape[:2], rows), torch.inf)
    padded[..., : query.shape[2]] = lse
    return _bthd(out), padded, torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)


def _efficient_backward(
    grad_out, query, key, value, bias, out, lse, seed, offset, dropout_p, needs, is_causal=False, *, scale=None
):
    assert bias is None and needs == [True, True, True, False] and not dropout_p and seed.dtype == torch.int64
    tq = query.shape[2]
    assert lse.shape == (*query.shape[:2], math.ceil(tq / 32) * 32) and (lse[..., tq:] == torch.inf).all()
    grads = _gradients(grad_out, query, key, value, out, lse[..., :tq], is_causal, scale, top_left=True)
    return *map(_bthd, grads), None


@contextmanager
def stand_ins(seen=None):
    """The six operators on the CPU; the names of those that run are appended to ``seen``."""
    with _scoped_library("aten", "IMPL") as library:
        for name in ("flash", "cudnn", "efficient"):
            for end in ("", "_backward"):
                function = globals()[f"_{name}{end}"]

                def run(*args, function=function, **kwargs):
                    if seen is not None:
                        seen.append(function.__name__.strip("_"))
                    return function(*args, **kwargs)

                library.impl(f"_scaled_dot_product_{name}_attention{end}", run, "CPU")
        yield
