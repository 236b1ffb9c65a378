# SPDX-License-Identifier: Apache-2.0
"""Eager calls without the dispatcher: numbers of the registered operations, which whoever listens still sees."""

from importlib import import_module

import pytest
import torch
from attention_cases import make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastprompt.ops import checks, decoupled_attention, diffuse_prompts, direct, prompt_attention


class Seen(TorchDispatchMode):
    """The operations of fastprompt that PyTorch's dispatcher runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fastprompt":
            self.names.append(op.__name__.removesuffix(".default"))
        return op(*args, **(kwargs or {}))


def wide():
    x, base = torch.randn(2, 2, 7, 16)
    return [x, base, torch.randn(3, 16), torch.randn(4, 16), torch.randn(16, 4), torch.zeros(())]


def branches(query, a, b, c, d, weight):
    return decoupled_attention(query, [a, b], [c, d], [0.5, weight])


def branch_inputs():
    return [torch.randn(2, 4, t, 16) for t in (5, 7, 3, 7, 3)] + [torch.randn(4, 1)]


CASES = {
    "prompt_attention": (lambda *x: prompt_attention(*x, return_lse=True), lambda: make(torch.float32)),
    "decoupled_attention": (branches, branch_inputs),
    "diffuse_prompts": (diffuse_prompts, wide),
}


def both(op, inputs, needs):
    leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    out = op(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(outs, wanted, [torch.ones_like(x) for x in outs])
    return [x.detach() for x in outs] + list(grads)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("which", ["all", "first", "last"])
def test_numbers_are_those_of_the_registered_operation(name, which):
    op, inputs = CASES[name][0], CASES[name][1]()
    needs = [which == "all" or i == (0 if which == "first" else len(inputs) - 1) for i in range(len(inputs))]
    directly = both(op, inputs, needs)
    with Seen() as seen:
        dispatched = both(op, inputs, needs)
    assert seen.names == [name, f"{name}_backward"]
    assert len(directly) == len(dispatched)
    for a, b in zip(directly, dispatched, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.fixture
def registered(monkeypatch):
    """How often the registered operation of prompt attention is called."""
    run = import_module("fastprompt.ops.prompt_attention")._run
    calls, operation = [], run.operation
    monkeypatch.setattr(run, "operation", lambda *args: calls.append(1) or operation(*args))
    return calls


def test_plain_calls_do_not_reach_the_dispatcher(registered):
    inputs = [x.requires_grad_() for x in make(torch.float32)]
    out = prompt_attention(*inputs)
    assert out.grad_fn.name() == "prompt_attentionBackward" and not registered
    with torch.no_grad():
        assert prompt_attention(*inputs).grad_fn is None and not registered


class Wrapped(torch.Tensor):
    """A subclass without a dispatch of its own."""


def test_subclasses_and_function_modes_reach_it(registered):
    inputs = make(torch.float32)
    prompt_attention(*inputs[:4], inputs[4].as_subclass(Wrapped))
    assert len(registered) == 1
    with torch.device("cpu"):
        prompt_attention(*inputs)
    assert len(registered) == 2


@pytest.mark.parametrize("name", CASES)
def test_memory_that_holds_the_negative_reaches_it(name):
    """The imaginary part of a conjugate is a plain tensor whose memory has the other sign."""
    op, inputs = CASES[name][0], CASES[name][1]()
    negative = [torch.complex(torch.zeros_like(x), -x).conj().imag for x in inputs]
    assert all(x.is_neg() for x in negative)
    needs = [True] * len(inputs)
    leaves = [x.detach().requires_grad_() for x in negative]
    out = op(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    found = [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])]
    for a, b in zip(found, both(op, inputs, needs), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused():
    inputs = [x.requires_grad_() for x in make(torch.float32)]
    grad = torch.autograd.grad(prompt_attention(*inputs).sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_checkpointed_calls_and_two_backward_passes():
    inputs = [x.requires_grad_() for x in make(torch.float32)]
    want = torch.autograd.grad(prompt_attention(*inputs).sum(), inputs)
    out = checkpoint(prompt_attention, *inputs, use_reentrant=False)
    for retain in (True, False):
        for a, b in zip(torch.autograd.grad(out.sum(), inputs, retain_graph=retain), want, strict=True):
            assert torch.equal(a, b)


def test_lists_of_tensors_are_taken_apart_and_put_together():
    a, b, c = torch.randn(3, 2)
    args = (a, [b, c], [], 1.0, None, [1.0, 2.0], [None, a])
    tensors, layout = direct._apart(args)
    assert [x.data_ptr() for x in tensors] == [x.data_ptr() for x in (a, b, c)]
    assert layout == (1, -3, -1, None, None, None, None)
    assert direct._nest("abc", layout) == ["a", ["b", "c"], [], None, None, None, None]


@pytest.mark.parametrize("change", [{"tk": 8}, {"dim": 32}, {"heads": 2}])
def test_a_call_unlike_those_that_passed_is_checked(change):
    """Every input differs from the ones that passed in one thing; the checks must see it."""
    inputs = make(torch.float32)
    for _ in range(2):
        prompt_attention(*inputs)
    others = make(torch.float32, **change)
    for i in range(5):
        mixed = [other if i == j else x for j, (x, other) in enumerate(zip(inputs, others, strict=True))]
        fits = all(x.shape == y.shape for x, y in zip(mixed, inputs, strict=True)) or (i == 0 and "heads" in change)
        if fits:
            prompt_attention(*mixed)
        else:
            with pytest.raises(ValueError):
                prompt_attention(*mixed)
    with pytest.raises(TypeError, match=r"key: got dtype torch\.float64"):
        prompt_attention(inputs[0], inputs[1].double(), *inputs[2:])
    with pytest.raises(TypeError, match=r"query: got dtype torch\.int64"), torch.autocast("cpu"):
        prompt_attention(*inputs)
        prompt_attention(inputs[0].long(), *inputs[1:])


def test_signatures_are_forgotten_before_they_are_too_many(monkeypatch):
    monkeypatch.setattr(checks, "MOST_SIGNATURES", 1)
    for tk in (3, 4, 5):
        prompt_attention(*make(torch.float32, tk=tk))
        assert len(checks._passed) == 1
