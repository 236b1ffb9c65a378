# SPDX-License-Identifier: Apache-2.0
"""Results files: JSON lines, one for every case, set of parameters and provider."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def results_file(text: str) -> Path:
    """A command-line argument that names a file which is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"got {text}, expected a file that bench.run --json wrote")
    return Path(text)


#: A line of a results file.
Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    """The rows of cases in a file, none if it is not there; of a row that was measured again, the last."""
    found = {}
    for row in holding(file, "case"):
        found[key(row)] = row
    return list(found.values())


def append(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Add lines to a results file, all in one write: a run that is cut off leaves whole groups of rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as out:  # a buffer would write some kilobytes at a time
        out.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def holding(file: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a file that hold ``name``; none of a file that is not there."""
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return [line for line in lines if name in line]


def ceilings(file: Path) -> dict[str, float]:
    """The ceilings that a file holds, measured last; empty if none."""
    found = holding(file, "ceilings")
    return found[-1]["ceilings"] if found else {}


def gpu_files() -> list[Path]:
    """Results of GPUs, ``GPU-DATE.jsonl``, the oldest first."""
    found = [f for f in RESULTS.glob("*.jsonl") if re.search(r"-\d{4}-\d\d-\d\d$", f.stem)]
    return sorted(found, key=lambda f: (f.stem[-10:], f.stem))


def key(row: Row) -> tuple[str, str, str]:
    """What names a row: case, parameters, provider."""
    return row["case"], json.dumps(row["params"], sort_keys=True), row["provider"]


def by_params(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same case and parameters, together."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row)[:2], []).append(row)
    return list(groups.values())


def settings(params: dict[str, Any]) -> str:
    """Parameters as text."""
    return ", ".join(f"{name} {value}" for name, value in params.items())


def varying(groups: list[list[Row]]) -> list[dict[str, Any]]:
    """Of every group, the parameters that are not the same in all."""
    sets = [group[0]["params"] for group in groups]
    return [{k: v for k, v in params.items() if any(p.get(k) != v for p in sets)} for params in sets]
