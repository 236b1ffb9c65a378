# SPDX-License-Identifier: Apache-2.0
"""Decoupled attention under autograd, autocast, torch.compile and opcheck."""

from itertools import product

import pytest
import torch
from attention_cases import DTYPES, IMPLS, compiled_equals_eager
from cpp_cases import needs_cpp
from decoupled_cases import Given, check, leaves, make, run
from torch.autograd import gradcheck, gradgradcheck

from fastprompt.ops import decoupled_attention
from fastprompt.ops.cpu import prompt_attention as cpu

#: C++ kernels have a file of their own.
pytestmark = pytest.mark.usefixtures("composition")

VISIBLE = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
CASES = {
    "plain": ({}, {}),
    "numbers": ({"weights": [1.0, 0.5]}, {"scale": 0.3}),
    "masked": ({"tq": 4, "lengths": (6, 3)}, {"attn_masks": [VISIBLE, None], "is_causal": [False, True]}),
    "all masked": (
        {"lengths": (6, 6), "weights": [(), (2, 4, 5)]},
        {"attn_masks": [VISIBLE, VISIBLE.float()], "is_causal": True},
    ),
    "one empty": ({"lengths": (0, 3), "weights": [(), 1.0]}, {}),
    "one off": ({"lengths": (4, 3), "weights": [0.0, ()]}, {}),
    "three": ({"lengths": (4, 2, 1), "shared": (True, False, True)}, {}),
}
each_case = pytest.mark.parametrize("case", CASES)
each_impl = pytest.mark.parametrize("impl", IMPLS)


def split(inputs):
    """Its tensors, and a function that puts such tensors back and attends."""
    tensors = list(inputs.tensors().values())

    def attend(*given, **kwargs):
        left = iter(given)
        return decoupled_attention(*inputs.map(lambda _: next(left)), **kwargs)

    return tensors, attend


@each_case
@each_impl
def test_gradcheck(case, impl):
    shape, kwargs = CASES[case]
    tensors, attend = split(leaves(make(**{"dim": 3} | shape)))
    assert gradcheck(lambda *x: attend(*x, impl=impl, **kwargs), tensors, fast_mode=True)


def test_the_reference_differentiates_twice():
    tensors, attend = split(leaves(make(tq=2, dim=2, heads=2, heads_kv=1, batch=1, lengths=(2, 1))))
    assert gradgradcheck(lambda *x: attend(*x, impl="reference"), tensors, fast_mode=True)


def test_second_derivatives_point_to_the_reference():
    tensors, attend = split(leaves(make()))
    first = torch.autograd.grad(attend(*tensors).sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        torch.autograd.grad(first[0].sum(), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_subset_of_inputs_gets_the_same_gradients(dtype):
    inputs = make(dtype, lengths=(4, 3))
    grad_out = torch.randn_like(inputs.query)
    for kept in product([False, True], repeat=6):
        needs = [name for name, keep in zip(inputs.tensors(), kept, strict=True) if keep]
        if needs:
            assert list(check(inputs, grad_out, needs)) == ["out", *needs]


def test_nothing_is_computed_without_a_need(monkeypatch):
    monkeypatch.setattr(cpu, "backward", None)
    assert not decoupled_attention(*make()).requires_grad
    with torch.no_grad():
        assert not decoupled_attention(*leaves(make())).requires_grad
    # Weights alone need no attention backward.
    inputs = make()
    assert list(run(inputs, torch.ones_like(inputs.query), ["weights[0]"])) == ["out", "weights[0]"]


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_runs_give_the_same_bits(case, dtype):
    shape, kwargs = CASES[case]
    inputs = make(dtype, **shape)
    grad_out = torch.randn_like(inputs.query)
    first, *others = (run(inputs, grad_out, **kwargs) for _ in range(3))
    for other in others:
        assert all(torch.equal(x, other[name]) for name, x in first.items())


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(impl, dtype):
    """float32 weights stay as they are."""
    inputs = make(torch.float32)
    live = leaves(inputs)
    with torch.autocast("cpu", dtype):
        out = decoupled_attention(*live, impl=impl)
    assert out.dtype == dtype
    grad_out = torch.randn_like(out)
    found = torch.autograd.grad(out, list(live.tensors().values()), grad_out)
    low = Given(*inputs.map(lambda x: x.to(dtype))[:3], inputs.weights)
    want = run(low, grad_out, impl=impl)
    assert torch.equal(out, want.pop("out"))
    for grad, expected in zip(found, want.values(), strict=True):
        assert grad.dtype == torch.float32 and torch.equal(grad, expected.float())


@each_impl
def test_autocast_leaves_float64_and_unifies_mixed_inputs(impl):
    mixed = make(torch.float32)
    mixed.keys[1] = mixed.keys[1].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert decoupled_attention(*make(torch.float64), impl=impl).dtype == torch.float64
        assert decoupled_attention(*mixed, impl=impl).dtype == torch.bfloat16


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["cpu", pytest.param("cpp", marks=needs_cpp)])
def test_opcheck(case, dtype, impl):
    shape, kwargs = CASES[case]
    inputs = leaves(make(dtype, **shape))
    weights = [w for w in inputs.weights if isinstance(w, torch.Tensor)]
    marks = [isinstance(w, torch.Tensor) for w in inputs.weights]
    masks = kwargs.get("attn_masks", [None] * len(marks))
    causal = kwargs.get("is_causal", False)
    arguments = (
        *inputs[:3], weights, [x for x in masks if x is not None], marks, [x is not None for x in masks],
        [1.0 if mark else w for w, mark in zip(inputs.weights, marks, strict=True)],
        causal if isinstance(causal, list) else [causal] * len(marks), 0.25,
    )  # fmt: skip
    op = torch.ops.fastprompt.decoupled_attention.default
    torch.library.opcheck(op, (*arguments, True, impl))
    with torch.no_grad():
        query, *lists = (x.detach() if isinstance(x, torch.Tensor) else [y.detach() for y in x] for x in arguments[:5])
        torch.library.opcheck(op, (query, *lists, *arguments[5:], False, impl))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_gradient_nothing_is_kept_and_the_output_is_the_same(case, dtype):
    shape, kwargs = CASES[case]
    tensors, attend = split(make(dtype, **shape))
    before = [x.clone() for x in tensors]
    found = attend(*tensors, **kwargs)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    tracked = attend(*(x.clone().requires_grad_() for x in tensors), **kwargs)
    assert tracked.requires_grad and not found.requires_grad
    assert torch.equal(found, tracked)


@each_case
@pytest.mark.parametrize(("impl", "dynamic"), [("auto", False), ("auto", True), ("reference", False)])
def test_compiles_in_one_graph(case, impl, dynamic):
    shape, kwargs = CASES[case]
    tensors, attend = split(leaves(make(torch.float32, **shape)))
    compiled_equals_eager(lambda *x: (attend(*x, impl=impl, **kwargs),), [tensors], dynamic=dynamic)


def test_compiles_under_autocast_with_layouts_and_changing_shapes():
    def attend(query, text, image, gate):
        query, text, image = (x.transpose(1, 2) for x in (query, text, image))
        with torch.autocast("cpu", torch.bfloat16):
            return (decoupled_attention(query, [text, image], [text, image], [1.0, gate]),)

    inputs = []
    for batch, tq in ((2, 5), (3, 8)):
        given = make(torch.float32, batch=batch, tq=tq)
        live = [x.transpose(1, 2).contiguous().requires_grad_() for x in (given.query, *given.keys)]
        inputs.append([*live, torch.zeros(4, 1, requires_grad=True)])
    compiled_equals_eager(attend, inputs, dynamic=True)
