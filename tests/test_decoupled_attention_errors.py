# SPDX-License-Identifier: Apache-2.0
"""Every error of decoupled attention names the argument, what was got and what was expected."""

import pytest
import torch
from decoupled_cases import make

import fastprompt
from fastprompt.ops import decoupled_attention


def arguments(**change):
    """Valid arguments ``B=2, Hq=4, Hkv=2, Tq=5, D=16``, 9 keys a sample and 3 shared ones, with some replaced."""
    return make(torch.float32)._asdict() | change


def message_of(error, **change):
    """The message of the call's error; `explain` must raise the same."""
    with pytest.raises(error) as called:
        decoupled_attention(**arguments(**change))
    with pytest.raises(error) as explained:
        fastprompt.explain(decoupled_attention, **arguments(**change))
    assert str(called.value) == str(explained.value)
    return str(called.value)


def second(name, x):
    """The argument with its second branch replaced."""
    return {name: [arguments()[name][0], x]}


def test_what_is_not_a_float_tensor():
    assert message_of(TypeError, query=[1.0]) == "query: got list, expected a torch.Tensor"
    for name in ("keys", "values"):
        assert message_of(TypeError, **second(name, 1.0)) == f"{name}[1]: got float, expected a torch.Tensor"
        message = message_of(TypeError, **second(name, torch.zeros(1, 2, 3, 16, dtype=torch.int64)))
        assert message.startswith(f"{name}[1]: got dtype torch.int64, expected one of torch.float16, ")


@pytest.mark.parametrize("name", ["keys", "values", "weights"])
def test_what_is_not_a_list_of_branches(name):
    message = message_of(TypeError, **{name: torch.zeros(2, 2, 3, 16)})
    assert message == f"{name}: got Tensor, expected a list or tuple with one entry a branch"


@pytest.mark.parametrize("name", ["attn_masks", "is_causal"])
def test_what_is_not_a_list_of_options(name):
    message = message_of(TypeError, **{name: torch.zeros(9)})
    assert message == f"{name}: got Tensor, expected a list or tuple with one entry a branch"


@pytest.mark.parametrize("name", ["values", "weights", "attn_masks", "is_causal"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_number_of_branches_that_does_not_match(name, count):
    message = message_of(ValueError, **{name: [None] * count})
    assert message == f"{name}: got {count} entries, expected 2, one for each of keys"


def test_no_branch():
    message = message_of(ValueError, keys=[], values=[], weights=[])
    assert message == "keys: got no branch, expected at least one [B or 1,Hkv,T,D]"


def test_rank():
    assert message_of(ValueError, query=torch.zeros(4, 5)) == "query: got rank 2 (shape [4, 5]), expected [B,Hq,Tq,D]"
    for name in ("keys", "values"):
        message = message_of(ValueError, **second(name, torch.zeros(2, 3, 16)))
        assert message == f"{name}[1]: got rank 3 (shape [2, 3, 16]), expected [B or 1,Hkv,T,D]"


@pytest.mark.parametrize("shape", [(3, 2, 3, 16), (2, 4, 3, 16), (2, 2, 3, 8), (0, 2, 3, 16)])
def test_keys_that_do_not_match(shape):
    message = message_of(ValueError, **second("keys", torch.zeros(shape)))
    assert message == (
        f"keys[1]: got shape {list(shape)}, expected [2 or 1,2,T,16] to match query [2, 4, 5, 16] and keys[0]"
    )


@pytest.mark.parametrize("shape", [(2, 2, 3, 16), (1, 2, 4, 16), (1, 4, 3, 16), (1, 2, 3, 8)])
def test_values_that_do_not_match(shape):
    message = message_of(ValueError, **second("values", torch.zeros(shape)))
    assert message == f"values[1]: got shape {list(shape)}, expected [1, 2, 3, 16] like keys[1]"


def test_heads_that_are_no_multiple():
    message = message_of(ValueError, query=torch.zeros(2, 3, 5, 16), weights=[1, 1])
    assert message == "query: got 3 heads for 2 key heads, expected a multiple (grouped-query attention)"
    nothing = [torch.zeros(2, 0, 9, 16)] * 2
    assert "query: got 4 heads for 0 key heads" in message_of(ValueError, keys=nothing, values=nothing)


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes(name, dtype):
    message = message_of(TypeError, **second(name, arguments()[name][1].to(dtype)))
    assert message.startswith(
        f"{name}[1]: got dtype {dtype}, expected torch.float32 like query; cast with {name}[1].to("
    )


def test_only_weights_may_be_float32_beside_half_precision():
    half = make(torch.float16)._asdict()
    assert decoupled_attention(**half | {"weights": [torch.ones(()), torch.ones(4, 1)]}).dtype == torch.float16
    wrong = message_of(TypeError, **half | {"weights": [1.0, torch.ones((), dtype=torch.bfloat16)]})
    assert wrong.startswith(
        "weights[1]: got dtype torch.bfloat16, expected torch.float16 (or torch.float32) like query"
    )
    assert message_of(TypeError, **half | second("keys", arguments()["keys"][1])).startswith("keys[0]: got dtype")
    double = make(torch.float64)._asdict() | {"weights": [1.0, torch.ones(())]}
    assert message_of(TypeError, **double).startswith(
        "weights[1]: got dtype torch.float32, expected torch.float64 like"
    )


@pytest.mark.parametrize("name", ["keys", "values", "weights", "attn_masks"])
def test_devices(name):
    given = arguments(attn_masks=[None, torch.zeros(3)], weights=[1.0, torch.ones(())])
    message = message_of(ValueError, **given | {name: [given[name][0], given[name][1].to("meta")]})
    assert message.startswith(
        f"{name}[1]: got device meta, expected cpu (the device of query); move it with {name}[1]."
    )


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf"), "1", torch.tensor(1.0)], ids=repr)
def test_scale(scale):
    assert message_of(ValueError, scale=scale).startswith(f"scale: got {scale!r}, expected a finite number >= 0")


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (None, TypeError, "got NoneType, expected a number or a torch.Tensor"),
        ("1", TypeError, "got str, expected a number or a torch.Tensor"),
        (float("nan"), ValueError, "got nan, expected a finite number or a tensor"),
        (torch.ones(4, dtype=torch.int64), TypeError, "got dtype torch.int64, expected one of"),
        (torch.ones(4), ValueError, "got shape [4], expected one that broadcasts to [B,Hq,Tq] = [2, 4, 5]"),
        (torch.ones(3, 1, 1), ValueError, "got shape [3, 1, 1], expected one that broadcasts to [B,Hq,Tq]"),
        (torch.ones(2, 4, 5, 1), ValueError, "got shape [2, 4, 5, 1], expected one that broadcasts to [B,Hq,Tq]"),
    ],
    ids=str,
)  # fmt: skip
def test_weights(weight, error, message):
    assert message_of(error, weights=[1.0, weight]).startswith(f"weights[1]: {message}")


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True], TypeError, "got list, expected a torch.Tensor"),
        (torch.zeros(5, 3, dtype=torch.int64), TypeError, "got dtype torch.int64, expected bool"),
        (
            torch.zeros(5, 9),
            ValueError,
            "got shape [5, 9], expected one that broadcasts to [B,Hq,Tq,Tk] = [2, 4, 5, 3]",
        ),
        (torch.zeros(3, 1, 5, 3), ValueError, "got shape [3, 1, 5, 3], expected one that broadcasts to"),
        (torch.zeros(1, 2, 4, 5, 3), ValueError, "got shape [1, 2, 4, 5, 3], expected one that broadcasts to"),
    ],
    ids=lambda x: str(list(x.shape)) if isinstance(x, torch.Tensor) else "",
)
def test_masks(mask, error, message):
    assert message_of(error, attn_masks=[None, mask]).startswith(f"attn_masks[1]: {message}")


def test_unknown_impl():
    assert (
        message_of(ValueError, impl="cuda") == "impl: got 'cuda', expected one of 'auto', 'reference', 'triton', 'cpp'"
    )


@pytest.mark.parametrize("impl", ["triton", "cpp"])
def test_an_explicit_impl_never_falls_back(impl, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = {"triton": "the tensors are on the CPU", "cpp": "not built"}[impl]
    monkeypatch.setattr("fastprompt.ops.cpp.wins.missing", lambda: "not built")
    message = message_of(fastprompt.ImplUnavailableError, impl=impl)
    assert message.startswith(f"impl='{impl}' cannot run decoupled_attention here: {reason}")
