# SPDX-License-Identifier: Apache-2.0
"""Short causal sequences on CPU: blocks over windows against the float64 oracle of each sequence."""

from itertools import product
from unittest.mock import patch

import pytest
import torch
from attention_cases import ALL, DTYPES, HALF, LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import NAMES, assert_close, largest
from varlen_cases import by_sequence, check, ends, grads_of, make, run

from fastprompt.ops.cpu import windows

#: C++ kernels have a file of their own.
pytestmark = pytest.mark.usefixtures("composition")

#: A longest sequence at both ends of each block size: none behind, 16 and 32 rows behind, and between.
LONGEST = {1: 16, 2: 16, 17: 16, 18: 32, 33: 32}


@pytest.fixture(autouse=True)
def taken():
    """Every case in this file is small: it takes windows all the same, and is checked to."""
    calls = dict.fromkeys(("forward", "backward"), 0)

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    replaced = {name: counted(name, getattr(windows, name)) for name in calls}
    with patch.multiple(windows, LEAST=1, **replaced):
        yield calls


def lengths_up_to(longest, count=7):
    """Sequences of different lengths; the longest is neither first nor last."""
    return [1 + (longest * 5 + i * 7) % longest for i in range(count)] + [longest, 1 + longest // 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("longest", LONGEST)
@pytest.mark.parametrize("prompts", [0, 1, 17])
def test_block_sizes(taken, longest, prompts, dtype):
    lengths = lengths_up_to(longest)
    made = windows._Windows(torch.tensor(lengths), longest, 4)
    assert (made.block, made.window) == (LONGEST[longest], LONGEST[longest] + longest - 1)
    check(make(dtype, lengths, prompts=prompts), lengths, is_causal=True)
    assert taken == {"forward": 1, "backward": 1}


def test_what_windows_hold(taken):
    """Longer sequences, and those that are not causal, are computed otherwise; to the same numbers."""
    for longest, is_causal in ((34, True), (33, False)):
        lengths = lengths_up_to(longest)
        check(make(torch.float32, lengths), lengths, is_causal=is_causal)
    assert not any(taken.values())


def test_many_prompts_for_few_rows(taken):
    with patch.object(windows, "LEAST", 11):
        cases = (((9, 12), [0, 1], 0), ((10, 12), [0, 1], 1), ((9, 12), [1, 1], 2), ((3, 4), [1, 1], 3))
        for lengths, index, calls in cases:
            check(make(torch.float32, lengths, bank=2), lengths, is_causal=True, prompt_index=torch.tensor(index))
            assert taken == {"forward": calls, "backward": calls}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_are_cut_at_prompts_and_at_their_size(taken, dtype):
    lengths, index = (5, 9, 3, 20, 6, 6, 1, 12), torch.tensor([2, 2, 0, 0, 0, 2, 2, 2])
    with patch.object(windows, "TILE", 23):
        tiled = windows.tiles(ends(lengths), index, 4)
        rows = [(t.rows.start, t.rows.stop, t.sequences.start, t.sequences.stop, t.prompt) for t in tiled]
        assert rows == [(0, 14, 0, 2, 2), (14, 37, 2, 4, 0), (37, 43, 4, 5, 0), (43, 62, 5, 8, 2)]
        check(make(dtype, lengths, bank=4), lengths, is_causal=True, prompt_index=index)
    for tile in (1, 33):
        with patch.object(windows, "TILE", tile):
            check(make(dtype, lengths), lengths, is_causal=True)
            check(make(dtype, lengths, bank=len(lengths)), lengths, is_causal=True)
    assert taken == {"forward": 5, "backward": 5}


@st.composite
def cases(draw):
    """Lengths around both block sizes, banks, unsorted indices, layouts and tile sizes; values come from a seed."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    lengths = draw(st.lists(st.sampled_from((1, 2, 5, 15, 16, 17, 18, 33)), min_size=1, max_size=8))
    heads_kv, bank = pick(1, 2, 3), pick(None, 1, len(lengths), 3)
    kwargs = {"is_causal": True, "scale": pick(None, None, 0.0, 0.3, 1.0)}
    if bank == 3 or pick(False, True):
        kwargs["prompt_index"] = torch.randint(0, bank or 1, (len(lengths),))
    inputs = make(pick(*DTYPES), lengths, heads_kv * pick(1, 2), heads_kv, pick(0, 1, 3), pick(1, 4, 16, 20), bank)
    inputs = [LAYOUTS[pick(*LAYOUTS)](x) if x.numel() else x for x in inputs]
    needs = draw(st.tuples(*[st.booleans()] * 5).filter(any))
    return inputs, lengths, pick((True, False), (False, True), (True, True)), needs, pick(1, 18, 40, 768), kwargs


@given(case=cases())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_matches_the_oracle(case):
    inputs, lengths, (with_out, with_lse), needs, tile, kwargs = case
    grad_out, grad_lse = grads_of(inputs)
    with patch.object(windows, "TILE", tile):
        check(inputs, lengths, grad_out if with_out else None, grad_lse if with_lse else None, needs, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_subset_of_inputs_gets_the_same_gradients(taken, dtype):
    lengths = (3, 18, 7)
    inputs = make(dtype, lengths)
    both = grads_of(inputs)
    whole = run(inputs, lengths, *both, is_causal=True).grads
    for needs in product([False, True], repeat=5):
        if any(needs[:3]):
            found = run(inputs, lengths, *both, needs, is_causal=True).grads
            for name, need, x, want in zip(NAMES, needs, found, whole, strict=True):
                assert x is None if not need else torch.equal(x, want), name
    assert taken["backward"] == 29


def test_rows_see_neither_their_neighbours_nor_what_comes_later():
    """Rows of other sequences, of other heads and behind a row are hidden, and not merely light."""
    lengths = (6, 17, 9)
    inputs = make(torch.float64, lengths)
    before = run(inputs, lengths, *grads_of(inputs), is_causal=True).out
    changed = [x.clone() for x in inputs]
    for x in changed[1:3]:
        x[12:23] += 100.0
        x[:, 1] -= 50.0
    after = run(changed, lengths, *grads_of(inputs), is_causal=True).out
    same = torch.tensor([*range(12), *range(23, 32)])
    assert torch.equal(after[same][:, :2], before[same][:, :2])
    assert not torch.isclose(after[12:23], before[12:23]).any(dim=-1).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("prompt_dtype", [None, torch.float32], ids=["half", "float32"])
def test_a_prompts_gradient_is_rounded_once(dtype, prompt_dtype):
    """Over all tiles: parts in half precision would lose more."""
    lengths = (torch.arange(40) % 7 + 10).tolist()
    inputs = make(dtype, lengths, heads=2)
    inputs[3:] = [p.to(prompt_dtype or dtype) for p in inputs[3:]]
    grad_out = torch.rand_like(inputs[0])
    exact, _, noise = by_sequence(inputs, lengths, grad_out, None, is_causal=True)
    allowed = torch.finfo(prompt_dtype or dtype).eps * largest(exact.grads[4]) + largest(noise.grads[4])
    for tile in (16, 768):
        with patch.object(windows, "TILE", tile):
            grad = run(inputs, lengths, grad_out, is_causal=True).grads[4]
        assert grad.dtype == (prompt_dtype or dtype)
        assert_close("prompt_value", grad, exact.grads[4], allowed)


def test_gradients_have_the_strides_that_the_fake_implementation_promises(taken):
    lengths = (3, 18, 7)
    for layout in LAYOUTS.values():
        inputs = [layout(x) for x in make(torch.float32, lengths, bank=3)]
        actual = run(inputs, lengths, *grads_of(inputs), ALL, is_causal=True)
        for x, grad in zip(inputs, actual.grads, strict=True):
            assert grad.stride() == torch.empty_like(x).stride()
    assert taken["backward"] == len(LAYOUTS)


def test_large_logits():
    lengths = (20, 33, 20)
    inputs = make(torch.float32, lengths, dim=64, prompts=10)
    inputs[0] = inputs[0] * 10
    check(inputs, lengths, *grads_of(inputs, with_lse=False), is_causal=True)
