# SPDX-License-Identifier: Apache-2.0
"""Attention as others compute it: PyTorch's backends by name, flex_attention, xformers, flash-attn, FlashInfer.

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
            # PyTorch's two words for it, and those of cuDNN about a shape.
            if not any(text in str(error) for text in ("No available kernel", "No viable backend", "cuDNN Frontend")):
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


def missing(package: str, device: str, train: bool = False) -> str | None:
    """Why a package of CUDA kernels cannot run, or cannot ``train``, as one for inference."""
    if train:
        return f"{package} has no backward"
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

    _in_half_precision("flash-attn", query.dtype)
    return flash_attn_varlen_func(query, key, value, query_ends, key_ends, *longest, causal=True)


def flashinfer_cascade(ends: Tensor, heads: int, dim: int, dtype: torch.dtype, causal: bool) -> Callable[..., Tensor]:
    """FlashInfer over packed rows ``[T,H,D]`` of sequences that share keys and values ``[H,P,D]``.

    Two of its kernels, all rows over the shared keys and every sequence over its own, and its merge of both.
    """
    import flashinfer

    _in_half_precision("flashinfer", dtype)
    own = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(ends.device), "NHD")
    own.plan(ends, ends, heads, heads, dim, causal=causal, q_data_type=dtype)

    def attend(query: Tensor, key: Tensor, value: Tensor, shared_key: Tensor, shared_value: Tensor) -> Tensor:
        shared = flashinfer.single_prefill_with_kv_cache(
            query, shared_key.contiguous(), shared_value.contiguous(), causal=False, kv_layout="HND", return_lse=True
        )
        return flashinfer.merge_state(*shared, *own.run(query, key, value, return_lse=True))[0]

    return attend


def flashinfer_decode(query: Tensor, key: Tensor, value: Tensor, tensor_cores: bool) -> Tensor:
    """FlashInfer of one token of one sequence, ``[1,Hq,1,D]`` over ``[1,Hkv,T,D]``."""
    import flashinfer

    _in_half_precision("flashinfer", query.dtype)
    if len(query) != 1:
        raise CannotRun(f"of a single sequence, not of {len(query)}")
    out = flashinfer.single_decode_with_kv_cache(
        query[0, :, 0], key[0], value[0], kv_layout="HND", use_tensor_cores=tensor_cores
    )
    return out.view(query.shape)


def _workspace(device: torch.device) -> Tensor:
    return torch.empty(128 << 20, dtype=torch.uint8, device=device)  # what its documentation takes


def _in_half_precision(package: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise CannotRun(f"{package} takes no {dtype} tensors")
