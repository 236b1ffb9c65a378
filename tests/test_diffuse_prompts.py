# SPDX-License-Identifier: Apache-2.0
"""`diffuse_prompts` and its gradients against the formula in float64, on every implementation."""

import itertools

import pytest
import torch
from attention_cases import LAYOUTS, TRITON_DEVICE, compiled_equals_eager, leaves, to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close, tolerance
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import linear

import fastprompt
from fastprompt.errors import ImplUnavailableError
from fastprompt.ops import diffuse_prompts

#: "cpu" is the composition of PyTorch's CPU kernels; test_diffuse_prompts_cpp.py has the C++ kernels.
IMPLS = ("cpu", "reference", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "base", "prompts", "down", "up", "log_scale")
OPTIONS = tuple(itertools.product(("relu", "softmax"), ("rowmax", "none")))
ALL, PROMPTS_ONLY = (True,) * 6, (False, False, True, True, True, False)

each_impl = pytest.mark.parametrize("impl", IMPLS)
each_option = pytest.mark.parametrize(("activation", "weight"), OPTIONS)


def make(dtype=torch.float32, batch=2, tokens=5, prompts=3, width=16, rank=2, wide=None, log_scale=0.3):
    """The six tensors.

    Scores are sums of few-bit fractions, exact in every dtype: no rounding decides whether ReLU lets one through, and
    ties at 0 occur.
    """

    def grid(low, high, step, *shape):
        return (torch.randint(low, high + 1, shape) * step).to(dtype)

    learned = (
        grid(-2, 2, 0.25, prompts, width), grid(-1, 1, 0.5, rank, width), grid(-1, 1, 0.5, width, rank),
        torch.tensor(log_scale).to(dtype),
    )  # fmt: skip
    if wide is not None:
        learned = tuple(x.to(wide) for x in learned)
    return [grid(-2, 2, 0.5, batch, tokens, width), torch.randn(batch, tokens, width).to(dtype), *learned]


def keys_of(prompts, down, up):
    return prompts + (prompts @ down.T) @ up.T


def oracle(inputs, grad, activation="relu", weight="rowmax"):
    """Output and the six gradients, a token at a time, in float64, and the variance of what rounding must leave.

    A number stored in the dtype of x is off by eps of itself (activations, their weight, scores, and gradients of
    those), independently of the others, so squares add up; products accumulate with the eps of float32 or wider.
    """
    eps, wide = torch.finfo(inputs[0].dtype).eps, torch.finfo(torch.promote_types(inputs[0].dtype, torch.float32)).eps
    x, base, prompts, down, up, log_scale = (t.detach().double() for t in inputs)
    grad, factor = grad.double(), log_scale.exp()
    keys = keys_of(prompts, down, up)
    out, dx, dkeys, dvalues, dscale = (torch.zeros_like(t) for t in (x, x, prompts, prompts, log_scale))
    out_var, dx_var, dkeys_var, dvalues_var, dscale_var = (
        torch.zeros_like(t) for t in (x, x, prompts, prompts, dscale)
    )
    for at in itertools.product(range(x.shape[0]), range(x.shape[1])):
        scores = torch.stack([(x[at] * k).sum() for k in keys]) if len(keys) else x.new_zeros(0)
        if activation == "relu":
            a = torch.where(scores > 0, scores, 0.0)
            a_var = (eps * a) ** 2
        else:
            a = scores.exp() / scores.exp().sum()
            shift = (eps * scores) ** 2
            a_var = a**2 * (shift + (a**2 * shift).sum() + eps**2)
        m = a.max() if weight == "rowmax" and len(a) else 1.0
        read = a @ prompts
        out[at] = factor * (base[at] + m * read)
        read_var = a_var @ prompts**2 + wide**2 * (a**2 @ prompts**2)
        out_var[at] = (factor * m) ** 2 * (read_var + (eps * read) ** 2) + (wide * out[at]) ** 2
        # Backward; m counts as a constant.
        d_read = factor * m * grad[at]
        slope = prompts @ d_read
        slope_var = (2 * eps * slope) ** 2 + wide**2 * (prompts**2 @ d_read**2)
        if activation == "relu":
            ds, ds_var = torch.where(scores > 0, slope, 0.0), slope_var
        else:
            centred = slope - (a * slope).sum()
            ds = a * centred
            ds_var = a_var * centred**2 + a**2 * (slope_var + (a**2 * slope_var + a_var * slope**2).sum())
        ds_var = ds_var + (eps * ds) ** 2
        dx[at], dx_var[at] = ds @ keys, (ds_var + (wide * ds) ** 2) @ keys**2
        dkeys += ds[:, None] * x[at]
        dkeys_var += (ds_var + (wide * ds) ** 2)[:, None] * x[at] ** 2
        dvalues += a[:, None] * d_read
        dvalues_var += (a_var + (2 * eps * a) ** 2)[:, None] * d_read**2
        dscale += (grad[at] * out[at]).sum()
        dscale_var += (grad[at] ** 2 * (out_var[at] + (2 * wide * out[at]) ** 2)).sum()
    low = prompts @ down.T
    dlow, dlow_var = dkeys @ up, dkeys_var @ up**2
    values = out, dx, factor * grad, dvalues + dkeys + dlow @ down, dlow.T @ prompts, dkeys.T @ low, dscale
    variances = (
        out_var, dx_var, (wide * factor * grad) ** 2, dvalues_var + dkeys_var + dlow_var @ down**2,
        dlow_var.T @ prompts**2, dkeys_var.T @ low**2, dscale_var,
    )  # fmt: skip
    return values, variances


def plain(inputs, grad, activation="relu", weight="rowmax"):
    """The same maths as PyTorch users write it, every intermediate in the dtype of x."""
    live = leaves(inputs, ALL)
    x, base, prompts, down, up, log_scale = (t.to(inputs[0].dtype) for t in live)
    a = linear(x, keys_of(prompts, down, up))
    a = a.relu() if activation == "relu" else a.softmax(-1)
    read = a @ prompts
    if weight == "rowmax" and len(prompts):
        read = read * a.detach().max(-1, keepdim=True).values
    out = log_scale.exp() * (base + read)
    return out.detach(), *torch.autograd.grad(out, live, grad, materialize_grads=True)


def run(inputs, grad, needs=ALL, impl="auto", **options):
    """Output and gradients (None where not asked for)."""
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    live, grad = to_device((leaves(inputs, needs), grad), device)
    out = diffuse_prompts(*live, impl=impl, **options)
    wanted = [t for t in live if t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad) if wanted else ())
    return to_device([out.detach(), *(next(found) if need else None for need in needs)], "cpu")


def check(inputs, needs=ALL, impl="auto", **options):
    grad = torch.randn(inputs[0].shape).to(inputs[0].dtype)
    actual = run(inputs, grad, needs, impl, **options)
    values, variances = oracle(inputs, grad, **options)
    parts = zip(("out", *NAMES), actual, values, plain(inputs, grad, **options), variances, strict=True)
    for name, got, want, low, variance in parts:
        if got is not None:
            assert_close(name, got, want, tolerance(want, low.to(inputs[0].dtype), variance.sqrt()))
    for name, x, got in zip(("out", *NAMES), (inputs[0], *inputs), actual, strict=True):
        assert got is None or (got.dtype, got.shape) == (x.dtype, x.shape), name
    return actual


@each_impl
@each_option
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(impl, activation, weight, dtype):
    check(make(dtype), impl=impl, activation=activation, weight=weight)


@pytest.mark.parametrize("impl", IMPLS[:2])
@each_option
def test_float64(impl, activation, weight):
    check(make(torch.float64), impl=impl, activation=activation, weight=weight)


@pytest.mark.parametrize("impl", IMPLS[:2])
@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_gradcheck_without_the_detached_weight(impl, activation):
    """With m = 1 nothing is detached and finite differences apply."""
    inputs = [torch.randn_like(x).requires_grad_() for x in make(torch.float64, width=4)]
    call = lambda *x: diffuse_prompts(*x, activation=activation, weight="none", impl=impl)  # noqa: E731
    assert gradcheck(call, inputs, fast_mode=True)


@each_impl
def test_no_gradient_flows_through_the_weight(impl):
    """At log_scale 0, one prompt p and base 0: out = s^2 p with s = x k, and dx is g (s p) k, not twice that."""
    x, p = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[1.0, 2.0]])
    inputs = [x, torch.zeros_like(x), p, torch.zeros(1, 2), torch.zeros(2, 1), torch.zeros(())]
    out, dx, *_ = run(inputs, torch.ones_like(x), impl=impl)
    torch.testing.assert_close(out, torch.tensor([[[9.0, 18.0]]]))
    torch.testing.assert_close(dx, torch.tensor([[[9.0, 18.0]]]))


@each_impl
def test_scores_of_zero_and_below_read_nothing(impl):
    """With all scores at most 0 the layer is exp(log_scale) * base, and prompts get no gradient: the rule at 0."""
    inputs = make(log_scale=0.0)
    inputs[0] = torch.zeros_like(inputs[0])
    out, dx, dbase, *learned, dscale = run(inputs, torch.ones_like(inputs[0]), impl=impl)
    assert torch.equal(out, inputs[1]) and torch.equal(dbase, torch.ones_like(dbase))
    assert not any(t.any() for t in (dx, *learned))
    torch.testing.assert_close(dscale, inputs[1].sum())


@each_impl
def test_identity_setting(impl):
    """No prompts and log_scale 0 is the frozen layer, bit for bit, with its gradients."""
    inputs = make(prompts=0, log_scale=0.0)
    grad = torch.randn_like(inputs[0])
    out, dx, dbase, *_ = run(inputs, grad, impl=impl)
    assert torch.equal(out, inputs[1]) and torch.equal(dbase, grad) and not dx.any()


@st.composite
def cases(draw):
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = pick(*DTYPES)
    inputs = make(
        dtype, pick(1, 3), pick(1, 7, 37), pick(0, 1, 5, 40), pick(8, 16, 24), pick(0, 1, 4),
        pick(None, torch.float32), pick(-0.5, 0.0, 1.0),
    )  # fmt: skip
    inputs[:2] = [LAYOUTS[pick(*LAYOUTS)](x) for x in inputs[:2]]
    inputs[2] = LAYOUTS[pick("contiguous", "strided")](inputs[2])
    needs = tuple(draw(st.booleans()) for _ in NAMES)
    return inputs, needs, dict(zip(("activation", "weight"), pick(*OPTIONS), strict=True))


@each_impl
@given(case=cases())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_shapes_layouts_and_needs(impl, case):
    inputs, needs, options = case
    check(inputs, needs, impl, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_subset_of_inputs_gets_the_same_gradients(dtype):
    for needs in itertools.product([False, True], repeat=6):
        check(make(dtype), needs)


@each_impl
@pytest.mark.parametrize("shape", [{"batch": 0}, {"tokens": 0}])
@each_option
def test_nothing(impl, shape, activation, weight):
    inputs = make(**shape)
    out, *grads = run(inputs, torch.zeros_like(inputs[0]), impl=impl, activation=activation, weight=weight)
    assert out.shape == inputs[0].shape
    assert [t.shape for t in grads] == [t.shape for t in inputs] and not any(t.any() for t in grads)


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_prompts_beside_half_precision(impl, dtype):
    """Prompts that half precision has to round; their gradients are not rounded to it."""
    inputs = make(dtype, wide=torch.float32)
    inputs[2] = inputs[2] + 2**-14
    _, *grads = check(inputs, impl=impl)
    assert not torch.equal(grads[2], grads[2].to(dtype).float())


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_sums_over_tokens_are_not_rounded_to_half_precision(impl):
    """Where every activation and slope is exact in bfloat16, all that is left of gradients is float32's rounding."""
    inputs = make(torch.bfloat16, tokens=100, wide=torch.float32, log_scale=0.0)
    inputs[1] = torch.randint(-8, 9, inputs[1].shape).bfloat16() / 4
    grad = torch.randint(-2, 3, inputs[0].shape).bfloat16() / 2
    _, _, _, *got = run(inputs, grad, impl=impl, weight="none")
    (_, _, _, *want), _ = oracle(inputs, grad, weight="none")
    for name, a, b in zip(NAMES[2:], got, want, strict=True):
        assert (a.double() - b).abs().max() <= 2**-15 * b.abs().max(), name


@each_impl
def test_large_scores_of_softmax(impl):
    inputs = make(torch.float32, tokens=9)
    inputs[0] = inputs[0] * 16
    check(inputs, impl=impl, activation="softmax")


@pytest.mark.parametrize("shape", [(), (1,)])
def test_log_scale_of_either_shape(shape):
    inputs = make()
    inputs[5] = inputs[5].reshape(shape)
    assert check([*inputs[:5], inputs[5]])[6].shape == shape


@each_impl
@each_option
def test_repeats_bit_for_bit(impl, activation, weight):
    inputs = make(torch.bfloat16, batch=2, tokens=40, prompts=20)
    grad = torch.randn_like(inputs[0])
    first, second = (run(inputs, grad, impl=impl, activation=activation, weight=weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize(("trained", "count"), [(True, 2), (False, 1)])
def test_what_is_kept_for_the_backward(impl, trained, count):
    """Of what is as large as a batch: x, and base where log_scale trains; nothing of size [B,N,P]."""
    inputs = to_device(leaves(make(batch=3, tokens=50, prompts=40), (*ALL[:5], trained)), TRITON_DEVICE)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        diffuse_prompts(*inputs, impl=impl)
    large = [t for t in kept if t.numel() >= 3 * 50]
    batched = [t for t in large if t.dim() == 3]
    assert {t.data_ptr() for t in batched} == {t.data_ptr() for t in inputs[:count]}
    assert all(t.numel() <= 40 * 16 for t in large if t.dim() != 3)


@pytest.mark.parametrize("impl", ["cpu"])
def test_the_cpu_works_tile_by_tile(impl, monkeypatch):
    """Several tiles give what one does."""
    from fastprompt.ops.cpu import diffuse_prompts as cpu

    inputs, largest = make(tokens=30, prompts=10), []
    monkeypatch.setattr(cpu, "TILE", 70)
    activate = cpu._activate
    monkeypatch.setattr(cpu, "_activate", lambda s, *rest: (largest.append(s.numel()), activate(s, *rest))[1])
    check(inputs, impl=impl)
    assert max(largest) == 70 and len(largest) == 2 * 9


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("activation", "weight", "dtype"), [("relu", "rowmax", torch.bfloat16), ("softmax", "none", torch.float32)]
)
def test_opcheck(impl, activation, weight, dtype):
    x, base, prompts, down, up, log_scale = make(dtype, wide=torch.float32)
    inputs = leaves([x, base, prompts, keys_of(prompts, down, up), log_scale], ALL[:5])
    inputs = to_device(inputs, TRITON_DEVICE if impl == "triton" else "cpu")
    torch.library.opcheck(torch.ops.fastprompt.diffuse_prompts.default, (*inputs, activation, weight, impl))


@pytest.mark.parametrize(
    ("impl", "dynamic", "needs"), [("auto", True, ALL), ("auto", False, PROMPTS_ONLY), ("reference", False, ALL)]
)
def test_compiles_in_one_graph(impl, dynamic, needs):
    inputs = [leaves(make(batch=b, tokens=n), needs) for b, n in ((2, 5), (3, 8))]
    compiled_equals_eager(lambda *x: (diffuse_prompts(*x, impl=impl),), inputs, dynamic=dynamic)


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(impl, dtype):
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    inputs = make()
    grad = torch.randn(inputs[0].shape).to(dtype)
    want = run([t.to(dtype) for t in inputs[:2]] + inputs[2:], grad, impl=impl)
    live, grad = to_device((leaves(inputs, ALL), grad), device)
    with torch.autocast(device, dtype):
        out = diffuse_prompts(*live, impl=impl)
    got = to_device([out.detach(), *torch.autograd.grad(out, live, grad)], "cpu")
    assert got[0].dtype == dtype and all(t.dtype == torch.float32 for t in got[1:])
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, want, strict=True))


def test_a_second_derivative_is_an_error_not_a_wrong_number():
    inputs = leaves(make(torch.float64), ALL)
    first = torch.autograd.grad(diffuse_prompts(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(t.square().sum() for t in first).backward()
    smooth = lambda *x: diffuse_prompts(*x, activation="softmax", weight="none", impl="reference")  # noqa: E731
    assert gradgradcheck(smooth, leaves(make(torch.float64, width=4), ALL), fast_mode=True)


def test_explain_without_cpp(monkeypatch):
    monkeypatch.setattr("fastprompt.ops.dispatch.CPP_OPS", ())
    inputs = make()
    assert fastprompt.explain(diffuse_prompts, *inputs).impl == "cpu"
    with pytest.raises(ImplUnavailableError, match="no cpp kernel for diffuse_prompts"):
        diffuse_prompts(*inputs, impl="cpp")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: got list, expected a torch.Tensor"),
        ({"x": torch.zeros(5, 16)}, ValueError, "x: got rank 2 (shape [5, 16]), expected [B,N,C]"),
        ({"base": torch.zeros(2, 4, 16)}, ValueError, "base: got shape [2, 4, 16], expected [2, 5, 16] to match x"),
        ({"base": torch.zeros(2, 5, 16).half()}, TypeError, "base: got dtype torch.float16, expected torch.float32"),
        ({"prompts": torch.zeros(1, 3, 16)}, ValueError, "prompts: got rank 3 (shape [1, 3, 16]), expected [P,C]"),
        ({"prompts": torch.zeros(3, 8)}, ValueError, "prompts: got shape [3, 8], expected [3, 16] to match x"),
        ({"prompts": torch.zeros(3, 16).double()}, TypeError, "prompts: got dtype torch.float64"),
        ({"down": torch.zeros(16, 2)}, ValueError, "down: got shape [16, 2], expected [16, 16]"),
        ({"up": torch.zeros(2, 16)}, ValueError, "up: got shape [2, 16], expected [16, 2] to match x [2, 5, 16] and"),
        ({"up": torch.zeros(16, 3)}, ValueError, "up: got shape [16, 3], expected [16, 2]"),
        ({"log_scale": torch.zeros(2)}, ValueError, "log_scale: got shape [2], expected one number"),
        ({"log_scale": 0.0}, TypeError, "log_scale: got float, expected a torch.Tensor"),
        ({"activation": "gelu"}, ValueError, "activation: got 'gelu', expected one of 'relu', 'softmax'"),
        ({"weight": "sum"}, ValueError, "weight: got 'sum', expected one of 'rowmax', 'none'"),
        ({"impl": "best"}, ValueError, "impl: got 'best'"),
    ],
)
def test_errors(change, error, message):
    arguments = dict(zip(NAMES, make(), strict=True)) | change
    for call in (diffuse_prompts, lambda **kwargs: fastprompt.explain(diffuse_prompts, **kwargs)):
        with pytest.raises(error) as raised:
            call(**arguments)
        assert message in str(raised.value)


def test_debug_finds_prompts_that_are_not_finite(monkeypatch):
    monkeypatch.setattr(fastprompt.config, "DEBUG", True)
    inputs = make()
    inputs[2][1, 2] = torch.nan
    with pytest.raises(ValueError, match="prompts: got 1 NaN"):
        diffuse_prompts(*inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("prompts", "width", "rank"), [(1, 64, 2), (100, 768, 0), (200, 768, 0), (512, 1024, 0)])
def test_on_the_gpu(dtype, prompts, width, rank):
    """Sizes of models. A wide key of no rank is exact in half precision, and so is what ReLU lets through."""
    for activation, weight in OPTIONS:
        inputs = make(dtype, 2, 70, prompts, width, rank, wide=torch.float32)
        check(inputs, impl="triton", activation=activation, weight=weight)
