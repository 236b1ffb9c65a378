# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of `diffuse_prompts` against the float64 oracle, at every level of this processor."""

import pytest
import torch
from attention_cases import LAYOUTS, compiled_equals_eager, leaves
from cpp_cases import isa, needs_cpp  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_diffuse_prompts import ALL, NAMES, OPTIONS, PROMPTS_ONLY, check, each_option, keys_of, make, oracle, run

import fastprompt
from fastprompt.errors import ImplUnavailableError
from fastprompt.ops import diffuse_prompts

pytestmark = needs_cpp
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Around the widths of vectors (4, 8, 16) and of tiles (16, 32).
SIZES = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
RELU, SOFTMAX = ({"activation": "relu"}, {"activation": "softmax"})


@pytest.fixture
def threads():
    """Set how many threads PyTorch has; one again afterwards."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def same(first, second):
    """Every bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def normal(dtype, batch=2, tokens=40, prompts=20, width=48, rank=2, learned=None):
    """The six tensors, of standard normal numbers: where only implementations of the same arithmetic are compared."""
    shapes = (batch, tokens, width), (batch, tokens, width), (prompts, width), (rank, width), (width, rank), ()
    kinds = (dtype, dtype, *[learned or dtype] * 4)
    return [torch.randn(s).mul(0.3).to(kind) for s, kind in zip(shapes, kinds, strict=True)]


@each_option
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(activation, weight, dtype, isa):  # noqa: F811
    check(make(dtype), impl="cpp", activation=activation, weight=weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_tokens_and_prompts(size, dtype, isa):  # noqa: F811
    check(make(dtype, 1, size, 3), impl="cpp")
    check(make(dtype, 1, 3, size), impl="cpp", activation="softmax" if size % 2 else "relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 7, 16, 24, 33, 48, 95, 96, 130, 256, 300])
def test_widths(width, dtype, isa):  # noqa: F811
    check(make(dtype, 1, 5, 7, width), impl="cpp")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_many_prompts(dtype, isa):  # noqa: F811
    for options in (RELU, SOFTMAX):
        check(make(dtype, 1, 5, 530, 32), impl="cpp", **options)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 330), (9, 67), (3, 401)])
def test_many_tokens(batch, tokens, dtype, isa):  # noqa: F811
    """Several blocks, then several ranges, whose ends are within samples."""
    for options in (RELU, SOFTMAX):
        check(make(dtype, batch, tokens, 5, 16), impl="cpp", **options)


@st.composite
def cases(draw):
    """Shapes, layouts and wanted gradients; the values come from a seed."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    inputs = make(
        pick(*DTYPES), pick(1, 3), pick(1, 7, 32, 37), pick(0, 1, 5, 40), pick(8, 16, 31, 64), pick(0, 1, 4),
        pick(None, torch.float32), pick(-0.5, 0.0, 1.0),
    )  # fmt: skip
    inputs[:2] = [LAYOUTS[pick(*LAYOUTS)](x) for x in inputs[:2]]
    inputs[2] = LAYOUTS[pick("contiguous", "strided")](inputs[2])
    needs = tuple(draw(st.booleans()) for _ in NAMES)
    return inputs, needs, dict(zip(("activation", "weight"), pick(*OPTIONS), strict=True))


@given(case=cases())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shapes_layouts_and_needs(isa, case):  # noqa: F811
    inputs, needs, options = case
    check(inputs, needs, "cpp", **options)


@pytest.mark.parametrize("needs", [*(tuple(i == j for j in range(6)) for i in range(6)), PROMPTS_ONLY], ids=str)
def test_any_gradient_alone(needs, isa):  # noqa: F811
    """The same bits as all at once."""
    for dtype in DTYPES:
        inputs = normal(dtype, learned=torch.float32)
        grad = torch.randn_like(inputs[0])
        for options in (RELU, SOFTMAX):
            alone, whole = (run(inputs, grad, n, "cpp", **options) for n in (needs, ALL))
            assert all(torch.equal(a, b) for a, b in zip(alone, whole, strict=True) if a is not None)


@pytest.mark.parametrize("offset", [1, 3, 7])
def test_rows_begin_anywhere(offset, isa):  # noqa: F811
    """Pointers that are aligned to nothing but their element."""
    for dtype in DTYPES:
        inputs = make(dtype, tokens=33, width=32)
        moved = [torch.empty(x.numel() + offset, dtype=dtype)[offset:].view_as(x).copy_(x) for x in inputs]
        check(moved, impl="cpp")


def test_rows_lie_anywhere(isa):  # noqa: F811
    """Rows and samples that overlap, are shared or far apart give the bits of their copies."""
    for dtype in DTYPES:
        x, _, *learned = normal(dtype, 2, 48, 20, 64)
        grad = torch.randn_like(x)
        wide = torch.randn(2, 60, 70).to(dtype)
        for view in (wide[:, 3:51, 5:69], wide[:1, :48, :64].expand(2, -1, -1), wide[:, :1, 1:65].expand(-1, 48, -1)):
            there = run([view, view, *learned], grad, impl="cpp")
            assert same(there, run([view.contiguous(), view.contiguous(), *learned], grad, impl="cpp"))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float32_prompts_beside_half_precision(dtype, isa):  # noqa: F811
    inputs = make(dtype, wide=torch.float32)
    inputs[2] = inputs[2] + 2**-14
    _, *grads = check(inputs, impl="cpp")
    assert not torch.equal(grads[2], grads[2].to(dtype).float())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_prompts_in_half_precision_at_the_kernels(dtype, isa):  # noqa: F811
    """`diffuse` always gives float32; the kernels also take the type of x, and round its gradients once."""
    x, base, prompts, down, up, _ = normal(dtype)
    log_scale = torch.zeros(())
    grad, keys = torch.randn_like(x), keys_of(prompts, down, up)
    found = [
        torch.ops.fastprompt.diffuse_prompts_backward(
            grad, x, base, *(t.to(kind) for t in (prompts, keys, log_scale)), "relu", "rowmax", [True] * 5, "cpp"
        )
        for kind in (dtype, torch.float32)
    ]
    assert [t.dtype for t in found[0]] == [dtype] * 5
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found[0][:4], found[1][:4], strict=True))


def test_sums_over_tokens_are_not_rounded_to_half_precision(isa):  # noqa: F811
    """Where every activation and slope is exact in bfloat16, all that is left of gradients is float32's rounding."""
    inputs = make(torch.bfloat16, tokens=100, wide=torch.float32, log_scale=0.0)
    inputs[1] = torch.randint(-8, 9, inputs[1].shape).bfloat16() / 4
    grad = torch.randint(-2, 3, inputs[0].shape).bfloat16() / 2
    _, _, _, *got = run(inputs, grad, impl="cpp", weight="none")
    (_, _, _, *want), _ = oracle(inputs, grad, weight="none")
    for name, a, b in zip(NAMES[2:], got, want, strict=True):
        assert (a.double() - b).abs().max() <= 2**-15 * b.abs().max(), name


@pytest.mark.parametrize("factor", [2**-40, 2**14])
def test_huge_and_tiny_scores(factor, isa):  # noqa: F811
    for dtype in DTYPES[:2]:
        inputs = make(dtype, tokens=9, log_scale=0.0)
        inputs[0] = inputs[0] * factor
        check(inputs, impl="cpp")
        grad = torch.randn_like(inputs[0])
        got = run(inputs, grad, impl="cpp", activation="softmax")
        # The oracle's exponentials would overflow.
        want = run([t.double() for t in inputs], grad.double(), impl="reference", activation="softmax")
        # The gradient of the scale is a sum whose terms cancel.
        sizes = [*(t.abs().max() for t in want[:-1]), (grad * want[0]).abs().sum()]
        for a, b, size in zip(got, want, sizes, strict=True):
            assert (a - b).abs().max() <= 8 * torch.finfo(dtype).eps * size


def test_scores_beyond_float16(isa):  # noqa: F811
    """Scores and weights are float32 whatever the type of x."""
    x = torch.full((1, 2, 16), 200.0, dtype=torch.float16)
    prompts = torch.full((1, 16), 64.0, dtype=torch.float16)
    zeros = torch.zeros(1, 16, dtype=torch.float16)
    inputs = [x, torch.zeros_like(x), prompts * 1e-3, zeros, zeros.T, torch.tensor(-20.0, dtype=torch.float16)]
    inputs[0][0, 1] = 20000.0
    assert check(inputs, impl="cpp")[0].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_in_its_row(bad, isa):  # noqa: F811
    for dtype in DTYPES:
        for options in (RELU, SOFTMAX):
            inputs = normal(dtype, 2, 40, 20, 33)
            grad = torch.randn_like(inputs[0])
            want = run(inputs, grad, impl="cpp", **options)
            inputs[0] = inputs[0].clone()
            inputs[0][1, 5, 3] = bad
            got = run(inputs, grad, impl="cpp", **options)
            hit = torch.zeros(2, 40, dtype=torch.bool)
            hit[1, 5] = True
            assert not got[0][hit].isfinite().any()
            assert torch.equal(got[0][~hit], want[0][~hit]) and torch.equal(got[1][~hit], want[1][~hit])
            assert torch.equal(got[2], want[2]) and not got[3].isfinite().all()
            if bad != bad:
                assert got[0][hit].isnan().all() and got[1][hit].isnan().all() and got[3].isnan().all()


def test_a_prompt_that_is_not_a_number(isa):  # noqa: F811
    for dtype in DTYPES:
        for options in (RELU, SOFTMAX):
            inputs = normal(dtype, learned=torch.float32)
            inputs[2][7, 1] = torch.nan
            out, dx, dbase, *_ = run(inputs, torch.randn_like(inputs[0]), impl="cpp", **options)
            assert out.isnan().all() and dx.isnan().all() and dbase.isfinite().all()


def test_identity_setting(isa):  # noqa: F811
    for dtype in DTYPES:
        inputs = make(dtype, prompts=0, log_scale=0.0)
        grad = torch.randn_like(inputs[0])
        out, dx, dbase, *_ = run(inputs, grad, impl="cpp")
        assert torch.equal(out, inputs[1]) and torch.equal(dbase, grad) and not dx.any()


@pytest.mark.parametrize("shape", [{"batch": 0}, {"tokens": 0}, {"width": 0}, {"prompts": 0}])
@each_option
def test_nothing(shape, activation, weight, isa):  # noqa: F811
    for dtype in DTYPES[:2]:
        inputs = make(dtype, **shape)
        out, *grads = run(inputs, torch.zeros_like(inputs[0]), impl="cpp", activation=activation, weight=weight)
        assert out.shape == inputs[0].shape
        assert [t.shape for t in grads] == [t.shape for t in inputs] and not any(t.any() for t in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_1_to_64_threads_give_the_same_bits(dtype, isa, threads):  # noqa: F811
    for inputs in (normal(dtype, 5, 301, 37, 100), normal(dtype, 1, 200, 100, 64)):
        grad = torch.randn_like(inputs[0])
        want = run(inputs, grad, impl="cpp")
        for count in (2, 3, 8, 64):
            threads(count)
            assert same(run(inputs, grad, impl="cpp"), want), f"{count} threads"
        threads(1)


def test_a_sample_does_not_depend_on_its_batch(isa):  # noqa: F811
    for dtype in DTYPES:
        inputs = normal(dtype, 3, 45, 20, 64)
        grad = torch.randn_like(inputs[0])
        whole = run(inputs, grad, impl="cpp")
        alone = run([t[1:2] for t in inputs[:2]] + inputs[2:], grad[1:2], impl="cpp")
        assert all(torch.equal(a[1:2], b) for a, b in zip(whole[:3], alone[:3], strict=True))


@pytest.mark.parametrize("axis", [0, 1])
def test_elements_past_two_to_the_31(axis):
    """The last sample or row begins more than 2^31 elements after the first; untouched memory costs nothing."""
    inputs = make(torch.float16, 2, 2)
    shape, stride = inputs[0].shape, list(inputs[0].stride())
    stride[axis] = 2**31 + 64
    far = torch.empty(stride[axis] + inputs[0].numel(), dtype=torch.float16)
    inputs[0] = far.as_strided(shape, stride).copy_(inputs[0])
    check(inputs, impl="cpp")


@pytest.mark.parametrize(
    ("activation", "weight", "dtype"), [("relu", "rowmax", torch.bfloat16), ("softmax", "none", torch.float32)]
)
def test_custom_op_contract(activation, weight, dtype):
    x, base, prompts, down, up, log_scale = make(dtype, wide=torch.float32)
    inputs = leaves([x, base, prompts, keys_of(prompts, down, up), log_scale], ALL[:5])
    torch.library.opcheck(torch.ops.fastprompt.diffuse_prompts.default, (*inputs, activation, weight, "cpp"))


@pytest.mark.parametrize(("dynamic", "needs"), [(True, ALL), (False, PROMPTS_ONLY)])
def test_compiles_in_one_graph(dynamic, needs):
    inputs = [leaves(make(batch=b, tokens=n), needs) for b, n in ((2, 5), (3, 8))]
    compiled_equals_eager(lambda *x: (diffuse_prompts(*x, impl="cpp"),), inputs, dynamic=dynamic)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast(dtype):
    inputs = make()
    with torch.autocast("cpu", dtype):
        out = diffuse_prompts(*inputs, impl="cpp")
    assert torch.equal(out, diffuse_prompts(*(t.to(dtype) for t in inputs[:2]), *inputs[2:], impl="cpp"))


def test_every_reason_is_listed():
    with pytest.raises(ImplUnavailableError, match="dtype float64 is not float16, bfloat16 or float32"):
        diffuse_prompts(*make(torch.float64, width=300), impl="cpp")


def test_auto_takes_what_was_measured_to_win(monkeypatch):
    for dtype, level, impl in (
        (torch.float32, "scalar", "cpu"), (torch.float32, "avx512", "cpp"), (torch.bfloat16, "avx512", "cpu"),
        (torch.bfloat16, "amx", "cpp"), (torch.float64, "amx", "cpu"),
    ):  # fmt: skip
        monkeypatch.setattr("fastprompt.ops.cpp.extension.best_isa", lambda level=level: level)
        choice = fastprompt.explain(diffuse_prompts, *make(dtype, width=300))
        assert choice.impl == impl, str(choice)
