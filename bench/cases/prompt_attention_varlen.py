# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention_varlen` on the shapes of CoOp's text tower: 100 classes, one context, causal, 6 to 10 own tokens.

The shared context (start token and learned tokens) is the prompt, a class's own tokens (name, full stop, EOT) are its
sequence. Providers: `padded` (as published: every class is 77 tokens, context included), `trimmed` (the same cut
after the longest class), `concat` (own tokens padded to the longest class, the context's keys copied to every class),
all on SDPA, the last two on each of its backends too; `flash_attn` over packed rows, the context's keys copied;
`flashinfer` (a cascade: the context's keys and a class's own, merged), `flex/packed` (one sequence, a block mask),
the reference `compiled`, and fastprompt. The context's own rows, which all but the first two compute once for all
classes and elsewhere, are not in their times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.case import Case, Provider, Step, attention_work, composed, tolerance
from bench.cases.prompt_attention import MODES
from bench.peers import backends, flash_attn_varlen, flashinfer_cascade, flex, missing, no_flex, on_backend
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

    def whole(total: int, attend: Callable[..., Tensor] = sdpa, why_not: str | None = None) -> Provider:
        """Every class with its own copy of the context's rows."""
        inputs = [pad(x, prompts, total) for x in packed[:3]]
        with torch.no_grad():
            for x, context in zip(inputs[1:], packed[3:], strict=True):
                x[:, :, :prompts] = context
        received = pad(grad, prompts, total, torch.zeros).detach()
        run = step(lambda q, k, v: attend(q, k, v, is_causal=True), inputs, received)

        def check() -> list[Tensor]:
            out, *grads = (x.detach() for x in run())
            shared = [g[:, :, :prompts].sum(0) for g in grads[1:]]
            return [unpad(out, prompts), *(unpad(g, prompts) for g in grads), *shared]

        return Provider(lambda: run, check, why_not, work)

    def concat(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
        k, v = (torch.cat([p.expand(classes, -1, -1, -1), x], 2) for p, x in ((pk, k), (pv, v)))
        return sdpa(q, k, v, causal_lower_right(longest, prompts + longest))

    def joined(attend: Callable[..., Tensor] = concat, why_not: str | None = None) -> Provider:
        """Own tokens as padded rows."""
        run = step(attend, [*map(pad, packed[:3]), *packed[3:]], pad(grad, blank=torch.zeros).detach())

        def check() -> list[Tensor]:
            results = run()
            return [*map(unpad, results[:4]), *results[4:]]

        return Provider(lambda: run, check, why_not, work)

    # Of every class, the rows of the context's keys and its own, in one tensor that begins with the context's.
    read = [torch.cat([torch.arange(prompts), prompts + torch.arange(*rows)]) for rows in pairwise(ends.tolist())]
    index, key_ends = torch.cat(read).to(device), ends + prompts * torch.arange(classes + 1, device=device).int()

    def flash_attn(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
        k, v = (torch.cat([p.transpose(0, 1), x]).index_select(0, index) for p, x in ((pk, k), (pv, v)))
        return flash_attn_varlen(q, k, v, ends, key_ends, (longest, prompts + longest))

    def flex_packed() -> Callable[..., Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask

        owner = torch.arange(classes, device=device).repeat_interleave(lengths.to(device))

        def visible(b, h, q, k):
            own = k - prompts
            return (k < prompts) | ((own <= q) & (owner[q] == owner[own.clamp(min=0)]))

        mask = create_block_mask(visible, None, None, rows, prompts + rows, device=device)
        compiled = flex()

        def run(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
            k, v = (torch.cat([p, x.transpose(0, 1)], 1).unsqueeze(0) for p, x in ((pk, k), (pv, v)))
            return compiled(q.transpose(0, 1).unsqueeze(0), k, v, block_mask=mask).squeeze(0).transpose(0, 1)

        return run

    def made(make: Callable[[], Callable[..., Tensor]], why_not: str | None = None) -> Provider:
        """Over packed rows, as they are; compiled once, for the check and the clock."""
        run = cache(lambda: step(make(), packed, grad))
        return Provider(run, lambda: run()(), why_not, work)

    def of_reference(*inputs: Tensor) -> Tensor:
        return prompt_attention_varlen(*inputs, ends, max_seqlen=longest, is_causal=True, impl="reference")

    def fastprompt(impl: str, inputs: list[Tensor] = packed, grad: Tensor = grad) -> Step:
        def run(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
            return prompt_attention_varlen(q, k, v, pk, pv, ends, max_seqlen=longest, is_causal=True, impl=impl)

        return step(run, inputs, grad)

    seen = int((prompts * lengths + lengths * (lengths + 1) // 2).sum())
    work = attention_work(heads * rows, heads * (rows + prompts), heads * seen, dim, kind.itemsize, train)
    providers = {
        "padded": whole(FULL),
        "trimmed": whole(prompts + longest),
        "concat": joined(),
    }
    for name, no in backends(device).items():
        providers[f"trimmed/{name}"] = whole(prompts + longest, on_backend(name, sdpa), no)
        providers[f"concat/{name}"] = joined(on_backend(name, concat), no)
    providers["flash_attn"] = made(lambda: flash_attn, missing("flash_attn", device))
    providers["flashinfer"] = made(
        lambda: flashinfer_cascade(ends, heads, dim, kind, causal=True), missing("flashinfer", device, train)
    )
    providers["flex/packed"] = made(flex_packed, no_flex(device, train))
    providers["compiled"] = made(lambda: torch.compile(of_reference, dynamic=False))
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
