# SPDX-License-Identifier: Apache-2.0
"""Every case with the parameters that are measured: ``python -m bench.suite --device cuda --minutes 8``.

On a CPU each case has a results file of its own. On a GPU all go into ``bench/results/GPU-DATE.jsonl``, the ceilings
first, then a sample of the kernels' tests, then what `bench.targets` asks for, then all tests and everything else; a
summary in Markdown is written beside it. What a file holds is not measured again.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from bench import forks, gpu_report, targets
from bench.gpu_report import SAMPLE
from bench.measure import DIED, FAILED, WRONG, machine
from bench.rows import RESULTS, append, by_params, ceilings, holding, key, read
from bench.run import GO_ON, ROOT, grid, measured, names

#: What remains to be done: its name, and the work, which gets the minutes that are left and returns an exit status.
Step = tuple[str, Callable[[float], int]]


class Runs(NamedTuple):
    """A case, how many rounds, its parameters as `bench.run` takes them, and which providers [all]."""

    case: str
    rounds: int
    settings: list[str]
    only: tuple[str, ...] = ()


TRAINING = ("dtype=bfloat16", "mode=forward+backward")
QWEN = "model=Qwen2.5-VL-7B"
#: What compiles in no time, of `prompt_attention`, and of packed sequences with the one that shares keys as they do.
QUICK = (
    "floor", "same_keys", "same_keys/cudnn", "concat", "concat/flash", "concat/efficient", "concat/cudnn", "expand",
    "xformers", "fastprompt",
)  # fmt: skip
SHARING = (
    "padded", "trimmed", "trimmed/flash", "trimmed/efficient", "trimmed/cudnn", "concat", "concat/flash",
    "concat/efficient", "concat/cudnn", "flash_attn", "flex/packed", "fastprompt",
)  # fmt: skip


def first(device: str) -> Iterator[Runs]:
    """On a GPU, what `bench.targets` asks for, against what compiles in no time: some minutes."""
    if device != "cuda":
        return
    large = ["batch=64", "heads=16", "tokens=257", "prompts=10,50,200"]  # ViT-L/14
    yield Runs("prompt_attention", 15, ["prompts=10,50,100,200", *TRAINING], QUICK)
    yield Runs("prompt_attention", 15, [*large, *TRAINING], QUICK)
    yield Runs("prompt_attention", 9, ["batch=4", "tokens=4096", "prompts=50", *TRAINING], QUICK)
    yield Runs("prompt_attention_varlen", 15, ["classes=1000", *TRAINING], SHARING)
    yield Runs("diffuse_prompts", 15, ["prompts=100,200", *TRAINING], ("eager", "fastprompt"))
    backends = ("sdpa/flash", "sdpa/efficient", "sdpa/cudnn", "xformers")
    attended = ["shape=sd15,sdxl", "dtype=bfloat16", "mode=forward"]
    yield Runs("decoupled_attention", 15, attended, ("floor", "sdpa", *backends, "fastprompt"))
    yield Runs("key_scores", 5, ["tokens=8192,16384"], ("chunked", "flash", "forward", "fastprompt"))
    yield Runs("compress_kv", 5, ["dtype=bfloat16"], ("published", "fastprompt"))
    cache = ["tokens=8192,32768", "heads_kv=4", "dim=128", "dtype=bfloat16"]
    yield Runs("compress_kv", 5, cache, ("published", "fastprompt"))
    yield Runs("summarize_tokens", 15, [*TRAINING], ("eager", "sdpa", "fastprompt"))
    yield Runs("vpt_step", 9, ["model=ViT-B,ViT-L", "prompts=10,50"])
    yield Runs("apt_step", 9, ["model=ViT-B", "prompts=10,50"], ("eager", "fastprompt", "floor"))
    texts = ["classes=1000", "dtype=float32,bfloat16"]
    yield Runs("coop_text", 5, texts, ("published", "trimmed", "shared", "fastprompt"))
    yield Runs("prefill_compress", 3, [QWEN, "tokens=8192"], ("plain", "lookm"))
    yield Runs("decode", 3, [QWEN, "clock=device,host", "tokens=32768", "batch=8"], ("plain", "lookm 20%"))


def plan(device: str) -> Iterator[Runs]:
    """What is measured on a device, the operations before the steps that are made of them."""
    yield from first(device)
    yield from rest(device)


def rest(device: str) -> Iterator[Runs]:
    """What is not measured `first`, and that once more against all there is."""
    gpu = device == "cuda"
    dtypes, modes = "dtype=bfloat16,float32" + ",float16" * gpu, "mode=forward,forward+backward"
    yield Runs("prompt_attention", 15, ["prompts=10,50,100,200", dtypes, modes])
    if gpu:  # ViT-L/14, and a sequence whose prompt is a small part
        yield Runs("prompt_attention", 15, ["batch=64", "heads=16", "tokens=257", "prompts=10,50,200", *TRAINING])
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
        yield Runs("prefill_compress", 3, [QWEN, "tokens=8192,32768"])
        yield Runs("decode", 3, [QWEN, "clock=host,device", "tokens=8192,32768,65536"])
        yield Runs("decode", 3, [QWEN, "clock=host,device", "tokens=32768", "batch=8"])
        yield Runs("prefill_compress", 1, [QWEN, "tokens=65536"])


#: The tests that run Triton kernels where there is a GPU.
TESTS = (
    "test_triton_device", "test_prompt_attention_triton", "test_prompt_attention_varlen_triton",
    "test_prompt_attention_library",
    "test_decoupled_attention_triton", "test_diffuse_prompts", "test_key_scores", "test_compress_kv",
    "test_summarize_tokens", "test_warmup",
)  # fmt: skip
#: These first, with so many of every test and dtype: every kernel against the oracle, in a minute.
PER_DTYPE = 1
#: All of them, in one go; most of it is Triton compiling what each process needs. Not begun with less time than that.
MATRIX = "every test"
MATRIX_MINUTES = 5.0
#: At a time, where each takes memory of the GPU.
PROCESSES = min(os.cpu_count() or 1, 12)
#: Minutes that compiling ahead takes at most.
COMPILING = 2.0


def gpu_file() -> Path:
    """Today's results of this GPU."""
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    return RESULTS / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}.jsonl"


def steps(device: str, cases: list[str], file: Path | None) -> Iterator[Step]:
    """What ``file`` lacks, in order; without one, each case has its own, and `bench.run` knows what that lacks."""
    if file and not ceilings(file):
        yield "the ceilings", partial(run_ceilings, file, device)
    tested = file if device == "cuda" and not cases else None
    if tested and SAMPLE not in _tests(tested):
        yield SAMPLE, partial(run_tests, tested, device, SAMPLE, [f"--sample={PER_DTYPE}", *map(_path, TESTS)])
    yield from _measured(first(device), device, cases, file)
    if tested and MATRIX not in _tests(tested):
        yield MATRIX, partial(run_tests, tested, device, MATRIX, [*map(_path, TESTS)], least=MATRIX_MINUTES)
    yield from _measured(rest(device), device, cases, file)


def _measured(wanted: Iterable[Runs], device: str, cases: list[str], file: Path | None) -> Iterator[Step]:
    """Of these, what lacks; on a GPU everything is compiled before, many at a time."""
    wanted = [runs for runs in wanted if not cases or runs.case in cases]
    lacking = [(runs, params) for runs in wanted for params in _lacking(_file(runs, device, file), runs)]
    if device == "cuda" and lacking:
        yield "compiling", partial(compile_ahead, lacking, device)
    for runs in wanted:
        own = _file(runs, device, file)
        if _lacking(own, runs):
            yield runs.case, partial(run_case, runs, device, own)


def _file(runs: Runs, device: str, file: Path | None) -> Path:
    return file or RESULTS / f"{runs.case}-{device}.jsonl"


def _lacking(file: Path, runs: Runs) -> list[dict[str, Any]]:
    return [params for params in grid(runs.settings) if not measured(file, runs.case, runs.only, set=params)]


def _tests(file: Path) -> set[str]:
    return {t["tests"] for t in holding(file, "tests")}


def _path(name: str) -> str:
    return str(ROOT / "tests" / f"{name}.py")


def run_ceilings(file: Path, device: str, minutes: float) -> int:
    """Measure what the device can do at most."""
    return _start(device)("bench.roofline", "--device", device, "--json", str(file))


def run_tests(file: Path, device: str, name: str, arguments: list[str], minutes: float, least: float = 0.0) -> int:
    """Run tests, to their end, where at least so many minutes are left, and add what came out under a name."""
    if minutes < least:
        return GO_ON
    workers = ["-n", str(PROCESSES)] if find_spec("xdist") else []
    with tempfile.TemporaryDirectory() as folder:
        status = module("pytest", "-q", *arguments, f"--junitxml={folder}/found.xml", *workers)
        if status > 1:  # interrupted, or no test ran; pytest has said why
            return status
        found = list(ElementTree.parse(Path(folder, "found.xml")).iter("testcase"))
    failed = [_named(c) for c in found if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in found)
    counts = {"passed": len(found) - len(failed) - skipped, "skipped": skipped, "failed": failed}
    append(file, [{"tests": name, **counts, "machine": machine(device)}])
    return status


def _named(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"


def compile_ahead(lacking: list[tuple[Runs, dict[str, Any]]], device: str, minutes: float) -> int:
    """Run everything once, many at a time, so that Triton and inductor find on disk what is then measured.

    Both key what they keep by source, types, constants and options, so that the same kernels serve. It takes a part of
    the time at most: what it has not reached, or what fails here, is compiled, or fails, where it is measured.
    """
    end = monotonic() + 60 * min(minutes / 4, COMPILING)
    waiting, running = lacking[::-1], []
    while (waiting or running) and (left := end - monotonic()) > 0:
        while waiting and len(running) < PROCESSES:
            runs, params = waiting.pop()
            running.append(forks.start(forks.run_once, runs.case, device, params, runs.only))
        wait([child.sentinel for child in running], left)
        running = [child for child in running if child.is_alive()]
    for child in running:
        child.kill()
        child.join()
    return 0


def run_case(runs: Runs, device: str, file: Path, minutes: float) -> int:
    """Measure what is left of a case, in a process of its own, which an error of the device ends with it.

    What was running then gets a row that says so, and the rest goes on without it.
    """
    end = monotonic() + 60 * minutes
    while True:
        left = (end - monotonic()) / 60
        options = ["--device", device, "--rounds", str(runs.rounds), "--minutes", f"{left:.2f}", "--resume"]
        options += ["--providers", *runs.only] if runs.only else []
        told: list[dict[str, Any]] = []
        arguments = [runs.case, *options, "--json", str(file), "--set", *runs.settings]
        status = _start(device)("bench.run", *arguments, told=told)
        if not told or not (status < 0 or status == forks.CRASHED):
            return status
        ended = _ended(told[-1], device)
        if key(ended) in {key(r) for r in read(file) if r.get("why_not") == DIED}:
            return status  # once more, though it was left out
        append(file, [ended])


def _ended(doing: dict[str, Any], device: str) -> dict[str, Any]:
    """A row for what ended its process: a provider, or all that has these parameters."""
    row = {"case": doing["case"], "baseline": "", "rounds": 0, "machine": machine(device), "why_not": DIED}
    if "provider" in doing:
        return row | {"params": doing["params"], "provider": doing["provider"]}
    return row | {"params": doing["set"], "set": doing["set"], "provider": "reference"}


def _start(device: str) -> Callable[..., int]:
    """On a GPU a fork of a process that has imported everything; on a CPU, whose memory is measured, a new one."""
    return forks.run if device == "cuda" else module


def module(name: str, *arguments: str, told: list[dict[str, Any]] | None = None) -> int:
    """The exit status of ``python -m NAME``."""
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
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # `timeout` leaves a page, too
    try:
        status = run(steps(args.device, args.cases, file), args.minutes)
    finally:
        if file.exists():
            file.with_suffix(".md").write_text(gpu_report.summary(file, [r.case for r in plan(args.device)]))
            print(targets.table(by_params(read(file)), ceilings(file)))
            print(f"bench.suite: {file.with_suffix('.md')}")
    bad = any(r.get("why_not", "").startswith((WRONG, FAILED)) for r in read(file))
    return status or int(bad or any(t["failed"] for t in holding(file, "tests")))


if __name__ == "__main__":
    sys.exit(main())
