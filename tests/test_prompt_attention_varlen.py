# SPDX-License-Identifier: Apache-2.0
"""Values and all five gradients of packed prompt attention against the float64 oracle of each sequence."""

from itertools import product
from unittest.mock import patch

import oracles
import pytest
import torch
from attention_cases import ALL, DTYPES, HALF, LAYOUTS, PROMPTS_ONLY
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close, largest
from varlen_cases import IMPLS, LENGTHS, by_sequence, check, grads_of, make, run

import fastprompt
from fastprompt.ops import prompt_attention, prompt_attention_varlen
from fastprompt.ops.cpu import prompt_attention_varlen as cpu

#: C++ kernels have a file of their own.
pytestmark = pytest.mark.usefixtures("composition")


@st.composite
def cases(draw):
    """Lengths, banks, layouts and tile sizes; the values come from a seed."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    lengths = draw(st.lists(st.sampled_from((1, 2, 3, 5, 17)), min_size=1, max_size=6))
    heads_kv = pick(1, 2, 3)
    bank = pick(None, 1, len(lengths), 4)
    kwargs = {"is_causal": pick(False, True), "scale": pick(None, None, 0.0, 0.3, 1.0)}
    kwargs["max_seqlen"] = pick(None, max(lengths), max(lengths) + 3)
    if bank == 4 or pick(False, True):
        kwargs["prompt_index"] = torch.randint(0, bank or 1, (len(lengths),))
    inputs = make(pick(*DTYPES), lengths, heads_kv * pick(1, 2), heads_kv, pick(0, 1, 3, 8), pick(1, 4, 16, 20), bank)
    inputs = [LAYOUTS[pick(*LAYOUTS)](x) if x.numel() else x for x in inputs]
    return inputs, lengths, pick(False, True), pick(ALL, PROMPTS_ONLY), pick(1, 11, 97, 1 << 20), kwargs


@pytest.mark.parametrize("impl", IMPLS)
@given(case=cases())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_matches_the_oracle(impl, case):
    inputs, lengths, with_lse, needs, tile, kwargs = case
    with patch.object(cpu, "TILE", tile):
        check(inputs, lengths, *grads_of(inputs, with_lse), needs, impl, **kwargs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_classes_of_coop(impl, dtype, is_causal):
    """Many short sequences over one prompt: its gradient is rounded once."""
    lengths = torch.randint(5, 21, (12,)).tolist()
    inputs = make(dtype, lengths, heads=2, heads_kv=2, prompts=17, dim=64)
    check(inputs, lengths, impl=impl, is_causal=is_causal)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_times_classes_of_cocoop(impl, dtype):
    lengths = (4, 6, 5) * 3
    index = torch.tensor([0, 1, 2]).repeat_interleave(3)
    for order in (index, index.flip(0), index.roll(4)):
        check(make(dtype, lengths, bank=3), lengths, impl=impl, prompt_index=order, is_causal=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_long_sequences(impl, dtype, is_causal):
    lengths = (257, 1, 130)
    with patch.object(cpu, "TILE", 10_000):
        check(make(dtype, lengths, heads=2, heads_kv=1, prompts=10, dim=20), lengths, impl=impl, is_causal=is_causal)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(impl, dtype, layout):
    inputs = [LAYOUTS[layout](x) for x in make(dtype, bank=len(LENGTHS))]
    grad_out, grad_lse = grads_of(inputs)
    for lse in (None, grad_lse, LAYOUTS[layout](grad_lse[..., None].expand(*grad_lse.shape, 2))[..., 0]):
        check(inputs, LENGTHS, LAYOUTS[layout](grad_out), lse, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_banks(impl, dtype):
    for bank in (None, 1, len(LENGTHS)):
        check(make(dtype, bank=bank), impl=impl)
    for index in ([0] * 5, [6] * 5, [3, 1, 3, 0, 1], [0, 1, 1, 4, 5]):
        inputs = make(dtype, bank=7)
        actual = check(inputs, impl=impl, prompt_index=torch.tensor(index))
        unread = [g for g in range(7) if g not in index]
        for grad in actual.grads[3:]:
            assert not grad[unread].any(), "a prompt that no sequence reads got a gradient"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [(1,), (6,), (1, 1, 1), (2, 2), ()], ids=str)
@pytest.mark.parametrize("prompts", [0, 1])
def test_few_and_single_rows(impl, lengths, prompts):
    for is_causal in (False, True):
        inputs = make(torch.float32, lengths, prompts=prompts)
        if lengths:
            check(inputs, lengths, impl=impl, is_causal=is_causal)
        else:
            actual = run(inputs, lengths, *grads_of(inputs), impl=impl, is_causal=is_causal)
            assert actual.out.shape == (0, 4, 16)
            assert not any(grad.any() for grad in actual.grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_float32_prompts_beside_half_precision(impl, dtype):
    inputs = [*make(dtype)[:3], *make(torch.float32)[3:]]
    for needs in (ALL, PROMPTS_ONLY):
        check(inputs, needs=needs, impl=impl)


@pytest.mark.parametrize("impl", IMPLS[:1])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("prompt_dtype", [None, torch.float32], ids=["half", "float32"])
@pytest.mark.parametrize("index", [None, [0] * 40], ids=["shared", "bank"])
def test_a_shared_prompts_gradient_is_rounded_once(impl, dtype, prompt_dtype, index):
    lengths = (torch.arange(40) % 7 + 10).tolist()
    inputs = make(dtype, lengths, heads=2)
    inputs[3:] = [p.to(prompt_dtype or dtype) for p in inputs[3:]]
    grad_out = torch.rand_like(inputs[0])
    kwargs = {} if index is None else {"prompt_index": torch.tensor(index)}
    exact, _, noise = by_sequence(inputs, lengths, grad_out, None, **kwargs)
    want = exact.grads[4]
    # Parts in half precision would lose more than the roundings of the single terms, which average out.
    allowed = torch.finfo(prompt_dtype or dtype).eps * largest(want) + largest(noise.grads[4])
    for tile in (100, cpu.TILE):
        with patch.object(cpu, "TILE", tile):
            grad = run(inputs, lengths, grad_out, impl=impl, **kwargs).grads[4]
        assert_close("prompt_value", grad, want, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out and lse"])
def test_any_subset_of_inputs_gets_the_same_gradients(dtype, with_lse):
    inputs = make(dtype)
    both = grads_of(inputs, with_lse)
    for needs in product([False, True], repeat=5):
        if any(needs):
            check(inputs, LENGTHS, *both, needs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_through_lse_alone(dtype, impl):
    inputs = make(dtype)
    actual = check(inputs, LENGTHS, None, grads_of(inputs)[1], impl=impl)
    assert not actual.grads[2].any()
    assert not actual.grads[4].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype):
    lengths = (40, 64, 40)
    inputs = make(dtype, lengths, dim=64, prompts=10)
    inputs[0] = inputs[0] * 10
    check(inputs, lengths, *grads_of(inputs, with_lse=False), is_causal=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_sequences_of_one_length_are_a_batch(impl):
    inputs = make(torch.float64, (4, 4, 4), bank=3)
    batch = [x.view(3, 4, *x.shape[1:]).transpose(1, 2) for x in inputs[:3]]
    want, want_lse = prompt_attention(*batch, *inputs[3:], is_causal=True, return_lse=True)
    actual = run(inputs, (4, 4, 4), *grads_of(inputs), impl=impl, is_causal=True)
    torch.testing.assert_close(actual.out, want.transpose(1, 2).flatten(0, 1))
    torch.testing.assert_close(actual.lse, want_lse.transpose(1, 2).flatten(0, 1))


def test_the_oracle_of_a_sequence_is_that_of_a_batch():
    """Guards the helper of these tests: summed prompt gradients and their noise."""
    inputs = make(torch.float32, (4, 4))
    grad_out, grad_lse = grads_of(inputs)
    exact, _, noise = by_sequence(inputs, (4, 4), grad_out, grad_lse)
    fold = lambda x: x.view(2, 4, *x.shape[1:]).transpose(1, 2)  # noqa: E731
    batch = oracles.prompt_attention(*map(fold, inputs[:3]), *inputs[3:], fold(grad_out), fold(grad_lse))
    for ours, theirs in zip((exact, noise), batch, strict=True):
        for x, want in zip(ours.grads[3:], theirs.grads[3:], strict=True):
            torch.testing.assert_close(x, want)


def test_out_alone_is_the_out_of_the_pair():
    inputs, cu_seqlens = make(torch.float32, (2, 3)), torch.tensor([0, 2, 5], dtype=torch.int32)
    out, lse = prompt_attention_varlen(*inputs, cu_seqlens, return_lse=True)
    assert torch.equal(prompt_attention_varlen(*inputs, cu_seqlens), out)
    assert lse.shape == (5, 4)


@pytest.mark.parametrize("impl", IMPLS)
def test_explain(impl):
    inputs, cu_seqlens = make(torch.float32, (2, 3)), torch.tensor([0, 2, 5], dtype=torch.int32)
    choice = fastprompt.explain(prompt_attention_varlen, *inputs, cu_seqlens, is_causal=True, impl=impl)
    assert (choice.op, choice.impl) == ("prompt_attention_varlen", impl)
