# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention_varlen` on the shapes of CoOp's text tower: 100 classes, one context, causal, 6 to 10 own tokens.

The shared context (start token and learned tokens) is the prompt, a class's own tokens (name, full stop, EOT) are its
sequence. Providers: `padded` (as published: every class is 77 tokens, context included), `trimmed` (the same cut after
the longest class), `concat` (own tokens padded to the longest class, the context's keys copied to every class), all on
SDPA, and fastprompt. The context's own rows, which `concat` and fastprompt compute once for all classes and elsewhere,
are not in their times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.case import Case, Provider, Step, attention_work, composed, tolerance
from bench.cases.prompt_attention import MODES
from fastprompt.ops import prompt_attention_varlen
from fastprompt.ops.dispatch import IMPLS

FULL = 77  # CLIP's context length


def build(
    device: str, classes: int = 100, prompts: int = 17, heads: int = 8, dim: int = 64, dtype: str = "bfloat16",
    mode: str = "forward+backward",
) -> Case:  # fmt: skip
    """The case."""
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    kind, train = getattr(torch, dtype), mode == "forward+backward"
    torch.manual_seed(0)
    lengths = torch.randint(6, 11, (classes,))
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    rows, longest = int(lengths.sum()), int(lengths.max())

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, dim, device=device).to(kind)

    packed = [*(tensor(rows, heads) for _ in range(3)), *(tensor(heads, prompts) for _ in range(2))]  # q, k, v, pk, pv
    packed = [x.requires_grad_(train) for x in packed]
    grad = tensor(rows, heads)
    own = torch.arange(longest, device=device) < lengths.to(device).unsqueeze(1)  # [S, longest]

    def pad(x: Tensor, start: int = 0, total: int = longest, blank: Callable[..., Tensor] = torch.randn) -> Tensor:
        """Packed rows ``[T,H,D]`` as a leaf ``[S,H,total,D]``: from row ``start`` on, ``blank`` elsewhere."""
        out = blank(classes, total, heads, dim, device=device).to(kind)
        out[:, start : start + longest][own] = x.detach()
        return out.transpose(1, 2).requires_grad_(train)

    def unpad(x: Tensor, start: int = 0) -> Tensor:
        return x.transpose(1, 2)[:, start : start + longest][own]

    def step(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Step:
        def run() -> list[Tensor]:
            out = function(*inputs)
            return [out.detach(), *torch.autograd.grad(out, inputs, grad)] if train else [out]

        return run

    def whole(total: int) -> Provider:
        """Every class with its own copy of the context's rows."""
        inputs = [pad(x, prompts, total) for x in packed[:3]]
        with torch.no_grad():
            for x, context in zip(inputs[1:], packed[3:], strict=True):
                x[:, :, :prompts] = context
        received = pad(grad, prompts, total, torch.zeros).detach()
        run = step(lambda q, k, v: sdpa(q, k, v, is_causal=True), inputs, received)

        def check() -> list[Tensor]:
            out, *grads = (x.detach() for x in run())
            shared = [g[:, :, :prompts].sum(0) for g in grads[1:]]
            return [unpad(out, prompts), *(unpad(g, prompts) for g in grads), *shared]

        return Provider(lambda: run, check, work=work)

    def concat(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
        k, v = (torch.cat([p.expand(classes, -1, -1, -1), x], 2) for p, x in ((pk, k), (pv, v)))
        return sdpa(q, k, v, causal_lower_right(longest, prompts + longest))

    joined = step(concat, [*map(pad, packed[:3]), *packed[3:]], pad(grad, blank=torch.zeros).detach())

    def unpadded() -> list[Tensor]:
        results = joined()
        return [*map(unpad, results[:4]), *results[4:]]

    def fastprompt(impl: str, inputs: list[Tensor] = packed, grad: Tensor = grad) -> Step:
        def run(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
            return prompt_attention_varlen(q, k, v, pk, pv, ends, max_seqlen=longest, is_causal=True, impl=impl)

        return step(run, inputs, grad)

    seen = int((prompts * lengths + lengths * (lengths + 1) // 2).sum())
    work = attention_work(heads * rows, heads * (rows + prompts), heads * seen, dim, kind.itemsize, train)
    providers = {
        "padded": whole(FULL),
        "trimmed": whole(prompts + longest),
        "concat": Provider(lambda: joined, unpadded, work=work),
    }
    for impl in IMPLS:
        name = "fastprompt" if impl == "auto" else f"fastprompt/{impl}"
        providers[name] = Provider(lambda i=impl: fastprompt(i), lambda i=impl: fastprompt(i)(), work=work)

    def reference() -> list[Tensor]:
        exact = [x.detach().double().requires_grad_(train) for x in packed]
        return fastprompt("reference", exact, grad.double())()

    providers |= composed(device, providers)
    params = {"classes": classes, "rows": rows, "prompts": prompts, "heads": heads, "dim": dim, "dtype": dtype,
              "mode": mode}  # fmt: skip
    return Case("prompt_attention_varlen", providers, "padded", reference, tolerance(kind), params, device_time=True)
