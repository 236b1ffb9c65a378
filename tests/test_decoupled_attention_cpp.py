# SPDX-License-Identifier: Apache-2.0
"""Decoupled attention on the C++ kernels against the float64 oracle, at every level of this processor."""

import pytest
import torch
from attention_cases import compiled_equals_eager
from cpp_cases import isa, needs_cpp  # noqa: F401
from decoupled_cases import check, leaves, make, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_decoupled_attention import cases
from test_decoupled_attention_autograd import split

from fastprompt.ops import decoupled_attention
from fastprompt.ops.cpp import decoupled_attention as launcher

pytestmark = needs_cpp
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@given(case=cases(DTYPES, (16, 20), (1, 7, 40), (0, 1, 9, 37)))
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_matches_the_oracle(isa, case):  # noqa: F811
    inputs, kwargs = case
    check(inputs, impl="cpp", **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [40, 64, 80, 160])
def test_cross_attention_with_text_and_image_tokens(dim, dtype, isa):  # noqa: F811
    """IP-Adapter's: the heads of diffusion models, weights of either kind."""
    check(make(dtype, 2, 2, 2, 70, dim, (77, 4), weights=[1.0, (2, 1, 70)]), impl="cpp")


def test_many_rows_and_samples(isa):  # noqa: F811
    """Several ranges of rows, whose sums are added; as many samples as need several rounds of memory for sums."""
    check(make(torch.float32, 2, 4, 2, 1100, 16, (33, 5)), impl="cpp")
    check(make(torch.float32, 70, 1, 1, 2, 256, (500, 12), weights=[0.5, 1.0]), impl="cpp")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_too_many_keys_for_one_pass(dtype, isa):  # noqa: F811
    """Branch by branch: there is a limit on the keys of all together, a lower one beside products on tiles."""
    keys = make(dtype, 2, 2, 2, 40, 32, (180, 13)).keys
    tiles = dtype == torch.bfloat16 and isa == "amx"
    assert launcher.in_one_pass(keys, [False, False], [False, False]) != tiles
    for lengths in ((180, 13), (500, 13)):
        check(make(dtype, 2, 2, 2, 40, 32, lengths), impl="cpp")


@given(needs=st.sets(st.sampled_from(list(make().tensors())), min_size=1))
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_subset_of_gradients(isa, needs):  # noqa: F811
    check(make(torch.float32), needs=needs, impl="cpp")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_stays_in_its_rows(value, isa):  # noqa: F811
    inputs = make(torch.float32, 2, 2, 2, 70, 16, (9, 3), shared=(False, False))
    inputs.query[1, 0, 5, 3] = value
    spoilt = decoupled_attention(*inputs, impl="cpp").isnan().any(-1)
    assert spoilt[1, 0, 5] and spoilt.sum() == 1


@pytest.mark.parametrize("size", [1e-30, 1e4])
def test_tiny_and_huge_scores(size, isa):  # noqa: F811
    inputs = make(torch.float32, 2, 2, 2, 70, 16, (9, 3))
    check(inputs._replace(query=inputs.query * size), impl="cpp")


def test_a_sample_does_not_depend_on_its_batch(isa):  # noqa: F811
    inputs = make(torch.float32, 3, 4, 2, 70, 64, (77, 16), shared=(False, False), weights=[1.0, 0.6])
    grad_out = torch.randn_like(inputs.query)
    alone = run(inputs.map(lambda x: x[1:2]), grad_out[1:2], impl="cpp")
    for name, x in run(inputs, grad_out, impl="cpp").items():
        assert torch.equal(alone[name], x[1:2]), name


def test_bits_do_not_depend_on_threads(isa):  # noqa: F811
    for dtype in DTYPES[:2]:
        inputs = make(dtype, 3, 4, 2, 70, 64, (77, 16))
        grad_out = torch.randn_like(inputs.query)
        want = run(inputs, grad_out, impl="cpp")
        torch.set_num_threads(5)
        got = run(inputs, grad_out, impl="cpp")
        torch.set_num_threads(1)
        assert all(torch.equal(got[name], x) for name, x in want.items())


def test_one_graph():
    inputs = leaves(make(torch.float32, weights=[0.5, 2.0]))
    tensors, attend = split(inputs)
    compiled_equals_eager(lambda *x: [attend(*x, impl="cpp")], [tensors])
