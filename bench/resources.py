# SPDX-License-Identifier: Apache-2.0
"""What every Triton kernel takes of a GPU, compiled without one: ``python -m bench.resources``.

Each kernel is compiled exactly as its launcher would launch it (same arguments, constants and configuration), for
targets that need not be present. Registers, stack (spilled registers) and static shared memory come from the cubin,
read by the cuobjdump that Triton carries; dynamic shared memory from Triton. AMD targets are compiled only: nothing
here reads their binaries.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.sass import disassemble, serialised
from fastprompt.kernels import (
    compress_kv,
    configs,
    decoupled_attention,
    diffuse_prompts,
    key_scores,
    prompt_part,
    summarize_tokens,
)
from fastprompt.kernels.launch import Launch
from fastprompt.kernels.prompt_attention import Problem, allocate, plan_backward, plan_forward, rounded

#: Shared memory a block may use, bytes (CUDA programming guide, table of technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: The table of sm_80 serves 8.6, 8.9 and 12.x too, which have less than an A100.
SHARED_SERVED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32), "cuda:90": GPUTarget("cuda", 90, 32), "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALARS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32",
           torch.int64: "i64", torch.uint8: "u8"}  # fmt: skip

#: Head sizes of the committed table: one of every class of sizes, and one that does not fill its tile.
SHOWN = (64, 80, 128, 256)

README = Path(__file__).parents[1] / "kernels" / "README.md"
BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"


class Job(NamedTuple):
    """One kernel of one variant for one target."""

    variant: str
    kernel: str
    dtype: str
    dim: int
    target: str


class Usage(NamedTuple):
    """What it takes; stack and shared memory in bytes, per thread and per block; None where it cannot be read."""

    registers: int | None
    stack: int | None
    shared: int
    warps: int
    #: Columns of sm_100's tensor memory, a block.
    columns: int = 0
    #: Whether every wgmma waits for the one before.
    serialised: bool = False


class Variant(NamedTuple):
    """What changes the code of a kernel, beside dtype and head size."""

    is_causal: bool = False
    mask: torch.dtype | None = None
    groups: int = 1
    bank: int = 1
    prompts: torch.dtype | None = None
    packed: bool = False
    library: bool = False
    cache: bool = False
    branches: bool = False
    diffuse: str | None = None
    summaries: bool = False


VARIANTS = {
    "plain": Variant(),
    "masked": Variant(is_causal=True, mask=torch.uint8),
    "packed": Variant(is_causal=True, packed=True),
    "bank": Variant(mask=torch.float32, groups=4, bank=8, prompts=torch.float32),
    "library": Variant(library=True),
    "library bank": Variant(groups=4, bank=8, prompts=torch.float32, library=True),
    "cache": Variant(is_causal=True, groups=4, cache=True),
    "cache masked": Variant(mask=torch.bool, groups=4, cache=True),
    "branches": Variant(branches=True),
    "branches masked": Variant(is_causal=True, mask=torch.float32, groups=2, branches=True),
    "diffuse": Variant(diffuse="relu"),
    "diffuse softmax": Variant(diffuse="softmax"),
    "summaries": Variant(summaries=True),
}


def plans(variant: str, dtype: torch.dtype, dim: int) -> list[Launch]:
    """Every launch of forward and backward on ViT-B/16 shapes, as the launchers plan them; no data is needed."""
    v = VARIANTS[variant]
    if v.cache:
        return _cache_plans(v, dtype, dim)
    if v.branches:
        return _branch_plans(v, dtype, dim)
    if v.diffuse:
        return _diffuse_plans(v.diffuse, dtype, dim)
    if v.summaries:
        return _summary_plans(dtype, 4 * dim)
    batch, heads, tokens, prompts = 64, 12, 197, 200
    rows = (1, tokens * batch) if v.packed else (batch, tokens)

    def tensor(b: int, t: int, h: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(b, t, h, dim, dtype=kind, device="meta").transpose(1, 2)

    query, out, grad_out = (tensor(*rows, heads) for _ in range(3))
    key, value = (tensor(*rows, heads // v.groups) for _ in range(2))
    bank = [tensor(v.bank, prompts, heads // v.groups, v.prompts or dtype).contiguous() for _ in range(2)]
    index = torch.zeros(batch, dtype=torch.int64, device="meta") if v.bank > 1 else None
    mask = None if v.mask is None else torch.empty(batch, 1, tokens, tokens, dtype=v.mask, device="meta")
    problem = Problem(
        query, key, value, *bank, index, None if mask is None else mask.expand(-1, heads, -1, -1), v.is_causal,
        dim**-0.5, torch.empty(batch + 1, dtype=torch.int32, device="meta") if v.packed else None, tokens,
    )  # fmt: skip
    lse = torch.empty(query.shape[:3], device="meta")
    # As launchers do before they plan: rows by the prompt of a bank that they read, and prompts rounded.
    counts = (batch * tokens, v.bank + 1) if v.bank > 1 else ()
    read = [torch.empty(n, dtype=torch.int32, device="meta") for n in counts]
    grads = allocate(problem, [True] * 5)
    key, value = rounded(query, *bank)
    behind = replace(problem, prompt_key=key, prompt_value=value)
    if v.library:
        plan = prompt_part.plan_backward(behind, out, lse, grad_out, (grads[0], grads[3], grads[4]), *read)
        plan.insert(0, prompt_part.plan_forward(problem, out, lse, grad_out, lse))
        return plan[:2]  # the others are those of the kernels over all keys
    plan = [plan_forward(problem, out, lse), *plan_backward(behind, out, lse, grad_out, lse, grads, *read)]
    return list({launch.kernel.__name__: launch for launch in plan}.values())


def _cache_plans(v: Variant, dtype: torch.dtype, dim: int) -> list[Launch]:
    """Every launch of scoring and compressing a decoder's cache of 4,096 tokens to a fifth."""
    batch, heads_kv, length, kept = 4, 8, 4096, 819
    shape = (batch, heads_kv, length)

    def tensor(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    query, key = (tensor(batch, h, length, dim, kind=dtype) for h in (heads_kv * v.groups, heads_kv))
    mask = None if v.mask is None else tensor(batch, length, kind=v.mask)
    options = ("visible", "max") if v.mask is not None else ("none", "mean")
    scores = key_scores.plan(
        query, key, tensor(batch, heads_kv * v.groups, length), mask, mask, tensor(1, *shape), v.is_causal, 0,
        dim**-0.5, *options,
    )  # fmt: skip
    index, order = (tensor(batch, heads_kv, n, kind=torch.int64) for n in (kept, length))
    kept_key, starts = tensor(batch, heads_kv, kept, dim, kind=dtype), tensor(*shape[:2], kept + 1, kind=torch.int64)
    nearest = compress_kv.plan_nearest(key, kept_key, index, tensor(*shape, kind=torch.int64), tensor(*shape))
    merge = compress_kv.plan_merge(
        key, kept_key, order, starts, tensor(*shape), 0.5, tensor(*kept_key.shape, kind=dtype)
    )
    return [scores, *nearest, merge]


def _branch_plans(v: Variant, dtype: torch.dtype, dim: int) -> list[Launch]:
    """Every launch of cross-attention to 77 text tokens, and to 257 image tokens under a spatial mask, as in SDXL."""
    batch, heads, tokens = 2, 10, 4096

    def tensor(b: int, t: int, h: int) -> Tensor:
        return torch.empty(b, t, h, dim, dtype=dtype, device="meta").transpose(1, 2)

    def branch(b: int, t: int, weight: Tensor | None, mask: torch.dtype | None) -> decoupled_attention.Branch:
        seen = None if mask is None else torch.empty(batch, 1, tokens, t, dtype=mask, device="meta")
        seen = None if seen is None else seen.expand(-1, heads, -1, -1)
        key, value = (tensor(b, t, heads // v.groups) for _ in range(2))
        return decoupled_attention.Branch(key, value, weight, 1.0, seen, v.is_causal)

    query, out, grad_out = (tensor(batch, tokens, heads) for _ in range(3))
    spatial = torch.empty(batch, 1, tokens, device="meta").expand(-1, heads, -1)
    branches = [branch(batch, 77, None, None), branch(1, 257, spatial, v.mask)]
    problem = decoupled_attention.Problem(query, branches, dim**-0.5)
    lse, delta = (torch.empty(2, batch, heads, tokens, device="meta") for _ in range(2))
    grads = [(torch.empty(x.key.shape, dtype=dtype, device="meta"),) * 2 for x in branches]
    plan = decoupled_attention.plan_backward(problem, lse, delta, grad_out, query, grads, True)
    plan = [decoupled_attention.plan_forward(problem, out, lse), *plan]
    return list({launch.kernel.__name__: launch for launch in plan}.values())


def _diffuse_plans(activation: str, dtype: torch.dtype, prompts: int) -> list[Launch]:
    """Every launch of prompts that are read after attention: their number decides what a program holds."""
    batch, tokens, width = 64, 197, 768

    def tensor(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    x, base, out, grad_out, dx, dbase = (tensor(batch, tokens, width, kind=dtype) for _ in range(6))
    # Launchers round prompts and keys; their gradients stay float32.
    learned, grads = ([tensor(prompts, width, kind=kind) for _ in range(2)] for kind in (dtype, torch.float32))
    problem = diffuse_prompts.Problem(x, base, *learned, tensor(), activation, "rowmax")
    partial = diffuse_prompts.allocate_partial(problem)
    plan = diffuse_prompts.plan_backward(problem, grad_out, [dx, dbase, *grads], partial)
    plan.insert(0, diffuse_prompts.plan_forward(problem, out))
    return list({launch.kernel.__name__: launch for launch in plan}.values())


def _summary_plans(dtype: torch.dtype, width: int) -> list[Launch]:
    """Every launch of 20 summaries of a ViT's tokens for each of 4 tasks: the width decides what a program holds."""
    tasks, batch, summaries, tokens = 4, 64, 20, 197

    def tensor(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    selectors, grad_selectors = (tensor(tasks, summaries, width) for _ in range(2))
    x, grad_x = (tensor(batch, tokens, width, kind=dtype) for _ in range(2))
    out, grad_out = (tensor(tasks, batch, summaries, width, kind=dtype) for _ in range(2))
    problem = summarize_tokens.Problem(selectors, x, width**-0.5)
    lse = tensor(tasks, batch, summaries)
    plan = summarize_tokens.plan_backward(problem, out, lse, grad_out, grad_selectors, grad_x)
    plan.insert(0, summarize_tokens.plan_forward(problem, out, lse))
    return list({launch.kernel.__name__: launch for launch in plan}.values())


def source(launch: Launch) -> ASTSource:
    """What Triton's own launcher would compile: ones and None are constants, multiples of 16 are marked."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    values = launch.arguments | launch.constants
    for position, parameter in enumerate(launch.kernel.params):

        def describe(value: Any, path: tuple[int, ...], parameter: Any = parameter) -> Any:
            if isinstance(value, tuple) and not parameter.is_constexpr:
                return tuple(describe(x, (*path, i)) for i, x in enumerate(value))
            specialized = isinstance(value, (int, Tensor)) and not parameter.do_not_specialize
            number = specialized and isinstance(value, int)
            if parameter.is_constexpr or value is None or (number and value == 1):
                constants[path] = value
                return "constexpr"
            if specialized and (isinstance(value, Tensor) or value % 16 == 0):
                attributes[path] = [["tt.divisibility", 16]]
            if isinstance(value, Tensor):
                return "*" + SCALARS[value.dtype]
            return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"

        signature[parameter.name] = describe(values[parameter.name], (position,))
    return ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_job(job: Job) -> Usage:
    """Compile one kernel for its target and read what it takes."""
    launch = configured(job)
    target = TARGETS[job.target]
    compiled = triton.compile(source(launch), target=target, options=launch.options())
    registers = stack = None
    waits = False
    shared = compiled.metadata.shared
    if target.backend == "cuda":
        waits = target.arch == 90 and serialised(disassemble(compiled.asm["cubin"]))
        registers, stack, static = read_cubin(compiled.asm["cubin"], job.kernel)
        shared = max(shared, static)
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return Usage(registers, stack, shared, launch.config.warps, columns, waits)


def read_cubin(cubin: bytes, kernel: str) -> tuple[int, int, int]:
    """Registers and stack bytes of a thread, and static shared memory of a block."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    match = re.search(rf"Function {kernel}:\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump: no resource usage of {kernel} in {text!r}")
    registers, stack, shared = map(int, match.groups())
    return registers, stack, shared


def distinct(todo: list[Job]) -> dict[Job, Job]:
    """Every job, and the first one that compiles the same code."""
    first: dict[tuple, Job] = {}
    same = {}
    for job in todo:
        launch = configured(job)
        same[job] = first.setdefault((job.target, source(launch).hash(), launch.config), job)
    return same


def configured(job: Job) -> Launch:
    """The launch of a job, with the tile of its target."""
    with configs.compiling_for(architecture(job.target)):
        return next(x for x in plans(job.variant, DTYPES[job.dtype], job.dim) if x.kernel.__name__ == job.kernel)


def architecture(target: str) -> str:
    """The table of tiles that serves a target."""
    return f"sm_{target.removeprefix('cuda:')}" if target.startswith("cuda") else "sm_80"


def jobs(variants: list[str], dtypes: list[str], dims: list[int], targets: list[str]) -> Iterator[Job]:
    """Every kernel of every combination."""
    for variant in variants:
        for dtype in dtypes:
            for dim in dims:
                for launch in plans(variant, DTYPES[dtype], dim):
                    for target in targets:
                        yield Job(variant, launch.kernel.__name__, dtype, dim, target)


def faults(job: Job, usage: Usage) -> list[str]:
    """What the gate forbids: spills and serialised products in half precision with D <= 128, too much shared memory."""
    if not job.target.startswith("cuda"):
        return []
    found = []
    limit = SHARED_LIMIT[int(job.target.split(":")[1])]
    if usage.shared > limit:
        found.append(f"{usage.shared} bytes of shared memory, limit {limit}")
    if job.dtype != "fp32" and job.dim <= 128:
        if usage.stack:
            found.append(f"{usage.stack} bytes of stack: registers are spilled")
        if usage.serialised:
            found.append("wgmma is serialised: something writes an accumulator between products")
    return found


def table(rows: list[tuple[Job, Usage]]) -> str:
    """Markdown: one line a kernel, dtype and head size; registers/stack/shared KiB of every target."""
    targets = list(dict.fromkeys(job.target for job, _ in rows))
    lines = [
        "| kernel | variant | dtype | D | " + " | ".join(targets) + " |",
        "|---" * (4 + len(targets)) + "|",
    ]
    grouped: dict[tuple, dict[str, Usage]] = {}
    for job, usage in rows:
        grouped.setdefault((job.kernel, job.variant, job.dtype, job.dim), {})[job.target] = usage
    for (kernel, variant, dtype, dim), usages in grouped.items():
        cells = []
        for target in targets:
            u = usages[target]
            stack = "" if not u.stack else f" **stack {u.stack}**"
            usage = "compiles" if u.registers is None else f"{u.registers} / {u.shared / 1024:.0f}{stack}"
            cells.append(f"{u.warps}: {usage}")
        name = kernel.removesuffix("_kernel")
        lines.append(f"| {name} | {variant} | {dtype} | {dim} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Compile the matrix; exit code 1 if the gate forbids something."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    shown = ["plain", "library", "cache", "branches", "diffuse", "summaries"]
    parser.add_argument("--variants", nargs="+", default=shown, choices=VARIANTS, help="[%(default)s]")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES, help="[%(default)s]")
    parser.add_argument("--dims", nargs="+", type=int, default=list(SHOWN), help="[%(default)s]")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write one line a kernel here")
    parser.add_argument("--write", action="store_true", help="write the table into kernels/README.md")
    args = parser.parse_args(argv)
    todo = list(jobs(args.variants, args.dtypes, args.dims, args.targets))
    same = distinct(todo)
    unique = list(dict.fromkeys(same.values()))
    with ProcessPoolExecutor(args.workers) as pool:
        compiled = tqdm(pool.map(compile_job, unique), "compile", len(unique), leave=False)
        usages = dict(zip(unique, compiled, strict=True))
    rows = [(job, usages[same[job]]) for job in todo]
    if args.json:
        args.json.write_text("".join(json.dumps({**j._asdict(), **u._asdict()}) + "\n" for j, u in rows))
    if args.write:
        before, rest = README.read_text().split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}")
    else:
        print(table(rows))
    bad = [(job, fault) for job, usage in rows for fault in faults(job, usage)]
    for job, fault in bad:
        print(f"bench.resources: {' '.join(map(str, job))}: {fault}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
