# SPDX-License-Identifier: Apache-2.0
"""`summarize_tokens` and its gradients against the formula in float64, on every implementation."""

import itertools

import pytest
import torch
from attention_cases import LAYOUTS, TRITON_DEVICE, compiled_equals_eager, leaves, to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close, tolerance
from torch.autograd import gradcheck, gradgradcheck

import fastprompt
from fastprompt.errors import ImplUnavailableError
from fastprompt.ops import summarize_tokens

IMPLS = ("auto", "reference", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("selectors", "x")
ALL, SELECTORS_ONLY = (True, True), (True, False)

each_impl = pytest.mark.parametrize("impl", IMPLS)


def make(dtype=torch.float32, tasks=2, batch=3, summaries=3, tokens=5, width=16, wide=None):
    """Selectors and tokens."""
    return [torch.randn(tasks, summaries, width).to(wide or dtype), torch.randn(batch, tokens, width).to(dtype)]


def oracle(inputs, grad, scale=None):
    """Output and both gradients, a summary at a time, in float64, and the variance of what rounding must leave.

    A number stored in the dtype of x is off by eps of itself (weights, slopes, what they are summed to), independently
    of the others, so squares add up; scores and products accumulate with the eps of float32 or wider.
    """
    low, wide = torch.finfo(inputs[1].dtype).eps, torch.finfo(torch.promote_types(inputs[1].dtype, torch.float32)).eps
    selectors, x = inputs[0].detach().to(inputs[1].dtype).double(), inputs[1].detach().double()
    scale, grad = x.shape[-1] ** -0.5 if scale is None else scale, grad.double()
    out, dsel, dx = (torch.zeros_like(t) for t in (grad, selectors, x))
    out_var, dsel_var, dx_var = (torch.zeros_like(t) for t in (grad, selectors, x))
    for t, b, s in itertools.product(*map(range, grad.shape[:3])):
        tokens, row, do = x[b], selectors[t, s], grad[t, b, s]
        if not len(tokens):
            continue
        scores = scale * (tokens @ row)
        p = scores.softmax(0)
        # The exponent of a weight is off by what its score and the log-sum-exp are.
        shift = wide * (scores.abs() + scale * tokens.norm(dim=-1) * row.norm() + scores.logsumexp(0).abs())
        p_var = p**2 * (shift**2 + low**2)
        out[t, b, s] = p @ tokens
        out_var[t, b, s] = p_var @ tokens**2 + (low * out[t, b, s]) ** 2
        dp, delta = tokens @ do, out[t, b, s] @ do
        dp_var = (wide * tokens.norm(dim=-1) * do.norm()) ** 2
        # delta is a sum over an output that was rounded.
        delta_var = out_var[t, b, s] @ do**2
        ds = scale * p * (dp - delta)
        ds_var = scale**2 * (p_var * (dp - delta) ** 2 + p**2 * (dp_var + delta_var)) + (low * ds) ** 2
        dsel[t, s] += ds @ tokens
        dsel_var[t, s] += ds_var @ tokens**2
        dx[b] += torch.outer(ds, row) + torch.outer(p, do)
        dx_var[b] += torch.outer(ds_var, row**2) + torch.outer(p_var, do**2)
    return (out, dsel, dx), (out_var, dsel_var, dx_var)


def plain(inputs, grad, scale=None):
    """The same maths as PyTorch users write it, every intermediate in the dtype of x."""
    live = leaves(inputs, ALL)
    selectors, x = (t.to(inputs[1].dtype) for t in live)
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    out = torch.einsum("tbsn,bnc->tbsc", (scale * torch.einsum("tsc,bnc->tbsn", selectors, x)).softmax(-1), x)
    return out.detach(), *torch.autograd.grad(out, live, grad, materialize_grads=True)


def run(inputs, grad, needs=ALL, impl="auto", **options):
    """Output and gradients (None where not asked for)."""
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    live, grad = to_device((leaves(inputs, needs), grad), device)
    out = summarize_tokens(*live, impl=impl, **options)
    assert out.is_contiguous()
    wanted = [t for t in live if t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad) if wanted else ())
    return to_device([out.detach(), *(next(found) if need else None for need in needs)], "cpu")


def grad_of(inputs):
    tasks, summaries, width = inputs[0].shape
    return torch.randn(tasks, len(inputs[1]), summaries, width).to(inputs[1].dtype)


def check(inputs, needs=ALL, impl="auto", grad=None, **options):
    grad = grad_of(inputs) if grad is None else grad
    actual = run(inputs, grad, needs, impl, **options)
    values, variances = oracle(inputs, grad, **options)
    low_precision = plain(inputs, grad, **options)
    for name, got, want, low, var in zip(("out", *NAMES), actual, values, low_precision, variances, strict=True):
        if got is not None:
            assert_close(name, got, want, tolerance(want, low.to(inputs[1].dtype), var.sqrt()))
    for name, x, got in zip(NAMES, inputs, actual[1:], strict=True):
        assert got is None or (got.dtype, got.shape) == (x.dtype, x.shape), name
    assert actual[0].dtype == inputs[1].dtype
    return actual


@each_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_equals_the_formula(impl, dtype, scale):
    check(make(dtype), impl=impl, scale=scale)


@pytest.mark.parametrize("impl", IMPLS[:2])
def test_float64(impl):
    check(make(torch.float64), impl=impl)
    inputs = leaves(make(torch.float64, width=4), ALL)
    assert gradcheck(lambda *x: summarize_tokens(*x, impl=impl), inputs, fast_mode=True)


@each_impl
def test_several_tiles_of_rows_and_tokens(impl):
    check(make(tasks=5, batch=2, summaries=9, tokens=70, width=24), impl=impl)


@st.composite
def cases(draw):
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    inputs = make(
        pick(*DTYPES), pick(0, 1, 3), pick(0, 1, 2), pick(0, 1, 5), pick(0, 1, 7, 37), pick(1, 8, 24),
        pick(None, torch.float32),
    )  # fmt: skip
    inputs = [LAYOUTS[pick(*LAYOUTS)](x) for x in inputs]
    grad = LAYOUTS[pick("contiguous", "strided")](grad_of(inputs))
    return inputs, tuple(draw(st.booleans()) for _ in NAMES), grad, {"scale": pick(None, 0.0, 1.5)}


@each_impl
@given(case=cases())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_shapes_layouts_and_needs(impl, case):
    inputs, needs, grad, options = case
    check(inputs, needs, impl, grad, **options)


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_selectors_beside_half_precision(impl, dtype):
    """Selectors that half precision has to round; the gradient that fast paths return is not rounded to it."""
    _, dsel, _ = check(make(dtype, wide=torch.float32), impl=impl)
    assert torch.equal(dsel, dsel.to(dtype).float()) == (impl == "reference")


@each_impl
def test_large_scores(impl):
    inputs = make(tokens=9)
    inputs[1] = inputs[1] * 30
    check(inputs, impl=impl, scale=1.0)


@each_impl
def test_repeats_bit_for_bit(impl):
    inputs = make(torch.bfloat16, tasks=3, batch=4, summaries=7, tokens=40, wide=torch.float32)
    grad = grad_of(inputs)
    first, second = (run(inputs, grad, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_what_is_kept_for_the_backward(impl):
    """Of what grows with the batch: the tokens, the output and its log-sum-exp; nothing of size [T,B,S,N]."""
    inputs = to_device(leaves(make(batch=4, tokens=50, summaries=7, tasks=3), SELECTORS_ONLY), TRITON_DEVICE)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = summarize_tokens(*inputs, impl=impl)
    assert sorted(t.numel() for t in kept) == sorted(
        [inputs[0].numel(), inputs[1].numel(), out.numel(), out[..., 0].numel()]
    )


def test_the_cpu_works_tile_by_tile(monkeypatch):
    """Several tiles give what one does."""
    from fastprompt.ops.cpu import summarize_tokens as cpu

    inputs = make(batch=5)
    grad = grad_of(inputs)
    want = run(inputs, grad)
    monkeypatch.setattr(cpu, "TILE", 70)
    for a, b in zip(run(inputs, grad), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(impl, dtype):
    inputs = leaves(make(dtype, wide=torch.float32), ALL)
    inputs = to_device(inputs, TRITON_DEVICE if impl == "triton" else "cpu")
    torch.library.opcheck(torch.ops.fastprompt.summarize_tokens.default, (*inputs, 0.25, impl))


@pytest.mark.parametrize(
    ("impl", "dynamic", "needs"), [("auto", True, ALL), ("auto", False, SELECTORS_ONLY), ("reference", False, ALL)]
)
def test_compiles_in_one_graph(impl, dynamic, needs):
    inputs = [leaves(make(batch=b, tokens=n), needs) for b, n in ((2, 5), (3, 8))]
    compiled_equals_eager(lambda *x: (summarize_tokens(*x, impl=impl),), inputs, dynamic=dynamic)


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(impl, dtype):
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    inputs = make()
    grad = grad_of(inputs).to(dtype)
    want = run([inputs[0], inputs[1].to(dtype)], grad, impl=impl)
    live, grad = to_device((leaves(inputs, ALL), grad), device)
    with torch.autocast(device, dtype):
        out = summarize_tokens(*live, impl=impl)
    got = to_device([out.detach(), *torch.autograd.grad(out, live, grad)], "cpu")
    assert got[0].dtype == dtype and all(t.dtype == torch.float32 for t in got[1:])
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, want, strict=True))


def test_a_second_derivative_is_an_error_not_a_wrong_number():
    inputs = leaves(make(torch.float64, width=4), ALL)
    first = torch.autograd.grad(summarize_tokens(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(t.square().sum() for t in first).backward()
    assert gradgradcheck(lambda *x: summarize_tokens(*x, impl="reference"), inputs, fast_mode=True)


def test_explain():
    inputs = make()
    assert fastprompt.explain(summarize_tokens, *inputs).impl == "cpu"
    with pytest.raises(ImplUnavailableError, match="no cpp kernel for summarize_tokens"):
        summarize_tokens(*inputs, impl="cpp")
    with pytest.raises(ImplUnavailableError, match="width 1040 is more than 1024"):
        summarize_tokens(*make(width=1040), impl="triton")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: got list, expected a torch.Tensor"),
        ({"x": torch.zeros(5, 16)}, ValueError, "x: got rank 2 (shape [5, 16]), expected [B,N,C]"),
        ({"x": torch.zeros(2, 5, 16).long()}, TypeError, "x: got dtype torch.int64"),
        ({"selectors": torch.zeros(3, 16)}, ValueError, "selectors: got rank 2 (shape [3, 16]), expected [T,S,C]"),
        ({"selectors": torch.zeros(2, 3, 8)}, ValueError, "selectors: got shape [2, 3, 8], expected [T,S,16] to match"),
        ({"selectors": torch.zeros(2, 3, 16).double()}, TypeError, "selectors: got dtype torch.float64, expected"),
        ({"scale": -1.0}, ValueError, "scale: got -1.0"),
        ({"impl": "best"}, ValueError, "impl: got 'best'"),
    ],
)
def test_errors(change, error, message):
    arguments = dict(zip(NAMES, make(), strict=True)) | change
    for call in (summarize_tokens, lambda **kwargs: fastprompt.explain(summarize_tokens, **kwargs)):
        with pytest.raises(error) as raised:
            call(**arguments)
        assert message in str(raised.value)


def test_debug_finds_selectors_that_are_not_finite(monkeypatch):
    monkeypatch.setattr(fastprompt.config, "DEBUG", True)
    inputs = make()
    inputs[0][1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="selectors: got 1 NaN"):
        summarize_tokens(*inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [384, 768, 1024])
def test_on_the_gpu(dtype, width):
    for tasks, tokens in ((1, 257), (4, 197)):
        check(make(dtype, tasks, 2, 20, tokens, width, torch.float32), impl="triton")
