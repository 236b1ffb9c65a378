# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention` in Triton: what the launchers of both directions allocate and launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import configs
from .configs import Config, padded
from .launch import Launch, launch, split, upcast
from .prompt_attention_backward import delta_kernel, key_value_kernel, prompt_kernel, query_kernel, reduce_kernel
from .prompt_attention_forward import forward_kernel

#: Programs that the reduction of prompt gradients aims for: two for every multiprocessor of a large GPU. A constant,
#: so that the order of the sum depends on shapes alone.
PROGRAMS = 264

#: Elements a program of the last sum over splits adds up.
REDUCE = 1024


@dataclass(frozen=True)
class Problem:
    """One call, as the kernels see it: ``[B,H,T,D]`` views; packed sequences are one row axis cut by ``cu_seqlens``."""

    query: Tensor
    key: Tensor
    value: Tensor
    prompt_key: Tensor
    prompt_value: Tensor
    prompt_index: Tensor | None
    mask: Tensor | None
    is_causal: bool
    scale: float
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0

    @property
    def samples(self) -> int:
        """Batch size, or number of sequences."""
        return len(self.query) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def rows(self) -> int:
        """Queries of the longest sample."""
        return self.query.shape[2] if self.cu_seqlens is None else self.max_seqlen

    @property
    def keys(self) -> int:
        """Instance keys of the longest sample."""
        return self.key.shape[2] if self.cu_seqlens is None else self.max_seqlen

    @property
    def prompts(self) -> int:
        """Prompt keys P."""
        return self.prompt_key.shape[2]

    @property
    def groups(self) -> int:
        """Query heads of a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def dim(self) -> dict[str, int]:
        """Head size, and the power of two that tiles hold."""
        return {"D": self.query.shape[3], "BLOCK_D": padded(self.query.shape[3])}

    @property
    def loops(self) -> dict[str, bool]:
        """What decides the loops of a kernel."""
        dtype = self.query.dtype
        return {"CAUSAL": self.is_causal, "SPLIT": split(dtype), "UPCAST": upcast(dtype)}

    def config(self, kernel: str, rows: int, keys: int, listed: bool = False) -> Config:
        """The configuration of one kernel; rows of a list (``listed``) take registers as a mask does."""
        crowded = listed or self.groups > 1 if kernel == "prompt" else self.mask is not None
        return configs.choose(kernel, self.query, self.query.shape[3], rows, keys, crowded)

    def inputs(self) -> dict[str, object]:
        """What both kernels that loop over keys read."""
        return {
            "query": self.query, "key": self.key, "value": self.value,
            "prompt_key": self.prompt_key, "prompt_value": self.prompt_value, "prompt_index": self.prompt_index,
            "mask": self.mask, "cu_seqlens": self.cu_seqlens,
            "sq": strides(self.query), "sk": strides(self.key), "sv": strides(self.value),
            "spk": strides(self.prompt_key), "spv": strides(self.prompt_value), "sm": strides(self.mask),
        }  # fmt: skip


def strides(x: Tensor | None) -> tuple[int, ...] | None:
    """Strides as kernels use them: a leading axis of size 1 (a shared prompt, packed rows, a broadcast mask) has 0."""
    if x is None:
        return None
    return (0 if len(x) == 1 else x.stride(0), *x.stride()[1:])


def flat(x: Tensor) -> bool:
    """Whether row ``r % T`` of sample ``r // T`` lies ``r`` rows after the first."""
    return len(x) == 1 or x.stride(0) == x.shape[2] * x.stride(2)


def tiles(size: int, block: int) -> int:
    """How many tiles of ``block`` cover ``size``."""
    return -(-size // block)


def full_mask(attn_mask: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """The mask as a ``[B,Hq,Tq,Tk]`` view with stride 0 where it is broadcast; bool is read as bytes."""
    if attn_mask is None:
        return None
    mask = attn_mask.view(torch.uint8) if attn_mask.dtype == torch.bool else attn_mask
    return mask.expand(shape)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_index: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[B,Hq,Tq,D]`` (memory order B,T,H,D) and lse ``[B,Hq,Tq]`` float32."""
    tensors = (query, key, value, prompt_key, prompt_value, array(prompt_index), attn_mask)
    out, lse = launch(_forward, tensors, (is_causal, scale))
    return out, lse


def _forward(query, key, value, prompt_key, prompt_value, prompt_index, attn_mask, is_causal, scale):
    batch, heads, tq, dim = query.shape
    mask = full_mask(attn_mask, (batch, heads, tq, key.shape[2]))
    problem = Problem(query, key, value, prompt_key, prompt_value, prompt_index, mask, is_causal, scale)
    out = query.new_empty(batch, tq, heads, dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, tq, dtype=torch.float32)
    return [out, lse], [plan_forward(problem, out, lse)]


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_index: Tensor | None,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of those of the five tensors that ``needs`` names, in their order."""
    index, kinds = array(prompt_index), (prompt_key.dtype, prompt_value.dtype)
    order, starts = readers(query, prompt_key, index) if needs[3] or needs[4] else (None, None)
    tensors = (
        grad_out, grad_lse, query, key, value, *rounded(query, prompt_key, prompt_value), index, attn_mask, out, lse,
        order, starts,
    )  # fmt: skip
    return launch(_backward, tensors, (is_causal, scale, tuple(needs), kinds))


def _backward(
    grad_out, grad_lse, query, key, value, prompt_key, prompt_value, prompt_index, attn_mask, out, lse, order, starts,
    is_causal, scale, needs, kinds,
):  # fmt: skip
    mask = full_mask(attn_mask, (*query.shape[:3], key.shape[2]))
    problem = Problem(query, key, value, prompt_key, prompt_value, prompt_index, mask, is_causal, scale)
    grads = allocate(problem, needs, kinds)
    plan = plan_backward(problem, out, lse, grad_out, grad_lse, grads, order, starts)
    return [x for x in grads if x is not None], plan


def rounded(query: Tensor, *prompts: Tensor) -> list[Tensor]:
    """Prompts in the dtype of the query: float32 ones, rounded inside a kernel, would stay in its registers, and they
    are less than is written for them.
    """
    return [x.to(query.dtype) for x in prompts]


def array(x: Tensor | None) -> Tensor | None:
    """A few numbers a sample, as kernels read them."""
    return None if x is None else x.contiguous()


def allocate(
    problem: Problem, needs: Sequence[bool], kinds: Sequence[torch.dtype | None] = (None, None)
) -> list[Tensor | None]:
    """Uninitialised gradients of the tensors in ``needs``; those of prompts are contiguous, as their sum is, and of
    ``kinds`` (None: the prompts' own).
    """
    p = problem
    grads = [torch.empty_like(x) if need else None for x, need in zip((p.query, p.key, p.value), needs, strict=False)]
    for x, need, kind in zip((p.prompt_key, p.prompt_value), needs[3:], kinds, strict=True):
        grads.append(torch.empty_like(x, dtype=kind, memory_format=torch.contiguous_format) if need else None)
    return grads


def plan_forward(problem: Problem, out: Tensor, lse: Tensor) -> Launch:
    """The forward launch."""
    p = problem
    config = p.config("forward", p.rows, p.keys + p.prompts)
    count, heads = tiles(p.rows, config.rows), p.query.shape[1]
    arguments = p.inputs() | {
        "out": out, "lse": lse, "so": strides(out), "sl": strides(lse),
        "heads": heads, "groups": p.groups, "tiles": count, "tq": p.rows, "tk": p.keys, "prompts": p.prompts,
        "scale": p.scale,
    }  # fmt: skip
    constants = {**p.loops, **p.dim, "BLOCK_M": config.rows, "BLOCK_N": config.keys}
    return Launch(forward_kernel, count * heads * p.samples, arguments, constants, config)


def plan_backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: list[Tensor | None],
    order: Tensor | None = None,
    starts: Tensor | None = None,
) -> list[Launch]:
    """The launches that fill those gradients that are not None; a part that nobody needs is not launched.

    ``order`` and ``starts`` are what `readers` gives.
    """
    p = problem
    dq, dk, dv, dpk, dpv = grads
    if not any(x is not None and x.numel() for x in grads):
        return []
    level, delta = row_numbers(lse)
    plan = [plan_delta(p, out, grad_out, grad_lse, lse, level, delta)]
    state = row_state(p, level, delta, grad_out)
    if dq is not None:
        plan.append(_plan_query(p, state, dq))
    if dk is not None or dv is not None:
        plan.append(_plan_key_value(p, state, dk, dv))
    if any(x is not None and x.numel() for x in (dpk, dpv)):
        plan += plan_prompt(p, state | {"order": order, "starts": starts}, dpk, dpv)
    return plan


def row_numbers(lse: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for two numbers a row, ``[B,H,T]`` each, rows of all samples evenly spaced: level and delta."""
    batch, heads, tq = lse.shape
    # Heads begin at multiples of 16 numbers, as Triton compiles for.
    memory = lse.new_empty(2, heads, 16 * tiles(batch * tq, 16))
    level, delta = memory[:, :, : batch * tq].unflatten(2, (batch, tq)).transpose(1, 2)
    return level, delta


def row_state(p: Problem, level: Tensor, delta: Tensor, grad_out: Tensor) -> dict[str, object]:
    """What every kernel of the backward but `delta` reads of its rows beside the query."""
    return {
        "grad_out": grad_out, "level": level, "delta": delta, "sdo": strides(grad_out), "ss": strides(delta),
        "groups": p.groups, "scale": p.scale,
    }  # fmt: skip


def plan_delta(
    p: Problem, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None, lse: Tensor, level: Tensor, delta: Tensor
) -> Launch:
    """The launch that fills level and delta."""
    config = Config(rows=min(64, padded(p.rows)), keys=0, warps=4, stages=1)
    count, heads = tiles(p.rows, config.rows), p.query.shape[1]
    arguments = {
        "out": out, "grad_out": grad_out, "grad_lse": grad_lse, "lse": lse, "cu_seqlens": p.cu_seqlens,
        "level": level, "delta": delta, "so": strides(out), "sdo": strides(grad_out), "sdl": strides(grad_lse),
        "sl": strides(lse), "ss": strides(delta),
        "heads": heads, "tiles": count, "tq": p.rows,
    }  # fmt: skip
    return Launch(delta_kernel, count * heads * p.samples, arguments, {**p.dim, "BLOCK_M": config.rows}, config)


def _plan_query(p: Problem, state: dict, dq: Tensor) -> Launch:
    config = p.config("query", p.rows, p.keys + p.prompts)
    count, heads = tiles(p.rows, config.rows), p.query.shape[1]
    arguments = p.inputs() | state | {
        "grad_query": dq, "sdq": strides(dq), "heads": heads, "tiles": count, "tq": p.rows, "tk": p.keys,
        "prompts": p.prompts,
    }  # fmt: skip
    constants = {**p.loops, **p.dim, "BLOCK_M": config.rows, "BLOCK_N": config.keys}
    return Launch(query_kernel, count * heads * p.samples, arguments, constants, config)


def _plan_key_value(p: Problem, state: dict, dk: Tensor | None, dv: Tensor | None) -> Launch:
    config = p.config("key_value", p.rows, p.keys)
    count, heads_kv = tiles(p.keys, config.keys), p.key.shape[1]
    arguments = state | {
        "query": p.query, "key": p.key, "value": p.value, "mask": p.mask, "cu_seqlens": p.cu_seqlens,
        "grad_key": dk, "grad_value": dv, "sq": strides(p.query), "sk": strides(p.key), "sv": strides(p.value),
        "sm": strides(p.mask), "sdk": strides(dk), "sdv": strides(dv),
        "heads_kv": heads_kv, "tiles": count, "tq": p.rows, "tk": p.keys,
    }  # fmt: skip
    constants = {
        "NEED_K": dk is not None, "NEED_V": dv is not None, **p.loops, **p.dim,
        "BLOCK_M": config.rows, "BLOCK_N": config.keys,
    }  # fmt: skip
    return Launch(key_value_kernel, count * heads_kv * p.samples, arguments, constants, config)


def plan_prompt(p: Problem, state: dict, dpk: Tensor | None, dpv: Tensor | None) -> list[Launch]:
    """The launches that fill dK_p and dV_p: a share a split, and their sums."""
    bank, heads_kv, prompts, dim = p.prompt_key.shape
    rows = p.query.shape[0] * p.query.shape[2]
    config = p.config("prompt", -(-rows // bank), prompts, listed=state["order"] is not None)
    count = tiles(prompts, config.keys)
    splits = max(1, min(tiles(rows, bank * config.rows), PROGRAMS // (bank * heads_kv * count)))
    shape = (splits, bank, heads_kv, prompts, dim)
    work = [None if x is None else x.new_empty(shape, dtype=torch.float32) for x in (dpk, dpv)]
    arguments = state | {
        "query": p.query, "prompt_key": p.prompt_key, "prompt_value": p.prompt_value,
        "work_key": work[0], "work_value": work[1],
        "sq": strides(p.query), "spk": strides(p.prompt_key), "spv": strides(p.prompt_value),
        "heads_kv": heads_kv, "tiles": count, "splits": splits, "bank": bank, "tq": p.query.shape[2],
        "rows_total": rows, "prompts": prompts,
    }  # fmt: skip
    constants = {
        "NEED_K": dpk is not None, "NEED_V": dpv is not None, "FLAT": flat(p.query) and flat(state["grad_out"]),
        "UPCAST": upcast(p.query.dtype), **p.dim, "BLOCK_M": config.rows, "BLOCK_P": config.keys,
    }  # fmt: skip
    plan = [Launch(prompt_kernel, splits * count * heads_kv * bank, arguments, constants, config)]
    pairs = zip(work, (dpk, dpv), strict=True)
    return plan + [plan_reduce(parts, grad) for parts, grad in pairs if parts is not None and grad is not None]


def plan_reduce(work: Tensor, grad: Tensor) -> Launch:
    """The sum of ``work [splits, ...]`` over splits, into a contiguous ``grad``."""
    sizes = {"work": work, "grad": grad, "splits": len(work), "size": grad.numel()}
    return Launch(reduce_kernel, tiles(grad.numel(), REDUCE), sizes, {"BLOCK": REDUCE}, Config(REDUCE, 0, 4, 1))


def readers(
    query: Tensor, prompts: Tensor, index: Tensor | None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Rows ``[B,H,T,D]`` sorted by the prompt ``[G,...]`` they read, and where each prompt's begin; None where equal
    runs in order say it all.
    """
    bank, device = len(prompts), query.device
    if cu_seqlens is not None and index is None and bank > 1:
        index = torch.arange(bank, device=device)
    if index is None:
        return None, None
    lengths = query.shape[2] if cu_seqlens is None else cu_seqlens.diff()
    reads = torch.repeat_interleave(index, lengths, output_size=query.shape[0] * query.shape[2])
    order = reads.argsort(stable=True)
    bounds = torch.arange(bank + 1, device=device)
    return order.to(torch.int32), torch.searchsorted(reads[order], bounds).to(torch.int32)
