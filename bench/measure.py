# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing, peak memory, and a description of the machine."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import trange


def interleave(steps: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every step in every round; all steps run once a round, in an order that rotates."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in trange(-warmup, rounds, desc="rounds", leave=False):
        for i in range(len(names)):
            name = names[(i + r) % len(names)]
            synchronize()
            start = time.perf_counter()
            steps[name]()
            synchronize()
            if r >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(times: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """p20/p50/p80 seconds, and the median over rounds of the ratio to ``baseline`` in the same round."""
    rows = {}
    for name, values in times.items():
        p20, p50, p80 = np.percentile(values, (20, 50, 80))
        ratios = np.asarray(values) / np.asarray(times[baseline])
        r20, r50, r80 = np.percentile(ratios, (20, 50, 80))
        rows[name] = {
            "p20_s": float(p20), "p50_s": float(p50), "p80_s": float(p80),
            "ratio_p20": float(r20), "ratio_p50": float(r50), "ratio_p80": float(r80),
        }  # fmt: skip
    return rows


def machine(device: str) -> dict[str, Any]:
    """Hardware, versions and commit of this run."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "commit": commit + ("+changes" if dirty.stdout else ""),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
