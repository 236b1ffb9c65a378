# SPDX-License-Identifier: Apache-2.0
"""Packed prompt attention under autograd, autocast, torch.compile and opcheck."""

import sys

import pytest
import torch
from attention_cases import ALL, DTYPES, HALF, PROMPTS_ONLY, compiled_equals_eager, leaves
from torch.autograd import gradcheck, gradgradcheck
from varlen_cases import IMPLS, LENGTHS, ends, grads_of, make, run

from fastprompt.ops import prompt_attention_varlen
from fastprompt.ops.cpu import prompt_attention_varlen as cpu

#: C++ kernels have a file of their own.
pytestmark = pytest.mark.usefixtures("composition")

# The name in the package is the function's.
module = sys.modules["fastprompt.ops.prompt_attention_varlen"]

CASES = {
    "shared": ({}, {}),
    "causal": ({"lengths": (2, 3, 3)}, {"is_causal": True, "max_seqlen": 5}),
    "one a sequence": ({"lengths": (3, 1, 2), "bank": 3}, {"scale": 0.3}),
    "bank": ({"lengths": (3, 1, 2), "bank": 4}, {"prompt_index": torch.tensor([2, 0, 2])}),
    "no prompts": ({"prompts": 0}, {}),
}
each_case = pytest.mark.parametrize("case", CASES)


def given(case, dtype, **change):
    """Tensors, ``cu_seqlens`` and keywords of a case."""
    shape, kwargs = CASES[case]
    shape = {"lengths": LENGTHS} | shape | change
    return make(dtype, **shape), ends(shape["lengths"]), shape["lengths"], kwargs


@each_case
@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(case, impl):
    inputs, cu_seqlens, _, kwargs = given(case, torch.float64, heads=2, heads_kv=1, dim=3)

    def attend(*x):
        return prompt_attention_varlen(*x, cu_seqlens, return_lse=True, impl=impl, **kwargs)

    assert gradcheck(attend, leaves(inputs), fast_mode=True)
    # Without a gradient of lse the CPU backward is another one.
    assert gradcheck(lambda *x: attend(*x)[0], leaves(inputs), fast_mode=True)


def test_the_reference_differentiates_twice():
    inputs = leaves(make(lengths=(1, 2), prompts=1, dim=2, heads=2))
    assert gradgradcheck(lambda *x: prompt_attention_varlen(*x, ends((1, 2)), impl="reference"), inputs, fast_mode=True)


def test_second_derivatives_point_to_the_reference():
    inputs = leaves(make())
    first = torch.autograd.grad(prompt_attention_varlen(*inputs, ends(LENGTHS)).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"prompt_attention_varlen: .* impl='reference'"):
        torch.autograd.grad(first[0].sum(), inputs)


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_runs_give_the_same_bits(case, dtype):
    inputs, _, lengths, kwargs = given(case, dtype)
    for both in (grads_of(inputs), grads_of(inputs, with_lse=False)):
        for needs in (ALL, PROMPTS_ONLY):
            first, *others = (run(inputs, lengths, *both, needs, **kwargs).named() for _ in range(3))
            for other in others:
                for name, x in first.items():
                    assert x is None or torch.equal(x, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_tensors_cost_nothing(dtype, monkeypatch):
    """With prompts alone to learn, no key of a sequence is looked at."""
    visited, returned = [], []
    over_keys, backward = cpu._backward, cpu.backward

    def spy_keys(batch, rows, pair, *args):
        visited.append(pair[0].shape[2])
        return over_keys(batch, rows, pair, *args)

    def spy_backward(*args):
        returned.append(backward(*args))
        return returned[-1]

    monkeypatch.setattr(cpu, "_backward", spy_keys)
    monkeypatch.setattr(cpu, "backward", spy_backward)
    inputs = make(dtype, (7, 7, 5), prompts=3)
    for needs, sizes in ((ALL, [5, 7, 3]), (PROMPTS_ONLY, [3]), ((False, True, False, False, False), [5, 7])):
        visited.clear()
        run(inputs, (7, 7, 5), *grads_of(inputs), needs)
        assert visited == sizes
        assert len(returned[-1]) == sum(needs)


def test_nothing_is_computed_without_a_need(monkeypatch):
    monkeypatch.setattr(cpu, "backward", None)
    assert not prompt_attention_varlen(*make(), ends(LENGTHS)).requires_grad
    with torch.no_grad():
        assert not prompt_attention_varlen(*leaves(make()), ends(LENGTHS)).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_computes_in_its_dtype(impl, dtype):
    inputs, (grad_out, grad_lse) = make(torch.float32), grads_of(make(dtype))
    with torch.autocast("cpu", dtype):
        live = leaves(inputs)
        out, lse = prompt_attention_varlen(*live, ends(LENGTHS), return_lse=True, impl=impl)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    found = torch.autograd.grad((out, lse), live, (grad_out, grad_lse))
    want = run([*(x.to(dtype) for x in inputs[:3]), *inputs[3:]], LENGTHS, grad_out, grad_lse, impl=impl)
    assert torch.equal(out, want.out)
    assert torch.equal(lse, want.lse)
    for grad, expected in zip(found, want.grads, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, expected.float())


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case, dtype):
    inputs, cu_seqlens, lengths, kwargs = given(case, dtype)
    # Memory order H,T,D: gradients come in the strides that the fake promises.
    inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    inputs = inputs if inputs[3].dim() == 4 else [*inputs[:3], *(p[None] for p in inputs[3:])]
    kwargs = {"prompt_index": None, "max_seqlen": max(lengths), "is_causal": False, "scale": 0.25} | kwargs
    order = ("prompt_index", "max_seqlen", "is_causal", "scale")
    arguments = (*leaves(inputs), cu_seqlens, *(kwargs[name] for name in order), "cpu")
    torch.library.opcheck(torch.ops.fastprompt.prompt_attention_varlen.default, arguments)


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out and lse"])
def test_gradients_have_the_strides_that_the_fake_promises(with_lse):
    inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in make(torch.float32, bank=5)]
    cu_seqlens, (grad_out, grad_lse) = ends(LENGTHS), grads_of(inputs, with_lse)
    out, lse = torch.ops.fastprompt.prompt_attention_varlen(*inputs, cu_seqlens, None, 7, False, 0.25, "cpu")
    arguments = [grad_out, grad_lse, *inputs, cu_seqlens, None, out, lse]
    tail = (7, False, 0.25, list(ALL), "cpu")
    real = torch.ops.fastprompt.prompt_attention_varlen_backward(*arguments, *tail)
    on_meta = (None if x is None else x.to("meta") for x in arguments)
    fake = module._fake_backward(*on_meta, *tail)
    assert [x.stride() for x in real] == [x.stride() for x in fake] == [x.stride() for x in inputs]


@each_case
@pytest.mark.parametrize(("impl", "dynamic"), [("cpu", False), ("cpu", True), ("reference", False)])
def test_compiles_in_one_graph(case, impl, dynamic):
    inputs, cu_seqlens, _, kwargs = given(case, torch.float32)
    compiled_equals_eager(
        lambda *x: prompt_attention_varlen(*x, cu_seqlens, return_lse=True, impl=impl, **kwargs),
        [leaves(inputs)],
        dynamic=dynamic,
    )


def test_one_compiled_function_takes_every_case_in_turn():
    """Numbers of rows, of sequences and of prompts become symbolic as they change."""
    found = [given(case, torch.float32) for case in CASES]
    compiled_equals_eager(
        lambda *x, **kwargs: prompt_attention_varlen(*x, return_lse=True, **kwargs),
        [(*leaves(inputs), cu_seqlens) for inputs, cu_seqlens, _, _ in found],
        [kwargs for *_, kwargs in found],
    )


def test_compiles_with_lengths_that_change_and_no_max_seqlen():
    def attend(query, key, value, prompt_key, prompt_value, cu_seqlens):
        return prompt_attention_varlen(
            query, key, value, prompt_key, prompt_value, cu_seqlens, is_causal=True, return_lse=True
        )

    inputs = [(*leaves(make(torch.float32, x, bank=len(x))), ends(x)) for x in ((3, 4), (2, 5, 1), (1, 1, 1, 9))]
    compiled_equals_eager(attend, inputs, dynamic=True)
