# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a piece of work."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_memory(work: Callable[[], Any]) -> int:
    """Bytes that ``work()`` needs at its peak on top of what is held before it.

    On a GPU this is exact (the allocator's count). On a CPU it is the growth of the resident set, so run it once in a
    fresh process: memory that earlier work freed but the process kept does not count.

    Args:
        work: Called once.

    Example:
        >>> peak_memory(lambda: torch.ones(1 << 24)) >= 0
        True
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    reset.write_text("5")  # resets VmHWM, the peak of the resident set
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
