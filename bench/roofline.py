# SPDX-License-Identifier: Apache-2.0
"""Ceilings of this machine, and every row's share of the nearer: ``python -m bench.roofline --device cpu``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.measure import DeviceClock, machine, wall_clock
from bench.rows import RESULTS, Row, append, by_params, gpu_files, read, settings

SIDES = {"cpu": 2048, "cuda": 8192}  # of the square matrices
COPIES = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes


def ceilings(device: str, side: int = 0, copied: int = 0, rounds: int = 15) -> dict[str, float]:
    """The fastest of a large copy (bytes read plus written a second) and of a large product in every dtype."""
    clock = DeviceClock() if device == "cuda" else wall_clock
    side, copied = side or SIDES[device], copied or COPIES[device]
    source = torch.randint(256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * copied / _fastest(lambda: target.copy_(source), clock, rounds)}
    for name in ("float32", "bfloat16", *(("float16", "tf32") if device == "cuda" else ())):
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        try:
            found[name] = 2 * side**3 / _fastest(lambda a=a, b=b: a @ b, clock, rounds)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed
    return found


def _fastest(work: Callable[[], Any], clock: Callable[[Callable], float], rounds: int) -> float:
    for _ in range(3):
        clock(work)
    return min(clock(work) for _ in range(rounds))


def share(row: Row, found: dict[str, float]) -> tuple[str, float] | None:
    """The nearer ceiling's name and how much of it a row reaches; None for a row without counts or time."""
    if "flops" not in row or "p50_s" not in row or row["params"].get("dtype") not in found:
        return None
    least = {"copy": row["bytes"] / found["copy"], "product": row["flops"] / found[row["params"]["dtype"]]}
    nearer = max(least, key=lambda name: least[name])
    return nearer, least[nearer] / row["p50_s"]


def table(rows: list[Row], found: dict[str, float]) -> str:
    """What every row with counts achieves."""
    lines = []
    for group in by_params(rows):
        shares = [(row, share(row, found)) for row in group]
        if all(s is None for _, s in shares):
            continue
        lines += [f"\n{group[0]['case']}: {settings(group[0]['params'])}",
                  f"{'provider':<22} {'GFLOP/s':>10} {'GB/s':>8} {'of the nearer ceiling':>24}"]  # fmt: skip
        for row, part in shares:
            if part is None:
                lines.append(f"{row['provider']:<22} {row.get('why_not', 'nothing counted')}")
                continue
            rate, moved = (row[k] / row["p50_s"] / 1e9 for k in ("flops", "bytes"))
            lines.append(f"{row['provider']:<22} {rate:10.1f} {moved:8.1f} {f'{100 * part[1]:.1f} % ({part[0]})':>24}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure the ceilings, print them and the shares, and append one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument("files", type=Path, nargs="*", help="results of this device [all in bench/results]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="append the ceilings to this file")
    args = parser.parse_args(argv)
    found = ceilings(args.device)
    header = machine(args.device)
    print(f"{header['device']}: copy {found['copy'] / 1e9:.1f} GB/s")
    for name, rate in found.items():
        if name != "copy":
            print(f"  product in {name:<9} {rate / 1e9:10.1f} GFLOP/s")
    if args.json:
        append(args.json, [{"ceilings": found, "machine": header}])
    files = args.files or (gpu_files() if args.device == "cuda" else sorted(RESULTS.glob("*-cpu.jsonl")))
    rows = [row for file in files for row in read(file)]
    for device in {row["machine"]["device"] for row in rows} - {header["device"]}:
        print(f"rows of another device ({device}) are held against the ceilings of this one")
    print(table(rows, found))


if __name__ == "__main__":
    main()
