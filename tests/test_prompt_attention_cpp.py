# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels against the float64 oracle, at every level of this processor."""

import pytest
import torch
from attention_cases import LAYOUTS, PROMPTS_ONLY, check, compiled_equals_eager, grads_of, leaves, make, run
from cpp_cases import LEVELS, isa, needs_cpp  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastprompt
from fastprompt.errors import ImplUnavailableError
from fastprompt.ops import prompt_attention
from fastprompt.ops.cpp import extension
from fastprompt.ops.cpp import prompt_attention as launcher

pytestmark = needs_cpp
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Around the widths of vectors (4, 8, 16), of tiles (16, 32) and of blocks of lanes (64).
SIZES = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
NEEDS = {name: tuple(i == j for j in range(5)) for i, name in enumerate(("query", "key", "value", "pk", "pv"))}


def cpp(inputs, **kwargs):
    """Output, lse and gradients by the kernels, the same gradients of out and lse every time."""
    torch.manual_seed(1)
    return run(inputs, *grads_of(inputs), impl="cpp", **kwargs)


def same(first, second):
    """Every bit."""
    pairs = zip((first.out, first.lse, *first.grads), (second.out, second.lse, *second.grads), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, 130, 257])
def test_lengths(size, dtype, isa):  # noqa: F811
    check(make(dtype, 1, 2, 1, size, size, prompts=size % 11), impl="cpp", is_causal=size % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 7, 16, 24, 33, 40, 64, 72, 80, 96, 128, 160, 255, 256])
def test_head_sizes(dim, dtype, isa):  # noqa: F811
    check(make(dtype, 1, 2, 1, 5, 19, dim=dim), impl="cpp")


@pytest.mark.parametrize(("tq", "tk"), [(1, 77), (40, 33), (33, 70), (5, 0), (0, 5), (2, 600), (1, 1300), (600, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_rectangles(tq, tk, is_causal, isa):  # noqa: F811
    for dtype in DTYPES[:2]:
        check(make(dtype, 1, 2, 1, tq, tk, prompts=33), impl="cpp", is_causal=is_causal)


def test_more_keys_than_a_block(isa):  # noqa: F811
    """Softmax over several blocks of keys, whose largest score comes last, and gradients of several ranges of keys."""
    for dtype in DTYPES[:2]:
        inputs = make(dtype, 1, 2, 1, 70, 2100, prompts=5)
        inputs[1][..., -1, :] *= 3
        check(inputs, impl="cpp")
        check(inputs, impl="cpp", is_causal=True)


@st.composite
def cases(draw):
    """Shapes, masks, banks and layouts; the values come from a seed."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, heads_kv, groups, tq, tk = pick(1, 3), pick(1, 2), pick(1, 3), pick(1, 7, 40, 67), pick(0, 1, 9, 37, 70)
    prompts = pick(0, 1, 8, 40) if tk else pick(1, 8)
    bank = pick(None, 1, batch, 4)
    kwargs = {"is_causal": pick(False, True), "scale": pick(None, 0.0, 1.0)}
    if bank == 4 or pick(False, True):
        kwargs["prompt_index"] = torch.randint(0, bank or 1, (batch,))
    inputs = make(pick(*DTYPES), batch, heads_kv * groups, heads_kv, tq, tk, prompts, pick(16, 20, 64), bank)
    if inputs[0].dtype != torch.float32 and pick(False, True):
        inputs[3:] = [x.float() for x in inputs[3:]]
    mask = pick(None, None, bool, float)
    if mask is not None:
        visible = torch.rand(pick((tq, tk), (batch, 1, 1, tk), (1, heads_kv * groups, tq, 1), (1, tk))) < 0.7
        additive = torch.randn(visible.shape).masked_fill(~visible, -torch.inf).to(inputs[0].dtype)
        kwargs["attn_mask"] = visible if mask is bool else additive
    inputs = [LAYOUTS[pick(*LAYOUTS)](x) if x.numel() else x for x in inputs]
    return inputs, pick(False, True), kwargs


@given(case=cases())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_matches_the_oracle(isa, case):  # noqa: F811
    inputs, with_lse, kwargs = case
    check(inputs, *grads_of(inputs, with_lse), impl="cpp", **kwargs)


@pytest.mark.parametrize("needs", [*NEEDS.values(), PROMPTS_ONLY], ids=[*NEEDS, "prompts"])
def test_any_gradient_alone(needs, isa):  # noqa: F811
    for dtype in DTYPES:
        check(make(dtype, tq=33, tk=40, prompts=20), needs=needs, impl="cpp")


@pytest.mark.parametrize("offset", [1, 3, 7])
def test_rows_begin_anywhere(offset, isa):  # noqa: F811
    """Pointers that are aligned to nothing but their element."""
    for dtype in DTYPES:
        inputs = make(dtype, tq=9, tk=17, dim=33)
        moved = [torch.empty(x.numel() + offset, dtype=dtype)[offset:].view_as(x).copy_(x) for x in inputs]
        check(moved, impl="cpp")


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float64, *DTYPES], ids=str)
def test_masks_of_every_type_and_layout(mask_dtype, isa):  # noqa: F811
    inputs = make(torch.float32, 2, 4, 2, 37, 41)
    visible = torch.rand(2, 4, 37, 41) < 0.7
    mask = visible if mask_dtype == torch.bool else (torch.randn(2, 4, 37, 41) - 9.0 * ~visible).to(mask_dtype)
    for x in (mask, mask.transpose(-1, -2).contiguous().transpose(-1, -2), mask[:, :1, :1], mask[0, 0]):
        check(inputs, impl="cpp", attn_mask=x, is_causal=True)


@pytest.mark.parametrize("logit", [1e-20, 1e4])
def test_huge_and_tiny_logits(logit, isa):  # noqa: F811
    for dtype in DTYPES:
        inputs = make(dtype, tq=33, tk=40)
        check(inputs, impl="cpp", scale=logit / 16)


def test_denormals(isa):  # noqa: F811
    """Values below the smallest normal number, which the oracle keeps; tiles of bfloat16 take them for zeros."""
    inputs = make(torch.float32, tq=5, tk=17)
    inputs[2], inputs[4] = inputs[2] * 1e-39, inputs[4] * 1e-39
    grads = grads_of(inputs, False)
    check(inputs, *grads, needs=(False, False, True, False, True), impl="cpp")
    half = make(torch.bfloat16, tq=5, tk=17)
    half[2], half[4] = half[2] * 1e-39, half[4] * 1e-39
    out = prompt_attention(*half, impl="cpp")
    assert out.abs().max() <= 1e-38


def test_what_is_not_a_number_stays_in_its_row(isa):  # noqa: F811
    for dtype in DTYPES:
        inputs = make(dtype, 2, 4, 2, 40, 37)
        want = cpp(inputs)
        inputs[0] = inputs[0].clone()
        inputs[0][1, 2, 33, 3] = torch.nan
        got = cpp(inputs)
        hit = torch.zeros(2, 4, 40, dtype=torch.bool)
        hit[1, 2, 33] = True
        assert got.out[hit].isnan().all() and got.lse[hit].isnan().all()
        assert torch.equal(got.out[~hit], want.out[~hit]) and torch.equal(got.lse[~hit], want.lse[~hit])
        inputs[0][1, 2, 33, 3], inputs[2] = 0.0, inputs[2].clone()
        inputs[2][0, 1, 5] = torch.inf
        assert not cpp(inputs).out[0, 2:].isfinite().any()


def test_rows_with_nothing_to_attend(isa):  # noqa: F811
    visible = torch.ones(2, 1, 5, 3, dtype=torch.bool)
    visible[0, 0, 1], visible[1, 0, 4] = False, False
    for dtype in DTYPES:
        actual = check(make(dtype, tk=3, prompts=0), impl="cpp", attn_mask=visible)
        assert not actual.out[0, :, 1].any() and (actual.lse[0, :, 1] == -torch.inf).all()


def test_no_samples_heads_or_prompts(isa):  # noqa: F811
    for sizes in ({"batch": 0, "bank": 0}, {"prompts": 0}, {"tk": 0}, {"tq": 0}, {"tk": 0, "prompts": 0}):
        inputs = leaves(make(torch.float32, **sizes))
        out = prompt_attention(*inputs, impl="cpp")
        grads = torch.autograd.grad(out.sum(), inputs)
        assert [x.shape for x in grads] == [x.shape for x in inputs]
        assert not any(x.any() for x in (*grads, out) if sizes == {"tk": 0, "prompts": 0})


def test_a_prompt_that_no_sample_reads_has_a_gradient_of_zeros(isa):  # noqa: F811
    for dtype in DTYPES:
        actual = check(make(dtype, batch=3, bank=4), impl="cpp", prompt_index=torch.tensor([2, 0, 2]))
        assert not actual.grads[3][[1, 3]].any() and actual.grads[3][[0, 2]].any()


def test_prompt_gradients_are_rounded_once(isa):  # noqa: F811
    """Of 64 samples that pull the same way: sums rounded sample by sample would stall."""
    inputs = make(torch.bfloat16, batch=64, tq=4, tk=3, prompts=2)
    inputs = [x[:1].expand_as(x) if x.dim() == 4 else x for x in inputs]
    check(inputs, impl="cpp")


def test_a_sample_does_not_depend_on_its_batch(isa):  # noqa: F811
    for dtype in DTYPES:
        for kwargs in ({}, {"is_causal": True}):
            inputs = make(dtype, batch=3, tq=70, tk=90)
            grads = grads_of(inputs)
            whole = run(inputs, *grads, impl="cpp", **kwargs)
            alone = run([x[1:2] for x in inputs[:3]] + inputs[3:], *(x[1:2] for x in grads), impl="cpp", **kwargs)
            pairs = (
                (whole.out, alone.out),
                (whole.lse, alone.lse),
                *zip(whole.grads[:3], alone.grads[:3], strict=True),
            )
            assert all(torch.equal(a[1:2], b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_parts_of_a_query_gradient_are_of_some_samples_at_a_time(dtype):
    """Two ranges of keys leave 8 MiB a sample, of which 64 MiB are held; samples are in the order of their prompts."""
    index = torch.tensor([1, 0] * 5)
    inputs = make(dtype, 10, 8, 8, 2048, 1025, prompts=2, dim=64, bank=2)
    grads = grads_of(inputs)
    whole = run(inputs, *grads, impl="cpp", prompt_index=index)
    for i in (9, 8):  # the first and the last batch
        one = [*(x[i : i + 1] for x in inputs[:3]), *inputs[3:]]
        alone = run(one, *(x[i : i + 1] for x in grads), impl="cpp", prompt_index=index[i : i + 1])
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole.grads[:3], alone.grads[:3], strict=True))


@pytest.mark.parametrize(("axis", "step"), [(0, 2**31 + 64), (1, 2**31 + 64), (2, 2**31 + 64)])
def test_elements_past_two_to_the_31(axis, step):
    """The last sample, head or row begins more than 2^31 elements after the first; untouched memory costs nothing."""
    inputs = make(torch.float16, 2, 2, 2, 2, 2, prompts=2, dim=16)
    for i in range(3):
        shape, stride = inputs[i].shape, list(inputs[i].stride())
        stride[axis] = step
        far = torch.empty(stride[axis] * (shape[axis] - 1) + inputs[i].numel(), dtype=torch.float16)
        inputs[i] = far.as_strided(shape, stride).copy_(inputs[i])
        check(inputs, impl="cpp")
        inputs[i] = inputs[i].contiguous()


def test_custom_op_contract():
    inputs = leaves(make(torch.float32, batch=2, tq=3, tk=3))
    arguments = (*inputs[:3], *(x.detach().unsqueeze(0).requires_grad_() for x in inputs[3:]), None, None, True, 0.25)
    torch.library.opcheck(torch.ops.fastprompt.prompt_attention.default, (*arguments, "cpp"))


def test_compiles_without_graph_breaks():
    inputs = [leaves(make(torch.float32, tq=t, tk=3)) for t in (3, 4)]
    compiled_equals_eager(lambda *x: prompt_attention(*x, return_lse=True, impl="cpp"), inputs)


def test_a_compiled_call_reads_no_prompt_that_is_not_there():
    """While it traces, an index has no values to check; the kernels look at them."""
    inputs = make(torch.float32, bank=3)
    call = torch.compile(
        lambda i: prompt_attention(*inputs, prompt_index=i, impl="cpp"), backend="eager", fullgraph=True
    )
    assert torch.equal(call(torch.tensor([2, 0])), prompt_attention(*inputs, prompt_index=torch.tensor([2, 0])))
    for wrong in (3, -1, 2**40):
        with pytest.raises(RuntimeError, match=rf"prompt_index: got {wrong} at \[1\], expected \[0, 2\]"):
            call(torch.tensor([0, wrong]))


def test_autocast():
    inputs = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = prompt_attention(*inputs, impl="cpp")
    assert torch.equal(out, prompt_attention(*(x.bfloat16() for x in inputs), impl="cpp"))


def test_every_reason_is_listed():
    with pytest.raises(ImplUnavailableError) as caught:
        prompt_attention(*make(torch.float64, dim=257), impl="cpp")
    for reason in ("dtype float64 is not float16, bfloat16 or float32", "head size 257 is more than 256"):
        assert reason in str(caught.value)


def test_auto_takes_what_was_measured_to_win(monkeypatch):
    for dtype, level, impl in (
        (torch.float32, "scalar", "cpu"), (torch.float32, "avx512", "cpp"), (torch.bfloat16, "avx512", "cpu"),
        (torch.bfloat16, "amx", "cpp"), (torch.float64, "amx", "cpu"),
    ):  # fmt: skip
        monkeypatch.setattr("fastprompt.ops.cpp.extension.best_isa", lambda level=level: level)
        choice = fastprompt.explain(prompt_attention, *make(dtype))
        assert choice.impl == impl, str(choice)
        assert level in str(choice) or "float64" in str(choice)


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_by_name(level, monkeypatch):
    """Gives the bits that the processor of that level gives."""
    inputs = make(torch.float32, 1, 2, 1, 20, 37, dim=40, bank=1)
    got = launcher.forward(*inputs, None, None, False, 0.2, isa=level)
    monkeypatch.setattr(extension, "best_isa", lambda: level)
    assert all(map(torch.equal, got, prompt_attention(*inputs, scale=0.2, return_lse=True, impl="cpp")))


def test_levels_that_are_not_there(monkeypatch):
    with pytest.raises(ValueError, match="isa: got 'avx', expected one of 'scalar', 'avx2', 'avx512', 'amx'"):
        extension.isa_number("avx")
    query, lse, scores = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)
    for level in (-1, len(LEVELS)):
        with pytest.raises(RuntimeError, match=f"this processor has no level {level}"):
            extension.operations().key_scores(query, query, lse, None, None, True, 0, 0.5, False, 0, level, scores)
    monkeypatch.setattr(extension, "best_isa", lambda: "avx2")
    with pytest.raises(ValueError, match="isa: got 'amx', but the best of this processor is 'avx2'"):
        extension.isa_number("amx")
