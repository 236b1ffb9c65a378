# SPDX-License-Identifier: Apache-2.0
"""`compress_kv` against a slow loop over heads and keys, on every implementation."""

import pytest
import torch
from attention_cases import LAYOUTS, TRITON_DEVICE, to_device
from hypothesis import given, settings
from hypothesis import strategies as st

import fastprompt
from fastprompt.errors import ImplUnavailableError
from fastprompt.ops import compress_kv, reference
from fastprompt.ops.dispatch import HEAD_SIZES

#: C++ has a file of its own.
IMPLS = ("reference", "triton")
MERGES = ("drop", "average", "pivot", "weighted")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(dtype=torch.float32, batch=2, heads=2, length=12, dim=16, dim_value=None):
    """Keys, values and scores with ties."""
    key, value = (torch.randn(batch, heads, length, d).to(dtype) for d in (dim, dim_value or dim))
    return key, value, torch.randint(0, 5, (batch, heads, length)).float()


def oracle(key, value, scores, budget, protect=None, recent=0, merge="drop", merge_keys=True, valid=None):
    """Keys and values in float64, and positions: one head after the other, one key after the other."""
    batch, heads, length, _ = key.shape
    budgets = torch.full((batch, heads), budget) if isinstance(budget, int) else budget
    slots = min(int(budgets.max()), length)
    kept_key, kept_value = (x.new_zeros(batch, heads, slots, x.shape[-1], dtype=torch.float64) for x in (key, value))
    index = torch.full((batch, heads, slots), -1)
    for b in range(batch):
        there = [t for t in range(length) if valid is None or valid[b, t]]
        for h in range(heads):
            room = min(int(budgets[b, h]), recent)
            last = there[max(0, len(there) - room) :]

            def rank(t, b=b, h=h, last=last):
                tier = 0 if t in last else 1 if protect is not None and protect[b, t] else 2
                return tier, -scores[b, h, t].item(), t

            kept = sorted(sorted(there, key=rank)[: min(int(budgets[b, h]), length)])
            index[b, h, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
            k, v = key[b, h].double(), value[b, h].double()
            unit = torch.nn.functional.normalize(key[b, h].double(), dim=-1)
            own = [1.0] * len(kept)
            sums = [[k[t].clone(), v[t].clone()] for t in kept]
            counts = [1] * len(kept)
            for t in there:
                if t in kept or not kept or merge == "drop":
                    continue
                similarity = unit[kept] @ unit[t]
                c = int(similarity.argmax())
                share = {"average": 1.0, "pivot": 0.5, "weighted": similarity[c].item()}[merge]
                counts[c] += 1
                own[c] += 0.5 if merge == "pivot" else 0.0
                sums[c][0] += share * k[t]
                sums[c][1] += share * v[t]
            for c, t in enumerate(kept):
                merged = [(s + (own[c] - 1) * x[t]) / counts[c] for s, x in zip(sums[c], (k, v), strict=True)]
                kept_key[b, h, c] = merged[0] if merge_keys else k[t]
                kept_value[b, h, c] = merged[1]
    return kept_key, kept_value, index


def check(inputs, budget, impl, **kwargs):
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    got = compress_kv(*to_device((*inputs, budget), device), impl=impl, **to_device(kwargs, device))
    *pairs, index = to_device(tuple(got), "cpu")
    *want, positions = oracle(*inputs, budget, **kwargs)
    assert torch.equal(index, positions) and index.dtype == torch.int64
    for x, exact, given_ in zip(pairs, want, inputs, strict=False):
        assert x.dtype == given_.dtype
        # One rounding to the dtype; sums in float32 of at most `length` numbers of the size of the inputs.
        length, size = given_.shape[2], given_.abs().max().item() if given_.numel() else 0.0
        float32 = torch.finfo(torch.float32).eps * length * size * 8
        torch.testing.assert_close(x.double(), exact, rtol=torch.finfo(x.dtype).eps, atol=float32)
    return *pairs, index


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_loop(impl, merge, dtype):
    check(make(dtype, length=20), 5, impl, recent=2, merge=merge)


@pytest.mark.parametrize("merge", MERGES)
def test_float64(merge):
    inputs = make(torch.float64)
    got, want = compress_kv(*inputs, 4, merge=merge), oracle(*inputs, 4, merge=merge)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@st.composite
def cases(draw):
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, heads, length = pick(1, 3), pick(1, 2), pick(1, 9, 40)
    inputs = make(pick(*DTYPES), batch, heads, length, 16, pick(16, 32))
    budget = pick(1, 3, 20, length, length + 3, None)
    if budget is None:
        budget = torch.randint(0, length + 1, (batch, heads))
        budget[0, 0] = length
    kwargs = {"recent": pick(0, 2, 50), "merge": pick(*MERGES), "merge_keys": pick(True, False)}
    for name, share in (("protect", 0.3), ("valid", 0.8)):
        if pick(True, False):
            kwargs[name] = torch.rand(batch, length) < share
    layout = LAYOUTS[pick("contiguous", "bthd", "strided", "sliced")]
    return [*map(layout, inputs[:2]), inputs[2]], budget, kwargs


@pytest.mark.parametrize("impl", IMPLS)
@given(case=cases())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_options(impl, case):
    inputs, budget, kwargs = case
    check(inputs, budget, impl, **kwargs)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_whole_budget_gives_the_inputs_back(impl):
    key, value, scores = make()
    for budget in (12, 13):
        *pair, index = compress_kv(*to_device((key, value, scores), TRITON_DEVICE), budget, impl=impl, merge="pivot")
        assert torch.equal(pair[0].cpu(), key) and torch.equal(pair[1].cpu(), value)
        assert torch.equal(index.cpu(), torch.arange(12).expand(2, 2, 12))


def test_the_budget_is_a_hard_cap():
    """Recent keys come before protected ones, those before scores; each group by its own rule."""
    key, value, _ = make(batch=1, heads=1, length=6)
    scores = torch.tensor([[[1.0, 9.0, 2.0, 3.0, 8.0, 0.0]]])
    protect = torch.tensor([[True, False, True, True, False, False]])
    for budget, kept in ((1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (4, [2, 3, 4, 5]), (6, [0, 1, 2, 3, 4, 5])):
        index = compress_kv(key, value, scores, budget, recent=2, protect=protect)[2]
        assert index.tolist() == [[kept]]


def test_a_large_score_does_not_outrank_protection():
    """No constant is added to scores, so none is too large, and -inf is as good as any."""
    key, value, _ = make(batch=1, heads=1, length=4)
    scores = torch.tensor([[[1e38, -torch.inf, 1e38, 3.0]]])
    protect = torch.tensor([[False, True, False, False]])
    assert compress_kv(key, value, scores, 2, protect=protect)[2].tolist() == [[[0, 1]]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("merge", MERGES[1:])
def test_copies_go_to_their_original(impl, merge):
    """Evicted copies of survivors, in any order, leave average and pivot unchanged; ties go to the lowest position."""
    key = torch.eye(4, 16).repeat(3, 1).expand(1, 1, -1, -1).contiguous()
    scores = torch.cat([torch.ones(4), torch.zeros(8)]).expand(1, 1, -1)
    kept, values, _ = check((key, key, scores), 4, impl, merge=merge)
    torch.testing.assert_close(kept, key[:, :, :4])
    assert torch.equal(kept, values)


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_changes_nothing(impl):
    """Pads of any value, on any side, leave what a sample keeps as it is."""
    inputs = make(batch=1, length=9)
    want = check(inputs, 4, impl, recent=2, merge="weighted")
    for left, right in ((3, 0), (0, 3), (2, 2)):
        padded = [torch.nn.functional.pad(x, (0, 0, left, right), value=torch.nan) for x in inputs[:2]]
        scores = torch.nn.functional.pad(inputs[2], (left, right), value=99.0)
        valid = torch.zeros(1, 9 + left + right, dtype=torch.bool)
        valid[:, left : left + 9] = True
        device = TRITON_DEVICE if impl == "triton" else "cpu"
        arguments = to_device((*padded, scores), device)
        got = compress_kv(*arguments, 4, recent=2, merge="weighted", valid=to_device(valid, device), impl=impl)
        for x, y in zip(to_device(tuple(got), "cpu")[:2], want, strict=False):
            torch.testing.assert_close(x, y)
        assert torch.equal(got[2].cpu(), want[2] + left)


@pytest.mark.parametrize("impl", IMPLS)
def test_permuting_heads_and_samples_permutes_the_result(impl):
    inputs = to_device(make(batch=3, length=20), TRITON_DEVICE if impl == "triton" else "cpu")
    want = compress_kv(*inputs, 5, merge="pivot", impl=impl)
    order = torch.tensor([2, 0, 1])
    got = compress_kv(*(x[order].flip(1) for x in inputs), 5, merge="pivot", impl=impl)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y[order].flip(1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("merge", MERGES)
def test_repeats_bit_for_bit(impl, merge):
    inputs = to_device(make(length=70), TRITON_DEVICE if impl == "triton" else "cpu")
    first, second = (compress_kv(*inputs, 9, merge=merge, impl=impl) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients(impl, merge):
    key, value, scores = make(torch.float64, batch=1, length=8, dim=16)
    kwargs = {"recent": 1, "merge": merge, "valid": torch.tensor([[False] + [True] * 7])}
    inputs = (key.requires_grad_(), value.requires_grad_())
    assert torch.autograd.gradcheck(lambda k, v: compress_kv(k, v, scores, 3, **kwargs)[:2], inputs)
    inputs = [x.detach().float().to(TRITON_DEVICE).requires_grad_() for x in inputs]
    kwargs["valid"] = kwargs["valid"].to(TRITON_DEVICE)
    key, value, _ = compress_kv(*inputs, scores.to(TRITON_DEVICE), 3, impl=impl, **kwargs)
    found = torch.autograd.grad(key.square().sum() + value.sum(), inputs)
    assert all(torch.isfinite(g).all() and g.any() for g in found)


@pytest.mark.parametrize("merge", ["average", "pivot", "weighted"])
def test_padding_reaches_no_gradient(merge):
    key, value, scores = make(length=8)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[0, :2] = False
    key[0, :, :2] = value[0, :, :2] = torch.nan
    inputs = (key.requires_grad_(), value.requires_grad_())
    key, value, _ = compress_kv(*inputs, scores, 3, merge=merge, valid=valid)
    for grad in torch.autograd.grad(key.square().sum() + value.sum(), inputs):
        assert torch.isfinite(grad.masked_fill(~valid[:, None, :, None], 0.0)).all()


@pytest.mark.parametrize("merge", ["drop", "average", "pivot", "weighted"])
@pytest.mark.parametrize("impl", IMPLS)
def test_permuting_keys_permutes_what_stays(impl, merge):
    key, value, scores = make()
    # Ties go by position, which is what changes here.
    inputs = key, value, torch.rand(scores.shape)
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    order = torch.randperm(12)
    key, value, index = compress_kv(*to_device(inputs, device), 5, merge=merge, impl=impl)
    mixed = [x[:, :, order] for x in inputs]
    other_key, other_value, places = compress_kv(*to_device(mixed, device), 5, merge=merge, impl=impl)
    # Where each kept key came from, and back into ascending order.
    came = order.to(device)[places]
    assert torch.equal(came.sort(dim=-1).values, index)
    back = came.argsort(dim=-1).unsqueeze(-1)
    for got, want in ((other_key, key), (other_value, value)):
        torch.testing.assert_close(got.gather(2, back.expand_as(got)), want)


def test_similarities_are_found_in_parts(monkeypatch):
    inputs = make(length=30)
    want = compress_kv(*inputs, 6, merge="weighted")
    monkeypatch.setattr(reference, "SIMILARITIES", 50)
    for x, y in zip(compress_kv(*inputs, 6, merge="weighted"), want, strict=True):
        torch.testing.assert_close(x, y)


def test_compiles():
    inputs = make()
    function = lambda k, v, s: compress_kv(k, v, s, 5, recent=2, merge="pivot")  # noqa: E731
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    torch._dynamo.reset()
    for x, y in zip(got, function(*inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_registered_operations():
    key, value, scores = to_device(make(), TRITON_DEVICE)
    kept, _, index = compress_kv(key, value, scores, 4)
    torch.library.opcheck(torch.ops.fastprompt.nearest_survivor.default, (key, kept, index, "triton"))
    order = torch.arange(12, device=key.device).expand(2, 2, 12).contiguous()
    starts = torch.tensor([0, 3, 3, 9, 12], device=key.device).expand(2, 2, 5).contiguous()
    arguments = (key, kept, order, starts, scores, 0.5, "triton")
    torch.library.opcheck(torch.ops.fastprompt.merge_evicted.default, arguments)


def test_explain():
    assert fastprompt.explain(compress_kv, *make(torch.float64), 4).impl == "reference"
    with pytest.raises(ImplUnavailableError, match="cannot run compress_kv here"):
        compress_kv(*make(torch.float64), 4, impl="cpp")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": [1.0]}, TypeError, "key: got list, expected a torch.Tensor"),
        ({"value": torch.zeros(2, 2, 12, 16).half()}, TypeError, "value: got dtype torch.float16"),
        (
            {"value": torch.zeros(2, 2, 11, 16)},
            ValueError,
            "value: got shape [2, 2, 11, 16], expected [2, 2, 12, 'Dv']",
        ),
        ({"scores": torch.zeros(2, 4, 12)}, ValueError, "scores: got shape [2, 4, 12], expected [2, 2, 12]"),
        ({"scores": torch.zeros(2, 12)}, ValueError, "scores: got rank 2 (shape [2, 12]), expected [B,Hkv,Tk]"),
        ({"budget": 0}, ValueError, "budget: got 0, expected an integer >= 1"),
        ({"budget": 0.2}, ValueError, "budget: got 0.2, expected an integer >= 1"),
        ({"budget": torch.ones(2, 2)}, TypeError, "budget: got dtype torch.float32, expected int64"),
        ({"budget": torch.ones(2, dtype=torch.int64)}, ValueError, "budget: got shape [2], expected [2, 2]"),
        ({"budget": torch.tensor([[1, -1], [1, 1]])}, ValueError, "budget: got values in [-1, 1]"),
        ({"protect": torch.zeros(2, 12)}, TypeError, "protect: got dtype torch.float32, expected torch.bool"),
        ({"valid": torch.ones(1, 12, dtype=torch.bool)}, ValueError, "valid: got shape [1, 12], expected [2, 12]"),
        ({"recent": -1}, ValueError, "recent: got -1, expected an integer >= 0"),
        ({"merge": "mean"}, ValueError, "merge: got 'mean', expected one of 'drop', 'average', 'pivot', 'weighted'"),
        ({"impl": "best"}, ValueError, "impl: got 'best'"),
    ],
)
def test_errors(change, error, message):
    arguments = dict(zip(("key", "value", "scores"), make(), strict=True)) | {"budget": 4} | change
    for call in (compress_kv, lambda **kwargs: fastprompt.explain(compress_kv, **kwargs)):
        with pytest.raises(error) as raised:
            call(**arguments)
        assert message in str(raised.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_on_the_gpu(dtype, merge, dim):
    valid = torch.rand(1, 130) < 0.9
    check(make(dtype, 1, 2, 130, dim), 30, "triton", recent=10, merge=merge)
    check(make(dtype, 1, 2, 130, dim), 30, "triton", recent=10, merge=merge, merge_keys=False, valid=valid)
