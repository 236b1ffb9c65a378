# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention` on ViT-B/16 shapes, forward or forward and backward, against what else computes the same.

Providers: `concat` copies the shared prompt to every sample while joining keys, `expand` holds a copy for every
sample before that, as code does that inserts prompts as tokens; each on the backend PyTorch chooses and on every
backend by name. `flex` is compiled flex_attention over the keys of `concat`, `flex/packed` over one long sequence in
which a block mask lets every sample see the prompt and itself, `xformers` its memory-efficient attention,
`flashinfer` a cascade of its kernels, `compiled` the reference under torch.compile. `same_keys` finds its keys
joined, so it is what a kernel can hope for, by PyTorch's choice or by cuDNN (`same_keys/cudnn`); `floor` has no
prompts.
`fastprompt/library-NAME` leaves the instance keys to one of PyTorch's backends and merges the prompt into its results.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.case import Case, Provider, Step, Work, attention_work, composed, tolerance
from bench.peers import backends, by_library, flashinfer_cascade, flex, missing, no_flex, on_backend, xformers
from fastprompt.ops import prompt_attention
from fastprompt.ops.cuda.libraries import LIBRARIES
from fastprompt.ops.dispatch import IMPLS

MODES = ("forward", "forward+backward")


def build(
    device: str, batch: int = 0, heads: int = 12, tokens: int = 197, dim: int = 64, prompts: int = 50,
    dtype: str = "bfloat16", mode: str = "forward+backward",
) -> Case:  # fmt: skip
    """The case; ``batch`` 0 is 16 on a CPU and 64 on a GPU."""
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    batch = batch or {"cpu": 16, "cuda": 64}[device]
    kind, train = getattr(torch, dtype), mode == "forward+backward"
    torch.manual_seed(0)

    def tensor(b: int, t: int) -> Tensor:
        """``[b,H,t,D]`` with the strides that a projection leaves."""
        return torch.randn(b, t, heads, dim, device=device).to(kind).transpose(1, 2).requires_grad_(train)

    inputs = [tensor(batch, tokens) for _ in range(3)] + [tensor(1, prompts) for _ in range(2)]
    joined = [inputs[0], *(x.detach().requires_grad_(train) for x in _concat(*inputs)[1:])]
    grad = tensor(batch, tokens).detach()

    def step(function: Callable[..., Tensor], given: list[Tensor] = inputs) -> Step:
        def run() -> list[Tensor]:
            out = function(*given)
            return [out.detach(), *torch.autograd.grad(out, given, grad)] if train else [out]

        return run

    def work(own: int, shared: int) -> Work:
        """Of ``own`` keys a sample and ``shared`` ones."""
        queries, keys = batch * heads * tokens, heads * (batch * own + shared)
        return attention_work(queries, keys, queries * (own + shared), dim, kind.itemsize, train)

    def provider(function: Callable[..., Tensor] | None, why_not: str | None = None, make=None) -> Provider:
        made = cache(make or (lambda: step(function)))  # compiled once, for the check and the clock
        return Provider(made, lambda: made()(), why_not, work(tokens, prompts))

    def same_keys(attend: Callable[..., Tensor] = sdpa) -> list[Tensor]:
        """Its results, the gradient of joined keys taken apart."""
        out, *grads = step(attend, joined)()
        if not train:
            return [out]
        instance, shared = [g[:, :, prompts:] for g in grads[1:]], [g[:, :, :prompts].sum(0, True) for g in grads[1:]]
        return [out, grads[0], *instance, *shared]

    providers = {
        "floor": Provider(lambda: step(sdpa, inputs[:3]), work=work(tokens, 0)),
        "same_keys": Provider(lambda: step(sdpa, joined), same_keys, work=work(tokens + prompts, 0)),
    }
    cudnn = on_backend("cudnn", sdpa)
    providers["same_keys/cudnn"] = Provider(
        lambda: step(cudnn, joined), lambda: same_keys(cudnn), backends(device)["cudnn"], work(tokens + prompts, 0)
    )
    for form, join in (("concat", _concat), ("expand", _expand)):
        providers[form] = provider(lambda *x, join=join: sdpa(*join(*x)))
        for name, absent in backends(device).items():
            providers[f"{form}/{name}"] = provider(on_backend(name, lambda *x, join=join: sdpa(*join(*x))), absent)
    no = no_flex(device, train)
    providers["flex"] = provider(None, no, lambda: step(_flex()))
    providers["flex/packed"] = provider(None, no, lambda: step(_flex_packed(batch, tokens, prompts, device)))
    providers["xformers"] = provider(lambda *x: xformers(*_concat(*x)), missing("xformers", device))
    providers["flashinfer"] = provider(
        None, missing("flashinfer", device, train), lambda: step(_cascade(batch, heads, tokens, dim, kind, device))
    )
    providers["compiled"] = provider(None, None, lambda: step(torch.compile(_reference, dynamic=False)))
    providers["fastprompt"] = provider(prompt_attention)
    providers |= composed(device, providers)
    for impl in IMPLS[1:]:
        providers[f"fastprompt/{impl}"] = provider(lambda *x, impl=impl: prompt_attention(*x, impl=impl))
    elsewhere = "composed of CUDA kernels" if device == "cpu" else None
    for name in LIBRARIES:
        providers[f"fastprompt/library-{name}"] = provider(by_library(name), elsewhere)

    def reference() -> list[Tensor]:
        exact = [x.detach().double().requires_grad_(train) for x in inputs]
        out = prompt_attention(*exact, impl="reference")
        return [out.detach(), *torch.autograd.grad(out, exact, grad.double())] if train else [out]

    params = {"batch": batch, "heads": heads, "tokens": tokens, "dim": dim, "prompts": prompts, "dtype": dtype,
              "mode": mode}  # fmt: skip
    return Case("prompt_attention", providers, "concat", reference, tolerance(kind), params, device_time=True)


def _concat(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values with the prompt in front of those of every sample."""
    k, v = (torch.cat([p.expand(len(x), -1, -1, -1), x], 2) for p, x in ((pk, k), (pv, v)))
    return q, k, v


def _expand(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _concat(q, k, v, *(p.repeat(len(q), 1, 1, 1) for p in (pk, pv)))


def _reference(*inputs: Tensor) -> Tensor:
    return prompt_attention(*inputs, impl="reference")


def _flex() -> Callable[..., Tensor]:
    compiled = flex()
    return lambda *inputs: compiled(*_concat(*inputs))


def _cascade(batch: int, heads: int, tokens: int, dim: int, kind: torch.dtype, device: str) -> Callable[..., Tensor]:
    ends = tokens * torch.arange(batch + 1, dtype=torch.int32, device=device)
    attend = flashinfer_cascade(ends, heads, dim, kind, causal=False)

    def run(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
        out = attend(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), pk[0], pv[0])
        return out.unflatten(0, (batch, tokens)).transpose(1, 2)

    return run


def _flex_packed(batch: int, tokens: int, prompts: int, device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b, h, q, k):
        return (k < prompts) | (q // tokens == (k - prompts) // tokens)

    mask = create_block_mask(visible, None, None, batch * tokens, prompts + batch * tokens, device=device)
    compiled = flex()

    def run(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2) for x in (q, k, v))
        out = compiled(q, torch.cat([pk, k], 2), torch.cat([pv, v], 2), block_mask=mask)
        return out.transpose(1, 2).unflatten(1, (batch, tokens)).squeeze(0).transpose(1, 2)

    return run
