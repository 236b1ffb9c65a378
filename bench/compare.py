# SPDX-License-Identifier: Apache-2.0
"""Compare two results files: ``python -m bench.compare before.jsonl after.jsonl --threshold 1.05``."""

from __future__ import annotations

import argparse
import sys

from bench.rows import Row, key, read, results_file, settings


def verdict(before: Row, after: Row) -> tuple[float | None, str]:
    """How many times as long, and what to say: a change counts if each p50 is outside the other's p20 to p80."""
    if "why_not" in before or "why_not" in after:
        states = [r.get("why_not", "ran") for r in (before, after)]
        return None, "" if states[0] == states[1] else f"{states[0]} -> {states[1]}"
    ratio = after["p50_s"] / before["p50_s"]
    inside = any(a["p20_s"] <= b["p50_s"] <= a["p80_s"] for a, b in ((before, after), (after, before)))
    return ratio, "" if inside else "slower" if ratio > 1 else "faster"


def main(argv: list[str] | None = None) -> int:
    """Print a line for every row of both files; 1 if one got slower than the threshold or no longer runs."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", type=results_file)
    parser.add_argument("after", type=results_file)
    parser.add_argument("--threshold", type=float, help="exit 1 if a row got slower by more than this factor")
    args = parser.parse_args(argv)
    before, after = ({key(r): r for r in read(file)} for file in (args.before, args.after))
    machines = [{r["machine"]["device"] for r in rows.values()} for rows in (before, after)]
    if machines[0] != machines[1]:
        print(f"different devices: {', '.join(machines[0])} and {', '.join(machines[1])}", file=sys.stderr)
    worse = 0
    heading = None
    for name in [k for k in before if k in after]:
        ratio, text = verdict(before[name], after[name])
        where = f"{before[name]['case']}: {settings(before[name]['params'])}"
        if where != heading:
            print(f"\n{where}\n{'provider':<22} {'before ms':>10} {'after ms':>10} {'ratio':>7}")
            heading = where
        times = (f"{1e3 * r['p50_s']:10.3f}" if "p50_s" in r else f"{'-':>10}" for r in (before[name], after[name]))
        print(f"{before[name]['provider']:<22} {' '.join(times)} {'-' if ratio is None else f'{ratio:.3f}':>7} {text}")
        stopped = "why_not" in after[name] and "why_not" not in before[name]
        worse += stopped or (text == "slower" and ratio > (args.threshold or float("inf")))
    for file, extra in (("before", before.keys() - after.keys()), ("after", after.keys() - before.keys())):
        if extra:
            print(f"\nonly in the file {file}: {len(extra)} rows")
    return int(args.threshold is not None and worse > 0)


if __name__ == "__main__":
    sys.exit(main())
