# SPDX-License-Identifier: Apache-2.0
"""What the first call of a kernel costs: ``python -m bench.first_call``, no GPU needed.

Every kernel is compiled for a target that need not be present, with the shipped tile and nothing cached: Triton, LLVM
and ptxas. Seconds are of the processor (user and system, ptxas included), not of a clock on the wall, so that what else
runs on the machine hardly counts. What a GPU adds, loading a few dozen kilobytes, is not in them.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
from pathlib import Path

import triton
from tqdm import tqdm

from bench.measure import machine
from bench.resources import TARGETS, VARIANTS, Job, compile_job, distinct, jobs

RESULTS = Path(__file__).parent / "results" / "first-call.json"

#: How often a kernel is compiled that takes longer than it may.
TRIES = 3
#: Seconds that no kernel may take.
LIMIT = 3.0


def processor_seconds() -> float:
    """User and system time of this process and of the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in used)


def compile_seconds(todo: list[Job]) -> dict[Job, float]:
    """What each job costs, one after the other; of jobs with the same code, the first."""
    seconds: dict[Job, float] = {}
    unique = list(dict.fromkeys(distinct(todo).values()))
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        # What a process pays once whatever it compiles, such as loading LLVM, is paid before.
        triton.knobs.cache.dir = f"{folder}/before"
        compile_job(unique[0])
        for job in tqdm(unique, "compile", leave=False):
            # Whatever else the machine does only adds: what seems too slow is tried again.
            for i in range(TRIES):
                seconds[job] = min(seconds.get(job, math.inf), _compile(job, f"{folder}/{i}"))
                if seconds[job] <= LIMIT:
                    break
    return seconds


def _compile(job: Job, folder: str) -> float:
    triton.knobs.cache.dir = folder
    start = processor_seconds()
    compile_job(job)
    return processor_seconds() - start


def main(argv: list[str] | None = None) -> int:
    """Measure; exit code 1 if a kernel takes longer than the limit."""
    parser = argparse.ArgumentParser(prog="python -m bench.first_call", description=__doc__)
    parser.add_argument("--target", default="cuda:90", choices=TARGETS, help="[%(default)s]")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="[all]")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], help="[%(default)s]")
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256], help="[%(default)s]")
    parser.add_argument("--json", type=Path, default=RESULTS, help="[bench/results/first-call.json]")
    args = parser.parse_args(argv)
    seconds = compile_seconds(list(jobs(args.variants, args.dtypes, args.dims, [args.target])))
    rows = [job._asdict() | {"seconds": round(x, 3)} for job, x in seconds.items()]
    lines = ",\n".join(json.dumps(row) for row in sorted(rows, key=lambda row: -row["seconds"]))
    args.json.write_text(f'{{"machine": {json.dumps(machine("cpu"))},\n"compiled": [\n{lines}\n]}}\n')
    slow = {job: x for job, x in seconds.items() if x > LIMIT}
    for job, x in slow.items():
        print(f"bench.first_call: {' '.join(map(str, job))}: {x:.1f} s, limit {LIMIT:.0f} s", file=sys.stderr)
    average = sum(seconds.values()) / len(seconds)
    print(f"{len(seconds)} kernels: {average:.2f} s on average, {max(seconds.values()):.2f} s at most")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
