# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a piece of work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_memory(work: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes that ``work()`` needs at its peak on top of what is held before it.

    On a GPU this is exact (the allocator's count). On a CPU it is the growth of the resident set, so run it once in a
    fresh process: memory that earlier work freed but the process kept does not count.

    Args:
        work: Called once.
        device: ``"cpu"`` or ``"cuda"``.

    Example:
        >>> peak_memory(lambda: torch.ones(1 << 24)) >= 0
        True
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident set
    except OSError:
        before = _peak_of_process()
        work()
        return _peak_of_process() - before
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _peak_of_process() -> int:
    import resource  # absent on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
