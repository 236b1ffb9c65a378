# SPDX-License-Identifier: Apache-2.0
"""`summarize_tokens` on DINOv2-S shapes, 20 summaries for each of some tasks, forward or forward and backward.

Providers: `eager` is the formula as two products and a softmax, `compiled` the same compiled, `sdpa` PyTorch's
attention with the tokens as keys and values and all selectors expanded to the batch, and fastprompt. In the backward
the selectors alone get a gradient: tokens are those of a frozen model (``grad_x=1`` asks for theirs too).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Case, Provider, Step, Work, tolerance
from fastprompt.ops import summarize_tokens
from fastprompt.ops.dispatch import IMPLS

MODES = ("forward", "forward+backward")


def build(
    device: str, batch: int = 0, tokens: int = 257, width: int = 384, tasks: int = 4, summaries: int = 20,
    dtype: str = "bfloat16", mode: str = "forward+backward", grad_x: int = 0,
) -> Case:  # fmt: skip
    """The case; ``batch`` 0 is 16 on a CPU and 64 on a GPU."""
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    batch = batch or {"cpu": 16, "cuda": 64}[device]
    kind, train = getattr(torch, dtype), mode == "forward+backward"
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, width, device=device).to(kind).requires_grad_(train and bool(grad_x))
    selectors = torch.randn(tasks, summaries, width, device=device).to(kind).requires_grad_(train)
    inputs, wanted = [selectors, x], [selectors, x] if grad_x else [selectors]
    grad = torch.randn(tasks, batch, summaries, width, device=device).to(kind)

    def step(function: Callable[..., Tensor]) -> Step:
        def run() -> list[Tensor]:
            out = function(*inputs)
            return [out.detach(), *torch.autograd.grad(out, wanted, grad)] if train else [out]

        return run

    rows = tasks * batch * summaries
    # x and the output; again with the gradient of the output, and with that of x. A product of the backward is again.
    passes = (2 if train else 1) + (1 if train and grad_x else 0)
    products = 2 + ((5 if grad_x else 3) if train else 0)
    moved = passes * batch * tokens * width + (3 if train else 1) * rows * width
    work = Work(2 * products * rows * tokens * width, moved * kind.itemsize)

    def provider(make: Callable[[], Step]) -> Provider:
        made = cache(make)  # compiled once, for the check and the clock
        return Provider(made, lambda: made()(), work=work)

    providers = {
        "eager": provider(lambda: step(_eager)),
        "compiled": provider(lambda: step(torch.compile(_eager, dynamic=False))),
        "sdpa": provider(lambda: step(_sdpa)),
        "fastprompt": provider(lambda: step(summarize_tokens)),
    }
    for impl in IMPLS[1:]:
        providers[f"fastprompt/{impl}"] = provider(lambda impl=impl: step(lambda *x: summarize_tokens(*x, impl=impl)))

    def reference() -> list[Tensor]:
        exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
        out = summarize_tokens(*exact, impl="reference")
        return [out.detach(), *torch.autograd.grad(out, exact[: len(wanted)], grad.double())] if train else [out]

    params = {"batch": batch, "tokens": tokens, "width": width, "tasks": tasks, "summaries": summaries,
              "dtype": dtype, "mode": mode, "grad_x": grad_x}  # fmt: skip
    return Case("summarize_tokens", providers, "eager", reference, tolerance(kind), params, device_time=True)


def _eager(selectors: Tensor, x: Tensor) -> Tensor:
    weights = (torch.einsum("tsc,bnc->tbsn", selectors, x) * x.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("tbsn,bnc->tbsc", weights, x)


def _sdpa(selectors: Tensor, x: Tensor) -> Tensor:
    rows = selectors.flatten(0, 1).expand(len(x), 1, -1, -1)
    out = scaled_dot_product_attention(rows, x.unsqueeze(1), x.unsqueeze(1))
    return out.squeeze(1).unflatten(1, selectors.shape[:2]).transpose(0, 1).contiguous()
