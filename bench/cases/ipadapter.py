# SPDX-License-Identifier: Apache-2.0
"""The cross-attention layers of a UNet with an IP-Adapter over the denoising steps of one generation, with guidance.

Providers: `diffusers` (its processors: keys and values of text and image tokens at every step), `fastprompt` (once a
generation), `fastprompt/every-step` (at every step, as while training), and the `floor`: diffusers' layers without an
adapter. `shape` is ``sd15`` (16 layers, 4 image tokens) or ``sdxl`` (70 layers, 16 image tokens); the other blocks of
the UNet are left out. Operations are those that a provider computes; token rows those it projects to keys and values.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bench.case import CannotRun, Case, Provider, Step, Work, tolerance

# Of a picture of 512 or 1024 pixels a side: (layers, share of the top grid's queries, width), then heads or head size.
SHAPES = {
    "sd15": ([(5, 1, 320), (5, 4, 640), (5, 16, 1280), (1, 64, 1280)], {"heads": 8}, 768, 4, 4096),
    "sdxl": ([(10, 1, 640), (60, 4, 1280)], {"dim_head": 64}, 2048, 16, 4096),
}
SCALE = 0.6


def build(
    device: str, shape: str = "sd15", steps: int = 20, batch: int = 2, layers: int = 0, queries: int = 0,
    text: int = 77, dtype: str = "bfloat16",
) -> Case:  # fmt: skip
    """The case; ``batch`` 2 is one picture with and without guidance; few ``layers`` and ``queries`` are quick."""
    # Here, since a machine may lack this extra, and every case's description is read there too.
    try:
        from diffusers.models.attention_processor import AttnProcessor2_0
    except ImportError as error:
        raise CannotRun("diffusers is not installed") from error
    from fastprompt.diffusers import DecoupledAttnProcessor

    if shape not in SHAPES:
        raise ValueError(f"shape: got {shape!r}, expected one of {', '.join(SHAPES)}")
    blocks, split, width, image, grid = SHAPES[shape]
    queries, kind = queries or grid, getattr(torch, dtype)
    torch.manual_seed(0)
    sites = [(max(queries // part, 1), c) for count, part, c in blocks for _ in range(min(layers, count) or count)]
    base = [_layer(c, width, split, image).to(device, kind) for _, c in sites]
    # Queries differ at every step; two grids in turn cost little memory.
    hidden = [[torch.randn(batch, n, c, device=device).to(kind) for n, c in sites] for _ in range(2)]
    tokens = torch.randn(batch, text, width, device=device).to(kind)
    images = torch.randn(batch, 1, image, width, device=device).to(kind)

    def generation(stack: list[nn.Module], given: Tensor | tuple, clear: str = "", x: list = hidden) -> Step:
        kept = [attn.processor.constants for attn in stack] if clear else []

        def run() -> list[Tensor]:
            for step in range(steps):
                if clear == "step" or not step:
                    for constants in kept:
                        constants.clear()
                with torch.no_grad():
                    out = [attn(h, given) for attn, h in zip(stack, x[step % 2], strict=True)]
            return out

        return run

    def ours(clear: str) -> Step:
        stack = copy.deepcopy(base)
        for attn in stack:
            attn.processor = DecoupledAttnProcessor.sharing(attn.processor)
        return generation(stack, (tokens, [images]), clear)

    def floor() -> Step:
        stack = copy.deepcopy(base)
        for attn in stack:
            del attn.processor
            attn.processor = AttnProcessor2_0()
        return generation(stack, tokens)

    def reference() -> list[Tensor]:
        exact = [attn.double() for attn in copy.deepcopy(base)]
        last = [[h.double() for h in hidden[(steps - 1) % 2]]]
        x = [last[0]] * 2
        return generation(exact, (tokens.double(), [images.double()]), x=x)()

    def counted(projected: int, more: int) -> tuple[Work, int]:
        """Of a generation whose tokens are projected ``projected`` times."""
        keys, values = text + more, sum(c for _, c in sites)
        rows = steps * batch * sum(n * c * c for n, c in sites)
        pairs = steps * batch * sum(n * keys * c for n, c in sites)
        tokens = projected * batch * keys
        macs = 2 * rows + 2 * pairs + 2 * tokens * width * values
        moved = steps * sum(4 * batch * n * c + 2 * c * c + 2 * batch * keys * c for n, c in sites)
        moved += projected * (4 if more else 2) * width * values
        return Work(2 * macs, moved * kind.itemsize), tokens

    def provider(make, projected: int, more: int = image, checked: bool = True) -> Provider:
        work, rows = counted(projected, more)
        return Provider(make, (lambda: make()()) if checked else None, work=work, tokens=rows)

    providers = {
        "floor": provider(floor, steps, 0, checked=False),
        "diffusers": provider(lambda: generation(base, (tokens, [images])), steps),
        "fastprompt/every-step": provider(lambda: ours("step"), steps),
        "fastprompt": provider(lambda: ours("generation"), 1),
    }
    params = {"shape": shape, "steps": steps, "batch": batch, "layers": len(sites), "queries": queries, "text": text,
              "image": image, "dtype": dtype}  # fmt: skip
    return Case("ipadapter", providers, "diffusers", reference, tolerance(kind), params)


def _layer(channels: int, width: int, split: dict[str, int], image: int) -> nn.Module:
    """A cross-attention layer as in the model, with diffusers' processor."""
    from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

    heads = split["heads"] if "heads" in split else channels // split["dim_head"]
    processor = IPAdapterAttnProcessor2_0(channels, width, (image,), SCALE)
    return Attention(channels, cross_attention_dim=width, heads=heads, dim_head=channels // heads, processor=processor)
