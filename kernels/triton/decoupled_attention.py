# SPDX-License-Identifier: Apache-2.0
"""`decoupled_attention` in Triton: what the launchers of both directions allocate and launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import configs
from .configs import Config, padded
from .decoupled_attention_kernels import branch_kernel, branches_kernel, branches_query_kernel
from .launch import Launch, launch, split, upcast
from .prompt_attention import PROGRAMS, full_mask, plan_reduce, strides, tiles


@dataclass(frozen=True)
class Branch:
    """One branch; ``weight`` ``[B,Hq,Tq]`` and ``mask`` ``[B,Hq,Tq,T]`` are views with stride 0 where broadcast."""

    key: Tensor
    value: Tensor
    weight: Tensor | None
    factor: float
    mask: Tensor | None
    is_causal: bool

    @property
    def length(self) -> int:
        """Keys T."""
        return self.key.shape[2]


@dataclass(frozen=True)
class Problem:
    """One call, as the kernels see it."""

    query: Tensor
    branches: list[Branch]
    scale: float

    def config(self, kernel: str, keys: int) -> Config:
        """The configuration of one kernel, whose tile of keys is for branches of up to ``keys``."""
        _, _, rows, dim = self.query.shape
        crowded = any(x.mask is not None for x in self.branches)
        return configs.choose(kernel, self.query, dim, rows, keys, crowded)

    def all_branches(self, kernel: str) -> tuple[dict, dict, Config]:
        """What both kernels that loop over branches take."""
        config = self.config(kernel, max(x.length for x in self.branches))
        heads, count = self.query.shape[1], tiles(self.query.shape[2], config.rows)
        each: dict[str, list[Tensor | None]] = {
            "keys": [x.key for x in self.branches], "values": [x.value for x in self.branches],
            "weights": [x.weight for x in self.branches], "masks": [x.mask for x in self.branches],
        }  # fmt: skip
        arguments: dict[str, object] = {"query": self.query, "sq": strides(self.query)}
        arguments |= {name: tuple(x) for name, x in each.items()}
        arguments |= {f"s{name[0]}": tuple(map(branch_strides, x)) for name, x in each.items()}
        arguments |= {
            "factors": tuple(x.factor for x in self.branches), "lengths": tuple(x.length for x in self.branches),
            "heads": heads, "groups": heads // self.branches[0].key.shape[1], "tiles": count,
            "tq": self.query.shape[2], "scale": self.scale,
        }  # fmt: skip
        constants = {
            "CAUSAL": tuple(x.is_causal for x in self.branches),
            "BLOCKS": tuple(min(config.keys, padded(x.length)) for x in self.branches),
            "BRANCHES": len(self.branches), **self.constants(config),
        }  # fmt: skip
        return arguments, constants, config

    def constants(self, config: Config) -> dict[str, object]:
        """What all kernels are compiled for."""
        dim = self.query.shape[3]
        return {"UPCAST": upcast(self.query.dtype), "D": dim, "BLOCK_D": padded(dim), "BLOCK_M": config.rows}

    def programs(self, config: Config) -> int:
        """One a tile of rows of a head."""
        return tiles(self.query.shape[2], config.rows) * self.query.shape[0] * self.query.shape[1]


def forward(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    weights: list[Tensor | None],
    factors: list[float],
    attn_masks: list[Tensor | None],
    is_causal: list[bool],
    scale: float,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Output ``[B,Hq,Tq,D]`` (memory order B,T,H,D), and ``[N,B,Hq,Tq]`` float32, the lse of every computed branch.

    It is so small that it is written whether or not to ``keep`` it.
    """
    settings = (len(keys), tuple(factors), tuple(is_causal), scale)
    out, lse = launch(_forward, (query, *keys, *values, *weights, *attn_masks), settings)
    return out if _computed(keys, weights, factors) else out.zero_(), [lse]


def _forward(query, *rest):
    tensors, (count, *settings) = rest[:-4], rest[-4:]
    batch, heads, tq, dim = query.shape
    problem = _problem(query, tensors, count, *settings)
    out = query.new_empty(batch, tq, heads, dim).transpose(1, 2)
    lse = query.new_empty(count, batch, heads, tq, dtype=torch.float32)
    return [out, lse], [plan_forward(problem, out, lse)] if problem.branches else []


def backward(
    grad_out: Tensor,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    weights: list[Tensor | None],
    factors: list[float],
    attn_masks: list[Tensor | None],
    is_causal: list[bool],
    scale: float,
    states: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of those of query, keys, values and weight tensors that ``needs`` names, in their order."""
    n = len(keys)
    tensors = (query, *keys, *values, *weights, *attn_masks, grad_out, states[0])
    delta, *grads = launch(_backward, tensors, (tuple(needs), n, tuple(factors), tuple(is_causal), scale))
    computed = _computed(keys, weights, factors)
    if len(computed) < n:
        # Nothing was launched for what a branch that adds nothing would have written.
        there = [bool(computed), *(j in computed for j in (*range(n), *range(n)))]
        for grad, written in zip(grads, (x for x, need in zip(there, needs, strict=False) if need), strict=True):
            if not written:
                grad.zero_()
    learned = [(j, w) for j, w in enumerate(weights) if w is not None]
    for (j, weight), need in zip(learned, needs[1 + 2 * n :], strict=True):
        if need:
            grad = torch.zeros_like(weight)
            grads.append(grad.copy_(delta[computed.index(j)].sum_to_size(weight.shape)) if j in computed else grad)
    return grads


def _backward(query, *rest):
    *tensors, grad_out, lse, needs, count, factors, is_causal, scale = rest
    problem = _problem(query, tensors, count, factors, is_causal, scale)
    keys, values, weights, _ = _parts(tensors, count)
    dq = torch.empty_like(query) if needs[0] else None
    pairs = zip((*keys, *values), needs[1 : 1 + 2 * count], strict=True)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) if need else None for x, need in pairs]
    delta = torch.empty_like(lse)
    of_computed = [(grads[j], grads[count + j]) for j in _computed(keys, weights, factors)]
    plan = plan_backward(problem, lse, delta, grad_out, dq, of_computed, any(needs[1 + 2 * count :]))
    return [x for x in (delta, dq, *grads) if x is not None], plan


def branch_strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of one branch's tensor; where there is none ones, which Triton compiles in as constants.

    None beside the strides of another branch makes Triton 3.6 forget which of those are constants.
    """
    return strides(x) or (1,) * 4


def _parts(tensors: Sequence, count: int) -> list[Sequence]:
    """Keys, values, weights and masks of ``count`` branches."""
    return [tensors[i : i + count] for i in range(0, 4 * count, count)]


def _computed(keys: Sequence[Tensor], weights: Sequence[Tensor | None], factors: Sequence[float]) -> list[int]:
    """Which branches can add anything."""
    there = zip(keys, weights, factors, strict=True)
    return [j for j, (key, weight, factor) in enumerate(there) if key.shape[2] and (weight is not None or factor)]


def _problem(query, tensors, count, factors, is_causal, scale) -> Problem:
    """The call, of those branches that are computed."""
    keys, values, weights, masks = _parts(tensors, count)
    branches = []
    for j in _computed(keys, weights, factors):
        weight = None if weights[j] is None else weights[j].expand(query.shape[:3])
        mask = full_mask(masks[j], (*query.shape[:3], keys[j].shape[2]))
        branches.append(Branch(keys[j], values[j], weight, factors[j], mask, is_causal[j]))
    return Problem(query, branches, scale)


def plan_forward(problem: Problem, out: Tensor, lse: Tensor) -> Launch:
    """The forward launch."""
    arguments, constants, config = problem.all_branches("branches")
    arguments |= {"out": out, "lse": lse, "so": strides(out), "sl": lse.stride()}
    return Launch(branches_kernel, problem.programs(config), arguments, constants, config)


def plan_backward(
    problem: Problem,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    dq: Tensor | None,
    grads: list[tuple[Tensor | None, Tensor | None]],
    need_weight: bool,
) -> list[Launch]:
    """The launches that fill ``delta``, dQ, and dK and dV of every branch, where those are not None."""
    plan = []
    if problem.branches and (dq is not None or need_weight or any(dk is not None for dk, _ in grads)):
        arguments, constants, config = problem.all_branches("branches_query")
        arguments |= {
            "grad_out": grad_out, "lse": lse, "delta": delta, "grad_query": dq,
            "sdo": strides(grad_out), "sl": lse.stride(), "sdq": strides(dq),
        }  # fmt: skip
        constants["SPLIT"] = split(problem.query.dtype)
        plan.append(Launch(branches_query_kernel, problem.programs(config), arguments, constants, config))
    for j, (dk, dv) in enumerate(grads):
        if dk is not None or dv is not None:
            plan += _plan_branch(problem, problem.branches[j], lse[j], delta[j], grad_out, dk, dv)
    return plan


def _plan_branch(
    p: Problem, branch: Branch, lse: Tensor, delta: Tensor, grad_out: Tensor, dk: Tensor | None, dv: Tensor | None
) -> list[Launch]:
    bank, heads_kv, length, dim = branch.key.shape
    batch, heads, tq, _ = p.query.shape
    config = p.config("branch", length)
    count = tiles(length, config.keys)
    splits = max(1, min(tiles(batch * tq, max(1, bank) * config.rows), PROGRAMS // max(1, bank * heads_kv * count)))
    shape = (splits, bank, heads_kv, length, dim)
    work = [None if x is None else x.new_empty(shape, dtype=torch.float32) for x in (dk, dv)]
    arguments = {
        "query": p.query, "key": branch.key, "value": branch.value, "weight": branch.weight, "mask": branch.mask,
        "grad_out": grad_out, "lse": lse, "delta": delta, "work_key": work[0], "work_value": work[1],
        "sq": strides(p.query), "sk": strides(branch.key), "sv": strides(branch.value), "sw": strides(branch.weight),
        "sm": strides(branch.mask), "sdo": strides(grad_out), "sl": lse.stride(), "factor": branch.factor,
        "heads_kv": heads_kv, "groups": heads // heads_kv, "tiles": count, "splits": splits, "bank": bank, "tq": tq,
        "rows_total": batch * tq, "length": length, "scale": p.scale,
    }  # fmt: skip
    constants = {"CAUSAL": branch.is_causal, **p.constants(config), "BLOCK_N": config.keys}
    plan = [Launch(branch_kernel, splits * count * heads_kv * bank, arguments, constants, config)]
    pairs = zip(work, (dk, dv), strict=True)
    return plan + [plan_reduce(parts, grad) for parts, grad in pairs if parts is not None and grad is not None]
