# SPDX-License-Identifier: Apache-2.0
"""A kernel launch as data: what a launcher runs is what the compile gate compiles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .configs import INTERPRET, Config


@dataclass(frozen=True)
class Launch:
    """One kernel with its arguments, compile-time constants and configuration."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: Config

    def run(self) -> None:
        """Launch on the current stream of the arguments' device; nothing to do for an empty grid."""
        if not self.programs:
            return
        options = {} if INTERPRET else self.options()
        with _on(next(x for x in self.arguments.values() if isinstance(x, Tensor))):
            self.kernel[(self.programs,)](**self.arguments, **self.constants, **options)

    def options(self) -> dict[str, Any]:
        """Compiler options; fusing a * b + c is named, since Triton's default for it is about to change."""
        return {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": True}


def _on(x: Tensor) -> AbstractContextManager:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def upcast(dtype: torch.dtype) -> bool:
    """The interpreter computes with the bit patterns of bfloat16; there it must be float32 from the load on."""
    return bool(INTERPRET) and dtype == torch.bfloat16


def split(dtype: torch.dtype) -> bool:
    """Whether tiles that need no mask have a loop of their own.

    Beside products of float32 a mask is nothing, and twice the code takes twice as long to compile.
    """
    return bool(INTERPRET) or dtype.itemsize == 2
