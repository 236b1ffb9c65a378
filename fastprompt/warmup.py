# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels ahead of the first step, and on request measure which tiles suit this GPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastprompt.errors import ImplUnavailableError
from fastprompt.ops import (
    compress_kv,
    decoupled_attention,
    diffuse_prompts,
    key_scores,
    prompt_attention,
    summarize_tokens,
)
from fastprompt.ops.dispatch import choose, tuned_file


@dataclass(frozen=True)
class Shape:
    """The attention of a layer: ``query [B,Hq,T,D]``, ``key [B,Hkv,T,D]``, a shared prompt ``[Hkv,P,D]``."""

    batch: int = 64
    heads: int = 12
    heads_kv: int = 12
    tokens: int = 197
    head_dim: int = 64
    prompts: int = 50
    dtype: torch.dtype = torch.bfloat16
    is_causal: bool = False

    def __post_init__(self):
        for name in ("batch", "heads", "heads_kv", "tokens", "head_dim", "prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 1 or more")

    def tensors(self, device: str, prompts: torch.dtype | None = None) -> list[Tensor]:
        """The five inputs, random, as leaves; prompts in their own dtype if it is given."""
        heads = (self.heads, self.heads_kv, self.heads_kv)
        sizes: list[tuple[int, ...]] = [(self.batch, h, self.tokens, self.head_dim) for h in heads]
        sizes += [(self.heads_kv, self.prompts, self.head_dim)] * 2
        dtypes = [self.dtype] * 3 + [prompts or self.dtype] * 2
        return [torch.randn(s, device=device).to(d).requires_grad_() for s, d in zip(sizes, dtypes, strict=True)]


def warmup(shape: Shape, device: str = "cuda") -> None:
    """Run forward and backward once through the Triton kernels, with gradients of all inputs and no mask.

    Prompts come in the dtype of the query and in float32, as trained ones do; inside the softmax, in one of their own,
    and behind the attention. Then keys are scored and merged, as a compressing cache does it, with and without padding.
    Compiled kernels are kept on disk by Triton, so one call serves
    later processes on the same machine. Masks in attention, packed sequences and prompt banks are variants of their own
    and compile when they are first used.

    Args:
        shape: What to run; a kernel is compiled for a dtype, a head size, and the padded sizes of its tiles.
        device: Where.

    Raises:
        ImplUnavailableError: Triton cannot run there; the message lists every reason.
    """
    _check(shape, device)
    for prompts in dict.fromkeys((shape.dtype, torch.float32)):
        _forward_backward(shape.tensors(device, prompts), shape)()
    _beside_the_softmax(shape, device)
    _compress(shape, device)


def tune(shape: Shape, device: str = "cuda", timer: Callable[[Callable], float] | None = None) -> Path:
    """Measure every candidate configuration of every kernel on this shape and save the fastest to `tuned_file`.

    The kernels are tuned one after the other; all of forward and backward is timed, so that a candidate is judged by
    what users wait for. A candidate that the GPU has not the resources for is passed over.

    Args:
        shape: What to measure; the result serves all shapes of its dtype width and head size.
        device: Where.
        timer: Milliseconds of a callable; default ``triton.testing.do_bench``.

    Returns:
        The file; later processes on the same kind of GPU read it.

    Raises:
        ImplUnavailableError: Triton cannot run there.
    """
    _check(shape, device)
    if timer is None and torch.device(device).type != "cuda":
        raise ImplUnavailableError(f"device: got {device!r}; tiles are tuned for a GPU, expected a CUDA device")
    import triton
    from triton.runtime.errors import OutOfResources

    from fastprompt.kernels import configs

    timer = timer or triton.testing.do_bench
    step = _forward_backward(shape.tensors(device), shape)
    itemsize, dim = shape.dtype.itemsize, shape.head_dim
    found = {}
    for kernel in tqdm(configs.KERNELS, "kernels", leave=False):
        name = configs.slot(kernel, itemsize, dim)
        shipped = configs.choose(kernel, itemsize, dim, 1 << 20, 1 << 20)
        times: dict[configs.Config, float] = {}
        for config in dict.fromkeys((shipped, *configs.CANDIDATES[kernel])):
            with configs.override(name, config):
                try:
                    times[config] = timer(step)
                except OutOfResources as error:
                    print(f"{kernel}: {tuple(config)} does not fit: {error}", file=sys.stderr)
        found[name] = min(times, key=lambda config: times[config])
        print(f"{kernel}: {found[name]} {times[found[name]]:.4f} ms, shipped {times.get(shipped, math.nan):.4f} ms")
    configs.save(tuned_file(), found)
    configs.load(tuned_file())
    return tuned_file()


def _check(shape: Shape, device: str) -> None:
    """Raise with every reason why Triton cannot run there."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected a PyTorch device such as 'cuda'") from error
    there = kind != "cuda" or torch.cuda.is_available()
    # One number serves: what decides is device, dtype and head size.
    probe = torch.zeros(1, 1, 1, shape.head_dim, dtype=shape.dtype, device=device if there else "cpu")
    try:
        choose("prompt_attention", [probe], "triton")
    except ImplUnavailableError as error:
        hint = "" if there else f"device: got {device!r}, but PyTorch sees no CUDA device. "
        raise ImplUnavailableError(hint + str(error)) from error
    if not there:
        raise ImplUnavailableError(f"device: got {device!r}, but PyTorch sees no CUDA device")


def _forward_backward(inputs: list[Tensor], shape: Shape) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        out = prompt_attention(*inputs, is_causal=shape.is_causal, impl="triton")
        return torch.autograd.grad(out, inputs, torch.ones_like(out))  # type: ignore[arg-type]

    return step


def _beside_the_softmax(shape: Shape, device: str) -> None:
    """Prompts in a branch of their own under a learned weight, prompts behind attention, and selectors of tokens."""
    query, key, value, *prompt = shape.tensors(device)
    weight = torch.ones(shape.heads, 1, device=device, requires_grad=True)
    shared = [x.unsqueeze(0) for x in prompt]
    out = decoupled_attention(
        query, [key, shared[0]], [value, shared[1]], [1.0, weight], is_causal=[shape.is_causal, False], impl="triton"
    )
    inputs = [query, key, value, *prompt, weight]
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    width = shape.heads * shape.head_dim
    rows = [torch.randn(shape.batch, shape.tokens, width, device=device).to(shape.dtype) for _ in range(2)]
    learned = [torch.randn(size, device=device) for size in ((shape.prompts, width), (4, width), (width, 4), ())]
    inputs = [x.requires_grad_() for x in (*rows, *learned)]
    out = diffuse_prompts(*inputs, impl="triton")
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    inputs = [torch.randn(1, shape.prompts, width, device=device).to(shape.dtype).requires_grad_(), rows[0]]
    out = summarize_tokens(*inputs, impl="triton")
    torch.autograd.grad(out, inputs, torch.ones_like(out))


@torch.no_grad()
def _compress(shape: Shape, device: str) -> None:
    """Score and merge as the policies do: of all queries or some, of a prompt or a padded batch of them."""
    query, key, value = (x.detach() for x in shape.tensors(device)[:3])
    lse = torch.zeros(query.shape[:3], device=device)
    valid = torch.ones(len(key), shape.tokens, dtype=torch.bool, device=device)
    for query_mask, key_mask in ((None, None), (valid, None), (valid, valid)):
        scores = key_scores(query, key, lse, query_mask=query_mask, key_mask=key_mask, impl="triton")
    compress_kv(key, value, scores, math.ceil(shape.tokens / 2), merge="pivot", impl="triton")
