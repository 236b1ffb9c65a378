# SPDX-License-Identifier: Apache-2.0
"""torch.func and forward-mode differentiation, for which kernels have no rule: the reference runs instead."""

import pytest
import torch
from torch.autograd import forward_ad

import fastprompt
from fastprompt.errors import ImplUnavailableError
from fastprompt.ops import (
    decoupled_attention,
    diffuse_prompts,
    prompt_attention,
    prompt_attention_varlen,
    summarize_tokens,
)

F64 = {"dtype": torch.float64}
X = torch.randn(1, 2, 5, 16, **F64)
PROMPT = torch.randn(2, 3, 16, **F64)
ROWS, BOUNDS = torch.randn(7, 2, 16, **F64), torch.tensor([0, 3, 7], dtype=torch.int32)
TABLE, DOWN, UP = torch.randn(3, 16, **F64), torch.randn(4, 16, **F64), torch.randn(16, 4, **F64)

#: A function of one tensor, which differentiates through the operation, and that tensor.
OPS = {
    "prompt_attention": (lambda x: prompt_attention(x, x, x, PROMPT, PROMPT), X),
    "prompt_attention_varlen": (lambda x: prompt_attention_varlen(x, x, x, PROMPT, PROMPT, BOUNDS), ROWS),
    "decoupled_attention": (lambda x: decoupled_attention(x, [x], [x], [0.5]), X),
    "diffuse_prompts": (
        lambda x: diffuse_prompts(x, x, TABLE, DOWN, UP, torch.tensor(0.1, **F64)), torch.randn(2, 5, 16, **F64),
    ),
    "summarize_tokens": (lambda x: summarize_tokens(TABLE.unsqueeze(0), x), torch.randn(2, 5, 16, **F64)),
}  # fmt: skip


@pytest.mark.parametrize(("op", "x"), OPS.values(), ids=OPS)
def test_derivatives_of_torch_func_are_those_of_autograd(op, x):
    leaf, direction = x.clone().requires_grad_(), torch.randn_like(x)
    out = op(leaf)
    weight = torch.randn_like(out)
    (want,) = torch.autograd.grad((out * weight).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: (op(x) * weight).sum())(x), want)
    along = (want * direction).sum()
    tangent = torch.func.jvp(op, (x,), (direction,))[1]
    torch.testing.assert_close((tangent * weight).sum(), along)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(op(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(dual, tangent)
    many = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(op)(many), torch.stack([op(y) for y in many]))


def test_a_kernel_by_name_is_refused():
    with forward_ad.dual_level():
        choice = fastprompt.explain(prompt_attention, X, X, X, PROMPT, PROMPT)
        assert choice.impl == "reference" and "forward-mode differentiation is running" in str(choice)
        with pytest.raises(ImplUnavailableError, match="forward-mode differentiation is running"):
            prompt_attention(X, X, X, PROMPT, PROMPT, impl="cpp")
