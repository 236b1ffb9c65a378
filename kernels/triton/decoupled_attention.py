# SPDX-License-Identifier: Apache-2.0
"""`decoupled_attention` in Triton: what the launchers of both directions allocate and launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import configs
from .configs import Config, padded
from .decoupled_attention_kernels import branch_kernel, branches_kernel, branches_query_kernel
from .launch import Launch, split, upcast
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

    @property
    def computed(self) -> bool:
        """Whether the branch can add anything."""
        return self.length > 0 and (self.weight is not None or self.factor != 0)


@dataclass(frozen=True)
class Problem:
    """One call, as the kernels see it."""

    query: Tensor
    branches: list[Branch]
    scale: float

    def config(self, kernel: str, keys: int) -> Config:
        """The configuration of one kernel, whose tile of keys is for branches of up to ``keys``."""
        _, _, rows, dim = self.query.shape
        masked = any(x.mask is not None for x in self.branches)
        return configs.choose(kernel, self.query, dim, rows, keys, masked)

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
        arguments |= {f"s{name[0]}": tuple(map(strides, x)) for name, x in each.items()}
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
    batch, heads, tq, dim = query.shape
    problem, _ = _problem(query, keys, values, weights, factors, attn_masks, is_causal, scale)
    out = query.new_empty(batch, tq, heads, dim).transpose(1, 2)
    lse = query.new_empty(len(keys), batch, heads, tq, dtype=torch.float32)
    if not problem.branches:
        return out.zero_(), [lse]
    plan_forward(problem, out, lse).run()
    return out, [lse]


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
    problem, computed = _problem(query, keys, values, weights, factors, attn_masks, is_causal, scale)
    dq = torch.empty_like(query) if needs[0] else None
    pairs = zip(keys + values, needs[1 : 1 + 2 * n], strict=True)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) if need else None for x, need in pairs]
    need_weight = dict(zip((j for j in range(n) if weights[j] is not None), needs[1 + 2 * n :], strict=True))
    delta = torch.empty_like(states[0])
    of_computed = [(grads[j], grads[n + j]) for j in computed]
    for launch in plan_backward(problem, states[0], delta, grad_out, dq, of_computed, any(need_weight.values())):
        launch.run()
    for j in set(range(n)) - set(computed):
        for grad in (grads[j], grads[n + j]):
            if grad is not None:
                grad.zero_()
    if dq is not None and not computed:
        dq.zero_()
    found = []
    for j, need in need_weight.items():
        weight = weights[j]
        if need and weight is not None:
            grad = torch.zeros_like(weight)
            found.append(grad.copy_(delta[computed.index(j)].sum_to_size(weight.shape)) if j in computed else grad)
    return [x for x in (dq, *grads) if x is not None] + found


def _problem(query, keys, values, weights, factors, attn_masks, is_causal, scale) -> tuple[Problem, list[int]]:
    """The branches that are computed, and which those are."""
    branches = []
    for key, value, weight, factor, mask, causal in zip(
        keys, values, weights, factors, attn_masks, is_causal, strict=True
    ):
        weight = None if weight is None else weight.expand(query.shape[:3])
        mask = full_mask(mask, (*query.shape[:3], key.shape[2]))
        branches.append(Branch(key, value, weight, factor, mask, causal))
    computed = [j for j, x in enumerate(branches) if x.computed]
    return Problem(query, [branches[j] for j in computed], scale), computed


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
