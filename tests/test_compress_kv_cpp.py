# SPDX-License-Identifier: Apache-2.0
"""`compress_kv` on the C++ kernels against the slow loop, at every level of this processor."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_cases import LAYOUTS
from cpp_cases import isa, needs_cpp  # noqa: F401
from hypothesis import HealthCheck, given, settings
from test_compress_kv import DTYPES, MERGES, cases, check, make

import fastprompt
from fastprompt.ops import compress_kv, reference

pytestmark = needs_cpp


@pytest.fixture
def threads():
    """Set how many threads PyTorch has; one again afterwards."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def same(first, second):
    """Every bit, NaN too."""
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_loop(merge, dtype, isa):  # noqa: F811
    for length, budget in ((1, 1), (9, 8), (20, 5), (70, 3), (130, 65)):
        check(make(dtype, length=length), budget, "cpp", recent=2, merge=merge)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 7, 15, 16, 17, 31, 33, 64, 80, 96, 128, 160, 255, 256])
def test_head_sizes(dim, dtype, isa):  # noqa: F811
    """Those of values are their own."""
    # One dim has similarities of 1 and -1 alone, up to the last bit: ties that roundings decide.
    merge = "drop" if dim == 1 else "weighted"
    for dim_value in (dim, 1, 2 * dim + 1):
        check(make(dtype, 1, 2, 40, dim, dim_value), 11, "cpp", merge=merge)


@pytest.mark.parametrize("budget", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 71, 72, 73, 145])
def test_survivors_around_tiles_and_blocks(budget, isa):  # noqa: F811
    for dtype in DTYPES[:2]:
        check(make(dtype, 1, 1, budget + 67, 24), budget, "cpp", merge="pivot")


@given(case=cases())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_options(isa, case):  # noqa: F811
    inputs, budget, kwargs = case
    check(inputs, budget, "cpp", **kwargs)


@pytest.mark.parametrize("offset", [1, 3, 7])
def test_rows_begin_anywhere(offset, isa):  # noqa: F811
    for dtype in DTYPES:
        key, value, scores = make(dtype, length=20, dim=33)
        moved = [torch.empty(x.numel() + offset, dtype=dtype)[offset:].view_as(x).copy_(x) for x in (key, value)]
        check((*moved, scores), 5, "cpp", merge="weighted")


@pytest.mark.parametrize("merge", MERGES[1:])
def test_copies_go_to_their_original(merge, isa):  # noqa: F811
    """Ties go to the lowest slot, exactly: of equal survivors the first takes all, in whatever block they lie."""
    for dtype in DTYPES:
        key = torch.randn(1, 1, 1, 16).expand(1, 1, 300, 16).to(dtype)
        value = torch.arange(300.0).view(1, 1, 300, 1).expand(1, 1, 300, 16).to(dtype)
        scores = torch.cat([torch.ones(200), torch.zeros(100)]).expand(1, 1, -1)
        kept_key, kept_value, _ = compress_kv(key, value, scores, 200, merge=merge, impl="cpp")
        assert torch.equal(kept_value[:, :, 1:], value[:, :, 1:200])
        assert not torch.equal(kept_value[:, :, 0], value[:, :, 0])
        torch.testing.assert_close(kept_key, key[:, :, :200])


def test_padding_changes_nothing(isa):  # noqa: F811
    """Not a bit of it; pads are never read."""
    for dtype in DTYPES:
        key, value, scores = make(dtype, batch=1, length=40)
        want = compress_kv(key, value, scores, 9, recent=2, merge="weighted", impl="cpp")
        pad = torch.nn.functional.pad
        padded = [pad(x, (0, 0, 3, 2), value=torch.nan) for x in (key, value)]
        valid = pad(torch.ones(1, 40, dtype=torch.bool), (3, 2))
        padded.append(pad(scores, (3, 2), value=99.0))
        got = compress_kv(*padded, 9, recent=2, merge="weighted", valid=valid, impl="cpp")
        assert same(got[:2], want[:2]) and torch.equal(got[2], want[2] + 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("merge", MERGES[1:])
def test_what_is_not_a_number_goes_where_the_reference_sends_it(merge, bad, isa):  # noqa: F811
    for dtype in DTYPES:
        key, value, _ = make(dtype, 1, 1, 100)
        scores = torch.arange(100.0, 0, -1).expand(1, 1, -1)
        for hit in ([80], [13], [13, 7], [13, 80], [99, 0]):
            broken = key.clone()
            broken[:, :, hit, 3] = bad
            got = compress_kv(broken, value, scores, 30, merge=merge, impl="cpp")
            want = compress_kv(broken, value, scores, 30, merge=merge, impl="reference")
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-14, 1e-5, 1e15, 1e30])
def test_huge_and_tiny_keys(size, isa):  # noqa: F811
    """Squares that underflow or overflow: as the reference has norms in float32. Denormal keys keep their direction."""
    for dtype in DTYPES[:2]:
        key, value, scores = make(dtype, 1, 2, 60)
        key = torch.nn.functional.one_hot(torch.arange(60) % 7, 16).expand(1, 2, -1, -1).to(dtype) + 0.1 * key.abs()
        scores = torch.arange(60.0, 0, -1).expand(1, 2, -1)
        # Where all are denormal, their similarities below the floor of norms underflow, here and there differently.
        everywhere = [torch.full((60,), size)] if size > 1e-38 else []
        for factors in (*everywhere, torch.arange(60).remainder(2).mul(size - 1).add(1)):
            scaled = (key * factors[:, None]).to(dtype)
            got = compress_kv(scaled, value, scores, 7, merge="weighted", impl="cpp")
            want = compress_kv(scaled, value, scores, 7, merge="weighted", impl="reference")
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, rtol=2 * torch.finfo(dtype).eps, atol=1e-5 * max(1.0, size))


def test_no_samples_heads_or_rows(isa):  # noqa: F811
    for batch, heads in ((0, 2), (2, 0)):
        key, value, scores = make(batch=batch, heads=heads)
        got = compress_kv(key, value, scores, 4, merge="pivot", impl="cpp")
        assert [x.shape for x in got] == [(batch, heads, 4, 16), (batch, heads, 4, 16), (batch, heads, 4)]
    key, value, scores = make(length=6)
    none = torch.zeros(2, 6, dtype=torch.bool)
    got = compress_kv(key, value, scores, 4, merge="pivot", valid=none, impl="cpp")
    assert not got[0].any() and not got[1].any() and (got[2] == -1).all()
    check((key, value, scores), torch.tensor([[0, 3], [6, 1]]), "cpp", merge="pivot")


def test_shared_rows(isa):  # noqa: F811
    """Samples and heads that share memory: strides of 0."""
    key, value, scores = make(batch=1, heads=1, length=30)
    key, value = (x.expand(3, 2, 30, 16) for x in (key, value))
    check((key, value, scores.expand(3, 2, 30)), 7, "cpp", merge="average")


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_1_to_8_threads_give_the_same_bits(merge, dtype, isa, threads):  # noqa: F811
    key, value, scores = make(dtype, 2, 3, 900, 64)
    run = lambda *x: compress_kv(*x, 180, recent=20, merge=merge, impl="cpp")  # noqa: E731
    want = run(key, value, scores)
    for count in (2, 3, 8):
        threads(count)
        assert same(run(key, value, scores), want), f"{count} threads"
    # A sample and a head alone, and elsewhere in memory.
    alone = run(*(LAYOUTS["bthd"](x[1:, 2:]) for x in (key, value)), scores[1:, 2:])
    assert same(alone, [x[1:, 2:] for x in want])


def test_concurrent_calls(isa, threads):  # noqa: F811
    threads(2)
    inputs = [make(dtype, 1, 2, 100 + 50 * i, 16 * (1 + i)) for i in range(4) for dtype in DTYPES[:2]]
    once = lambda x: compress_kv(*x, 30, merge="pivot", impl="cpp")  # noqa: E731
    want = list(map(once, inputs))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert all(map(same, pool.map(once, inputs), want))


def test_nearest_of_many(isa):  # noqa: F811
    """Random keys of a real size: sums of the same pairs, but for near-ties that roundings decide."""
    for dtype in DTYPES:
        key, value, scores = make(dtype, 1, 2, 1500, 64)
        *got, index = compress_kv(key, value, scores, 300, merge="average", impl="cpp")
        want = reference.merge_kv(key, value, index, "average", True, None)
        for x, y in zip(got, want, strict=True):
            equal = torch.isclose(x.float(), y.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5).all(-1)
            assert equal.float().mean() > 0.99


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_elements_past_two_to_the_31(axis):
    """The last sample, head or row begins more than 2^31 elements after the first; untouched memory costs nothing."""
    inputs = list(make(torch.float16, 2, 2, 3))
    for i in range(2):
        shape, stride = inputs[i].shape, list(inputs[i].stride())
        stride[axis] = 2**31 + 64
        far = torch.empty(stride[axis] * (shape[axis] - 1) + inputs[i].numel(), dtype=torch.float16)
        inputs[i] = far.as_strided(shape, stride).copy_(inputs[i])
        check(inputs, 2, "cpp", merge="average")
        inputs[i] = inputs[i].contiguous()


def test_gradients_are_those_of_the_plain_form():
    key, value, scores = make(length=20)
    found = []
    for impl in ("cpp", "reference"):
        inputs = [x.clone().requires_grad_() for x in (key, value)]
        out = compress_kv(*inputs, scores, 5, merge="weighted", impl=impl)
        found.append((*out[:2], *torch.autograd.grad(out[0].square().sum() + out[1].sum(), inputs)))
    assert same(*found)


def test_registered_operation():
    key, value, scores = make()
    index = compress_kv(key, value, scores, 4)[2]
    valid = torch.ones(2, 12, dtype=torch.bool)
    torch.library.opcheck(torch.ops.fastprompt.merge_kv.default, (key, value, index, valid, "weighted", True, "cpp"))


def test_compiles():
    inputs = make()
    function = lambda k, v, s: compress_kv(k, v, s, 5, recent=2, merge="pivot", impl="cpp")  # noqa: E731
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    torch._dynamo.reset()
    assert same(got, function(*inputs))


def test_auto_takes_what_was_measured_to_win(monkeypatch):
    for dtype, level, impl in (
        (torch.float32, "scalar", "reference"), (torch.float32, "avx512", "cpp"), (torch.bfloat16, "amx", "cpp"),
        (torch.float16, "avx512", "cpp"), (torch.bfloat16, "avx512", "reference"), (torch.float64, "amx", "reference"),
    ):  # fmt: skip
        monkeypatch.setattr("fastprompt.ops.cpp.extension.best_isa", lambda level=level: level)
        assert fastprompt.explain(compress_kv, *make(dtype), 4).impl == impl
