# SPDX-License-Identifier: Apache-2.0
"""Run a benchmark case: ``python -m bench.run prompt_attention --set prompts=10,50 --json results.jsonl``."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from bench import cases
from bench.case import CannotRun, Case, Provider, difference
from bench.measure import (
    DIED,
    FAILED,
    OOM,
    WRONG,
    DeviceClock,
    attempt,
    give_back,
    interleave,
    machine,
    summary,
    synchronize,
    wall_clock,
)
from bench.rows import append, read, settings
from fastprompt.ops.cpp import extension
from fastprompt.ops.cpp.extension import ISAS
from fastprompt.tuning.memory import peak_memory

ROOT = Path(__file__).parent.parent

#: Exit status of a run whose time was up: the same command goes on where it stopped (EX_TEMPFAIL of sysexits.h).
GO_ON = 75


def names() -> list[str]:
    """Every case."""
    return [m.name for m in pkgutil.iter_modules(cases.__path__)]


def build(name: str, device: str, params: dict[str, Any], only: list[str] | None = None) -> Case:
    """A case, with all its providers or with those in ``only`` and the baseline."""
    try:
        case = importlib.import_module(f"bench.cases.{name}").build(device, **params)
    except CannotRun as error:  # none of its providers can
        return Case(name, {"fastprompt": Provider(lambda: list, why_not=str(error))}, "fastprompt", list, 0.0, params)
    unknown = set(only or ()) - set(case.providers)
    if unknown:
        raise SystemExit(f"--providers: got {', '.join(unknown)}, expected some of {', '.join(case.providers)}")
    if only:
        for provider in set(case.providers) - {*only, case.baseline}:
            del case.providers[provider]
    return case


def grid(settings: list[str]) -> Iterator[dict[str, int | float | str]]:
    """Every combination of ``["prompts=10,50", "dtype=float32"]``, as keyword arguments."""
    given = [(name, values.split(",")) for name, values in (item.split("=", 1) for item in settings)]
    for values in itertools.product(*(v for _, v in given)):
        yield {n: _number(v) for (n, _), v in zip(given, values, strict=True)}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def measure(
    case: Case, device: str, rounds: int, peak: Callable[[str], Any], tell: Callable[[str | None], Any] = str
) -> dict[str, dict[str, Any]]:
    """One row a provider: times, ratios and peak memory, or why there are none.

    ``peak(provider)`` returns bytes, or a text that says why it cannot run; ``tell(provider)`` is called before it is
    run for the first time, and with None before all are timed.
    """
    want, why_not = attempt(case.reference)
    if why_not:  # nothing is timed unchecked
        return {name: {"why_not": f"{FAILED}: the reference: {why_not}"} for name in case.providers}
    rows: dict[str, dict[str, Any]] = {}
    steps = {}
    for name, provider in case.providers.items():
        if not provider.why_not:
            tell(name)
        rows[name] = _examine(case, name, want, peak)
        synchronize()  # after an error of the device this raises, while it is known whose it is
        if "why_not" not in rows[name]:
            step, why_not = attempt(provider.build)
            if why_not:
                rows[name] = {"why_not": why_not}
            else:
                steps[name] = step
    tell(None)
    clock = DeviceClock() if device == "cuda" and case.device_time else wall_clock
    times, failed = interleave(steps, rounds, clock)
    for name, numbers in summary(times, case.baseline).items():
        rows[name] = {**numbers, **rows[name]}
    return rows | {name: {"why_not": why_not} for name, why_not in failed.items()}


def _examine(case: Case, name: str, want: list[Tensor], peak: Callable[[str], Any]) -> dict[str, Any]:
    """What is known of a provider before it is timed: its difference from the reference, peak memory, counted work."""
    provider = case.providers[name]
    if provider.why_not:
        return {"why_not": provider.why_not if provider.why_not == DIED else f"not run: {provider.why_not}"}
    found, why_not = attempt(lambda: difference(case, name, want))
    if why_not is None:
        peak_bytes, why_not = attempt(lambda: peak(name))
        why_not = why_not or (peak_bytes if isinstance(peak_bytes, str) else None)
    if why_not:
        return {"why_not": why_not}
    work = {"flops": provider.work.flops, "bytes": provider.work.bytes} if provider.work else {}
    tokens = {} if provider.tokens is None else {"tokens": provider.tokens}
    return {"difference": found, "peak_bytes": peak_bytes, **work, **tokens}


def peak_in_fresh_process(
    case: str, device: str, params: dict[str, Any], provider: str, isa: str | None = None
) -> int | str:
    """Peak memory of two steps; on a CPU only a process that did nothing else can tell."""
    settings = [f"{name}={value}" for name, value in params.items()]
    command = [sys.executable, "-m", "bench.run", case, "--device", device, "--memory-of", provider, "--set", *settings]
    command += ["--isa", isa] if isa else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode == -9:  # the kernel's answer to a process that takes too much
        return OOM
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}, its message is above")
    return json.loads(done.stdout.splitlines()[-1])


def show(case: Case, rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a table for people."""
    ratio = f"x {case.baseline}"
    head = (
        f"{'provider':<20} {'p50 ms':>9} {'p20':>9} {'p80':>9} {ratio:>14} {'peak MiB':>9} {'TFLOP/s':>8} {'tokens':>8}"
    )
    lines = [f"{case.name}: {settings(case.params)}", head]
    for name, r in rows.items():
        if "why_not" in r:
            lines.append(f"{name:<20} {r['why_not']}")
            continue
        times = " ".join(f"{1e3 * r[k]:9.3f}" for k in ("p50_s", "p20_s", "p80_s"))
        ratio = f"{r['ratio_p50']:14.3f}" if "ratio_p50" in r else f"{'':>14}"
        rate = f"{r['flops'] / r['p50_s'] / 1e12:8.2f}" if "flops" in r else f"{'':>8}"
        tokens = f"{r['tokens']:8}" if "tokens" in r else ""
        lines.append(f"{name:<20} {times} {ratio} {r['peak_bytes'] / 2**20:9.0f} {rate} {tokens}".rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None, tell: Callable[[dict[str, Any]], Any] = dict) -> int:
    """Check, time and measure a case; print a table, append JSON lines; 1 if a provider is wrong or fails.

    ``tell`` gets what is about to run, as far as it is known: ``case``, ``set``, ``params``, ``provider``.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("case", choices=names())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds; every provider runs once a round")
    parser.add_argument("--json", type=Path, help="append one JSON line a provider to this file")
    parser.add_argument("--resume", action="store_true", help="leave out the parameters that the JSON file has")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help=f"start nothing more after that long, and exit with {GO_ON}"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE[,VALUE]", help="parameters of the case")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these and the baseline")
    parser.add_argument(
        "--isa", choices=ISAS, help="hold the C++ kernels to this level; PyTorch is held to it by ATEN_CPU_CAPABILITY, "
        "ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS",
    )  # fmt: skip
    parser.add_argument("--memory-of", metavar="PROVIDER", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but PyTorch sees no CUDA device; use --device cpu")
    start = monotonic()
    header = machine(args.device)
    if args.isa:
        extension.best_isa = lambda: args.isa
    if args.device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32 in the embedding of patches, too
    wrong = False
    for params in grid(args.set):
        given = params | ({"isa": args.isa} if args.isa else {})
        if args.resume and args.json and measured(args.json, args.case, args.providers, set=given):
            continue
        if monotonic() - start > 60 * args.minutes:
            return GO_ON
        doing = {"case": args.case, "set": given}
        tell(doing)
        give_back()  # what the last set of parameters held
        torch.compiler.reset()  # a provider compiled for other shapes would be compiled again for any, and run slower
        case = build(args.case, args.device, params, args.providers)
        if args.isa:
            case = replace(case, params={**case.params, "isa": args.isa})
        if args.memory_of:
            print(json.dumps(_peak(case, args.memory_of, args.device)))
            continue
        if args.resume and args.json and measured(args.json, args.case, args.providers, params=case.params):
            continue
        if args.device == "cuda":
            _prepare_for_gpu(case, args.json)

        def peak(provider: str, case: Case = case, params: dict = params) -> int | str:
            if args.device == "cpu":
                return peak_in_fresh_process(case.name, args.device, params, provider, args.isa)
            return _peak(case, provider, args.device)

        def about(provider: str | None, doing: dict = doing, case: Case = case) -> None:
            tell(doing | ({"params": case.params, "provider": provider} if provider else {}))

        rows = measure(case, args.device, args.rounds, peak, about)
        synchronize()  # after an error of the device this raises, before rows are kept that only repeat it
        wrong |= any(r.get("why_not", "").startswith((WRONG, FAILED)) for r in rows.values())
        print(show(case, rows), end="\n\n", flush=True)
        if args.json:
            common = {
                "baseline": case.baseline, "params": case.params, "set": given, "rounds": args.rounds,
                "machine": header,
            }  # fmt: skip
            common |= {"only": args.providers} if args.providers else {}
            append(args.json, [{"case": case.name, "provider": n, **r, **common} for n, r in rows.items()])
        del case, peak, about
    return int(wrong)


def _prepare_for_gpu(case: Case, file: Path | None) -> None:
    """Build a provider once, for its memory and its times, and leave out those that ended a process before."""
    ended = {r["provider"] for r in (read(file) if file else ()) if is_of(r, case) and r.get("why_not") == DIED}
    for name, provider in case.providers.items():
        why_not = DIED if name in ended else provider.why_not
        case.providers[name] = replace(provider, build=cache(provider.build), why_not=why_not)


def is_of(row: dict[str, Any], case: Case) -> bool:
    """Whether a row is of these parameters of the case."""
    return row["case"] == case.name and row["params"] == case.params


def _peak(case: Case, provider: str, device: str) -> int | str:
    build = case.providers[provider].build
    step, why_not = attempt(build)
    if why_not is None:
        found, why_not = attempt(lambda: peak_memory(lambda: (step(), step()), device))
    if why_not and hasattr(build, "cache_clear"):
        build.cache_clear()  # what did not fit
    return why_not or found


def measured(file: Path, case: str, only: Sequence[str] | None, **known: dict[str, Any]) -> bool:
    """Whether a file has rows of a case with ``known``, of all providers or of those in ``only``."""
    for row in read(file):
        if row["case"] != case or any(row.get(name) != value for name, value in known.items()):
            continue
        died = row.get("why_not") == DIED and "set" not in row  # one provider, before the others were measured
        if not died and ("only" not in row or (only and set(only) <= set(row["only"]))):
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
