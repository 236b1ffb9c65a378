# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels over packed sequences against the float64 oracle of each sequence."""

import pytest
import torch
from attention_cases import LAYOUTS, PROMPTS_ONLY, TRITON_DEVICE, leaves, to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from varlen_cases import LENGTHS, check, ends, grads_of, make, run

import fastprompt
from fastprompt.errors import ImplUnavailableError
from fastprompt.ops import prompt_attention_varlen
from fastprompt.ops.dispatch import HEAD_SIZES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def cases(draw):
    """Lengths, banks and layouts; the values come from a seed."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    lengths = draw(st.lists(st.sampled_from((1, 2, 5, 37)), min_size=1, max_size=4))
    heads_kv, bank = pick(1, 2), pick(None, 1, len(lengths), 4)
    kwargs = {"is_causal": pick(False, True), "scale": pick(None, 0.0, 1.0)}
    kwargs["max_seqlen"] = pick(None, max(lengths), max(lengths) + 3)
    if bank == 4 or pick(False, True):
        kwargs["prompt_index"] = torch.randint(0, bank or 1, (len(lengths),))
    inputs = make(pick(*DTYPES), lengths, heads_kv * pick(1, 3), heads_kv, pick(0, 1, 8, 40), 16, bank)
    if inputs[0].dtype != torch.float32 and pick(False, True):
        inputs[3:] = [x.float() for x in inputs[3:]]
    inputs = [LAYOUTS[pick(*LAYOUTS)](x) if x.numel() else x for x in inputs]
    return inputs, lengths, pick(False, True), pick((True,) * 5, PROMPTS_ONLY), kwargs


@given(case=cases())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_matches_the_oracle(case):
    inputs, lengths, with_lse, needs, kwargs = case
    check(inputs, lengths, *grads_of(inputs, with_lse), needs, "triton", **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classes_of_coop(dtype):
    """Many short sequences over one prompt: its gradient is rounded once."""
    lengths = torch.randint(5, 21, (12,)).tolist()
    check(make(dtype, lengths, heads=1, heads_kv=1, prompts=17, dim=64), lengths, impl="triton", is_causal=True)


def test_index_and_bounds_with_strides():
    inputs = make(torch.float32, (2, 3), bank=3)
    bounds = torch.tensor([0, 9, 2, 9, 5], dtype=torch.int32, device=TRITON_DEVICE)[::2]
    index = torch.tensor([2]).expand(2)
    on_device = to_device(inputs, TRITON_DEVICE)
    got = prompt_attention_varlen(*on_device, bounds, prompt_index=index.to(TRITON_DEVICE), impl="triton")
    want = prompt_attention_varlen(*inputs, ends((2, 3)), prompt_index=index, impl="reference")
    torch.testing.assert_close(got.cpu(), want)


def test_images_times_classes_of_cocoop():
    lengths = (4, 6, 5) * 3
    index = torch.tensor([0, 1, 2]).repeat_interleave(3).roll(4)
    check(make(torch.float32, lengths, bank=3), lengths, impl="triton", prompt_index=index, is_causal=True)


def test_long_sequences():
    check(make(torch.float32, (130, 1, 64), 2, 1, prompts=10), (130, 1, 64), impl="triton", is_causal=True)


def test_results_are_bitwise_repeatable_and_do_not_depend_on_neighbours():
    lengths = (40, 3, 70)
    inputs = make(torch.float32, lengths)
    grads = grads_of(inputs)
    first, second = (run(inputs, lengths, *grads, impl="triton", max_seqlen=70) for _ in range(2))
    for a, b in zip((first.out, first.lse, *first.grads), (second.out, second.lse, *second.grads), strict=True):
        assert torch.equal(a, b)
    rows = slice(40, 43)
    alone = run(
        [x[rows] for x in inputs[:3]] + inputs[3:], (3,), *(x[rows] for x in grads), impl="triton", max_seqlen=70
    )
    assert torch.equal(first.out[rows], alone.out) and torch.equal(first.lse[rows], alone.lse)


def test_custom_op_contract():
    inputs = to_device(leaves(make(torch.float32, (2, 3), bank=1)), TRITON_DEVICE)
    arguments = (*inputs, ends((2, 3)).to(TRITON_DEVICE), None, 3, True, 0.25, "triton")
    torch.library.opcheck(torch.ops.fastprompt.prompt_attention_varlen.default, arguments)


def test_gradients_lie_in_memory_as_compiled_code_was_told():
    """Prompts, too, whose gradients are summed in a layout of their own."""
    inputs = to_device([LAYOUTS["bthd"](x) for x in make(torch.float32, (2, 3), bank=1)], TRITON_DEVICE)
    cu_seqlens = ends((2, 3)).to(TRITON_DEVICE)
    out, lse = torch.ops.fastprompt.prompt_attention_varlen(*inputs, cu_seqlens, None, 3, True, 0.25, "triton")
    arguments = (torch.randn_like(out), None, *inputs, cu_seqlens, None, out, lse, 3, True, 0.25, [True] * 5, "triton")
    operation = torch.ops.fastprompt.prompt_attention_varlen_backward.default
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_graph_breaks():
    inputs = to_device(leaves(make(torch.float32, (2, 3))), TRITON_DEVICE)
    cu_seqlens = ends((2, 3)).to(TRITON_DEVICE)
    compiled = torch.compile(
        lambda *x: prompt_attention_varlen(*x, max_seqlen=3, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    call = lambda f, **kw: torch.autograd.grad(f(*inputs, cu_seqlens, **kw).square().sum(), inputs)  # noqa: E731
    want = call(prompt_attention_varlen, max_seqlen=3, impl="triton")
    for a, b in zip(call(compiled), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_every_reason_is_listed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ImplUnavailableError) as caught:
        prompt_attention_varlen(*make(torch.float64, dim=24), ends(LENGTHS), impl="triton")
    for reason in (
        "the tensors are on the CPU (set TRITON_INTERPRET=1 ",
        "dtype torch.float64 is not",
        "head size 24 ",
    ):
        assert reason in str(caught.value)
    assert fastprompt.explain(prompt_attention_varlen, *make(torch.float32), ends(LENGTHS)).impl in ("cpp", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("prompts", [0, 17, 200])
def test_full_matrix(dtype, dim, prompts):
    for lengths in ((6,) * 100, (577, 1, 77, 197, 257)):
        for is_causal, bank in ((False, None), (True, len(lengths))):
            check(make(dtype, lengths, 4, 2, prompts, dim, bank), lengths, impl="triton", is_causal=is_causal)
