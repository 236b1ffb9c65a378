# SPDX-License-Identifier: Apache-2.0
"""A GPU that is not there, for Triton: kernels are compiled for sm_90 and launched into a driver that does nothing.

Everything between an operation and the GPU is the real thing: Triton's `JITFunction`, its compiler, its launcher in C.
The C library `stand_in.c` takes the place of libcuda alone; tensors of the CPU lend their addresses. Only for a process
of its own that does not interpret kernels: nothing computes anything there, so results are what memory held.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

from fastprompt import config
from fastprompt.kernels import configs
from fastprompt.ops import dispatch

TARGET = GPUTarget("cuda", 90, 32)

#: Bytes of an argument by its type in Triton's signature; all others are pointers.
BYTES = {"i32": 4, "fp32": 4, "u1": 4}


class Arrived(NamedTuple):
    """What one launch gave the driver: programs, threads of one, bytes of shared memory, arguments as bits."""

    kernel: str
    programs: int
    threads: int
    shared: int
    arguments: list[int]


class Launcher(CudaLauncher):
    """Triton's launcher, which reports inside `listen`."""

    heard: list[Arrived] | None = None

    def __init__(self, src: Any, metadata: Any):
        super().__init__(src, metadata)
        self.name = src.fn.__name__
        self.types = list(flat(src.signature.values()))

    def __call__(self, *args: Any) -> None:
        if Launcher.heard is None:
            return super().__call__(*args)
        count = len(self.types)
        sizes = (ctypes.c_uint8 * count)(*(BYTES.get(kind, 8) for kind in self.types))
        values = (ctypes.c_uint64 * (3 + count))()
        library().stand_in_listen(count, sizes, values)
        super().__call__(*args)
        library().stand_in_listen(0, None, None)
        Launcher.heard.append(Arrived(self.name, *values[:3], list(values[3:])))


class Driver(CudaDriver):
    """Triton's driver for NVIDIA's GPUs, without asking PyTorch for one."""

    def __init__(self):
        self.utils = CudaUtils()
        self.launcher_cls = Launcher

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        return TARGET


def flat(signature: Any) -> Iterator[str]:
    """The types of those arguments that a compiled kernel takes, in order."""
    for kind in signature:
        if isinstance(kind, tuple):
            yield from flat(kind)
        elif kind != "constexpr":
            yield kind


@functools.lru_cache
def library() -> ctypes.CDLL:
    """The stand-in for libcuda, loaded under its name, so that Triton's extension finds it where it looks for that."""
    folder = tempfile.mkdtemp()
    path = Path(folder) / "libcuda.so.1"
    command = [
        "cc",
        "-O2",
        "-w",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        path,
        Path(__file__).with_suffix(".c"),
    ]
    subprocess.run(command, check=True)
    triton.knobs.nvidia.libcuda_path = folder
    return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


@contextmanager
def active() -> Iterator[None]:
    """Inside, operations on tensors of the CPU launch Triton kernels into nothing, with the tiles of sm_90."""
    library()
    before = dispatch.interpreting, config.IMPL
    triton.runtime.driver.set_active(Driver())
    dispatch.interpreting, config.IMPL = lambda: True, "triton"
    try:
        with configs.compiling_for("sm_90"):
            yield
    finally:
        dispatch.interpreting, config.IMPL = before


@contextmanager
def listen() -> Iterator[list[Arrived]]:
    """What launches inside the context gave the driver."""
    Launcher.heard = heard = []
    try:
        yield heard
    finally:
        Launcher.heard = None
