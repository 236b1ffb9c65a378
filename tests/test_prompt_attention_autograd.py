# SPDX-License-Identifier: Apache-2.0
"""Prompt attention under autograd, autocast, torch.compile and opcheck."""

import warnings
from itertools import product

import pytest
import torch
from attention_cases import ALL, DTYPES, IMPLS, PROMPTS_ONLY, check, compiled_equals_eager, grads_of, leaves, make, run
from torch.autograd import gradcheck, gradgradcheck

from fastprompt.ops import prompt_attention
from fastprompt.ops.cpu import prompt_attention as cpu

#: C++ kernels have a file of their own.
pytestmark = pytest.mark.usefixtures("composition")

INDEX = torch.tensor([2, 0, 2])
CASES = {
    "plain": ({}, {}),
    "masked": ({"tq": 4, "tk": 6}, {"attn_mask": torch.tensor([1, 1, 0, 1, 0, 1]).bool(), "is_causal": True}),
    "bank": ({"batch": 3, "bank": 3}, {"prompt_index": INDEX, "scale": 0.3}),
    "no prompts": ({"prompts": 0}, {}),
    "prompts alone": ({"tk": 0}, {}),
}
each_case = pytest.mark.parametrize("case", CASES)


@each_case
@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(case, impl):
    shape, kwargs = CASES[case]
    inputs = leaves(make(**{"tq": 3, "tk": 4, "dim": 3, "heads": 2, "heads_kv": 1} | shape))
    assert gradcheck(lambda *x: prompt_attention(*x, return_lse=True, impl=impl, **kwargs), inputs, fast_mode=True)


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_subset_of_inputs_gets_the_same_gradients(dtype, with_lse):
    inputs = make(dtype)
    both = grads_of(inputs, with_lse)
    for needs in product([False, True], repeat=5):
        if any(needs):
            check(inputs, *both, needs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_through_lse_alone(dtype, impl):
    inputs = make(dtype)
    grad_lse = grads_of(inputs)[1]
    actual = check(inputs, None, grad_lse, impl=impl)
    assert not actual.grads[2].any()
    assert not actual.grads[4].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_tensors_cost_nothing(dtype, monkeypatch):
    """With prompts alone to learn, no gradient and no score of an instance key is computed."""
    products, returned = [], []
    baddbmm, backward = torch.baddbmm, cpu.backward

    def spy_product(bias, left, right, **kwargs):
        products.append({*left.shape, *right.shape})
        return baddbmm(bias, left, right, **kwargs)

    def spy_backward(*args):
        returned.append((tuple(args[-1]), backward(*args)))
        return returned[-1][1]

    monkeypatch.setattr(torch, "baddbmm", spy_product)
    monkeypatch.setattr(cpu, "backward", spy_backward)
    # Sizes that tell the dimensions apart: 37 instance keys, 40 with the prompts.
    inputs = make(dtype, tk=37, prompts=3)
    for needs in (ALL, PROMPTS_ONLY):
        products.clear()
        run(inputs, *grads_of(inputs), needs)
        assert returned[-1][0] == needs
        assert len(returned[-1][1]) == sum(needs)
        assert products, "no matrix product was seen"
        assert any(shape & {37, 40} for shape in products) == (needs == ALL)


def test_nothing_is_computed_without_a_need(monkeypatch):
    monkeypatch.setattr(cpu, "backward", None)
    assert not prompt_attention(*make()).requires_grad
    inputs = leaves(make())
    with torch.no_grad():
        assert not prompt_attention(*inputs).requires_grad
    out, lse = prompt_attention(*inputs, return_lse=True)
    assert out.requires_grad
    assert lse.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_the_mask_gets_no_gradient(impl):
    inputs, mask = leaves(make()), torch.zeros(5, 9, requires_grad=True)
    out = prompt_attention(*inputs, attn_mask=mask, impl=impl)
    assert torch.autograd.grad(out.sum(), mask, allow_unused=True) == (None,)


def test_a_second_backward_of_a_freed_graph_is_an_error():
    inputs = leaves(make())
    out = prompt_attention(*inputs)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", [ALL, PROMPTS_ONLY], ids=["all", "prompts"])
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out and lse"])
def test_double_backward_is_an_error_not_a_wrong_number(dtype, needs, with_lse):
    inputs = leaves(make(dtype), needs)
    out, lse = prompt_attention(*inputs, return_lse=True)
    loss = out.double().square().sum() + (lse.square().sum() if with_lse else 0)
    wanted = [x for x in inputs if x.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError):
            first = torch.autograd.grad(loss, wanted, create_graph=True)
            torch.autograd.grad(sum(x.double().square().sum() for x in first), wanted)


def test_the_reference_differentiates_twice():
    inputs = leaves(make(tq=2, tk=2, prompts=1, dim=2, heads=2, batch=1))
    assert gradgradcheck(lambda *x: prompt_attention(*x, impl="reference"), inputs, fast_mode=True)


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_runs_give_the_same_bits(case, dtype):
    shape, arguments = CASES[case]
    inputs = make(dtype, **shape)
    both = grads_of(inputs)
    for needs in (ALL, PROMPTS_ONLY):
        first, *others = (run(inputs, *both, needs, **arguments).named() for _ in range(3))
        for other in others:
            for name, x in first.items():
                assert x is None or torch.equal(x, other[name]), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(impl, dtype):
    inputs, (grad_out, grad_lse) = make(torch.float32), grads_of(make(dtype))
    with torch.autocast("cpu", dtype):
        live = leaves(inputs)
        out, lse = prompt_attention(*live, return_lse=True, impl=impl)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    found = torch.autograd.grad((out, lse), live, (grad_out, grad_lse))
    want = run([*(x.to(dtype) for x in inputs[:3]), *inputs[3:]], grad_out, grad_lse, impl=impl)
    assert torch.equal(out, want.out)
    assert torch.equal(lse, want.lse)
    for grad, expected in zip(found, want.grads, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, expected.float())


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_leaves_float64_and_unifies_mixed_inputs(impl):
    inputs = make(torch.float64)
    mixed = make(torch.float32)
    mixed[1] = mixed[1].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert prompt_attention(*inputs, impl=impl).dtype == torch.float64
        assert prompt_attention(*mixed, impl=impl).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert prompt_attention(*make(torch.bfloat16), impl=impl).dtype == torch.float16


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case, dtype):
    shape, kwargs = CASES[case]
    inputs = make(dtype, **shape)
    inputs = inputs if inputs[3].dim() == 4 else [*inputs[:3], *(p[None] for p in inputs[3:])]
    arguments = {"prompt_index": None, "attn_mask": None, "is_causal": False, "scale": 0.25} | kwargs
    torch.library.opcheck(torch.ops.fastprompt.prompt_attention.default, (*leaves(inputs), *arguments.values(), "cpu"))


@each_case
@pytest.mark.parametrize(("impl", "dynamic"), [("cpu", False), ("cpu", True), ("reference", False)])
def test_compiles_in_one_graph(case, impl, dynamic):
    shape, kwargs = CASES[case]
    compiled_equals_eager(
        lambda *x: prompt_attention(*x, return_lse=True, impl=impl, **kwargs),
        [leaves(make(torch.float32, **shape))],
        dynamic=dynamic,
    )


def test_one_compiled_function_takes_every_case_in_turn():
    """Sizes become symbolic one by one as they change, and must compare with those that are still constants."""
    compiled_equals_eager(
        lambda *x, **kwargs: prompt_attention(*x, return_lse=True, **kwargs),
        [leaves(make(torch.float32, **shape)) for shape, _ in CASES.values()],
        [kwargs for _, kwargs in CASES.values()],
    )


@pytest.mark.parametrize("needs", [ALL, PROMPTS_ONLY], ids=["all", "prompts"])
def test_compiles_with_mixed_dtypes_layouts_masks_and_changing_shapes(needs):
    def attend(query, key, value, prompt_key, prompt_value, mask):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return prompt_attention(query, key, value, prompt_key, prompt_value, attn_mask=mask, return_lse=True)

    inputs = []
    for batch, tq in ((2, 5), (3, 8)):
        # One prompt a sample: sizes that must agree are symbolic on both sides.
        half, full = make(torch.bfloat16, batch=batch, tq=tq, tk=tq), make(torch.float32, bank=batch)
        live = leaves([*(x.transpose(1, 2).contiguous() for x in half[:3]), *full[3:]], needs)
        inputs.append([*live, torch.rand(batch, 1, 1, tq) < 0.5])
    compiled_equals_eager(attend, inputs, dynamic=True)


def test_compiles_under_autocast():
    def attend(*x):
        with torch.autocast("cpu", torch.bfloat16):
            return prompt_attention(*x, return_lse=True)

    compiled_equals_eager(attend, [leaves(make(torch.float32), PROMPTS_ONLY)])
