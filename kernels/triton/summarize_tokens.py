# SPDX-License-Identifier: Apache-2.0
"""`summarize_tokens` in Triton: what the launchers of both directions allocate and launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import configs
from .configs import Config, padded
from .diffuse_prompts import pitch, plan_columns
from .launch import Launch, launch, upcast
from .prompt_attention import tiles
from .summarize_tokens_kernels import summarize_kernel, summarize_slopes_kernel, summarize_tokens_kernel

#: Columns of a tile in the backward, by bytes of an element.
COLUMNS = {2: 64, 4: 32}


@dataclass(frozen=True)
class Problem:
    """One call, as the kernels see it: selectors contiguous, in their own dtype."""

    selectors: Tensor
    x: Tensor
    scale: float

    @property
    def rows(self) -> int:
        """Tokens of all samples."""
        return self.x.shape[0] * self.x.shape[1]

    @property
    def summaries(self) -> int:
        """Summaries of all tasks."""
        return self.selectors.shape[0] * self.selectors.shape[1]

    def config(self, kernel: str) -> Config:
        """The configuration of one kernel; that of `plan_columns` is in tokens and columns."""
        _, tokens, width = self.x.shape
        sizes = (self.rows, width) if kernel == "diffuse_prompt" else (self.summaries, tokens)
        return configs.choose(kernel, self.x, width if kernel == "summarize" else 0, *sizes)

    def inputs(self) -> dict[str, object]:
        """What all kernels read."""
        return {
            "selectors": self.selectors, "summaries": self.selectors.shape[1], "rows_total": self.summaries,
            "tokens": self.x.shape[1],
        }  # fmt: skip

    def constants(self, config: Config, columns: int) -> dict[str, object]:
        """What all kernels are compiled for."""
        return {
            "UPCAST": upcast(self.x.dtype), "C": self.x.shape[2], "BLOCK_C": columns, "BLOCK_M": config.rows,
            "BLOCK_N": config.keys,
        }  # fmt: skip


def forward(selectors: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[T,B,S,C]`` and lse ``[T,B,S]``, contiguous."""
    out, lse = launch(_forward, (selectors.contiguous(), x), (scale,))
    return out, lse


def _forward(selectors, x, scale):
    tasks, count, width = selectors.shape
    out = x.new_empty(tasks, len(x), count, width)
    lse = x.new_empty(tasks, len(x), count, dtype=torch.float32)
    return [out, lse], [plan_forward(Problem(selectors, x, scale), out, lse)]


def backward(
    grad_out: Tensor, selectors: Tensor, x: Tensor, out: Tensor, lse: Tensor, scale: float, needs: list[bool]
) -> list[Tensor]:
    """Gradients of those of (selectors, x) that ``needs`` names, in their order."""
    return launch(_backward, (grad_out, selectors.contiguous(), x, out, lse), (scale, tuple(needs)))


def _backward(grad_out, selectors, x, out, lse, scale, needs):
    dsel, dx = (t.new_empty(t.shape) if need else None for t, need in zip((selectors, x), needs, strict=True))
    plan = plan_backward(Problem(selectors, x, scale), out, lse, grad_out, dsel, dx)
    return [t for t in (dsel, dx) if t is not None], plan


def plan_forward(p: Problem, out: Tensor, lse: Tensor) -> Launch:
    """The forward launch."""
    config = p.config("summarize")
    count = tiles(p.summaries, config.rows)
    arguments = p.inputs() | {
        "x": p.x, "out": out, "lse": lse, "sx": p.x.stride(), "so": out.stride(), "sl": lse.stride(), "tiles": count,
        "scale": p.scale,
    }  # fmt: skip
    constants = p.constants(config, padded(p.x.shape[2]))
    return Launch(summarize_kernel, len(p.x) * count, arguments, constants, config)


def plan_backward(
    p: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, dsel: Tensor | None, dx: Tensor | None
) -> list[Launch]:
    """The launches that fill those gradients that are not None.

    Weights and slopes, ``[B N, T S]`` each, live between two of them; weights only where dx is needed.
    """
    batch, tokens, width = p.x.shape
    columns = min(COLUMNS[p.x.element_size()], padded(width))
    slope = p.x.new_empty(p.rows, pitch(p.summaries))
    weight = None if dx is None else torch.empty_like(slope)
    config = p.config("summarize_slopes")
    count, row_tiles = tiles(tokens, config.keys), tiles(p.summaries, config.rows)
    arguments = p.inputs() | {
        "x": p.x, "out": out, "grad_out": grad_out, "lse": lse, "kept_weight": weight, "kept_slope": slope,
        "pitch": slope.shape[1], "sx": p.x.stride(), "so": out.stride(), "sdo": grad_out.stride(), "sl": lse.stride(),
        "tiles": count, "row_tiles": row_tiles, "scale": p.scale,
    }  # fmt: skip
    constants = p.constants(config, columns)
    plan = [Launch(summarize_slopes_kernel, batch * count * row_tiles, arguments, constants, config)]
    if dsel is not None and dsel.numel():
        plan += plan_columns(p, slope, p.x, None, dsel.flatten(0, 1))
    if dx is not None:
        config = p.config("summarize_tokens")
        count, column_tiles = tiles(tokens, config.keys), tiles(width, columns)
        arguments = p.inputs() | {
            "grad_out": grad_out, "kept_weight": weight, "kept_slope": slope, "grad_x": dx, "pitch": slope.shape[1],
            "sdo": grad_out.stride(), "sdx": dx.stride(), "tiles": count, "column_tiles": column_tiles,
        }  # fmt: skip
        constants = p.constants(config, columns)
        plan.append(Launch(summarize_tokens_kernel, batch * count * column_tiles, arguments, constants, config))
    return plan
