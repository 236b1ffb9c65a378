# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of decoupled attention against the float64 oracle: interpreted, or on the device."""

import pytest
import torch
from attention_cases import LAYOUTS, TRITON_DEVICE, compiled_equals_eager, to_device
from decoupled_cases import check, leaves, make, oracle, run
from hypothesis import given, settings
from test_decoupled_attention import cases, rms
from test_decoupled_attention_autograd import CASES, split

import fastprompt
from fastprompt.kernels import decoupled_attention as launchers
from fastprompt.ops import decoupled_attention
from fastprompt.ops.dispatch import HEAD_SIZES, MORE_HEAD_SIZES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (*HEAD_SIZES, *MORE_HEAD_SIZES["decoupled_attention"])
NEEDS = {
    "query": {"branches_query"},
    "keys[1]": {"branches_query", "branch", "reduce"},
    "values[1]": {"branch", "reduce"},
    "weights[0]": {"branches_query"},
}


@given(case=cases(DTYPES, (16,), (1, 7, 40), (0, 1, 9, 37)))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_matches_the_oracle(case):
    inputs, kwargs = case
    check(inputs, impl="triton", **kwargs)


@pytest.mark.parametrize("dim", DIMS)
def test_head_sizes(dim):
    check(make(torch.float32, 1, 2, 1, 5, dim), impl="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_attention_with_text_and_image_tokens(dtype):
    """Several tiles of keys in one branch, one in the other, and weights of either kind."""
    check(make(dtype, 2, 2, 2, 40, 16, (77, 4), weights=[1.0, (2, 1, 40)]), impl="triton")


@pytest.mark.parametrize("branches", [1, 5])
def test_numbers_of_branches(branches):
    inputs = make(torch.float32, 2, 2, 1, 5, 16, range(1, branches + 1), [True] * branches)
    check(inputs, impl="triton")


def test_rows_with_nothing_to_attend():
    visible = torch.ones(2, 1, 5, 3, dtype=torch.bool)
    visible[0, 0, 1], visible[1, 0, 4] = False, False
    for dtype in DTYPES:
        inputs = make(dtype, lengths=(3, 3))
        actual = check(inputs, impl="triton", attn_masks=[visible, visible])
        assert not actual["out"][0, :, 1].any() and not actual["query"][0, :, 1].any()


@pytest.mark.parametrize("shape", [{"batch": 0}, {"tq": 0}, {"lengths": (0, 3)}, {"lengths": (0, 0)}], ids=str)
def test_empty_inputs(shape):
    check(make(torch.float32, **shape), impl="triton")


def test_a_branch_of_weight_zero_is_not_computed(launched):
    inputs = make(torch.float32, weights=[0.0, 1.0])
    inputs.keys[0].fill_(torch.nan)
    assert all(x.isfinite().all() for x in run(inputs, torch.ones_like(inputs.query), impl="triton").values())
    assert all(x.arguments.get("lengths", (3,)) == (3,) for x in launched)
    assert not run(make(torch.float32, weights=[0.0, 0]), inputs.query, impl="triton")["out"].any()


@pytest.mark.parametrize("name", NEEDS)
def test_only_what_is_needed_is_launched(name, launched):
    check(make(torch.float32), needs=[name], impl="triton")
    assert {x.kernel.__name__.removesuffix("_kernel") for x in launched} == NEEDS[name] | {"branches"}


def test_inputs_are_read_in_place(launched):
    """Kernels get the memory of the arguments themselves, whatever the strides; nothing is expanded or copied."""
    inputs = make(torch.float32, batch=3).map(lambda x: LAYOUTS["strided"](x) if x.dim() == 4 else x)
    inputs = leaves(inputs).map(lambda x: to_device(x, TRITON_DEVICE))
    decoupled_attention(*inputs, impl="triton").sum().backward()
    for launch in launched[:2]:
        for name in ("keys", "values"):
            pairs = zip(launch.arguments[name], getattr(inputs, name), strict=True)
            assert all(x.data_ptr() == want.data_ptr() for x, want in pairs)
        assert launch.arguments["query"].data_ptr() == inputs.query.data_ptr()
        assert [x[0] for x in launch.arguments["sk"]] == [inputs.keys[0].stride(0), 0]
    # The gradient of a sum is one number with stride 0 everywhere.
    assert launched[1].arguments["sdo"] == (0, 0, 0, 0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_of_shared_keys_are_rounded_once(dtype, launched):
    inputs = make(dtype, batch=32, heads=1, heads_kv=1, tq=2, lengths=(2,), shared=(True,), weights=[1.0])
    grad_out = torch.randn_like(inputs.query)
    exact, _, _ = oracle(inputs, grad_out)
    actual = run(inputs, grad_out, impl="triton")
    assert max(x.arguments.get("splits", 1) for x in launched) > 1, "the reduction was not split"
    for name in ("keys[0]", "values[0]"):
        assert rms(actual[name].double() - exact[name]) <= torch.finfo(dtype).eps * rms(exact[name]), name


def test_results_are_bitwise_repeatable(launched):
    inputs = make(torch.float32, batch=3, tq=70)
    grad_out = torch.randn_like(inputs.query)
    first, second = (run(inputs, grad_out, impl="triton") for _ in range(2))
    assert max(x.arguments.get("splits", 1) for x in launched) > 1, "the reduction was not split"
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize("case", ["masked", "one empty", "one off"])
def test_custom_op_contract_and_compile(case):
    shape, kwargs = CASES[case]
    tensors, attend = split(leaves(make(torch.float32, **shape)).map(lambda x: to_device(x, TRITON_DEVICE)))
    kwargs = to_device(kwargs, TRITON_DEVICE)
    compiled_equals_eager(lambda *x: (attend(*x, impl="triton", **kwargs),), [tensors])


def test_opcheck():
    inputs = leaves(make(torch.float32, tq=3, weights=[(4, 1), (2, 4, 3)])).map(lambda x: to_device(x, TRITON_DEVICE))
    arguments = (*inputs, [], [True, True], [False, False], [1.0, 1.0], [True, False], 0.25, True, "triton")
    torch.library.opcheck(torch.ops.fastprompt.decoupled_attention.default, arguments)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_elements_past_two_to_the_31(axis):
    """The last sample, head or row begins more than 2^31 elements after the first."""
    inputs = make(torch.float16, 2, 2, 2, 2, 16, (2,), (False,))

    def far(x):
        stride = list(x.stride())
        stride[axis] = 2**31 + 64
        return torch.empty(stride[axis] + x.numel(), dtype=x.dtype).as_strided(x.shape, stride).copy_(x)

    check(inputs._replace(query=far(inputs.query)), impl="triton")
    check(inputs._replace(keys=[far(inputs.keys[0])]), impl="triton")


def test_auto_never_interprets():
    choice = fastprompt.explain(decoupled_attention, *make(torch.float32))
    assert choice.impl in ("cpp", "cpu") and choice.refused["triton"]


def test_splits_fill_a_gpu_from_shapes_alone():
    """Few keys of few heads: the rows that read them are split, up to a bounded workspace."""
    for bank, splits in ((1, 26), (2, 13)):
        query = torch.empty(2, 10, 4096, 64, device="meta")
        key = torch.empty(bank, 10, 16, 64, device="meta")
        problem = launchers.Problem(query, [launchers.Branch(key, key, None, 1.0, None, False)], 0.125)
        lse = torch.empty(1, 2, 10, 4096, device="meta")
        plan = launchers.plan_backward(problem, lse, lse, query, None, [(key, key)], False)
        assert next(x.arguments["splits"] for x in plan if "splits" in x.arguments) == splits


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_full_matrix(dtype, dim):
    for lengths in ((77, 4), (77, 16, 16), (1300, 1)):
        for heads_kv in (1, 2):
            check(make(dtype, 2, 2, heads_kv, 300, dim, lengths, [False, True, True][: len(lengths)]), impl="triton")
