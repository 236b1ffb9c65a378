# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing, what a provider that cannot run leaves behind, and a description of the machine."""

from __future__ import annotations

import ctypes
import gc
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import trange

from bench.case import CannotRun, IsWrong
from fastprompt.errors import ImplUnavailableError

OOM = "oom"
WRONG = "wrong"
FAILED = "failed"
#: What ended the process that ran it: an error after which a device cannot be used, or a crash.
DIED = f"{FAILED}: its process ended"


def attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """``(work(), None)``, or ``(None, why not)`` where it cannot run, is wrong, out of memory or broken."""
    try:
        return work(), None
    except CannotRun as error:
        why_not = f"not run: {error}"
    except IsWrong as error:
        why_not = f"{WRONG}: {error}"
    except ImplUnavailableError as error:
        why_not = "not run: " + str(error).split(". Use ")[0]  # the reasons without the advice
    except (torch.OutOfMemoryError, MemoryError):
        why_not = OOM
    except Exception as error:
        if any(text in str(error) for text in ("DefaultCPUAllocator: can't allocate memory", "_STATUS_ALLOC_FAILED")):
            why_not = OOM  # of the host; of a library of CUDA
        else:
            traceback.print_exc()  # the others go on, and the run fails
            why_not = f"{FAILED}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, why_not


def interleave(
    steps: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[Callable], float], warmup: int = 2
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every step in every round, and why some have none; a round runs all, in an order that rotates."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for r in trange(-warmup, rounds, desc="rounds", leave=False, disable=None):
        for i in range(len(names)):
            name = names[(i + r) % len(names)]
            if name in failed:
                continue
            seconds, why_not = attempt(partial(clock, steps[name]))
            if why_not:
                failed[name] = why_not
            elif r >= 0:
                times[name].append(seconds)
    return {name: t for name, t in times.items() if name not in failed}, failed


def wall_clock(step: Callable[[], Any]) -> float:
    """Seconds until the step's results are there, on the host's clock."""
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


class DeviceClock:
    """Seconds that a GPU works on a step, from events around it.

    The device first naps, so that the host has queued the launches before the first one starts and its overhead does
    not count, and then overwrites its L2 cache, so that a step does not find what the one before left there. How long
    it must nap is found for every step, in its first calls. A step that waits for the device itself, or launches more
    than the device's queue holds, keeps the host until the nap is over, however long: it gets no longer one.
    """

    SHORTEST, LONGEST = 1e-3, 0.25  # seconds
    CYCLES = 2e9  # a second's, at most: a slower clock naps longer

    def __init__(self):
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self.naps: dict[Callable[[], Any], tuple[float, bool]] = {}  # seconds, and whether the step waits

    def __call__(self, step: Callable[[], Any]) -> float:
        nap, waits = self.naps.get(step, (self.SHORTEST, False))
        seconds, queued, late = self._time(step, nap)
        while late and not waits and nap < self.LONGEST:
            nap = min(2 * max(nap, queued), self.LONGEST)
            seconds, queued, late = self._time(step, nap)
            waits = late and queued > 0.7 * nap
        if not late:  # the first call of all may have compiled for seconds
            nap = min(nap, max(4 * queued, self.SHORTEST))
        self.naps[step] = nap, waits
        return seconds

    def _time(self, step: Callable[[], Any], nap: float) -> tuple[float, float, bool]:
        """Seconds on the device; those in which the host queued the step; whether the device woke before."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize()
        torch.cuda._sleep(int(nap * self.CYCLES))
        self.flush.zero_()
        start.record()
        before = time.perf_counter()
        step()
        queued = time.perf_counter() - before
        late = start.query()
        end.record()
        synchronize()
        return start.elapsed_time(end) / 1e3, queued, late


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(times: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """p20/p50/p80 seconds, and those of the ratio to ``baseline`` in the same round (absent if it could not run)."""
    rows = {}
    for name, values in times.items():
        p20, p50, p80 = np.percentile(values, (20, 50, 80))
        rows[name] = {"p20_s": float(p20), "p50_s": float(p50), "p80_s": float(p80)}
        if baseline in times:
            r20, r50, r80 = np.percentile(np.asarray(values) / np.asarray(times[baseline]), (20, 50, 80))
            rows[name] |= {"ratio_p20": float(r20), "ratio_p50": float(r50), "ratio_p80": float(r80)}
    return rows


def too_large(needed: int, device: str) -> str | None:
    """Why work that keeps ``needed`` bytes alive is not tried here; None if it fits into what is free now."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if needed < 0.9 * free:
        return None
    return f"activations need {needed / 2**30:.1f} GiB, more than the {free / 2**30:.1f} GiB free"


def give_back() -> None:
    """Return freed memory to the system, where the C library can, and to the device: both then tell what is held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def machine(device: str) -> dict[str, Any]:
    """Hardware, versions and commit of this run."""
    commit = _output("git", "rev-parse", "HEAD")
    dirty = _output("git", "status", "--porcelain", "--untracked-files=no")
    hardware: dict[str, Any]
    if device == "cuda":
        fields = ("driver_version", "clocks.sm", "clocks.max.sm")
        found = _output("nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").split(", ")
        hardware = {
            "device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **dict(zip(fields, found, strict=False))
        }  # fmt: skip
    else:
        hardware = {
            "device": _cpu_name(), "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }  # fmt: skip
    return {
        **hardware,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in ("triton", "transformers")},
        "commit": commit + ("+changes" if dirty else ""),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
