# SPDX-License-Identifier: Apache-2.0
"""CLIP's frozen MLP against transformers' own module, and where it is left to that module."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPMLP

from fastprompt.nn import frozen_mlp
from fastprompt.nn.frozen_mlp import FrozenQuickMLP, is_frozen_quick, run_mlp

ROWS, WIDTH, HIDDEN = 11, 24, 56


def mlp(dtype=torch.float64, act="quick_gelu") -> CLIPMLP:
    """Frozen, with biases that count and rows far out on both sides of the activation."""
    config = CLIPTextConfig(hidden_size=WIDTH, intermediate_size=HIDDEN, hidden_act=act)
    found = CLIPMLP(config).to(torch.float64).requires_grad_(False)
    for p in found.parameters():
        p.copy_(torch.randn(p.shape, dtype=torch.float64) * (0.5 if p.dim() == 2 else 2.0))
    return found.to(dtype)


def step(run, x, grad):
    x = x.detach().clone().requires_grad_()
    out = run(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


@pytest.fixture
def applied():
    """Counts the calls of `FrozenQuickMLP`."""
    with patch.object(frozen_mlp, "FrozenQuickMLP", wraps=FrozenQuickMLP) as function:
        yield function.apply


def test_equals_the_module_in_float64(applied):
    module, x, grad = mlp(), 3 * torch.randn(ROWS, WIDTH).double(), torch.randn(ROWS, WIDTH).double()
    for ours, theirs in zip(step(lambda x: run_mlp(module, x), x, grad), step(module, x, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert applied.call_count == 1


def test_gradcheck():
    module = mlp()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: run_mlp(module, x), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_as_exact_as_the_module(applied, dtype):
    """At most twice its error, and one rounding of the result."""
    module = mlp(dtype)
    exact = copy.deepcopy(module).double()
    x, grad = torch.randn(200, WIDTH).to(dtype), torch.randn(200, WIDTH).to(dtype)
    found = step(lambda x: run_mlp(module, x), x, grad)
    for ours, plain, want in zip(found, step(module, x, grad), step(exact, x.double(), grad.double()), strict=True):
        assert ours.dtype == dtype
        allowed = 2 * (plain - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (ours - want).abs().max() <= allowed
    assert applied.call_count == 1


def test_keeps_one_tensor():
    """Besides the weights, the backward pass keeps the rows behind the first product alone."""
    module, kept = mlp(torch.float32), []
    weights = {p.data_ptr() for p in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        run_mlp(module, torch.randn(ROWS, WIDTH, requires_grad=True))
    assert [list(x.shape) for x in kept if x.data_ptr() not in weights] == [[ROWS, HIDDEN]]


def _trained(module):
    module.fc2.bias.requires_grad_(True)
    return module


def _wrapped(module):
    class Wrapped(nn.Linear):
        pass

    module.fc1.__class__ = Wrapped
    return module


def _without_bias(module):
    module.fc1.bias = None
    return module


def _hooked(module):
    module.fc1.register_forward_hook(lambda m, args, out: 2 * out)
    return module


def _hooked_whole(module):
    module.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    return module


def _patched(module):
    forward = module.fc2.forward
    module.fc2.forward = lambda x: forward(x) + 1
    return module


OTHERS = {
    "a weight that learns": _trained, "a wrapped layer": _wrapped, "no bias": _without_bias, "a hook": _hooked,
    "a hook of the whole": _hooked_whole, "a forward of its own": _patched,
    "gelu": lambda module: mlp(act="gelu"),
}  # fmt: skip


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_anything_else_runs_as_it_is(applied, change):
    module = change(mlp())
    assert not is_frozen_quick(module)
    x, grad = torch.randn(ROWS, WIDTH).double(), torch.randn(ROWS, WIDTH).double()
    for ours, theirs in zip(step(lambda x: run_mlp(module, x), x, grad), step(module, x, grad), strict=True):
        assert torch.equal(ours, theirs)
    assert not applied.called


def test_a_weight_that_learns_gets_its_gradient():
    module = _trained(mlp())
    run_mlp(module, torch.randn(ROWS, WIDTH).double()).sum().backward()
    assert torch.equal(module.fc2.bias.grad, torch.full((WIDTH,), ROWS).double())


def test_autocast_is_left_to_the_module(applied):
    module, x = mlp(torch.float32), torch.randn(ROWS, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        found = run_mlp(module, x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, module(x))
    assert not applied.called


def test_compile_sees_the_module(applied):
    module, x = mlp(torch.float32), torch.randn(ROWS, WIDTH)
    compiled = torch.compile(lambda x: run_mlp(module, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    assert not applied.called


def test_no_second_derivative():
    """What the backward pass keeps is no function of the input to autograd: better an error than a wrong number."""
    module, x = mlp(), torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(run_mlp(module, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
