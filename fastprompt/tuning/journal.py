# SPDX-License-Identifier: Apache-2.0
"""The log of a run: JSONL, one line a training step and one an evaluation."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Journal:
    r"""Appends records to a JSONL file, one line each, handed to the system at once.

    Args:
        path: the file; created if missing.
        keep: resuming, whether a record that is there already stays; the first that does not, or that is torn by a
            crash, is cut off with all after it. None starts an empty file (default None).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> journal = Journal(path)
        >>> for step in (1, 2):
        ...     journal.write({"step": step})
        >>> journal.close()
        >>> Journal(path, keep=lambda record: record["step"] <= 1).close()
        >>> path.read_text()
        '{"step": 1}\n'
    """

    def __init__(self, path: Path, keep: Callable[[Record], bool] | None = None) -> None:
        self._file = open(path, "ab")
        self._file.truncate(0 if keep is None else _length_to_keep(path, keep))

    def write(self, record: Record) -> None:
        """Append one record; a number that is not finite becomes null, as JSON has no word for it."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _length_to_keep(path: Path, keep: Callable[[Record], bool]) -> int:
    length = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            # A torn line: whatever follows was written by nobody.
            return length
        if not line.endswith(b"\n") or not keep(record):
            return length
        length += len(line)
    return length
