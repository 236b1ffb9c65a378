# SPDX-License-Identifier: Apache-2.0
"""The prompt's part of `prompt_attention` where another kernel attends to the instance keys: merged into its results.

Softmax over the union of two key sets is the sum of both, weighted by exp(L_part - L), and with the joint lse L and
output O the gradients of a part need nothing of the other: P = exp(scale q k - L), dS = P * (dO V^T - rowsum(dO * O)).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, launch, upcast
from .prompt_attention import (
    Problem,
    allocate,
    array,
    plan_delta,
    plan_prompt,
    readers,
    rounded,
    row_numbers,
    row_state,
    strides,
    tiles,
)
from .tiles import (
    LN2,
    LOG2E,
    SIZES,
    load_prompt,
    load_rows,
    load_tile,
    matmul_input,
    online_softmax,
    safe_lse,
    split,
    store_tile,
)


@triton.jit(do_not_specialize=SIZES)
def prompt_forward_kernel(
    query, prompt_key, prompt_value, prompt_index, part, part_lse, out, lse,
    sq, spk, spv, sp, spl, so, sl, heads, groups, tiles, tq, prompts, scale,
    UPCAST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Output and lse over prompt and instance keys of BLOCK_M rows of one head, from those over instance keys alone.

    The instance part is one key more: its lse is the score, its output the value.
    """
    tile, head, b = split(tl.program_id(0), tiles, heads)
    g = b if prompt_index is None else tl.load(prompt_index + b)
    kv = head // groups
    query += b * sq[0] + head * sq[1]
    part += b * sp[0] + head * sp[1]
    part_lse += b * spl[0] + head * spl[1]
    out += b * so[0] + head * so[1]
    lse += b * sl[0] + head * sl[1]
    prompt_key += g * spk[0] + kv * spk[1]
    prompt_value += g * spv[0] + kv * spv[1]

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < tq
    q = load_tile(query, rows, live, sq[2], sq[3], D, BLOCK_D)
    dtype: tl.constexpr = q.dtype
    q = matmul_input(q, UPCAST)
    acc = load_tile(part, rows, live, sp[2], sp[3], D, BLOCK_D).to(tl.float32)
    peak = load_rows(part_lse, rows, live, spl[2], 0.0) * LOG2E
    total = tl.full([BLOCK_M], 1.0, tl.float32)
    for p in range(0, prompts, BLOCK_P):
        cols = p + tl.arange(0, BLOCK_P)
        there = cols < prompts
        k = matmul_input(load_prompt(prompt_key, cols, there, spk, dtype, D, BLOCK_D), UPCAST)
        scores = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(there[None, :], scores, float("-inf"))
        v = matmul_input(load_prompt(prompt_value, cols, there, spv, dtype, D, BLOCK_D), UPCAST)
        acc, peak, total = online_softmax(acc, peak, total, scores, v)
    store_tile(out, acc / total[:, None], rows, live, so[2], so[3], D, BLOCK_D)
    tl.store(lse + rows.to(tl.int64) * sl[2], (peak + tl.log2(total)) * LN2, mask=live)


@triton.jit(do_not_specialize=SIZES)
def prompt_query_kernel(
    query, prompt_key, prompt_value, prompt_index, out, grad_out, lse, level, delta, grad_query,
    sq, spk, spv, so, sdo, sl, ss, sdq, heads, groups, tiles, tq, prompts, scale,
    UPCAST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the prompt's part to dQ of BLOCK_M rows of one head, and write their delta = rowsum(dO * O), and level."""
    tile, head, b = split(tl.program_id(0), tiles, heads)
    g = b if prompt_index is None else tl.load(prompt_index + b)
    kv = head // groups
    query += b * sq[0] + head * sq[1]
    out += b * so[0] + head * so[1]
    grad_out += b * sdo[0] + head * sdo[1]
    grad_query += b * sdq[0] + head * sdq[1]
    lse += b * sl[0] + head * sl[1]
    prompt_key += g * spk[0] + kv * spk[1]
    prompt_value += g * spv[0] + kv * spv[1]

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < tq
    q = load_tile(query, rows, live, sq[2], sq[3], D, BLOCK_D)
    dtype: tl.constexpr = q.dtype
    q = matmul_input(q, UPCAST)
    do = load_tile(grad_out, rows, live, sdo[2], sdo[3], D, BLOCK_D)
    o = load_tile(out, rows, live, so[2], so[3], D, BLOCK_D)
    base = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    shift = safe_lse(load_rows(lse, rows, live, sl[2], 0.0))
    state = b * ss[0] + head * ss[1] + rows.to(tl.int64) * ss[2]
    tl.store(delta + state, base, mask=live)
    tl.store(level + state, shift, mask=live)
    do = matmul_input(do, UPCAST)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for p in range(0, prompts, BLOCK_P):
        cols = p + tl.arange(0, BLOCK_P)
        there = cols < prompts
        k = matmul_input(load_prompt(prompt_key, cols, there, spk, dtype, D, BLOCK_D), UPCAST)
        v = matmul_input(load_prompt(prompt_value, cols, there, spv, dtype, D, BLOCK_D), UPCAST)
        scores = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2E)
        # Keys past the end are zero, but the weight of a zero score may be infinite.
        weight = tl.exp2(tl.where(there[None, :], scores, float("-inf")) - shift[:, None])
        ds = weight * (tl.dot(do, v.T, input_precision="ieee") - base[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    # The sum, not the part, is what is rounded last.
    acc = acc * scale + load_tile(grad_query, rows, live, sdq[2], sdq[3], D, BLOCK_D).to(tl.float32)
    store_tile(grad_query, acc, rows, live, sdq[2], sdq[3], D, BLOCK_D)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_index: Tensor | None,
    part: Tensor,
    part_lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[B,Hq,Tq,D]`` (memory order B,T,H,D) and lse ``[B,Hq,Tq]`` over prompt and instance keys, from ``part``
    and its lse over instance keys alone, of which every row sees one at least.
    """
    tensors = (query, key, value, prompt_key, prompt_value, array(prompt_index), part, part_lse)
    out, lse = launch(_forward, tensors, (scale,))
    return out, lse


def _forward(query, key, value, prompt_key, prompt_value, prompt_index, part, part_lse, scale):
    problem = Problem(query, key, value, prompt_key, prompt_value, prompt_index, None, False, scale)
    batch, heads, tq, dim = query.shape
    out = query.new_empty(batch, tq, heads, dim).transpose(1, 2)
    lse = part_lse.new_empty(batch, heads, tq)
    return [out, lse], [plan_forward(problem, part, part_lse, out, lse)]


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_index: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    """Add the prompt's part to ``dq``, if it is there; returns those gradients of both prompts that ``needs`` names."""
    index, kinds = array(prompt_index), (prompt_key.dtype, prompt_value.dtype)
    order, starts = readers(query, prompt_key, index) if any(needs) else (None, None)
    prompts = rounded(query, prompt_key, prompt_value)
    tensors = (grad_out, query, key, value, *prompts, index, out, lse, dq, order, starts)
    return launch(_backward, tensors, (scale, tuple(needs), kinds))


def _backward(
    grad_out, query, key, value, prompt_key, prompt_value, prompt_index, out, lse, dq, order, starts, scale, needs,
    kinds,
):  # fmt: skip
    problem = Problem(query, key, value, prompt_key, prompt_value, prompt_index, None, False, scale)
    grads = allocate(problem, (False, False, False, *needs), kinds)
    plan = plan_backward(problem, out, lse, grad_out, (dq, *grads[3:]), order, starts) if problem.prompts else []
    return [x for x in grads if x is not None], plan


def plan_forward(problem: Problem, part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> Launch:
    """The launch that merges the prompt into output and lse over instance keys, where every row sees one at least."""
    arguments = {"part": part, "part_lse": part_lse, "sp": strides(part), "spl": strides(part_lse), "sl": strides(lse)}
    return _plan(prompt_forward_kernel, "forward", problem, arguments | {"out": out, "lse": lse, "so": strides(out)})


def plan_backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grads: Sequence[Tensor | None],
    order: Tensor | None = None,
    starts: Tensor | None = None,
) -> list[Launch]:
    """The launches that add the prompt's part to dQ, and fill dK_p and dV_p, of those that are not None.

    ``order`` and ``starts`` are what `readers` gives.
    """
    p, (dq, dpk, dpv) = problem, grads
    level, delta = row_numbers(lse)
    state = row_state(p, level, delta, grad_out)
    plan = []
    if dq is not None:
        arguments = {
            "out": out,
            "lse": lse,
            "so": strides(out),
            "sl": strides(lse),
            "grad_query": dq,
            "sdq": strides(dq),
        }
        plan.append(_plan(prompt_query_kernel, "query", p, state | arguments))
    elif dpk is not None or dpv is not None:
        plan.append(plan_delta(p, out, grad_out, None, lse, level, delta))
    if dpk is not None or dpv is not None:
        plan += plan_prompt(p, state | {"order": order, "starts": starts}, dpk, dpv)
    return plan


def _plan(kernel, entry: str, p: Problem, arguments: dict) -> Launch:
    """A launch over tiles of rows: half a tile of the kernel over all keys that ``entry`` names, and no pipeline.

    What a row moves takes the time here, not a tile or a few of keys: more programs at once hide more of it.
    """
    config = p.config(entry, p.rows, p.prompts)
    warps = 4 if p.query.shape[3] <= 64 and p.query.element_size() == 2 else 8
    config = config._replace(rows=max(16, config.rows // 2), keys=min(64, config.keys), warps=warps, stages=1)
    count, heads = tiles(p.rows, config.rows), p.query.shape[1]
    names = ("query", "prompt_key", "prompt_value", "prompt_index", "sq", "spk", "spv")
    given = p.inputs()
    arguments |= {name: given[name] for name in names} | {
        "heads": heads, "groups": p.groups, "tiles": count, "tq": p.rows, "prompts": p.prompts, "scale": p.scale,
    }  # fmt: skip
    constants = {"UPCAST": upcast(p.query.dtype), **p.dim, "BLOCK_P": config.keys, "BLOCK_M": config.rows}
    return Launch(kernel, count * heads * p.samples, arguments, constants, config)
