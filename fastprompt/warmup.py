# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels ahead of the first step, and on request measure which tiles suit this GPU."""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
    prompt_attention_varlen,
    summarize_tokens,
)
from fastprompt.ops.dispatch import MOST_COLUMNS, MOST_PROMPTS, choose, tuned_file


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
    """Run every operation that has a Triton kernel once, forward and backward, with all gradients and no mask.

    Prompts come in the dtype of the query and in float32, as trained ones do; inside the softmax, over packed
    sequences, in a softmax of their own, and behind the attention. Then keys are scored and merged, as a compressing
    cache does it, with and without padding. Compiled kernels are kept on disk by Triton, so one call serves later
    processes on the same machine. Masks in attention and prompt banks are variants of their own and compile when they
    are first used.

    Args:
        shape: What to run; a kernel is compiled for a dtype, a head size, and the padded sizes of its tiles.
        device: Where.

    Raises:
        ImplUnavailableError: Triton cannot run there; the message lists every reason.
    """
    _check(shape, device)
    steps = tqdm(_steps(shape, device).items(), "compile", leave=False)
    for name, ready in steps:
        steps.set_postfix_str(name)
        ready()()


def tune(shape: Shape, device: str = "cuda", timer: Callable[[Callable], float] | None = None) -> Path:
    """Measure every candidate configuration of every kernel on this shape and save the fastest to `tuned_file`.

    The kernels are tuned one after the other; all of an operation is timed, forward and backward, so that a candidate
    is judged by what users wait for. One that does not compile, or asks for more than the GPU has, is passed over.

    Args:
        shape: What to measure; the result serves all shapes of its dtype width and class of head sizes.
        device: Where.
        timer: Milliseconds of a callable; default ``triton.testing.do_bench``.

    Returns:
        The file; later processes on the same kind of GPU read it. ``python -m bench.choose_tiles --ship FILE`` (of a
        clone) puts what it holds into the tables that everybody gets.

    Raises:
        ImplUnavailableError: Triton cannot run there.
    """
    _check(shape, device)
    if timer is None and torch.device(device).type != "cuda":
        raise ImplUnavailableError(f"device: got {device!r}; tiles are tuned for a GPU, expected a CUDA device")
    import triton
    from triton.errors import TritonError

    from fastprompt.kernels import configs
    from fastprompt.kernels.candidates import candidates

    timer = timer or triton.testing.do_bench
    target = configs.architecture(torch.zeros((), device=device).device)
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "the interpreter"
    origin = f"measured on {gpu}, {datetime.date.today()}, {_describe(shape)}"
    found: dict[str, configs.Entry] = {}
    for ready in _steps(shape, device).values():
        step = ready()
        with configs.asked() as asked:
            step()
            names = [name for name in asked if name not in found]
        for name in tqdm(names, "kernels", leave=False):
            before = configs.table(target)[name].config
            times: dict[configs.Config, float] = {}
            for config in dict.fromkeys((before, *candidates(*configs.parse(name)))):
                with configs.override(target, name, config):
                    try:
                        times[config] = timer(step)
                    except TritonError as error:
                        print(f"{name}: {tuple(config)} is passed over: {error}", file=sys.stderr)
            best = min(times, key=lambda config: times[config])
            found[name] = configs.Entry(best, origin)
            print(f"{name}: {best} {times[best]:.4f} ms, before {times.get(before, math.nan):.4f} ms")
    configs.save(tuned_file(), target, found)
    configs.load(tuned_file())
    return tuned_file()


def _describe(shape: Shape) -> str:
    """The shape in a few words, for where a configuration comes from."""
    names = ("batch", "heads", "heads_kv", "tokens", "head_dim", "prompts")
    return ", ".join(f"{name} {getattr(shape, name)}" for name in names) + ", causal" * shape.is_causal


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


def _steps(shape: Shape, device: str) -> dict[str, Callable[[], Callable[[], object]]]:
    """Every operation that can run this shape, and what makes it ready to run: inputs are there only while it does."""
    steps: dict[str, Callable[[], Callable[[], object]]] = {}
    for prompts in dict.fromkeys((shape.dtype, torch.float32)):
        kind = str(prompts).removeprefix("torch.")
        steps[f"prompt_attention, {kind} prompts"] = partial(_prompt_attention, shape, device, prompts)
    steps["prompt_attention_varlen"] = partial(_varlen, shape, device)
    steps["decoupled_attention"] = partial(_decoupled_attention, shape, device)
    width = shape.heads * shape.head_dim
    if shape.prompts <= MOST_PROMPTS:
        steps["diffuse_prompts"] = partial(_diffuse_prompts, shape, device, width)
    if width <= MOST_COLUMNS:
        steps["summarize_tokens"] = partial(_summarize_tokens, shape, device, width)
    steps["key_scores, compress_kv"] = partial(_compress, shape, device)
    return steps


def _forward_backward(op: Callable[[], Any], inputs: list[Tensor]) -> Callable[[], object]:
    def step() -> object:
        out = op()
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return step


def _prompt_attention(shape: Shape, device: str, prompts: torch.dtype) -> Callable[[], object]:
    inputs = shape.tensors(device, prompts)
    return _forward_backward(partial(prompt_attention, *inputs, is_causal=shape.is_causal, impl="triton"), inputs)


def _varlen(shape: Shape, device: str) -> Callable[[], object]:
    """The samples as packed sequences under float32 prompts, as CoOp's classes are."""
    query, key, value, *prompt = shape.tensors(device, torch.float32)
    packed = [x.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for x in (query, key, value)]
    ends = torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * shape.tokens
    tensors = [*packed, *prompt, ends]
    op = partial(prompt_attention_varlen, *tensors, max_seqlen=shape.tokens, is_causal=shape.is_causal, impl="triton")
    return _forward_backward(op, tensors[:-1])


def _decoupled_attention(shape: Shape, device: str) -> Callable[[], object]:
    """Prompts in a branch of their own, under a learned weight."""
    query, key, value, *prompt = shape.tensors(device)
    weight = torch.ones(shape.heads, 1, device=device, requires_grad=True)
    shared = [x.detach().unsqueeze(0).requires_grad_() for x in prompt]
    op = partial(
        decoupled_attention, query, [key, shared[0]], [value, shared[1]], [1.0, weight],
        is_causal=[shape.is_causal, False], impl="triton",
    )  # fmt: skip
    return _forward_backward(op, [query, key, value, *shared, weight])


def _diffuse_prompts(shape: Shape, device: str, width: int) -> Callable[[], object]:
    rows = [torch.randn(shape.batch, shape.tokens, width, device=device).to(shape.dtype) for _ in range(2)]
    learned = [torch.randn(size, device=device) for size in ((shape.prompts, width), (4, width), (width, 4), ())]
    inputs = [x.requires_grad_() for x in (*rows, *learned)]
    return _forward_backward(partial(diffuse_prompts, *inputs, impl="triton"), inputs)


def _summarize_tokens(shape: Shape, device: str, width: int) -> Callable[[], object]:
    sizes = ((1, shape.prompts, width), (shape.batch, shape.tokens, width))
    inputs = [torch.randn(size, device=device).to(shape.dtype).requires_grad_() for size in sizes]
    return _forward_backward(partial(summarize_tokens, *inputs, impl="triton"), inputs)


def _compress(shape: Shape, device: str) -> Callable[[], object]:
    """Score and merge as the policies do: of all queries or some, of a prompt or a padded batch of them."""
    query, key, value = (x.detach() for x in shape.tensors(device)[:3])
    lse = torch.zeros(query.shape[:3], device=device)
    valid = torch.ones(len(key), shape.tokens, dtype=torch.bool, device=device)

    def step() -> object:
        for query_mask, key_mask in ((None, None), (valid, None), (valid, valid)):
            scores = key_scores(query, key, lse, query_mask=query_mask, key_mask=key_mask, impl="triton")
        return compress_kv(key, value, scores, math.ceil(shape.tokens / 2), merge="pivot", impl="triton")

    return step
