# SPDX-License-Identifier: Apache-2.0
"""`key_scores` against the materialised attention matrix in float64, on every implementation."""

import pytest
import torch
from attention_cases import LAYOUTS, TRITON_DEVICE, to_device
from hypothesis import given, settings
from hypothesis import strategies as st

import fastprompt
from fastprompt.errors import ImplUnavailableError
from fastprompt.kernels import key_scores as launcher
from fastprompt.ops import key_scores, prompt_attention
from fastprompt.ops.cpp import extension
from fastprompt.ops.dispatch import HEAD_SIZES

IMPLS = ("cpu", "reference", "triton")  # C++ has a file of its own
# Bound on the relative error of the exponential in PyTorch's flash attention for bfloat16 on CPU, a short polynomial:
# a 32nd of bfloat16's own rounding.
FLASH_EXP = 2**-13
# The same of the C++ kernels where they multiply tiles of bfloat16.
TILES_EXP = 2**-18
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(dtype=torch.float32, batch=2, heads=4, heads_kv=2, tq=9, tk=9, dim=16, is_causal=True, scale=None):
    """Queries, keys, and the lse that their attention has, in the dtype that operations give it."""
    query, key = (torch.randn(batch, h, t, dim).to(dtype) for h, t in ((heads, tq), (heads_kv, tk)))
    lse = scores_of(query, key, is_causal, scale).logsumexp(-1)
    return query, key, lse.to(torch.promote_types(dtype, torch.float32))


def scores_of(query, key, is_causal, scale=None):
    """Scaled scores in float64, -inf where a row may not look."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * (query @ key.mT)
    tq, tk = scores.shape[-2:]
    if is_causal:
        hidden = [[j > i + tk - tq for j in range(tk)] for i in range(tq)]
        scores = scores.masked_fill(torch.tensor(hidden, dtype=torch.bool).view(tq, tk), -torch.inf)
    return scores


def oracle(
    query, key, lse, is_causal=True, query_start=0, query_mask=None, key_mask=None, scale=None, normalize="none",
    group_reduce="mean",
):  # fmt: skip
    """Scores from the whole matrix, and a bound of what float32 arithmetic may leave."""
    batch, heads, tq, dim = query.shape
    heads_kv, tk = key.shape[1:3]
    scores = scores_of(query, key, is_causal, scale)
    counted = torch.zeros(batch, tq, dtype=torch.bool)
    counted[:, query_start:] = True
    if query_mask is not None:
        counted &= query_mask
    found, noise = torch.zeros(2, batch, heads, tk, dtype=torch.float64)
    eps = torch.finfo(lse.dtype).eps
    size = query.double().abs() @ key.double().abs().repeat_interleave(heads // heads_kv, dim=1).mT
    size = size * (dim**-0.5 if scale is None else scale)
    for b in range(batch):
        for h in range(heads):
            for j in range(tk):
                rows = [i for i in range(tq) if counted[b, i] and scores[b, h, i, j] > -torch.inf]
                live = [i for i in rows if lse[b, h, i] > -torch.inf]
                for i in live:
                    weight = torch.exp(scores[b, h, i, j] - lse[b, h, i].double())
                    found[b, h, j] += weight
                    noise[b, h, j] += weight * eps * (4 * size[b, h, i, j] + 4 * lse[b, h, i].abs() + 8 + len(live))
                if normalize == "visible":
                    found[b, h, j] /= max(len(rows), 1)
                    noise[b, h, j] /= max(len(rows), 1)
    found, noise = (x.unflatten(1, (heads_kv, -1)) for x in (found, noise))
    reduced = (
        found.amax(2) if group_reduce == "max" else found.sum(2) / (found.shape[2] if group_reduce == "mean" else 1)
    )
    if key_mask is not None:
        reduced = reduced * key_mask[:, None]
    return reduced, noise.sum(2)


def check(inputs, impl, **kwargs):
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    got = to_device(key_scores(*to_device(inputs, device), impl=impl, **to_device(kwargs, device)), "cpu")
    assert got.dtype == inputs[2].dtype and not got.requires_grad
    want, allowed = oracle(*inputs, **kwargs)
    if inputs[0].dtype == torch.bfloat16:
        allowed = allowed + {"cpu": FLASH_EXP, "cpp": TILES_EXP}.get(impl, 0.0) * want
    # Weights that float32 cannot hold are 0.
    wrong = (got.double() - want).abs() - allowed - torch.finfo(torch.float32).tiny
    assert torch.isfinite(got).all() and (wrong <= 0).all(), wrong.max()
    return got


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_matrix(impl, dtype):
    check(make(dtype), impl)


@pytest.mark.parametrize("group_reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_programs_that_share_the_query_heads_of_a_key_head(group_reduce, is_causal):
    """Few long key heads: every query head, or two of five, is a program's; their shares are added in order."""
    inputs = make(batch=1, heads=3, heads_kv=1, tq=256, tk=24, is_causal=is_causal)
    assert len(launcher.allocate(*inputs[:2], 0)) == 3 and len(launcher.allocate(*inputs[:2], 200)) == 1
    wide = [torch.empty(44, n, 256, 16, device="meta") for n in (5, 1)]
    assert len(launcher.allocate(*wide, 0)) == 3
    kwargs = {"is_causal": is_causal, "normalize": "visible", "group_reduce": group_reduce}
    assert torch.equal(check(inputs, "triton", **kwargs), check(inputs, "triton", **kwargs))


@pytest.mark.parametrize("impl", IMPLS[:2])
def test_float64_is_exact(impl):
    check(make(torch.float64), impl, group_reduce="max")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("tq", "tk"), [(1, 40), (40, 33), (33, 70), (70, 70), (5, 1)])
def test_rectangles(impl, is_causal, tq, tk):
    check(make(batch=1, heads=2, heads_kv=1, tq=tq, tk=tk, is_causal=is_causal), impl, is_causal=is_causal)


@st.composite
def cases(draw):
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, heads_kv, groups, tq, tk = pick(1, 2), pick(1, 2), pick(1, 3), pick(1, 7, 37), pick(1, 9, 37)
    kwargs = {"is_causal": pick(True, False), "scale": pick(None, 0.0, 1.0), "group_reduce": pick("mean", "sum", "max")}
    inputs = make(pick(*DTYPES), batch, heads_kv * groups, heads_kv, tq, tk, 16, kwargs["is_causal"], kwargs["scale"])
    kwargs |= {"normalize": pick("none", "visible"), "query_start": pick(0, tq // 2, tq)}
    for name, length in (("query_mask", tq), ("key_mask", tk)):
        if pick(True, False):
            kwargs[name] = torch.rand(batch, length) < 0.7
    layout = LAYOUTS[pick("contiguous", "bthd", "strided", "sliced")]
    return [layout(x) for x in inputs[:2]] + [inputs[2]], kwargs


@pytest.mark.parametrize("impl", IMPLS)
@given(case=cases())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_options(impl, case):
    inputs, kwargs = case
    check(inputs, impl, **kwargs)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_row_gives_away_is_one(impl):
    """Over all keys, scores add up to the number of live rows."""
    inputs = make(batch=1, heads=6, heads_kv=2, tq=40, tk=33)
    live = (inputs[2] > -torch.inf).sum(-1).unflatten(1, (2, 3)).sum(-1)
    torch.testing.assert_close(check(inputs, impl, group_reduce="sum").sum(-1), live.float())


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_see_nothing_and_pads(impl):
    """Values of rows and keys that are masked do not matter, whatever they are."""
    query, key, lse = make(tq=6, tk=6)
    row_mask, key_mask = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    row_mask[0, :2] = key_mask[0, :2] = False
    kwargs = {"query_mask": row_mask, "key_mask": key_mask, "normalize": "visible"}
    want = check((query, key, lse), impl, **kwargs)
    lse = lse.clone()
    lse[0, :, :2] = -torch.inf
    for anything in (1e4, torch.nan, torch.inf):
        far, padded = query.clone(), key.clone()
        far[0, :, :2] = padded[0, :, :2] = anything
        device = TRITON_DEVICE if impl == "triton" else "cpu"
        got = key_scores(*to_device((far, padded, lse), device), impl=impl, **to_device(kwargs, device))
        torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_order_of_rows_and_keys(impl):
    """Without causality, scores move with their keys, and rows may come in any order."""
    query, key, lse = make(tq=20, tk=17, is_causal=False)
    rows, columns = torch.randperm(20), torch.randperm(17)
    got = check((query[:, :, rows], key[:, :, columns], lse[:, :, rows]), impl, is_causal=False)
    want = check((query, key, lse), impl, is_causal=False)
    torch.testing.assert_close(got, want[:, :, columns])


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits(impl):
    query, key, _ = make(tq=20, tk=20)
    query = query * 60
    lse = scores_of(query, key, True).logsumexp(-1).float()
    check((query, key, lse), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_lse_of_our_attention(impl):
    """The lse that `prompt_attention` returns is the one it wants, prompts included."""
    query, key, _ = make(torch.float32, tq=12, tk=12)
    prompt = torch.randn(2, 3, 16)
    _, lse = prompt_attention(query, key, key, prompt, prompt, is_causal=True, return_lse=True)
    got = check((query, key, lse), impl, group_reduce="sum")
    assert (got.sum(-1) < 2 * 12).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [{"batch": 0}, {"tq": 0}, {"tk": 0}])
def test_nothing(impl, shape):
    sizes = {"batch": 2, "heads": 4, "heads_kv": 2, "tq": 3, "tk": 5, "dim": 16} | shape
    query = torch.zeros(sizes["batch"], 4, sizes["tq"], 16)
    key, lse = torch.zeros(sizes["batch"], 2, sizes["tk"], 16), torch.zeros(query.shape[:3])
    inputs = to_device((query, key, lse), TRITON_DEVICE if impl == "triton" else "cpu")
    got = key_scores(*inputs, impl=impl, normalize="visible")
    assert got.shape == key.shape[:3] and not got.any()


@pytest.mark.parametrize("impl", ["cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_scale_for_any_level(dtype, impl):
    """On CPU, levels travel as columns that the scale multiplies again."""
    for scale in (1e-35, 1e-4, 3.0, 50.0):
        check(make(dtype, tq=21, tk=30, scale=scale), impl, scale=scale)


@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_bit_for_bit(impl):
    inputs = to_device(make(tq=70, tk=70), TRITON_DEVICE if impl == "triton" else "cpu")
    assert torch.equal(key_scores(*inputs, impl=impl), key_scores(*inputs, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_registered_operation(impl):
    if impl == "reference":
        return
    query, key, lse = to_device(make(), TRITON_DEVICE if impl == "triton" else "cpu")
    mask = torch.ones(2, 9, dtype=torch.bool, device=query.device)
    torch.library.opcheck(
        torch.ops.fastprompt.key_scores.default, (query, key, lse, mask, mask, True, 2, 0.25, "visible", "max", impl)
    )


def test_compiles_and_carries_no_gradient():
    query, key, lse = make()
    query.requires_grad_()
    want = key_scores(query, key, lse)
    got = torch.compile(key_scores, fullgraph=True, backend="aot_eager")(query, key, lse)
    torch._dynamo.reset()
    assert not want.requires_grad and torch.equal(got, want)


def test_autocast_casts_queries_and_keys():
    query, key, lse = make()
    with torch.autocast("cpu", torch.bfloat16):
        got = key_scores(query, key, lse)
    assert torch.equal(got, key_scores(query.bfloat16(), key.bfloat16(), lse))


def test_explain(monkeypatch):
    inputs = make()
    assert fastprompt.explain(key_scores, *inputs).impl == ("cpu" if extension.missing() else "cpp")
    monkeypatch.setattr("fastprompt.ops.cpp.wins.missing", lambda: "not built")
    assert fastprompt.explain(key_scores, *inputs).impl == "cpu"
    with pytest.raises(ImplUnavailableError, match="cannot run key_scores here: not built"):
        key_scores(*inputs, impl="cpp")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query: got list, expected a torch.Tensor"),
        ({"lse": torch.zeros(2, 4, 9).double()}, TypeError, "lse: got dtype torch.float64, expected torch.float32"),
        ({"key": torch.zeros(2, 2, 9, 16).half()}, TypeError, "key: got dtype torch.float16, expected torch.float32"),
        ({"lse": torch.zeros(2, 4, 8)}, ValueError, "lse: got shape [2, 4, 8], expected [2, 4, 9]"),
        ({"lse": torch.zeros(2, 4)}, ValueError, "lse: got rank 2 (shape [2, 4]), expected [B,Hq,Tq]"),
        ({"key": torch.zeros(1, 2, 9, 16)}, ValueError, "key: got shape [1, 2, 9, 16], expected [2,Hkv,Tk,16]"),
        ({"key": torch.zeros(2, 3, 9, 16)}, ValueError, "query: got 4 heads for 3 key heads"),
        ({"query_mask": torch.zeros(2, 9)}, TypeError, "query_mask: got dtype torch.float32, expected torch.bool"),
        ({"key_mask": torch.zeros(2, 8, dtype=torch.bool)}, ValueError, "key_mask: got shape [2, 8], expected [2, 9]"),
        ({"query_start": -1}, ValueError, "query_start: got -1, expected an integer from 0 to 9"),
        ({"query_start": 10}, ValueError, "query_start: got 10, expected"),
        ({"scale": -1.0}, ValueError, "scale: got -1.0"),
        ({"normalize": "all"}, ValueError, "normalize: got 'all', expected one of 'none', 'visible'"),
        ({"group_reduce": "min"}, ValueError, "group_reduce: got 'min', expected one of 'mean', 'sum', 'max'"),
        ({"impl": "best"}, ValueError, "impl: got 'best'"),
    ],
)
def test_errors(change, error, message):
    arguments = dict(zip(("query", "key", "lse"), make(), strict=True)) | change
    for call in (key_scores, lambda **kwargs: fastprompt.explain(key_scores, **kwargs)):
        with pytest.raises(error) as raised:
            call(**arguments)
        assert message in str(raised.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_on_the_gpu(dtype, dim):
    for is_causal in (True, False):
        inputs = make(dtype, 1, 4, 2, 130, 130, dim, is_causal)
        check(inputs, "triton", is_causal=is_causal)
        masks = {name: torch.rand(1, 130) < 0.7 for name in ("query_mask", "key_mask")}
        check(inputs, "triton", is_causal=is_causal, query_start=65, normalize="visible", group_reduce="max", **masks)
