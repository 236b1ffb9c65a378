# SPDX-License-Identifier: Apache-2.0
"""Values and every gradient of decoupled attention against the float64 oracle."""

import pytest
import torch
from attention_cases import DTYPES, HALF, IMPLS, LAYOUTS
from decoupled_cases import check, leaves, make, oracle, run
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close, largest
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fastprompt
from fastprompt.ops import decoupled_attention, prompt_attention
from fastprompt.ops.cpu import prompt_attention as cpu

#: C++ kernels have a file of their own.
pytestmark = pytest.mark.usefixtures("composition")

each_impl = pytest.mark.parametrize("impl", IMPLS)


def rms(x):
    return float(x.double().square().mean().sqrt())


def test_the_oracle_agrees_with_pytorch():
    inputs = leaves(make())
    query, keys, values, weights = inputs
    shared = (x.expand(2, -1, -1, -1) for x in (keys[1], values[1]))
    branches = sdpa(query, keys[0], values[0], enable_gqa=True), sdpa(query, *shared, enable_gqa=True)
    out = weights[0][..., None] * branches[0] + 0.7 * branches[1]
    grad_out = torch.randn_like(out)
    exact, _, _ = oracle(inputs, grad_out)
    torch.testing.assert_close(out, exact.pop("out"))
    tensors = inputs.tensors()
    for name, grad in zip(tensors, torch.autograd.grad(out, list(tensors.values()), grad_out), strict=True):
        torch.testing.assert_close(grad, exact[name])


@st.composite
def cases(draw, dtypes=DTYPES, dims=(1, 4, 16, 40), queries=(1, 3, 17), lengths=(0, 1, 2, 9, 33)):
    """Shapes, branches, weights, masks and layouts; the values come from a seed."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, heads_kv, groups, tq, branches = pick(1, 2, 3), pick(1, 2), pick(1, 3), pick(*queries), pick(1, 2, 3)
    heads, dtype = heads_kv * groups, pick(*dtypes)
    numbers, shapes = (1.0, 0, -0.5), ((), (heads, 1), (batch, 1, 1), (tq,), (batch, heads, tq))
    each = lambda *options: [pick(*options) for _ in range(branches)]  # noqa: E731
    found = make(
        dtype, batch, heads, heads_kv, tq, pick(*dims), each(*lengths), each(False, True), each(*numbers, *shapes)
    )
    if dtype in HALF and pick(False, True):
        found.weights[:] = [w.float() if isinstance(w, torch.Tensor) else w for w in found.weights]
    kwargs = {"is_causal": pick(False, True, each(False, True)), "scale": pick(None, None, 0.0, 0.3)}
    masks = []
    for kind, key in zip(each(None, None, bool, float), found.keys, strict=True):
        tk = key.shape[2]
        shape = pick((tq, tk), (batch, 1, 1, tk), (1, heads, tq, tk), (batch, heads, tq, 1), (tk,))
        visible = torch.rand(shape) < 0.7
        additive = torch.randn(shape).masked_fill(~visible, -torch.inf).to(dtype)
        masks.append(kind and (visible if kind is bool else additive))
    if any(x is not None for x in masks):
        kwargs["attn_masks"] = masks
    return found.map(lambda x: LAYOUTS[pick(*LAYOUTS)](x) if x.dim() == 4 and x.numel() else x), kwargs


@each_impl
@given(case=cases())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_matches_the_oracle(impl, case):
    inputs, kwargs = case
    assert fastprompt.explain(decoupled_attention, *inputs, impl=impl, **kwargs).impl == impl
    check(inputs, impl=impl, **kwargs)


@each_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_attention_with_text_and_image_tokens(impl, dtype):
    """IP-Adapter: 77 text keys, 4 image keys, a spatial mask that is no 0 or 1."""
    inputs = make(dtype, heads=2, heads_kv=2, tq=64, dim=40, lengths=(77, 4), weights=[1.0, (2, 1, 64)])
    check(inputs, impl=impl)


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(impl, dtype, layout):
    inputs = make(dtype, weights=[(2, 4, 5), (2, 4, 5)])
    strided = inputs.map(lambda x: LAYOUTS[layout](x))
    check(strided, LAYOUTS[layout](torch.randn_like(inputs.query)), impl=impl)


@each_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_nothing_to_attend_in_a_branch(impl, dtype):
    visible = torch.ones(2, 1, 5, 3, dtype=torch.bool)
    visible[0, 0, 1], visible[1, 0, 4] = False, False
    inputs = make(dtype, lengths=(3, 3), shared=(True, False), weights=[(4, 1), (2, 4, 5)])
    for masks, causal in (([visible, None], False), ([None, visible], [True, False]), ([visible, visible], True)):
        actual = check(inputs, impl=impl, attn_masks=masks, is_causal=causal)
        assert all(x.isfinite().all() for x in actual.values())
    # The last pair hides row 1 of sample 0 in both branches.
    assert not actual["out"][0, :, 1].any() and not actual["query"][0, :, 1].any()


@each_impl
@pytest.mark.parametrize(
    "shape", [{"batch": 0}, {"tq": 0}, {"lengths": (0, 3)}, {"lengths": (0, 0)}, {"shared": (True, True), "batch": 0}],
    ids=str,
)  # fmt: skip
def test_empty_inputs(impl, shape):
    check(make(torch.float32, **shape), impl=impl)


@each_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_tensor_of_zero_trains(impl, dtype):
    """A gate that starts at 0 leaves the model as it was, and gets a gradient; its branch's keys get none."""
    inputs = make(dtype, weights=[1.0, ()])
    inputs.weights[1].zero_()
    actual = check(inputs, impl=impl)
    assert actual["weights[1]"].abs() > 0.1
    assert not actual["keys[1]"].any() and not actual["values[1]"].any()


@each_impl
def test_a_weight_of_the_number_zero(impl):
    inputs = make(torch.float32, weights=[0.0, 1.0])
    actual = check(inputs, impl=impl)
    assert not actual["keys[0]"].any() and not actual["values[0]"].any()
    assert not decoupled_attention(*inputs[:3], [0.0, 0], impl=impl).any()


def test_a_branch_of_weight_zero_is_not_computed():
    inputs = make(torch.float32, weights=[0.0, 1.0])
    inputs.keys[0].fill_(torch.nan)
    assert all(x.isfinite().all() for x in run(inputs, torch.ones_like(inputs.query)).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_branch_is_prompt_attention_without_prompts(dtype, is_causal):
    query, keys, values, _ = make(dtype, lengths=(9,), shared=(False,))
    none = query.new_zeros(2, 0, 16)
    want = prompt_attention(query, keys[0], values[0], none, none, is_causal=is_causal)
    assert torch.equal(decoupled_attention(query, keys, values, [1], is_causal=is_causal), want)


@each_impl
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_what_the_batch_shares_are_rounded_once(impl, dtype, masked):
    """Sums over many samples that were rounded on the way would be off by far more than one rounding."""
    inputs = make(dtype, batch=256, heads=1, heads_kv=1, tq=2, lengths=(2, 2), shared=(False, True), weights=[1.0, ()])
    grad_out = torch.randn_like(inputs.query)
    kwargs = {"attn_masks": [None, torch.zeros(2, 2)]} if masked else {}
    exact, noise, _ = oracle(inputs, grad_out, **kwargs)
    actual, eps = run(inputs, grad_out, impl=impl, **kwargs), torch.finfo(dtype).eps
    for name in ("keys[1]", "values[1]"):
        assert rms(actual[name].double() - exact[name]) <= eps * rms(exact[name]), name
    # One number, the sum of outputs that were rounded.
    name = "weights[1]"
    assert_close(name, actual[name], exact[name], eps * largest(exact[name]) + largest(noise[name]))


@pytest.mark.parametrize("impl", ["cpu"])
@pytest.mark.parametrize("masked", [False, True])
def test_shared_keys_are_never_copied_for_a_sample(masked, impl, monkeypatch):
    """The forward reads them with batch stride 0, the backward once, or as samples where a mask tells those apart."""
    seen = []
    forward, backward = cpu.forward, cpu.backward
    monkeypatch.setattr(cpu, "forward", lambda *x: (seen.append(x[1:3]), forward(*x))[1])
    monkeypatch.setattr(cpu, "backward", lambda *x: (seen.append(x[3:5] if masked else x[5:7]), backward(*x))[1])
    inputs = make(torch.float32, batch=5, lengths=(7,), shared=(True,))
    masks = [torch.ones(7, dtype=torch.bool)] if masked else None
    run(inputs, torch.ones_like(inputs.query), attn_masks=masks, impl=impl)
    assert len(seen) == 2
    for pair in seen:
        for x, given_ in zip(pair, (inputs.keys[0], inputs.values[0]), strict=True):
            assert x.data_ptr() == given_.data_ptr() and (len(x) == 1 or x.stride(0) == 0)


def test_float16_scores_past_its_range():
    inputs = make(torch.float16)
    check(inputs._replace(query=inputs.query * 300))


def test_the_masks_get_no_gradient():
    inputs, mask = leaves(make()), torch.zeros(5, 9, requires_grad=True)
    out = decoupled_attention(*inputs, attn_masks=[mask, None])
    assert torch.autograd.grad(out.sum(), mask, allow_unused=True) == (None,)
