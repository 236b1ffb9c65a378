# SPDX-License-Identifier: Apache-2.0
"""What the host pays for a call, in microseconds: ``python -m bench.host_cost``, no GPU needed.

Where kernels are short, a GPU waits for the host that launches them. Here everything is paid but the GPU and its
driver: checks, dispatch, autograd, allocation, and Triton's launcher, whose driver is `bench.stand_in`. Tensors are
tiny and on the CPU, so the allocations are not CUDA's. The yardstick is PyTorch's own attention on a single number.
Seconds are of the processor, not of a clock on the wall, so that what else runs on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench import stand_in
from bench.measure import interleave, machine
from fastprompt.hf.attention import CHILD, attention
from fastprompt.kernels import prompt_attention as launchers
from fastprompt.nn.prefix import Prefix
from fastprompt.ops import (
    compress_kv,
    decoupled_attention,
    diffuse_prompts,
    key_scores,
    prompt_attention,
    prompt_attention_varlen,
    summarize_tokens,
)

RESULTS = Path(__file__).parent / "results" / "host-cost.json"

#: Samples, heads, tokens, head size, prompts.
B, H, T, D, P = 2, 4, 17, 64, 10

#: Calls that one timing spans.
CALLS = 50


def both(op: Callable[..., Tensor], tensors: list[Tensor], needs: list[Tensor] | None = None) -> Callable[[], object]:
    """Forward and backward."""
    wanted = [x.requires_grad_() for x in (tensors if needs is None else needs)]
    grad = torch.ones_like(op(*tensors))
    return lambda: torch.autograd.grad(op(*tensors), wanted, grad)


def triton_steps() -> dict[str, Callable[[], object]]:
    """Every operation on the Triton kernels."""

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def rows() -> list[Tensor]:
        return [make(B, T, H, D).transpose(1, 2) for _ in range(3)]

    def prompts() -> list[Tensor]:
        return [make(H, P, D, dtype=torch.float32) for _ in range(2)]

    plain, site = [*rows(), *prompts()], rows()
    lse = make(B, H, T, dtype=torch.float32)
    bank = [x.unsqueeze(0) for x in plain[3:]]
    ends = torch.tensor([0, T, B * T], dtype=torch.int32)
    packed = [make(B * T, H, D) for _ in range(3)]
    mask = torch.ones(B, 1, T, T, dtype=torch.bool)
    width = H * D
    layer = nn.Module()
    layer.add_module(CHILD, Prefix(*prompts()))
    wide = [make(B, T, width), make(B, T, width), *(make(*s, dtype=torch.float32) for s in ((P, width), (4, width)))]
    wide += [make(width, 4, dtype=torch.float32), make(dtype=torch.float32)]
    trained = [*rows(), *prompts()]
    return {
        "one launch": lambda: launchers.forward(*plain[:3], *bank, None, None, False, 1.0),
        "prompt_attention, forward": lambda: prompt_attention(*plain),
        "prompt_attention, masked forward": lambda: prompt_attention(*plain, attn_mask=mask),
        "prompt_attention, both": both(prompt_attention, [*rows(), *prompts()]),
        "prompt_attention, both, prompts alone": both(prompt_attention, trained, trained[3:]),
        "prompt_attention_varlen, both": both(
            lambda *x: prompt_attention_varlen(*x, ends, max_seqlen=T), [*packed, *prompts()]
        ),
        "decoupled_attention, both": both(
            lambda q, k, v, pk, pv: decoupled_attention(q, [k, pk], [v, pv], [1.0, 0.5]),
            [*rows(), *(make(1, H, P, D) for _ in range(2))],
        ),
        "diffuse_prompts, both": both(lambda *x: diffuse_prompts(*x), wide),
        "summarize_tokens, both": both(
            lambda *x: summarize_tokens(*x), [make(1, P, width, dtype=torch.float32), make(B, T, width)]
        ),
        "key_scores": lambda: key_scores(plain[0], plain[1], lse),
        "compress_kv": lambda: compress_kv(plain[1], plain[2], lse, 8, merge="pivot"),
        "a layer of transformers, both": both(
            lambda *x: attention(layer, *x, None, scaling=1.0)[0], site, [*site, *layer.parameters()]
        ),
    }


def cpu_steps() -> dict[str, Callable[[], object]]:
    """The yardstick, and a step of generation on the CPU's own kernels."""
    one = [torch.zeros(1, 1, 1, 1) for _ in range(3)]
    step = [torch.zeros(1, H, t, D) for t in (1, T, T)] + [torch.zeros(H, P, D) for _ in range(2)]
    trained = [x.clone() for x in step]
    return {
        "PyTorch's attention of one number, forward": lambda: nn.functional.scaled_dot_product_attention(*one),
        "PyTorch's attention of one number, both": both(
            nn.functional.scaled_dot_product_attention, [x.clone() for x in one]
        ),
        "prompt_attention of one row on a CPU, forward": lambda: prompt_attention(*step),
        "prompt_attention of one row on a CPU, both": both(prompt_attention, trained),
    }


def processor_clock(step: Callable[[], object]) -> float:
    """Seconds of the processor that one of `CALLS` calls takes."""
    start = time.process_time()
    for _ in range(CALLS):
        step()
    return (time.process_time() - start) / CALLS


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of every step: the least and the median of ``rounds``, since a busy machine only ever adds."""
    torch.set_num_threads(1)
    times, failed = interleave(cpu_steps(), rounds, processor_clock)
    with stand_in.active():
        found = interleave(triton_steps(), rounds, processor_clock)
    times, failed = times | found[0], failed | found[1]
    if failed:
        raise RuntimeError(f"host_cost: {failed}")
    kinds = {"least": np.min, "median": np.median}
    return {name: {kind: round(1e6 * float(of(t)), 1) for kind, of in kinds.items()} for name, t in times.items()}


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="[%(default)s]")
    parser.add_argument("--json", type=Path, default=RESULTS, help="[bench/results/host-cost.json]")
    args = parser.parse_args(argv)
    found = measure(args.rounds)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(cost)}" for name, cost in found.items())
    args.json.write_text(f'{{"machine": {json.dumps(machine("cpu"))},\n"microseconds": {{\n{lines}\n}}}}\n')
    for name, cost in found.items():
        print(f"{cost['least']:8.1f}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
