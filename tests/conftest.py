# SPDX-License-Identifier: Apache-2.0
"""What every test gets: a seed, poisoned uninitialised memory, and GPU tests skipped where there is no GPU."""

import os
import random
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from fastprompt.ops import dispatch

# Without a GPU, Triton kernels are interpreted; Triton decides that when they are decorated, so before any import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A GPU machine without network may lack this extra; where all extras are, nothing is left out.
if not find_spec("diffusers"):
    collect_ignore = [f"test_{x}.py" for x in ("accelerate", "attn_processors", "constants", "generate", "ip_adapter")]

# Tests are small: a second thread costs more than it brings, above all on a busy machine.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, help="so many of every test and dtype, spread over its other parameters")


def pytest_collection_modifyitems(config, items):
    if count := config.getoption("sample"):
        groups = {}
        for item in items:
            if getattr(item.obj, "is_hypothesis_test", False):
                continue  # dozens of shapes in one test, each compiled on a GPU
            given = getattr(item, "callspec", None)
            dtypes = tuple(str(x) for x in given.params.values() if isinstance(x, torch.dtype)) if given else ()
            groups.setdefault((item.path, item.originalname, dtypes), []).append(item)
        kept = {group[i * len(group) // count] for group in groups.values() for i in range(count)}
        items[:] = [item for item in items if item in kept]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def composition(monkeypatch):
    """What "auto" takes on a CPU without the C++ kernels: the composition of PyTorch's."""
    monkeypatch.setattr(dispatch, "CPP_OPS", ())


@pytest.fixture(autouse=True)
def name_composition(request, monkeypatch):
    """Tests may name the composition of PyTorch's CPU kernels, "cpu", which users reach through "auto" alone."""
    if "cpu" in getattr(getattr(request.node, "callspec", None), "params", {}).values():
        monkeypatch.setattr(dispatch, "IMPLS", (*dispatch.IMPLS, "cpu"))


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Floats that fastprompt allocates uninitialised are NaN, so that one it forgets to write is seen."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            x = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "").split(".")[0]
            if caller != "fastprompt" or torch.compiler.is_compiling() or x.device.type == "meta":
                return x
            # Bytes are the workspace of Triton kernels, floats all: 255 four times is a NaN, too.
            return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(255) if x.dtype == torch.uint8 else x

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_strided"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def launched(monkeypatch):
    """The launches of Triton kernels that run, in order, with the tensors that they were given."""
    from fastprompt.kernels import configs, launch

    seen, arguments = [], launch.Step.arguments

    def spy(step, tensors):
        found = arguments(step, tensors)
        given = dict(zip(step.launch.kernel.arg_names, found, strict=True))
        seen.append(replace(step.launch, arguments={name: given[name] for name in step.launch.arguments}))
        return found

    monkeypatch.setattr(launch.Step, "arguments", spy)
    # What an earlier test has run is planned again: the first run of a plan is given tensors, later ones addresses.
    configs.stamp += 1
    return seen
