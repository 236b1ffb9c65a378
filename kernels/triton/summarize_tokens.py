# SPDX-License-Identifier: Apache-2.0
"""`summarize_tokens` in Triton: what the launchers of both directions allocate and launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import configs
from .configs import Config, padded
from .launch import INTERPRET, Launch, upcast
from .prompt_attention import PROGRAMS, plan_reduce, tiles
from .summarize_tokens_kernels import summarize_kernel, summarize_selectors_kernel, summarize_tokens_kernel


@dataclass(frozen=True)
class Problem:
    """One call, as the kernels see it: selectors contiguous, in their own dtype."""

    selectors: Tensor
    x: Tensor
    scale: float

    def __post_init__(self):
        object.__setattr__(self, "selectors", self.selectors.contiguous())

    @property
    def rows(self) -> int:
        """Summaries of all tasks."""
        return self.selectors.shape[0] * self.selectors.shape[1]

    def config(self, kernel: str) -> Config:
        """The configuration of one kernel."""
        _, tokens, width = self.x.shape
        if INTERPRET:
            return configs.fit(configs.PINNED, self.rows, tokens)
        return configs.choose(kernel, self.x.element_size(), width, self.rows, tokens)

    def inputs(self) -> dict[str, object]:
        """What all kernels read."""
        return {
            "selectors": self.selectors, "x": self.x, "sx": self.x.stride(), "summaries": self.selectors.shape[1],
            "rows_total": self.rows, "tokens": self.x.shape[1], "scale": self.scale,
        }  # fmt: skip

    def constants(self, config: Config) -> dict[str, object]:
        """What all kernels are compiled for."""
        width = self.x.shape[2]
        return {
            "UPCAST": upcast(self.x.dtype), "C": width, "BLOCK_C": padded(width), "BLOCK_M": config.rows,
            "BLOCK_N": config.keys,
        }  # fmt: skip


def forward(selectors: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[T,B,S,C]`` and lse ``[T,B,S]``, contiguous."""
    tasks, count, width = selectors.shape
    out = x.new_empty(tasks, len(x), count, width)
    lse = x.new_empty(tasks, len(x), count, dtype=torch.float32)
    plan_forward(Problem(selectors, x, scale), out, lse).run()
    return out, lse


def backward(
    grad_out: Tensor, selectors: Tensor, x: Tensor, out: Tensor, lse: Tensor, scale: float, needs: list[bool]
) -> list[Tensor]:
    """Gradients of those of (selectors, x) that ``needs`` names, in their order."""
    dsel, dx = (t.new_empty(t.shape) if need else None for t, need in zip((selectors, x), needs, strict=True))
    for step in plan_backward(Problem(selectors, x, scale), out, lse, grad_out, dsel, dx):
        step.run()
    return [t for t in (dsel, dx) if t is not None]


def plan_forward(p: Problem, out: Tensor, lse: Tensor) -> Launch:
    """The forward launch."""
    config = p.config("summarize")
    count = tiles(p.rows, config.rows)
    arguments = p.inputs() | {"out": out, "lse": lse, "so": out.stride(), "sl": lse.stride(), "tiles": count}
    return Launch(summarize_kernel, len(p.x) * count, arguments, p.constants(config), config)


def plan_backward(
    p: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, dsel: Tensor | None, dx: Tensor | None
) -> list[Launch]:
    """The launches that fill those gradients that are not None; weights and slopes never leave a program."""
    batch, tokens, width = p.x.shape
    config = p.config("summarize_selectors")
    count = tiles(p.rows, config.rows)
    splits = max(1, min(batch, PROGRAMS // max(1, count)))
    work = None if dsel is None else dsel.new_empty(splits, p.rows, width, dtype=torch.float32)
    delta = None if dx is None else torch.empty_like(lse)
    arguments = p.inputs() | {
        "out": out, "grad_out": grad_out, "lse": lse, "delta": delta, "work": work,
        "so": out.stride(), "sdo": grad_out.stride(), "sl": lse.stride(), "splits": splits, "size": batch,
    }  # fmt: skip
    plan = [Launch(summarize_selectors_kernel, count * splits, arguments, p.constants(config), config)]
    if work is not None and dsel is not None:
        plan.append(plan_reduce(work, dsel))
    if dx is not None:
        config = p.config("summarize_tokens")
        count = tiles(tokens, config.keys)
        arguments = p.inputs() | {
            "grad_out": grad_out, "lse": lse, "delta": delta, "grad_x": dx, "sdo": grad_out.stride(),
            "sl": lse.stride(), "sdx": dx.stride(), "tiles": count,
        }  # fmt: skip
        plan.append(Launch(summarize_tokens_kernel, batch * count, arguments, p.constants(config), config))
    return plan
