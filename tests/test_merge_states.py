# SPDX-License-Identifier: Apache-2.0
from itertools import permutations

import pytest
import torch
from oracles import assert_close, largest, tolerance
from torch.autograd import gradcheck

import fastprompt
from fastprompt.ops import merge_states

NAMES = ("out_a", "lse_a", "out_b", "lse_b")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IMPLS = ("auto", "reference")
SHAPE = (2, 3, 7, 20)


def lse_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def state(dtype=torch.float64, shape=SHAPE, spread=3.0):
    """A random state ``(out, lse)``; some rows saw no key."""
    out, lse = torch.randn(shape), spread * torch.randn(shape[:-1])
    empty = torch.rand(shape[:-1]) < 0.2
    return out.masked_fill(empty[..., None], 0.0).to(dtype), lse.masked_fill(empty, -torch.inf).to(lse_dtype(dtype))


def attention(query, key, value):
    """``(out, lse)`` over one set of keys."""
    scores = query @ key.transpose(-1, -2)
    return scores.softmax(dim=-1) @ value, scores.logsumexp(dim=-1)


def exact(out_a, lse_a, out_b, lse_b, grad_out, grad_lse):
    """The merge in float64 with derivatives by hand, a row at a time: dL_k = w_k (dO (O_k - O) + dL), dO_k = w_k dO."""
    out_a, lse_a, out_b, lse_b, grad_out, grad_lse = (
        x.detach().double() for x in (out_a, lse_a, out_b, lse_b, grad_out, grad_lse)
    )
    lse = torch.logaddexp(lse_a, lse_b)
    weights = [torch.where(lse > -torch.inf, (x - lse).exp(), 0.0)[..., None] for x in (lse_a, lse_b)]
    out = weights[0] * out_a + weights[1] * out_b
    grads = []
    for weight, side in zip(weights, (out_a, out_b), strict=True):
        row = (grad_out * (side - out)).sum(dim=-1) + grad_lse
        grads += [weight * grad_out, weight[..., 0] * row]
    return out, lse, grads


def plain(out_a, lse_a, out_b, lse_b):
    """The merge as one would write it, in the dtype of the outputs."""
    lse = torch.logaddexp(lse_a, lse_b)
    weights = [torch.exp(x - lse).nan_to_num(0.0).to(out_a.dtype)[..., None] for x in (lse_a, lse_b)]
    return weights[0] * out_a + weights[1] * out_b, lse


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("impl", IMPLS)
def test_union_of_keys_is_attention_over_the_union(impl):
    query, key, value = torch.randn(3, 2, 4, 11, 20, dtype=torch.float64)
    for cut in (1, 4, 10):
        parts = [attention(query, key[:, :, s], value[:, :, s]) for s in (slice(cut), slice(cut, None))]
        for got, want in zip(merge_states(*parts[0], *parts[1], impl=impl), attention(query, key, value), strict=True):
            torch.testing.assert_close(got, want)


def test_every_order_and_bracketing_of_three_states_agrees():
    states = [state() for _ in range(3)]
    merged = []
    for a, b, c in permutations(states):
        merged += [merge_states(*merge_states(*a, *b), *c), merge_states(*a, *merge_states(*b, *c))]
    for other in merged[1:]:
        for got, want in zip(other, merged[0], strict=True):
            torch.testing.assert_close(got, want)


def test_swapping_the_sides_changes_no_bit():
    a, b = state(torch.float32), state(torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(merge_states(*a, *b), merge_states(*b, *a), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_outputs_and_gradients_match_the_oracle(dtype, impl):
    tensors = (*state(dtype), *state(dtype))
    grad_out, grad_lse = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE[:-1]).to(lse_dtype(dtype))
    inputs = leaves(tensors)
    out, lse = merge_states(*inputs, impl=impl)
    assert (out.dtype, lse.dtype) == (dtype, lse_dtype(dtype))
    grads = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))
    want_out, want_lse, want_grads = exact(*tensors, grad_out, grad_lse)
    plain_out, plain_lse = plain(*tensors)
    # A weight is exp(lse_k - lse): its relative error is eps of the larger of the two.
    weight_noise = torch.finfo(lse.dtype).eps * (1 + largest(lse))
    assert_close("out", out, want_out, tolerance(want_out, plain_out, weight_noise * want_out))
    assert_close("lse", lse, want_lse, tolerance(want_lse, plain_lse))
    for name, x, grad, want in zip(NAMES, tensors, grads, want_grads, strict=True):
        assert grad.dtype == x.dtype
        # The gradient of a lse sums D products, each with the rounding of a weight.
        terms = SHAPE[-1] if name.startswith("lse") else 1
        assert_close(name, grad, want, (torch.finfo(x.dtype).eps + terms * weight_noise) * largest(want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty", ["a", "b", "ab"])
def test_a_side_without_keys_changes_nothing(dtype, empty):
    some = (torch.randn(SHAPE).to(dtype), torch.randn(SHAPE[:-1]).to(lse_dtype(dtype)))
    tensors = dict(zip(NAMES, some * 2, strict=True))
    for side in empty:
        tensors[f"out_{side}"] = torch.zeros(SHAPE, dtype=dtype)
        tensors[f"lse_{side}"] = torch.full(SHAPE[:-1], -torch.inf, dtype=lse_dtype(dtype))
    inputs = leaves(tensors.values())
    out, lse = merge_states(*inputs)
    other = "a" if "a" not in empty else "b"
    assert torch.equal(out, tensors[f"out_{other}"])
    assert torch.equal(lse, tensors[f"lse_{other}"])
    grads = torch.autograd.grad((out, lse.nan_to_num(neginf=0.0)), inputs, (torch.ones_like(out), torch.ones_like(lse)))
    for name, grad in zip(NAMES, grads, strict=True):
        assert grad.isfinite().all(), name
        if name[-1] in empty:
            assert not grad.any(), f"{name}: a side without keys got a gradient"
        else:
            # dL = w (dO (O_k - O) + dL) with w = 1 and O_k = O: exact but for sums over D that cancel.
            rounding = torch.finfo(grad.dtype).eps * SHAPE[-1] * largest(out)
            assert_close(name, grad, torch.ones_like(grad), rounding if name.startswith("lse") else 0.0)


def test_large_and_distant_lse_do_not_overflow():
    out = torch.randn(4, 8)
    far = torch.tensor([1e4, -1e4, 5e37, 0.0])
    merged, lse = merge_states(out, far, -out, torch.zeros(4))
    torch.testing.assert_close(merged, torch.stack([out[0], -out[1], out[2], torch.zeros(8)]))
    torch.testing.assert_close(lse, torch.tensor([1e4, 0.0, 5e37, 2.0]).where(far != 0, torch.tensor(2.0).log()))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    inputs = leaves((*state(shape=(2, 3, 4), spread=1.0), *state(shape=(2, 3, 4), spread=1.0)))
    for lse in inputs[1::2]:
        lse.data.nan_to_num_(neginf=-1.0)
    assert gradcheck(lambda *x: merge_states(*x, impl=impl), inputs)


@pytest.mark.parametrize("shape", [(5,), (0, 4), (2, 3, 1, 1), (2, 3, 7, 20)], ids=str)
def test_any_number_of_leading_dimensions(shape):
    a, b = state(shape=shape), state(shape=shape)
    out, lse = merge_states(*a, *b)
    want_out, want_lse, _ = exact(*a, *b, torch.zeros(shape), torch.zeros(shape[:-1]))
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.fastprompt.merge_states.default, leaves((*state(dtype), *state(dtype))))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_in_one_graph(impl):
    def loss(*x):
        out, lse = merge_states(*x, impl=impl)
        return (out.square().sum() + lse.clamp(min=-10).sum()), out, lse

    inputs = leaves((*state(torch.float32), *state(torch.float32)))
    eager = loss(*inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    for got, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(torch.autograd.grad(compiled[0], inputs), torch.autograd.grad(eager[0], inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_explain_gives_the_reasons():
    choice = fastprompt.explain(merge_states, *state(), *state())
    assert choice.impl == "reference"
    assert choice.refused.keys() == {"triton", "cpp"}
    assert "no triton kernel for merge_states" in str(choice)


@pytest.mark.parametrize("impl", ["triton", "cpp"])
def test_an_explicit_impl_never_falls_back(impl):
    with pytest.raises(fastprompt.ImplUnavailableError, match=f"impl='{impl}' cannot run merge_states here: no {impl}"):
        merge_states(*state(), *state(), impl=impl)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out_a": [1.0]}, TypeError, "out_a: got list, expected a torch.Tensor"),
        ({"lse_b": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, r"lse_b: got dtype torch.int64, expected one of"),
        ({"out_b": torch.zeros(2, 3, 4)}, TypeError, "out_b: got dtype torch.float32, expected torch.float64"),
        ({"lse_a": torch.zeros(2, 3)}, TypeError, "lse_a: got dtype torch.float32, expected torch.float64"),
        ({"out_b": torch.zeros(2, 3, 5).double()}, ValueError, r"out_b: got shape \[2, 3, 5\], expected \[2, 3, 4\]"),
        ({"lse_b": torch.zeros(2, 3, 1).double()}, ValueError, r"lse_b: got shape \[2, 3, 1\], expected \[2, 3\]"),
        ({"lse_a": torch.zeros(2, 3, device="meta").double()}, ValueError, "lse_a: got device meta, expected cpu"),
        ({"impl": "cuda"}, ValueError, "impl: got 'cuda', expected one of 'auto', 'reference', 'triton', 'cpp'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors_name_the_argument(change, error, message):
    arguments = dict(zip(NAMES, (*state(shape=(2, 3, 4)), *state(shape=(2, 3, 4))), strict=True)) | change
    with pytest.raises(error, match=message):
        merge_states(**arguments)
    with pytest.raises(error, match=message):
        fastprompt.explain(merge_states, **arguments)
