# SPDX-License-Identifier: Apache-2.0
"""Attention as others compute it: PyTorch's backends by name, flex_attention, xformers, flash-attn.

And ours with the instance keys left to one of PyTorch's backends.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.case import CannotRun
from fastprompt.ops import dispatch, prompt_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip


def backends(device: str) -> dict[str, str | None]:
    """PyTorch's backends, and why one is not here."""
    return {n: "PyTorch has this backend on CUDA alone" if device == "cpu" and n in ("efficient", "cudnn") else None
            for n in BACKENDS}  # fmt: skip


def on_backend(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with every call of PyTorch's attention on one backend."""

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with sdpa_kernel(BACKENDS[name]):
                return function(*args, **kwargs)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise CannotRun(f"the {name} backend takes no tensors like these here") from error

    return run


def by_library(name: str) -> Callable[..., Any]:
    """`prompt_attention` with the instance keys left to one of PyTorch's kernels, which users reach by "auto" alone."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with patch.object(dispatch, "IMPLS", (*dispatch.IMPLS, name)):
            return prompt_attention(*args, impl=name, **kwargs)

    return run


def flex() -> Callable[..., Tensor]:
    """flex_attention, compiled as it is meant to be."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def no_flex(device: str, train: bool) -> str | None:
    """Why flex_attention cannot run."""
    return "flex_attention has no backward on a CPU" if train and device == "cpu" else None


def missing(package: str, device: str) -> str | None:
    """Why a package of CUDA kernels cannot run."""
    return f"{package} runs on CUDA" if device == "cpu" else None if find_spec(package) else "not installed"


def xformers(*inputs: Tensor) -> Tensor:
    """Its memory-efficient attention over ``[B,H,T,D]``."""
    from xformers.ops import memory_efficient_attention

    try:
        return memory_efficient_attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)
    except NotImplementedError as error:
        raise CannotRun(str(error).splitlines()[0]) from error


def flash_attn_varlen(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, longest: tuple[int, int]
) -> Tensor:
    """flash-attn over packed rows ``[T,H,D]``, causal: the last query of a sequence sees its last key."""
    from flash_attn import flash_attn_varlen_func

    if query.dtype not in (torch.float16, torch.bfloat16):
        raise CannotRun(f"flash-attn takes no {query.dtype} tensors")
    return flash_attn_varlen_func(query, key, value, query_ends, key_ends, *longest, causal=True)
