# SPDX-License-Identifier: Apache-2.0
"""Every error of packed prompt attention names the argument, what was got and what was expected."""

import pytest
import torch
from oracles import NAMES
from varlen_cases import ends, make

import fastprompt
from fastprompt import config
from fastprompt.ops import prompt_attention_varlen


def arguments(**change):
    """Valid arguments ``T=9, S=3, Hq=4, Hkv=2, P=3, D=16`` in float32, with some replaced."""
    inputs = make(torch.float32, (4, 3, 2))
    return dict(zip(NAMES, inputs, strict=True)) | {"cu_seqlens": ends((4, 3, 2))} | change


def message_of(error, **change):
    """The message of the call's error; `explain` must raise the same."""
    with pytest.raises(error) as called:
        prompt_attention_varlen(**arguments(**change))
    with pytest.raises(error) as explained:
        fastprompt.explain(prompt_attention_varlen, **arguments(**change))
    assert str(called.value) == str(explained.value)
    return str(called.value)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (None, TypeError, "cu_seqlens: got NoneType, expected a torch.Tensor"),
        ([0, 9], TypeError, "cu_seqlens: got list, expected a torch.Tensor"),
        (torch.tensor([0, 9]), TypeError, "cu_seqlens: got dtype torch.int64, expected torch.int32; use .int()"),
        (torch.tensor([0.0, 9.0]), TypeError, "cu_seqlens: got dtype torch.float32, expected torch.int32; use .int()"),
        (torch.tensor([[0, 9]]).int(), ValueError, "cu_seqlens: got shape [1, 2], expected [S+1]"),
        (torch.tensor([]).int(), ValueError, "cu_seqlens: got shape [0], expected [S+1]"),
        (torch.tensor([1, 9]).int(), ValueError, "cu_seqlens: got 1 first and 9 last, expected 0 and 9 (the rows of"),
        (torch.tensor([0, 8]).int(), ValueError, "cu_seqlens: got 0 first and 8 last, expected 0 and 9 (the rows of"),
        (torch.tensor([0]).int(), ValueError, "cu_seqlens: got 0 first and 0 last, expected 0 and 9 (the rows of"),
        (torch.tensor([0, 6, 4, 9]).int(), ValueError, "cu_seqlens: got 6 before 4 at [1], expected increasing"),
        (torch.tensor([0, 12, 9]).int(), ValueError, "cu_seqlens: got 12 before 9 at [1], expected increasing"),
        (torch.tensor([0, 4, 4, 9]).int(), ValueError, "cu_seqlens: got sequence 1 empty (rows 4 to 4), expected at"),
        (torch.tensor([0, 4, 9, 9]).int(), ValueError, "cu_seqlens: got sequence 2 empty (rows 9 to 9), expected at"),
        (torch.tensor([0, 9]).int().to("meta"), ValueError, "cu_seqlens: got device meta, expected cpu (the device of"),
    ],
    ids=str,
)
def test_cu_seqlens(cu_seqlens, error, message):
    assert message_of(error, cu_seqlens=cu_seqlens).startswith(message)


@pytest.mark.parametrize(
    ("longest", "error", "message"),
    [
        (3, ValueError, "max_seqlen: got 3, expected at least 4 (the longest sequence)"),
        (-1, ValueError, "max_seqlen: got -1, expected at least 4 (the longest sequence)"),
        (4.0, TypeError, "max_seqlen: got float, expected an int or None"),
        (True, TypeError, "max_seqlen: got bool, expected an int or None"),
        (torch.tensor(4), TypeError, "max_seqlen: got Tensor, expected an int or None"),
    ],
    ids=str,
)
def test_max_seqlen(longest, error, message):
    assert message_of(error, max_seqlen=longest) == message


def test_max_seqlen_where_values_cannot_be_read():
    meta = {name: x.to("meta") for name, x in arguments().items()}
    with pytest.raises(ValueError, match="max_seqlen: got 2, expected at least 3, since 3 sequences hold 9 rows"):
        prompt_attention_varlen(**meta, max_seqlen=2)
    out = prompt_attention_varlen(**meta)
    assert (out.shape, out.device.type) == ((9, 4, 16), "meta")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(1, 4, 9, 16)}, ValueError, "query: got rank 4 (shape [1, 4, 9, 16]), expected [T,H,D]"),
        ({"key": torch.zeros(8, 2, 16)}, ValueError, "key: got shape [8, 2, 16], expected [9, 2, 16] to match query"),
        ({"value": torch.zeros(9, 4, 16)}, ValueError, "value: got shape [9, 4, 16], expected [9, 2, 16] to match"),
        ({"prompt_key": torch.zeros(4, 3, 16)}, ValueError, "prompt_key: got shape [4, 3, 16], expected [2, 3, 16]"),
        ({"query": torch.zeros(9, 3, 16)}, ValueError, "query: got 3 heads for 2 key heads, expected a multiple"),
        ({"key": torch.zeros(9, 2, 16).half()}, TypeError, "key: got dtype torch.float16, expected torch.float32"),
        ({"scale": -1.0}, ValueError, "scale: got -1.0, expected a finite number >= 0"),
        ({"prompt_index": torch.zeros(2).long()}, ValueError, "prompt_index: got shape [2], expected [3]"),
        ({"prompt_index": torch.zeros(3).int()}, TypeError, "prompt_index: got torch.int32, expected int64"),
        ({"prompt_index": torch.tensor([0, 1, 0])}, ValueError, "prompt_index: got values in [0, 1], expected [0, 0]"),
        ({"impl": "cpu"}, ValueError, "impl: got 'cpu', expected one of 'auto', 'reference', 'triton', 'cpp'"),
    ],
    ids=str,
)
def test_other_arguments(change, error, message):
    assert message_of(error, **change).startswith(message)


def test_a_bank_that_fits_neither_one_nor_the_sequences():
    bank = dict.fromkeys(NAMES[3:], torch.zeros(2, 2, 3, 16))
    message = message_of(ValueError, **bank)
    assert message.startswith("prompt_key: got a bank of 2 prompts for a batch of 3 and no prompt_index; expected 1 ")


def test_debug_checks_finite_prompts(monkeypatch):
    monkeypatch.setattr(config, "DEBUG", True)
    prompt = torch.full((2, 3, 16), torch.nan)
    assert message_of(ValueError, prompt_value=prompt).startswith("prompt_value: got 96 NaN")
