# SPDX-License-Identifier: Apache-2.0
"""A pretended GPU: in `pretend_cuda` the device "cuda" is the CPU, so that the paths of a GPU run where there is none.

PyTorch's calls that name the device get the CPU instead, ``torch.cuda`` answers as an H200 would, and fastprompt's
operations choose what they choose on a GPU: Triton kernels, interpreted. Nothing here is fast, and what only a device
can show (launches, streams, the memory of kernels) is not shown.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from fastprompt.ops import dispatch

NAME = "Pretended H200"
#: Bytes of its memory, and how many of them nobody holds.
MEMORY, FREE = 139 << 30, 138 << 30


class OnTheCpu(TorchFunctionMode):
    """Every call that names the device gets the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:  # its name remains
            return func(*args, **(kwargs or {}))
        return func(*map(there, args), **{name: there(x) for name, x in (kwargs or {}).items()})


def there(x: Any) -> Any:
    """The CPU for the device, anything else as it is."""
    return "cpu" if isinstance(x, str | torch.device) and str(x).startswith("cuda") else x


class Event:
    """Is over as soon as it is recorded, unless a test says what the device does."""

    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return False  # the device naps

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Autocast(torch.autocast):
    """That of the device, on the CPU."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__(there(device_type), *args, **kwargs)


@contextmanager
def pretend_cuda(kernels: bool = True) -> Iterator[None]:
    """Inside, there is a GPU; without ``kernels``, one whose operations take their reference by themselves."""
    real = dispatch.reasons_against

    def reasons_against(op, impl, tensors, by_name=True):
        if impl in ("cpp", "cpu"):
            return ["the tensors are on cuda, not on the CPU"]
        if not (by_name or kernels):
            return ["no kernels were asked for"]
        return real(op, impl, tensors, by_name=True)

    answers: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "get_device_name": lambda *device: NAME,
        "get_device_capability": lambda *device: (9, 0), "mem_get_info": lambda *device: (FREE, MEMORY),
        "memory_allocated": lambda *device: 1 << 20, "max_memory_allocated": lambda *device: 3 << 20,
        "is_current_stream_capturing": lambda: False, "device": lambda device: nullcontext(), "Event": Event,
    }  # fmt: skip
    silent = ("synchronize", "empty_cache", "reset_peak_memory_stats", "_sleep")
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        for name in silent:
            stack.enter_context(patch.object(torch.cuda, name, lambda *args: None))
        stack.enter_context(patch.object(torch, "autocast", Autocast))
        stack.enter_context(patch.object(dispatch, "reasons_against", reasons_against))
        stack.enter_context(OnTheCpu())
        yield
