# SPDX-License-Identifier: Apache-2.0
"""Run a benchmark case: ``python -m bench.run vpt_step --json bench/results/vpt_step-cpu.jsonl``."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

from bench import cases
from bench.measure import interleave, machine, summary
from fastprompt.tuning.memory import peak_memory


def names() -> list[str]:
    """Every case."""
    return [m.name for m in pkgutil.iter_modules(cases.__path__)]


def main(argv: list[str] | None = None) -> int:
    """Check, time and measure one case; print a table and append JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("case", choices=names())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds; every provider runs once a round")
    parser.add_argument("--json", type=Path, help="append one JSON line a provider to this file")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters of the case")
    parser.add_argument("--memory-of", metavar="PROVIDER", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    given = dict(item.split("=", 1) for item in args.set)
    overrides = {name: int(value) if value.isdigit() else value for name, value in given.items()}
    case = importlib.import_module(f"bench.cases.{args.case}").build(args.device, **overrides)
    if args.memory_of:
        step = case.providers[args.memory_of]()
        print(peak_memory(lambda: (step(), step()), args.device))
        return 0
    differences = case.check()
    print(f"{case.name}: providers agree: {differences}", file=sys.stderr)
    rows = summary(interleave({n: build() for n, build in case.providers.items()}, args.rounds), case.baseline)
    forwarded = [args.case, "--device", args.device, "--set", *args.set]
    for name in rows:
        command = [sys.executable, "-m", "bench.run", *forwarded, "--memory-of", name]
        rows[name]["peak_bytes"] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    header = machine(args.device)
    lines = [
        {"case": case.name, "provider": n, **r, "baseline": case.baseline, "params": case.params,
         "differences": differences, "rounds": args.rounds, "machine": header}
        for n, r in rows.items()
    ]  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with args.json.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    print(f"{'provider':<14} {'p50 s':>8} {'p20':>8} {'p80':>8} {'x ' + case.baseline:>12} {'peak MiB':>9}")
    for n, r in rows.items():
        print(
            f"{n:<14} {r['p50_s']:8.3f} {r['p20_s']:8.3f} {r['p80_s']:8.3f} {r['ratio_p50']:12.3f} "
            f"{r['peak_bytes'] / 2**20:9.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
