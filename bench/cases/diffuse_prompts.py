# SPDX-License-Identifier: Apache-2.0
"""`diffuse_prompts` on ViT-B/16 shapes, forward or forward and backward, against the code as released.

Providers: `eager` is the released module, `compiled` the same compiled, and fastprompt. Two compute something else, for
scale: `attention` has no prompts, `attention/concat` is what the same number of prompts costs as keys of
the attention itself, copied to every sample.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.case import Case, Provider, Step, Work, composed, tolerance
from fastprompt.ops import diffuse_prompts
from fastprompt.ops.dispatch import IMPLS

MODES = ("forward", "forward+backward")


def build(
    device: str, batch: int = 0, tokens: int = 197, width: int = 768, prompts: int = 100, rank: int = 4,
    head_dim: int = 64, dtype: str = "bfloat16", mode: str = "forward+backward",
) -> Case:  # fmt: skip
    """The case; ``batch`` 0 is 16 on a CPU and 64 on a GPU."""
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    batch = batch or {"cpu": 16, "cuda": 64}[device]
    kind, train = getattr(torch, dtype), mode == "forward+backward"
    torch.manual_seed(0)

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=device)).to(kind).requires_grad_(train)

    x, base = tensor(batch, tokens, width), tensor(batch, tokens, width)
    # As published, but for a key map that has learned a little: zeros would leave gradients of zero to compare.
    learned = [tensor(prompts, width, scale=0.02), tensor(rank, width), tensor(width, rank, scale=0.002)]
    inputs = [x, base, *learned, tensor(1, scale=0.1).detach().squeeze().requires_grad_(train)]
    # Partly along base, so that the gradient of the scale does not cancel.
    grad = (base.detach() + torch.randn_like(base)).detach()

    def step(function: Callable[..., Tensor], given: list[Tensor] = inputs, grad: Tensor = grad) -> Step:
        def run() -> list[Tensor]:
            out = function(*given)
            return [out.detach(), *torch.autograd.grad(out, given, grad)] if train else [out]

        return run

    def heads(*shape: int) -> Tensor:
        return tensor(*shape).detach().unflatten(-1, (-1, head_dim)).transpose(1, 2).requires_grad_(train)

    attended = [heads(batch, tokens, width) for _ in range(3)]
    joined = [*attended, heads(1, prompts, width), heads(1, prompts, width)]
    grad_heads = heads(batch, tokens, width).detach()

    rows, size = batch * tokens, batch * tokens * width
    # x, base and out; then x, base and the gradients of out, x and base. Five products of the backward, one again.
    work = Work((14 if train else 4) * rows * prompts * width, (8 if train else 3) * size * kind.itemsize)

    def provider(make: Callable[[], Step]) -> Provider:
        made = cache(make)  # compiled once, for the check and the clock
        return Provider(made, lambda: made()(), work=work)

    providers = {
        "eager": provider(lambda: step(_released)),
        "compiled": provider(lambda: step(torch.compile(_released, dynamic=False))),
        "fastprompt": provider(lambda: step(diffuse_prompts)),
    }
    for impl in IMPLS[1:]:
        providers[f"fastprompt/{impl}"] = provider(lambda impl=impl: step(lambda *x: diffuse_prompts(*x, impl=impl)))
    providers |= composed(device, providers)
    providers["attention"] = Provider(lambda: step(sdpa, attended, grad_heads))
    providers["attention/concat"] = Provider(lambda: step(_concat, joined, grad_heads))

    def reference() -> list[Tensor]:
        exact = [t.detach().double().requires_grad_(train) for t in inputs]
        out = diffuse_prompts(*exact, impl="reference")
        return [out.detach(), *torch.autograd.grad(out, exact, grad.double())] if train else [out]

    params = {"batch": batch, "tokens": tokens, "width": width, "prompts": prompts, "rank": rank, "dtype": dtype,
              "mode": mode}  # fmt: skip
    return Case("diffuse_prompts", providers, "eager", reference, tolerance(kind), params, device_time=True)


def _released(x: Tensor, base: Tensor, prompts: Tensor, down: Tensor, up: Tensor, log_scale: Tensor) -> Tensor:
    keys = prompts + linear(linear(prompts, down), up)
    active = torch.relu(linear(x, keys))
    weight = active.detach().max(-1, keepdim=True).values
    return log_scale.exp() * (base + weight * (active @ prompts))


def _concat(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    k, v = (torch.cat([p.expand(len(x), -1, -1, -1), x], 2) for p, x in ((pk, k), (pv, v)))
    return sdpa(q, k, v)
