# SPDX-License-Identifier: Apache-2.0
"""`key_scores` on the C++ kernels against the attention matrix in float64, at every level of this processor."""

import pytest
import torch
from cpp_cases import isa, needs_cpp  # noqa: F401
from hypothesis import HealthCheck, given, settings
from test_key_scores import DTYPES, cases, check, make, scores_of

from fastprompt.ops import key_scores

pytestmark = needs_cpp


@given(case=cases())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_options(isa, case):  # noqa: F811
    inputs, kwargs = case
    check(inputs, "cpp", **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tq", "tk"), [(1, 40), (16, 17), (33, 70), (65, 129), (5, 1)])
def test_rectangles(tq, tk, dtype, isa):  # noqa: F811
    for is_causal in (True, False):
        inputs = make(dtype, batch=1, heads=2, heads_kv=1, tq=tq, tk=tk, is_causal=is_causal)
        check(inputs, "cpp", is_causal=is_causal)


@pytest.mark.parametrize("dim", [1, 7, 16, 33, 64, 80, 128, 256])
def test_head_sizes(dim, isa):  # noqa: F811
    for dtype in DTYPES:
        check(make(dtype, 1, 2, 1, 17, 19, dim), "cpp")


def test_what_does_not_count_may_be_anything(isa):  # noqa: F811
    for dtype in DTYPES:
        query, key, lse = make(dtype, tq=40, tk=40)
        row_mask, key_mask = torch.ones(2, 40, dtype=torch.bool), torch.ones(2, 40, dtype=torch.bool)
        row_mask[0, :20] = key_mask[0, :20] = False
        kwargs = {"query_mask": row_mask, "key_mask": key_mask, "normalize": "visible"}
        want = check((query, key, lse), "cpp", **kwargs)
        for anything in (1e4, torch.nan, torch.inf):
            far, padded, level = query.clone(), key.clone(), lse.clone()
            far[0, :, :20] = padded[0, :, :20] = anything
            level[0, :, :20] = anything
            assert torch.equal(key_scores(far, padded, level, impl="cpp", **kwargs), want)


def test_levels_of_any_size(isa):  # noqa: F811
    """Huge and tiny logits; an lse that is not that of the rows gives what the formula says, not a clamped weight."""
    for dtype in DTYPES[:2]:
        for scale in (1e-35, 3.0, 50.0):
            check(make(dtype, tq=21, tk=30, scale=scale), "cpp", scale=scale)
        query, key, _ = make(dtype, tq=20, tk=20)
        lse = scores_of(query * 60, key, True).logsumexp(-1).float()
        check((query * 60, key, lse), "cpp")
        check((query, key, lse * 0 - 5), "cpp")


@pytest.mark.parametrize("shape", [{"batch": 0}, {"tq": 0}, {"tk": 0}])
def test_nothing(shape, isa):  # noqa: F811
    sizes = {"batch": 2, "tq": 3, "tk": 5} | shape
    query, key = torch.zeros(sizes["batch"], 4, sizes["tq"], 16), torch.zeros(sizes["batch"], 2, sizes["tk"], 16)
    got = key_scores(query, key, torch.zeros(query.shape[:3]), impl="cpp", normalize="visible")
    assert got.shape == key.shape[:3] and not got.any()


def test_bits_depend_on_a_sample_alone(isa):  # noqa: F811
    """Not on threads, not on the batch."""
    for dtype in DTYPES:
        inputs = make(dtype, batch=3, heads=6, tq=150, tk=170)
        want = key_scores(*inputs, impl="cpp")
        for threads in (2, 7):
            torch.set_num_threads(threads)
            got = key_scores(*inputs, impl="cpp")
            torch.set_num_threads(1)
            assert torch.equal(got, want)
        assert torch.equal(key_scores(*(x[1:2] for x in inputs), impl="cpp"), want[1:2])


def test_registered_operation():
    query, key, lse = make()
    mask = torch.ones(2, 9, dtype=torch.bool)
    arguments = (query, key, lse, mask, mask, True, 2, 0.25, "visible", "max", "cpp")
    torch.library.opcheck(torch.ops.fastprompt.key_scores.default, arguments)
