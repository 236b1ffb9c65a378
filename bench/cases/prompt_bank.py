# SPDX-License-Identifier: Apache-2.0
"""A prompt bank: `prompt_attention` on ViT-B/16 shapes where every sample reads the prompt of its own tenant of 256.

Providers: `gather` copies each sample's prompt out of the bank in front of its keys, `loop` calls attention once a
tenant, both on SDPA; fastprompt reads the bank in place. `floor` has no prompts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.case import Case, Provider, Step, attention_work, composed, tolerance
from bench.cases.prompt_attention import MODES
from fastprompt.ops import prompt_attention
from fastprompt.ops.dispatch import IMPLS


def build(
    device: str, tenants: int = 256, batch: int = 0, heads: int = 12, tokens: int = 197, dim: int = 64,
    prompts: int = 50, dtype: str = "bfloat16", mode: str = "forward",
) -> Case:  # fmt: skip
    """The case; ``batch`` 0 is 16 on a CPU and 64 on a GPU; samples draw their tenants."""
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    batch = batch or {"cpu": 16, "cuda": 64}[device]
    kind, train = getattr(torch, dtype), mode == "forward+backward"
    torch.manual_seed(0)
    index = torch.randint(tenants, (batch,))
    present = index.unique().tolist()
    index = index.to(device)
    samples = {tenant: (index == tenant).nonzero().squeeze(1) for tenant in present}

    def tensor(*shape: int) -> Tensor:
        """``[b,H,t,D]`` with the strides that a projection leaves."""
        return torch.randn(*shape, heads, dim, device=device).to(kind).transpose(1, 2).requires_grad_(train)

    inputs = [*(tensor(batch, tokens) for _ in range(3)), *(tensor(tenants, prompts) for _ in range(2))]
    grad = tensor(batch, tokens).detach()

    def step(function: Callable[..., Tensor], given: list[Tensor] = inputs, grad: Tensor = grad) -> Step:
        def run() -> list[Tensor]:
            out = function(*given)
            return [out.detach(), *torch.autograd.grad(out, given, grad)] if train else [out]

        return run

    def gather(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
        return sdpa(q, torch.cat([pk[index], k], 2), torch.cat([pv[index], v], 2))

    def loop(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for tenant, rows in samples.items():
            pairs = ((p[tenant].expand(len(rows), -1, -1, -1), x[rows]) for p, x in ((pk, k), (pv, v)))
            out[rows] = sdpa(q[rows], *(torch.cat(pair, 2) for pair in pairs))
        return out

    def work(shared: int) -> tuple[int, int, int]:
        """Rows of queries, of keys, and pairs, with ``shared`` keys of a prompt."""
        queries = batch * heads * tokens
        return queries, heads * (batch * tokens + len(present) * shared), queries * (tokens + shared)

    counted = attention_work(*work(prompts), dim, kind.itemsize, train)

    def provider(function: Callable[..., Tensor]) -> Provider:
        return Provider(lambda: step(function), step(function), work=counted)

    def fastprompt(impl: str) -> Callable[..., Tensor]:
        return lambda *x: prompt_attention(*x, prompt_index=index, impl=impl)

    floor = attention_work(*work(0), dim, kind.itemsize, train)
    providers = {
        "floor": Provider(lambda: step(sdpa, inputs[:3]), work=floor),
        "gather": provider(gather),
        "loop": provider(loop),
    }
    for impl in IMPLS:
        providers["fastprompt" if impl == "auto" else f"fastprompt/{impl}"] = provider(fastprompt(impl))
    providers |= composed(device, providers)

    def reference() -> list[Tensor]:
        exact = [x.detach().double().requires_grad_(train) for x in inputs]
        return step(fastprompt("reference"), exact, grad.double())()

    params = {"tenants": tenants, "batch": batch, "heads": heads, "tokens": tokens, "dim": dim, "prompts": prompts,
              "dtype": dtype, "mode": mode}  # fmt: skip
    return Case("prompt_bank", providers, "gather", reference, tolerance(kind), params, device_time=True)
