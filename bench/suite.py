# SPDX-License-Identifier: Apache-2.0
"""Every case with the parameters that are measured: ``python -m bench.suite --device cuda --minutes 8``.

On a CPU each case has a results file of its own. On a GPU all go into ``bench/results/GPU-DATE.jsonl``, the ceilings
first, then the tests of the kernels, and a summary in Markdown is written beside it. What a file holds is not measured
again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from bench import gpu_report
from bench.measure import FAILED, WRONG, machine
from bench.rows import RESULTS, append, ceilings, holding, read
from bench.run import GO_ON, ROOT, grid, names

#: What remains to be done: its name, and the work, which gets the minutes that are left and returns an exit status.
Step = tuple[str, Callable[[float], int]]


class Runs(NamedTuple):
    """A case, how many rounds, and its parameters as `bench.run` takes them."""

    case: str
    rounds: int
    settings: list[str]


def plan(device: str) -> Iterator[Runs]:
    """What is measured on a device, the operations before the steps that are made of them."""
    gpu = device == "cuda"
    dtypes, modes = "dtype=bfloat16,float32" + ",float16" * gpu, "mode=forward,forward+backward"
    yield Runs("prompt_attention", 15, ["prompts=10,50,100,200", dtypes, modes])
    if gpu:  # ViT-L/14, and a sequence whose prompt is a small part
        large = ["batch=64", "heads=16", "tokens=257", "prompts=10,50,200"]
        yield Runs("prompt_attention", 15, [*large, "dtype=bfloat16", "mode=forward+backward"])
        yield Runs("prompt_attention", 9, ["batch=4", "tokens=4096", "prompts=50", "dtype=bfloat16", modes])
    yield Runs("prompt_attention_varlen", 15, [*["classes=100,1000"] * gpu, dtypes, modes])
    yield Runs("diffuse_prompts", 15, ["prompts=100,200", dtypes, modes])
    yield Runs("decoupled_attention", 15, ["shape=sd15,sdxl", dtypes, modes])
    yield Runs("summarize_tokens", 15, [dtypes, modes])
    yield Runs("key_scores", 5, ["tokens=1024,4096,8192,16384"])
    yield Runs("compress_kv", 5, [dtypes])
    if gpu:
        yield Runs("key_scores", 5, ["tokens=8192,32768", "heads=28", "heads_kv=4", "dim=128"])
        yield Runs("compress_kv", 5, ["tokens=8192,32768", "heads_kv=4", "dim=128", "dtype=bfloat16"])
    yield Runs("decode_attention", 15, ["tokens=1024,8192,32768", dtypes])
    yield Runs("prompt_bank", 15, ["dtype=bfloat16", modes])
    if not gpu:
        yield Runs("cpu_candidates", 15, ["prompts=10,100", dtypes])
    yield Runs("vpt_step", 9, ["model=ViT-B,ViT-L", "prompts=10,50,100"] if gpu else [])
    yield Runs("apt_step", 9, ["model=ViT-B", "prompts=10,50,100"] if gpu else ["model=DINOv2-S,ViT-B"])
    yield Runs("prefix_step", 9, [dtypes, "checkpointing=0,1"])
    yield Runs("coop_text", 5, ["classes=10,100,1000", "dtype=float32,bfloat16"])
    yield Runs("cocoop_step", 3, ["batch=8", "tower=0,1"])
    yield Runs("cocoop_step", 1, ["batch=32"])
    if gpu:
        yield Runs("cocoop_step", 1, ["batch=8", "classes=1000"])
    yield Runs("maple_step", 5, [])
    yield Runs("multilane", 5, ["tasks=1,4,10"])
    yield Runs("ipadapter", 3, ["shape=sd15,sdxl"] if gpu else [])
    yield Runs("prefill_compress", 5, [])
    yield Runs("decode", 5, [])
    if gpu:
        qwen = "model=Qwen2.5-VL-7B"
        yield Runs("prefill_compress", 3, [qwen, "tokens=8192,32768,65536"])
        yield Runs("decode", 3, [qwen, "clock=host,device", "tokens=8192,32768,65536"])
        yield Runs("decode", 3, [qwen, "clock=host,device", "tokens=32768", "batch=8"])


#: The tests that run Triton kernels where there is a GPU.
TESTS = (
    "test_triton_device", "test_prompt_attention_triton", "test_prompt_attention_varlen_triton",
    "test_prompt_attention_library",
    "test_decoupled_attention_triton", "test_diffuse_prompts", "test_key_scores", "test_compress_kv",
    "test_summarize_tokens", "test_warmup",
)  # fmt: skip


def gpu_file() -> Path:
    """Today's results of this GPU."""
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    return RESULTS / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}.jsonl"


def steps(device: str, cases: list[str], file: Path | None) -> Iterator[Step]:
    """What ``file`` lacks, in order; without one, each case has its own, and `bench.run` knows what that lacks."""
    if file and not ceilings(file):
        yield "the ceilings", lambda minutes: _module("bench.roofline", "--device", device, "--json", str(file))
    if file and device == "cuda" and not cases:
        known = {t["tests"] for t in holding(file, "tests")}
        for name in TESTS:
            if name not in known:
                yield name, partial(run_tests, file, device, ROOT / "tests" / f"{name}.py")
    for runs in plan(device):
        if cases and runs.case not in cases:
            continue
        own = file or RESULTS / f"{runs.case}-{device}.jsonl"
        if _lacks(own, runs):
            yield runs.case, partial(run_case, runs, device, own)


def run_tests(file: Path, device: str, path: Path, minutes: float) -> int:
    """Run a file of tests, to its end, and add what came out."""
    workers = ["-n", str(min(os.cpu_count() or 1, 12))] if find_spec("xdist") else []  # each takes memory of the GPU
    with tempfile.TemporaryDirectory() as folder:
        status = _module("pytest", "-q", str(path), f"--junitxml={folder}/found.xml", *workers)
        if status > 1:  # interrupted, or no test ran; pytest has said why
            return status
        found = list(ElementTree.parse(Path(folder, "found.xml")).iter("testcase"))
    failed = [c.get("name") for c in found if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in found)
    counts = {"passed": len(found) - len(failed) - skipped, "skipped": skipped, "failed": failed}
    append(file, [{"tests": path.stem, **counts, "machine": machine(device)}])
    return status


def run_case(runs: Runs, device: str, file: Path, minutes: float) -> int:
    """Measure what is left of a case, in a process of its own, which an error of the device ends with it."""
    options = ["--device", device, "--rounds", str(runs.rounds), "--minutes", f"{minutes:.2f}", "--resume"]
    return _module("bench.run", runs.case, *options, "--json", str(file), "--set", *runs.settings)


def _lacks(file: Path, runs: Runs) -> bool:
    held = [r.get("set") for r in read(file) if r["case"] == runs.case]
    return any(params not in held for params in grid(runs.settings))


def _module(name: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", name, *arguments], cwd=ROOT, check=False).returncode


def run(todo: Iterator[Step], minutes: float) -> int:
    """Do one after the other while there is time; 1 if one failed."""
    start, status = monotonic(), 0
    for name, work in todo:
        remaining = minutes - (monotonic() - start) / 60
        found = GO_ON if remaining <= 0 else work(remaining)
        if found == GO_ON:
            print(f"bench.suite: {minutes:g} minutes are over, in or before {name}; the same command goes on there")
            return GO_ON
        if found:
            print(f"bench.suite: {name} failed, exit status {found}; its message is above", file=sys.stderr)
            status = 1
    return status


def main(argv: list[str] | None = None) -> int:
    """Measure what is left; 1 if a test failed or a provider was wrong, 75 if time was up and the same goes on."""
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="only these, and no tests [all]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help=f"start nothing more after that long, and exit with {GO_ON}"
    )
    parser.add_argument("--json", type=Path, help="one file for everything [GPU-DATE.jsonl on a GPU]")
    args = parser.parse_args(argv)
    unknown = set(args.cases) - set(names())
    if unknown:
        parser.error(f"CASE: got {', '.join(sorted(unknown))}, expected some of {', '.join(names())}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but PyTorch sees no CUDA device; use --device cpu")
    file = args.json or (gpu_file() if args.device == "cuda" else None)
    if file is None:
        return run(steps(args.device, args.cases, None), args.minutes)
    file = file.resolve()  # what is run has another folder
    try:
        status = run(steps(args.device, args.cases, file), args.minutes)
    finally:
        if file.exists():
            file.with_suffix(".md").write_text(gpu_report.summary(file, [r.case for r in plan(args.device)]))
            print(f"bench.suite: {file.with_suffix('.md')}")
    bad = any(r.get("why_not", "").startswith((WRONG, FAILED)) for r in read(file))
    return status or int(bad or any(t["failed"] for t in holding(file, "tests")))


if __name__ == "__main__":
    sys.exit(main())
