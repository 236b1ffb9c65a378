# SPDX-License-Identifier: Apache-2.0
"""`diffuse_prompts` in Triton: what the launchers of both directions allocate and launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import configs
from .configs import INTERPRET, Config, padded
from .diffuse_prompts_kernels import diffuse_kernel, diffuse_prompt_kernel, diffuse_rows_kernel
from .launch import Launch, launch, upcast
from .prompt_attention import PROGRAMS, REDUCE, tiles
from .prompt_attention_backward import reduce_kernel

#: Prompts of a tile in the sums over tokens.
PROMPT_TILE = 64


class HasTokens(Protocol):
    """A call over tokens ``x [B,N,C]``."""

    @property
    def x(self) -> Tensor:
        """The tokens."""

    @property
    def rows(self) -> int:
        """Tokens of all samples."""

    def config(self, kernel: str) -> Config:
        """The configuration of one kernel."""


@dataclass(frozen=True)
class Problem:
    """One call, as the kernels see it: prompts and keys as `_learned` gives them."""

    x: Tensor
    base: Tensor | None
    prompts: Tensor
    keys: Tensor
    log_scale: Tensor
    activation: str
    weight: str

    @property
    def rows(self) -> int:
        """Tokens of all samples."""
        return self.x.shape[0] * self.x.shape[1]

    def config(self, kernel: str) -> Config:
        """The configuration of one kernel; its ``keys`` are columns of a tile."""
        count, width = self.keys.shape
        return configs.choose(kernel, self.x, padded(count), self.rows, width)

    def inputs(self) -> dict[str, object]:
        """What both kernels that own tokens read."""
        return {
            "x": self.x, "base": self.base, "values": self.prompts, "keys": self.keys, "log_scale": self.log_scale,
            "sx": self.x.stride(), "sb": None if self.base is None else self.base.stride(),
            "tokens": self.x.shape[1], "rows_total": self.rows, "count": len(self.keys),
        }  # fmt: skip

    def constants(self, config: Config) -> dict[str, object]:
        """Their compile-time constants. Without prompts, what would be activated does not matter."""
        return {
            "SOFTMAX": self.activation == "softmax" and len(self.keys) > 0, "ROWMAX": self.weight == "rowmax",
            "UPCAST": upcast(self.x.dtype), "C": self.x.shape[2],
            "BLOCK_M": config.rows, "BLOCK_P": padded(len(self.keys)), "BLOCK_C": config.keys,
        }  # fmt: skip


def forward(
    x: Tensor, base: Tensor, prompts: Tensor, keys: Tensor, log_scale: Tensor, activation: str, weight: str
) -> Tensor:
    """Output ``[B,N,C]``, contiguous."""
    return launch(_forward, (x, base, *_learned(x, prompts, keys), log_scale), (activation, weight))[0]


def _forward(x, base, prompts, keys, log_scale, activation, weight):
    out = x.new_empty(x.shape)
    return [out], [plan_forward(Problem(x, base, prompts, keys, log_scale, activation, weight), out)]


def _learned(x: Tensor, prompts: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts and keys contiguous and in the dtype of ``x``."""
    return prompts.to(x.dtype).contiguous(), keys.to(x.dtype).contiguous()


def backward(
    grad_out: Tensor,
    x: Tensor,
    base: Tensor | None,
    prompts: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    activation: str,
    weight: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of those of (x, base, prompts, keys, log_scale) that ``needs`` names, in their order."""
    tensors = (grad_out, x, base, *_learned(x, prompts, keys), log_scale)
    settings = (activation, weight, (prompts.dtype, keys.dtype), tuple(needs))
    grads = launch(_backward, tensors, settings)
    if needs[4]:
        # One number a program.
        grads[-1] = grads[-1].sum().reshape(log_scale.shape)
    return grads


def _backward(grad_out, x, base, prompts, keys, log_scale, activation, weight, dtypes, needs):
    problem = Problem(x, base, prompts, keys, log_scale, activation, weight)
    likes = zip((x, x, prompts, keys), (x.dtype, x.dtype, *dtypes), needs, strict=False)
    grads = [t.new_empty(t.shape, dtype=dtype) if need else None for t, dtype, need in likes]
    partial = allocate_partial(problem) if needs[4] else None
    return [t for t in (*grads, partial) if t is not None], plan_backward(problem, grad_out, grads, partial)


def allocate_partial(p: Problem) -> Tensor:
    """One number a program of the backward: its share of the gradient of ``log_scale``."""
    return p.log_scale.new_empty(tiles(p.rows, p.config("diffuse_rows").rows))


def plan_forward(p: Problem, out: Tensor) -> Launch:
    """The forward launch."""
    config = p.config("diffuse")
    arguments = p.inputs() | {"out": out, "so": out.stride()}
    return Launch(diffuse_kernel, tiles(p.rows, config.rows), arguments, p.constants(config), config)


def plan_backward(p: Problem, grad_out: Tensor, grads: list[Tensor | None], partial: Tensor | None) -> list[Launch]:
    """The launches that fill those gradients that are not None; a part that nobody needs is not launched.

    Activations and the gradients of scores, ``[B N, P]`` each, live between two of them.
    """
    dx, dbase, dprompts, dkeys = grads
    config = p.config("diffuse_rows")
    kept = [None if t is None else p.x.new_empty(p.rows, pitch(len(t))) for t in (dprompts, dkeys)]
    weight = None if dprompts is None else p.log_scale.new_empty(p.rows)
    arguments = p.inputs() | {
        "grad_out": grad_out, "grad_x": dx, "grad_base": dbase, "kept_active": kept[0], "kept_slope": kept[1],
        "kept_weight": weight, "pitch": pitch(len(p.keys)), "partial": partial, "sg": grad_out.stride(),
        "sdx": None if dx is None else dx.stride(), "sdb": None if dbase is None else dbase.stride(),
    }  # fmt: skip
    plan = [Launch(diffuse_rows_kernel, tiles(p.rows, config.rows), arguments, p.constants(config), config)]
    for left, right, weights, grad in ((kept[1], p.x, None, dkeys), (kept[0], grad_out, weight, dprompts)):
        if left is not None and grad is not None and grad.numel():
            plan += plan_columns(p, left, right, weights, grad)
    return plan


def pitch(count: int) -> int:
    """Numbers of a row of what lives between two kernels: loads of 16 bytes need rows that begin at multiples."""
    return -(-count // 16) * 16


def plan_columns(p: HasTokens, left: Tensor, right: Tensor, weight: Tensor | None, grad: Tensor) -> list[Launch]:
    """``grad = left^T (weight * right)`` over all tokens: shares of splits, and their sum."""
    config = p.config("diffuse_prompt")
    count, width = grad.shape
    block = min(config.rows if INTERPRET else PROMPT_TILE, padded(count))
    columns = tiles(width, config.keys)
    owners = columns * tiles(count, block)
    splits = max(1, min(tiles(p.rows, config.rows), PROGRAMS // owners))
    work = grad.new_empty(splits, count, width, dtype=torch.float32)
    arguments = {
        "left": left, "right": right, "weight": weight, "work": work, "sr": right.stride(),
        "tokens": p.x.shape[1], "rows_total": p.rows, "count": count, "pitch": left.shape[1], "tiles": columns,
        "splits": splits,
    }  # fmt: skip
    constants = {
        "FLAT": len(right) == 1 or right.stride(0) == right.shape[1] * right.stride(1),
        "UPCAST": upcast(p.x.dtype), "C": width, "BLOCK_M": config.rows, "BLOCK_P": block, "BLOCK_C": config.keys,
    }  # fmt: skip
    sizes = {"work": work, "grad": grad, "splits": splits, "size": grad.numel()}
    reduce = Config(REDUCE, 0, 4, 1)
    return [
        Launch(diffuse_prompt_kernel, splits * owners, arguments, constants, config),
        Launch(reduce_kernel, tiles(grad.numel(), REDUCE), sizes, {"BLOCK": REDUCE}, reduce),
    ]
