# SPDX-License-Identifier: Apache-2.0
"""Every error of prompt attention names the argument, what was got and what was expected."""

import pytest
import torch
from attention_cases import make
from oracles import NAMES

import fastprompt
from fastprompt import config
from fastprompt.ops import prompt_attention

INT = torch.int64


def arguments(**change):
    """Valid arguments ``B=2, Hq=4, Hkv=2, Tq=5, Tk=9, P=3, D=16`` in float32, with some replaced."""
    return dict(zip(NAMES, make(torch.float32), strict=True)) | change


def message_of(error, **change):
    """The message of the call's error; `explain` must raise the same."""
    with pytest.raises(error) as called:
        prompt_attention(**arguments(**change))
    with pytest.raises(error) as explained:
        fastprompt.explain(prompt_attention, **arguments(**change))
    assert str(called.value) == str(explained.value)
    return str(called.value)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_float_tensor(name):
    assert message_of(TypeError, **{name: [1.0]}) == f"{name}: got list, expected a torch.Tensor"
    message = message_of(TypeError, **{name: torch.zeros(2, 2, 2, dtype=INT)})
    assert message.startswith(f"{name}: got dtype torch.int64, expected one of torch.float16, ")


@pytest.mark.parametrize("name", NAMES)
def test_rank(name):
    expected = "[Hkv,P,D] or [G,Hkv,P,D]" if name.startswith("prompt") else "[B,H,T,D]"
    message = message_of(ValueError, **{name: torch.zeros(4, 5)})
    assert message == f"{name}: got rank 2 (shape [4, 5]), expected {expected}"


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("key", (3, 2, 9, 16), [2, 2, 9, 16]),
        ("key", (2, 2, 9, 8), [2, 2, 9, 16]),
        ("value", (2, 2, 8, 16), [2, 2, 9, 16]),
        ("value", (2, 4, 9, 16), [2, 2, 9, 16]),
        ("prompt_key", (4, 3, 16), [1, 2, 3, 16]),
        ("prompt_key", (2, 3, 8), [1, 2, 3, 16]),
        ("prompt_value", (2, 4, 16), [1, 2, 3, 16]),
        ("prompt_value", (2, 2, 3, 16), [1, 2, 3, 16]),
    ],
)
def test_shapes_that_do_not_match(name, shape, expected):
    message = message_of(ValueError, **{name: torch.zeros(shape)})
    expected = expected[-len(shape) :]
    assert message.startswith(f"{name}: got shape {list(shape)}, expected {expected} to match query [2, 4, 5, 16]")


def test_heads_that_are_no_multiple():
    message = message_of(ValueError, query=torch.zeros(2, 3, 5, 16))
    assert message == "query: got 3 heads for 2 key heads, expected a multiple (grouped-query attention)"
    nothing = {"key": torch.zeros(2, 0, 9, 16), "value": torch.zeros(2, 0, 9, 16)}
    prompts = dict.fromkeys(NAMES[3:], torch.zeros(0, 3, 16))
    assert "query: got 4 heads for 0 key heads" in message_of(ValueError, **nothing, **prompts)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes(name, dtype):
    message = message_of(TypeError, **{name: arguments()[name].to(dtype)})
    assert message.startswith(f"{name}: got dtype {dtype}, expected torch.float32 like query; cast with {name}.to(")


def test_only_float32_prompts_may_stand_beside_half_precision():
    half = {name: x.half() for name, x in arguments().items()}
    wrong = {name: x.bfloat16() for name, x in arguments().items()}
    for name in NAMES[3:]:
        message = message_of(TypeError, **half | {name: wrong[name]})
        assert message.startswith(f"{name}: got dtype torch.bfloat16, expected torch.float16 (or torch.float32)")
    assert message_of(TypeError, **half | {"key": arguments()["key"]}).startswith("key: got dtype torch.float32")


@pytest.mark.parametrize("name", [*NAMES[1:], "prompt_index", "attn_mask"])
def test_devices(name):
    others = {"prompt_index": torch.zeros(2, dtype=INT), "attn_mask": torch.zeros(9)}
    moved = arguments(**others)[name].to("meta")
    message = message_of(ValueError, **others | {name: moved})
    assert message.startswith(f"{name}: got device meta, expected cpu (the device of query); move it with {name}.to(")


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0, 0], TypeError, "prompt_index: got list, expected a torch.Tensor"),
        (torch.zeros(2, dtype=torch.int32), TypeError, "prompt_index: got torch.int32, expected int64 of shape [2]"),
        (torch.zeros(3, dtype=INT), ValueError, "prompt_index: got shape [3], expected [2] (one a sample)"),
        (torch.zeros(2, 1, dtype=INT), ValueError, "prompt_index: got shape [2, 1], expected [2] (one a sample)"),
        (torch.tensor([0, 1]), ValueError, "prompt_index: got values in [0, 1], expected [0, 0] (bank of 1)"),
        (torch.tensor([-1, 0]), ValueError, "prompt_index: got values in [-1, 0], expected [0, 0] (bank of 1)"),
    ],
    ids=str,
)
def test_prompt_index(index, error, message):
    assert message_of(error, prompt_index=index).startswith(message)


def test_a_bank_that_fits_neither_one_nor_the_batch():
    bank = dict.fromkeys(NAMES[3:], torch.zeros(3, 2, 3, 16))
    message = message_of(ValueError, **bank)
    assert message.startswith("prompt_key: got a bank of 3 prompts for a batch of 2 and no prompt_index; expected 1 ")
    assert "pass prompt_index=int64[2]" in message


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf"), "1", torch.tensor(1.0)], ids=repr)
def test_scale(scale):
    assert message_of(ValueError, scale=scale).startswith(f"scale: got {scale!r}, expected a finite number >= 0")


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True], TypeError, "attn_mask: got list, expected a torch.Tensor"),
        (torch.zeros(5, 9, dtype=INT), TypeError, "attn_mask: got dtype torch.int64, expected bool"),
        (torch.zeros(5, 12), ValueError, "attn_mask: got shape [5, 12], expected one that broadcasts to"),
        (torch.zeros(3, 1, 5, 9), ValueError, "attn_mask: got shape [3, 1, 5, 9], expected one that broadcasts to"),
        (torch.zeros(1, 2, 4, 5, 9), ValueError, "attn_mask: got shape [1, 2, 4, 5, 9], expected one that broadcasts"),
    ],
    ids=lambda x: str(list(x.shape)) if isinstance(x, torch.Tensor) else "",
)
def test_mask(mask, error, message):
    assert message_of(error, attn_mask=mask).startswith(message)


def test_a_mask_of_a_dtype_that_nothing_computes_with():
    mask = torch.zeros(5, 9).to(torch.float8_e4m3fn)
    assert message_of(TypeError, attn_mask=mask).startswith("attn_mask: got dtype torch.float8_e4m3fn, expected bool")


def test_unknown_impl():
    for impl in ("cuda", "cpu", None):
        message = message_of(ValueError, impl=impl)
        assert message == f"impl: got {impl!r}, expected one of 'auto', 'reference', 'triton', 'cpp'"


@pytest.mark.parametrize("impl", ["triton", "cpp"])
@pytest.mark.parametrize("by_environment", [False, True], ids=["argument", "environment"])
def test_an_explicit_impl_never_falls_back(impl, by_environment, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = {"triton": "the tensors are on the CPU", "cpp": "not built"}[impl]
    monkeypatch.setattr("fastprompt.ops.cpp.wins.missing", lambda: "not built")
    if by_environment:
        monkeypatch.setattr(config, "IMPL", impl)
    message = message_of(fastprompt.ImplUnavailableError, impl="auto" if by_environment else impl)
    assert message.startswith(f"impl='{impl}' cannot run prompt_attention here: {reason}")


def test_explain_tells_the_choice_and_every_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("fastprompt.ops.cpp.wins.missing", lambda: "not built")
    choice = fastprompt.explain(prompt_attention, **arguments())
    assert (choice.op, choice.impl) == ("prompt_attention", "cpu")
    assert choice.refused == {
        "triton": ["the tensors are on the CPU, where Triton is interpreted: for tests, and only by name"],
        "cpp": ["not built"],
    }
    meta = {name: x.to("meta") for name, x in arguments().items()}
    choice = fastprompt.explain(prompt_attention, **meta, return_lse=True, is_causal=True)
    assert choice.impl == "reference"
    assert choice.refused["cpu"] == ["composed of PyTorch's CPU kernels; the tensors are on meta"]
    assert str(choice).splitlines()[0] == "prompt_attention: reference (plain PyTorch runs everywhere)"
    assert all(f"not {impl}: " in str(choice) for impl in ("triton", "cpp", "cpu"))
    asked = fastprompt.explain(prompt_attention, **arguments(), impl="reference")
    assert (asked.impl, asked.why) == ("reference", "asked for by name")
    with pytest.raises(TypeError, match=r"op: got .*sum.*, expected an operation of fastprompt.ops"):
        fastprompt.explain(torch.sum, torch.zeros(1))


def test_check_finite():
    fastprompt.check_finite(torch.zeros(0), torch.ones(2, 3))
    bad = torch.zeros(2, 3)
    bad[1, 1], bad[1, 2], bad[0, 2] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(ValueError, match=r"prompts: got 1 NaN and 2 infinite of 6 elements \(first at \[0, 2\]\), exp"):
        fastprompt.check_finite(bad)
    with pytest.raises(ValueError, match=r"^grads\[1\]: got 1 NaN"):
        fastprompt.check_finite(torch.ones(1), bad, name="grads")
