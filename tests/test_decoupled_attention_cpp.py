# SPDX-License-Identifier: Apache-2.0
"""Decoupled attention on the C++ kernels against the float64 oracle, at every level of this processor."""

import pytest
import torch
from attention_cases import compiled_equals_eager
from cpp_cases import isa, needs_cpp  # noqa: F401
from decoupled_cases import check, leaves, make, run
from hypothesis import HealthCheck, given, settings
from test_decoupled_attention import cases
from test_decoupled_attention_autograd import split

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
