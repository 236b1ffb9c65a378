# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels over packed sequences against the float64 oracle of each sequence, at every level."""

import pytest
import torch
from attention_cases import LAYOUTS, PROMPTS_ONLY, leaves
from cpp_cases import isa, needs_cpp  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from varlen_cases import LENGTHS, check, ends, grads_of, make, run

from fastprompt.ops import prompt_attention_varlen

pytestmark = needs_cpp
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def cases(draw):
    """Lengths, banks and layouts; the values come from a seed."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    lengths = draw(st.lists(st.sampled_from((1, 2, 5, 16, 37, 70)), min_size=1, max_size=5))
    heads_kv, bank = pick(1, 2), pick(None, 1, len(lengths), 4)
    kwargs = {"is_causal": pick(False, True), "scale": pick(None, 0.0, 1.0)}
    kwargs["max_seqlen"] = pick(None, max(lengths), max(lengths) + 3)
    if bank == 4 or pick(False, True):
        kwargs["prompt_index"] = torch.randint(0, bank or 1, (len(lengths),))
    inputs = make(pick(*DTYPES), lengths, heads_kv * pick(1, 3), heads_kv, pick(0, 1, 8, 40), pick(16, 20), bank)
    if inputs[0].dtype != torch.float32 and pick(False, True):
        inputs[3:] = [x.float() for x in inputs[3:]]
    inputs = [LAYOUTS[pick(*LAYOUTS)](x) if x.numel() else x for x in inputs]
    return inputs, lengths, pick(False, True), pick((True,) * 5, PROMPTS_ONLY), kwargs


@given(case=cases())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_matches_the_oracle(isa, case):  # noqa: F811
    inputs, lengths, with_lse, needs, kwargs = case
    check(inputs, lengths, *grads_of(inputs, with_lse), needs, "cpp", **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classes_of_coop(dtype, isa):  # noqa: F811
    """Many short sequences over one prompt: its gradient is rounded once."""
    lengths = torch.randint(5, 21, (40,)).tolist()
    check(make(dtype, lengths, heads=2, heads_kv=2, prompts=17, dim=64), lengths, impl="cpp", is_causal=True)


def test_images_times_classes_of_cocoop(isa):  # noqa: F811
    lengths = (4, 6, 5) * 3
    index = torch.tensor([0, 1, 2]).repeat_interleave(3).roll(4)
    check(make(torch.float32, lengths, bank=3), lengths, impl="cpp", prompt_index=index, is_causal=True)


def test_index_and_bounds_with_strides(isa):  # noqa: F811
    inputs = make(torch.float32, (2, 3), bank=3)
    bounds = torch.tensor([0, 9, 2, 9, 5], dtype=torch.int32)[::2]
    index = torch.tensor([2]).expand(2)
    got = prompt_attention_varlen(*inputs, bounds, prompt_index=index, impl="cpp")
    want = prompt_attention_varlen(*inputs, ends((2, 3)), prompt_index=index, impl="reference")
    torch.testing.assert_close(got, want)


def test_long_and_short_sequences(isa):  # noqa: F811
    lengths = (130, 1, 700, 64)
    for dtype in DTYPES[:2]:
        check(make(dtype, lengths, 2, 1, prompts=10), lengths, impl="cpp", is_causal=True)


def test_a_sequence_does_not_depend_on_its_neighbours(isa):  # noqa: F811
    lengths, rows = (40, 3, 70), slice(40, 43)
    for dtype in DTYPES:
        inputs = make(dtype, lengths)
        grads = grads_of(inputs)
        whole = run(inputs, lengths, *grads, impl="cpp", max_seqlen=70)
        alone = run([x[rows] for x in inputs[:3]] + inputs[3:], (3,), *(x[rows] for x in grads), impl="cpp")
        pairs = ((whole.out, alone.out), (whole.lse, alone.lse), *zip(whole.grads[:3], alone.grads[:3], strict=True))
        assert all(torch.equal(a[rows], b) for a, b in pairs)


def test_no_sequences(isa):  # noqa: F811
    inputs = leaves(make(torch.float32, ()))
    out = prompt_attention_varlen(*inputs, ends(()), impl="cpp")
    assert [x.shape for x in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]


def test_custom_op_contract():
    inputs = leaves(make(torch.float32, (2, 3), bank=1))
    arguments = (*inputs, ends((2, 3)), None, 3, True, 0.25, "cpp")
    torch.library.opcheck(torch.ops.fastprompt.prompt_attention_varlen.default, arguments)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 2, 9), "got 0 first and 9 last, expected 0 and 5"),
        ((-1, 2, 5), "got -1 first and 5 last, expected 0 and 5"),
        ((0, 5, 5), r"got a sequence of 5 rows at \[0\], expected 1 to 3"),
        ((0, 7, 5), r"got a sequence of 7 rows at \[0\], expected 1 to 3"),
    ],
)
def test_a_compiled_call_reads_no_row_that_is_not_there(bounds, message):
    """While it traces, bounds have no values to check; the kernels look at them."""
    inputs = make(torch.float32, (2, 3))
    call = torch.compile(
        lambda ends: prompt_attention_varlen(*inputs, ends, max_seqlen=3, impl="cpp"), backend="eager", fullgraph=True
    )
    call(ends((2, 3)))
    with pytest.raises(RuntimeError, match=f"cu_seqlens: {message}"):
        call(torch.tensor(bounds, dtype=torch.int32))


def test_auto_and_names():
    import fastprompt

    assert fastprompt.explain(prompt_attention_varlen, *make(torch.float64), ends(LENGTHS)).impl == "cpu"
    assert fastprompt.explain(prompt_attention_varlen, *make(torch.float32), ends(LENGTHS), impl="cpp").impl == "cpp"
