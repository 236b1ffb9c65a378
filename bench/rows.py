# SPDX-License-Identifier: Apache-2.0
"""Results files: JSON lines, one for every case, set of parameters and provider."""

from __future__ import annotations

import argparse
import json
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
    """The rows of cases in a file; of a row that was measured again, the last."""
    found = {}
    for row in map(json.loads, file.read_text().splitlines()):
        if "case" in row:
            found[key(row)] = row
    return list(found.values())


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
