# SPDX-License-Identifier: Apache-2.0
"""Values and all five gradients of prompt attention against the float64 oracle."""

from unittest.mock import patch

import oracles
import pytest
import torch
from attention_cases import DTYPES, HALF, IMPLS, LAYOUTS, PROMPTS_ONLY, check, grads_of, leaves, make, run
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import NAMES, assert_close, largest
from torch.nn.functional import scaled_dot_product_attention

import fastprompt
from fastprompt.ops import prompt_attention
from fastprompt.ops.cpu import prompt_attention as cpu

#: C++ kernels have a file of their own.
pytestmark = pytest.mark.usefixtures("composition")


def tiny_blocks(tile=97, workspace=11):
    """Make the CPU backward run several row blocks, several tiles and several head steps on small shapes."""
    return patch.multiple(cpu, TILE=tile, WORKSPACE=workspace)


def rms(x):
    return float(x.double().square().mean().sqrt())


def test_the_oracle_agrees_with_pytorch():
    inputs = leaves(make(bank=1))
    grad_out, _ = grads_of(inputs, with_lse=False)
    query, key, value, prompt_key, prompt_value = inputs
    joined = [torch.cat([p.expand(2, -1, -1, -1), x], 2) for p, x in ((prompt_key, key), (prompt_value, value))]
    out = scaled_dot_product_attention(query, *joined, enable_gqa=True)
    exact, _ = oracles.prompt_attention(*inputs, grad_out)
    torch.testing.assert_close(out, exact.out)
    for got, want in zip(torch.autograd.grad(out, inputs, grad_out), exact.grads, strict=True):
        torch.testing.assert_close(got, want)


@st.composite
def cases(draw):
    """Shapes, masks, banks, layouts and block sizes; the values come from a seed."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, heads_kv, groups, tq, tk = (
        pick(1, 2, 3),
        pick(1, 2, 3),
        pick(1, 2, 3),
        pick(1, 3, 7, 17),
        pick(0, 1, 2, 9, 33),
    )
    prompts = pick(0, 1, 3, 8) if tk else pick(1, 3, 8)
    heads = heads_kv * groups
    bank = pick(None, 1, batch, 4)
    kwargs = {"is_causal": pick(False, True), "scale": pick(None, None, 0.0, 0.3, 1.0)}
    if bank == 4 or pick(False, True):
        kwargs["prompt_index"] = torch.randint(0, bank or 1, (batch,))
    inputs = make(pick(*DTYPES), batch, heads, heads_kv, tq, tk, prompts, pick(1, 4, 16, 20, 80), bank)
    mask = pick(None, None, bool, float)
    if mask is not None:
        shape = pick(
            (tq, tk), (batch, 1, 1, tk), (1, heads, tq, tk), (batch, heads, tq, 1), (tk,), (batch, heads, tq, tk)
        )
        visible = torch.rand(shape) < 0.7
        additive = torch.randn(shape).masked_fill(~visible, -torch.inf).to(inputs[0].dtype)
        kwargs["attn_mask"] = visible if mask is bool else additive
    inputs = [LAYOUTS[pick(*LAYOUTS)](x) if x.numel() else x for x in inputs]
    blocks = {"tile": pick(1, 97, 1 << 21), "workspace": pick(1, 11, 1 << 24)}
    return inputs, pick(False, True), pick((True,) * 5, PROMPTS_ONLY), blocks, kwargs


@pytest.mark.parametrize("impl", IMPLS)
@given(case=cases())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_matches_the_oracle(impl, case):
    inputs, with_lse, needs, blocks, kwargs = case
    assert fastprompt.explain(prompt_attention, *inputs, impl=impl, **kwargs).impl == impl
    with tiny_blocks(**blocks):
        check(inputs, *grads_of(inputs, with_lse), needs, impl, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape",
    [
        {"tq": 197, "tk": 197, "prompts": 10, "dim": 64},
        {"tq": 63, "tk": 257, "prompts": 1, "dim": 80},
        {"tq": 1, "tk": 1300, "prompts": 0, "dim": 20},
    ],
    ids=str,
)
def test_long_rows(impl, dtype, shape):
    inputs = make(dtype, batch=2, heads=2, heads_kv=1, **shape)
    with tiny_blocks(tile=20_000, workspace=1000):
        check(inputs, impl=impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs", [(True,) * 5, PROMPTS_ONLY], ids=["all", "prompts"])
def test_every_blocking_gives_the_same_gradients(dtype, needs):
    inputs = make(dtype, batch=3, heads=6, heads_kv=3, tq=11)
    grads = grads_of(inputs)
    for tile in (1, 50, 500, 5000):
        # 500 elements hold two of the three KV heads.
        for workspace in (1, 500):
            with tiny_blocks(tile, workspace):
                check(inputs, *grads, needs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_layouts(impl, layout, dtype):
    inputs = [LAYOUTS[layout](x) for x in make(dtype, batch=3, bank=3)]
    grad_out, grad_lse = grads_of(inputs)
    for lse in (None, grad_lse, LAYOUTS[layout](grad_lse[..., None].expand(*grad_lse.shape, 2))[..., 0]):
        check(inputs, LAYOUTS[layout](grad_out), lse, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_banks(impl, dtype, batch):
    for bank in (None, 1, batch):
        check(make(dtype, batch=batch, bank=bank), impl=impl)
    for index in ([0] * batch, [4] * batch, [3, 1, 3, 0][:batch]):
        inputs, index = make(dtype, batch=batch, bank=5), torch.tensor(index)
        actual = check(inputs, impl=impl, prompt_index=index)
        unread = [g for g in range(5) if g not in index]
        for grad in actual.grads[3:]:
            assert not grad[unread].any(), "a prompt that no sample reads got a gradient"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("index", [None, 0], ids=["shared", "index"])
def test_the_gradient_of_a_shared_prompt_is_rounded_once(impl, dtype, index):
    """Sums over many samples that were rounded on the way would be off by far more than one rounding."""
    inputs = make(dtype, batch=256, heads=1, heads_kv=1, tq=2, tk=2, bank=1)
    grad_out, _ = grads_of(inputs, with_lse=False)
    kwargs = {} if index is None else {"prompt_index": torch.full((256,), index)}
    exact, _ = oracles.prompt_attention(*inputs, grad_out, **kwargs)
    actual = run(inputs, grad_out, impl=impl, **kwargs)
    for got, want in zip(actual.grads[3:], exact.grads[3:], strict=True):
        assert rms(got.double() - want) <= torch.finfo(dtype).eps * rms(want)


def test_float16_scores_past_its_range():
    inputs = make(torch.float16)
    inputs[:2] = [x * 300 for x in inputs[:2]]
    check(inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_nothing_to_attend(impl, dtype):
    grid = torch.ones(2, 1, 5, 3, dtype=torch.bool)
    grid[0, 0, 1], grid[1, 0, 4] = False, False
    for kwargs in ({"attn_mask": grid}, {"is_causal": True}, {"attn_mask": grid, "is_causal": True}):
        inputs = make(dtype, tk=3, prompts=0)
        for grads in (grads_of(inputs), grads_of(inputs, with_lse=False)):
            actual = check(inputs, *grads, impl=impl, **kwargs)
        dead = actual.lse == -torch.inf
        assert dead.any()
        assert not dead.all()
        assert not actual.out[dead].any()
        assert not actual.grads[0][dead].any()
        # Prompts are always visible: the same rows see them.
        assert check(make(dtype, tk=3, prompts=1), impl=impl, **kwargs).lse.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [{"batch": 0}, {"tq": 0}, {"tk": 0, "prompts": 0}], ids=str)
def test_empty_inputs(impl, shape):
    inputs = make(torch.float32, **shape)
    actual = check(inputs, impl=impl)
    assert not any(grad.any() for grad in actual.grads)
    assert (actual.lse == -torch.inf).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_plain_causal_attention(impl, dtype, heads_kv):
    """As many queries as keys and no prompt: what a decoder runs over a prompt's tokens."""
    for layout in ("contiguous", "bthd"):
        inputs = [LAYOUTS[layout](x) for x in make(dtype, tq=9, heads_kv=heads_kv, prompts=0)]
        for scale in (None, 0.0):
            check(inputs, impl=impl, is_causal=True, scale=scale)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_float32_prompts_beside_half_precision(impl, dtype):
    inputs = [*make(dtype)[:3], *make(torch.float32)[3:]]
    for needs in ((True,) * 5, PROMPTS_ONLY):
        check(inputs, needs=needs, impl=impl)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("needs", [(True,) * 5, PROMPTS_ONLY], ids=["all", "prompts"])
def test_a_shared_prompts_gradient_is_rounded_once(dtype, needs):
    inputs = make(dtype, batch=64, heads=2, tq=9, tk=4)
    grad_out = torch.rand_like(inputs[0])
    exact, noise = oracles.prompt_attention(*inputs, grad_out)
    # Summing 1152 positive rows in half precision would lose up to a quarter of the sum; no allowance for that here.
    grad, want = run(inputs, grad_out, needs=needs).grads[4], exact.grads[4]
    assert_close("prompt_value", grad, want, torch.finfo(dtype).eps * largest(want) + largest(noise.grads[4]))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("needs", [(True,) * 5, PROMPTS_ONLY], ids=["all", "prompts"])
def test_large_logits_are_as_exact_as_pytorchs_flash(dtype, needs):
    inputs = make(dtype, batch=2, heads=4, heads_kv=4, tq=64, tk=190, prompts=10, dim=64, bank=2)
    inputs[0] = inputs[0] * 10
    grad_out, _ = grads_of(inputs, with_lse=False)
    exact, _ = oracles.prompt_attention(*inputs, grad_out)
    # A logit has standard deviation 10: the largest of a row is above 20, where bf16 resolves 1/8.
    assert exact.lse.mean() > 20
    query, key, value, prompt_key, prompt_value = flash_inputs = leaves(inputs)
    joined = [torch.cat([p, x], 2) for p, x in ((prompt_key, key), (prompt_value, value))]
    flash = torch.autograd.grad(scaled_dot_product_attention(query, *joined), flash_inputs, grad_out)
    grads = run(inputs, grad_out, needs=needs).grads
    for name, grad, theirs, want in zip(NAMES, grads, flash, exact.grads, strict=True):
        if grad is not None:
            error, allowed = rms(grad - want), 2 * rms(theirs - want)
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 4.0])
@pytest.mark.parametrize("needs", [(True,) * 5, PROMPTS_ONLY], ids=["all", "prompts"])
def test_extreme_scales(dtype, scale, needs):
    inputs = make(dtype, tq=40, tk=40, prompts=8, dim=64)
    check(inputs, *grads_of(inputs, with_lse=False), needs, scale=scale)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prompts", [0, 2])
@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_a_finite_mask_of_the_lowest_number(impl, dtype, prompts, scale):
    """Eager masks of transformers hide with finfo.min, and hide every key of a padded row."""
    inputs = make(dtype, tk=6, prompts=prompts)
    mask = torch.zeros(5, 6, dtype=dtype)
    mask[0], mask[1, :3] = torch.finfo(dtype).min, torch.finfo(dtype).min
    actual = run(inputs, torch.ones_like(inputs[0]), impl=impl, attn_mask=mask, scale=scale)
    assert all(grad.isfinite().all() for grad in actual.grads)
    # Rows that keep a visible key are those of a bool mask; a row without any is not defined beyond being finite.
    rows = slice(0 if prompts else 1, None)
    exact, _ = oracles.prompt_attention(*inputs, attn_mask=mask == 0, scale=scale)
    plain = oracles.plain_prompt_attention(*inputs, attn_mask=mask == 0, scale=scale)
    allowed = oracles.tolerance(exact.out, plain.out)
    assert actual.out.isfinite().all()
    assert_close("out", actual.out[:, :, rows], exact.out[:, :, rows], allowed)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_float32_mask_beside_half_precision(impl):
    inputs = make(torch.bfloat16)
    mask = torch.randn(5, 9).bfloat16().float()
    check(inputs, impl=impl, attn_mask=mask)


def test_out_alone_is_the_out_of_the_pair():
    inputs = make(torch.float32)
    out, lse = prompt_attention(*inputs, return_lse=True)
    assert torch.equal(prompt_attention(*inputs), out)
    assert lse.shape == (2, 4, 5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["float32-mask", "half-mask"])
@pytest.mark.parametrize("offset", [-300.0, 300.0])
@pytest.mark.parametrize("prompts", [0, 3])
def test_a_mask_with_an_offset_keeps_its_values(dtype, wide, offset, prompts):
    """Softmax does not see an offset of a whole row, but a half-precision sum of mask and scores would."""
    inputs = make(dtype, tq=16, tk=16, prompts=prompts)
    mask = (torch.randn(16, 16) + offset).to(torch.float32 if wide else dtype)
    check(inputs, *grads_of(inputs, with_lse=False), attn_mask=mask)


def test_second_derivatives_point_to_the_reference():
    inputs = leaves(make(torch.float64))
    first = torch.autograd.grad(prompt_attention(*inputs).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        torch.autograd.grad(first[0].sum(), inputs)
