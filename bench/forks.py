# SPDX-License-Identifier: Apache-2.0
"""Processes of the suite on a GPU: forks of one that has imported everything and never touched the device.

Importing PyTorch, transformers and the cases takes seconds, and a process of its own for every case would pay it every
time. A fork starts at once, and an error of the device still ends with it.
"""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from bench.measure import attempt
from bench.run import build

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["bench.preloaded", "bench.roofline"])
#: Looking for devices by NVML keeps CUDA out of the server, where it would be of no use to a fork.
NVML = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}

#: Exit status of a process that an error ended (EX_SOFTWARE of sysexits.h).
CRASHED = 70
#: Seconds without a word after which one is ended.
PATIENCE = 240


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A fork that runs ``target(*arguments)``."""
    os.environ.update(NVML)  # the server is started with the first fork
    child = FORKS.Process(target=target, args=arguments)
    child.start()
    return child


def run(name: str, *arguments: str, told: list[dict[str, Any]] | None = None) -> int:
    """The exit status of ``main(arguments)`` of a module in a fork; ``told`` gets what it says it is about to do."""
    receive, send = FORKS.Pipe(duplex=False)
    child = start(_main, name, arguments, send)
    send.close()
    try:
        while receive.poll(PATIENCE):
            message = receive.recv()
            if told is not None:
                told.append(message)
        print(f"{name}: nothing for {PATIENCE} seconds; ended", file=sys.stderr)
        child.kill()
    except EOFError:  # it is over
        pass
    except BaseException:  # so is this process
        child.kill()
        raise
    child.join()
    return child.exitcode or 0


def _main(name: str, arguments: Sequence[str], messages: Connection) -> None:
    try:
        main = importlib.import_module(name).main
        status = main(list(arguments), messages.send) if name == "bench.run" else main(list(arguments))
    except Exception:
        traceback.print_exc()
        status = CRASHED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)  # a device that was lost hangs what would be cleaned up


def run_once(case: str, device: str, params: dict[str, Any], only: Sequence[str]) -> None:
    """Run every provider of a case once, for what it compiles; few layers hold the kernels of many."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)  # what fails here, fails again where it is measured
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # as many processes compile already
    takes = inspect.signature(importlib.import_module(f"bench.cases.{case}").build).parameters
    layers = {"layers": 1} if "layers" in takes else {}
    found, _ = attempt(lambda: build(case, device, params | layers, list(only)))
    for provider in found.providers.values() if found else ():
        if not provider.why_not:
            attempt(lambda provider=provider: provider.build()())
