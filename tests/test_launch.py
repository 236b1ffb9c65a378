# SPDX-License-Identifier: Apache-2.0
"""Triton's own launch path, which interpreted kernels never take, into the driver of `bench.stand_in`."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from fastprompt.kernels import launch

ROOT = Path(__file__).parents[1]
KERNELS = {
    name
    for path in (ROOT / "kernels" / "triton").glob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
}


@pytest.fixture(scope="module")
def found():
    """What a process that does not interpret kernels found."""
    if not shutil.which("cc") or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("Triton's launcher is compiled: needs a C compiler and Python's headers")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "launch_cases.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(900)
def test_every_kernel_is_launched(found):
    launched = {kernel for first, _ in found["cases"].values() for kernel in first[0]}
    assert launched == KERNELS


def test_what_is_compiled_and_what_arrives(found):
    """Triton compiles what the compile gate compiles; the driver gets the meant arguments in the meant order, at the
    first call, by Triton's path, and at the second, by the compiled kernel alone.
    """
    assert not found["faults"], "\n".join(found["faults"][:5])


def test_a_call_like_one_before_compiles_nothing(found):
    for name, (first, second) in found["cases"].items():
        assert second[0] == [] and second[1] == first[1] > 0, name


#: How often a kernel is compiled for the 48 + 8 shapes of `launch_cases.shapes`. Strides of lse are multiples of 16 or
#: are not, in three ways; prompts fill one of two tiles; lengths of two branches are multiples of 16 or are not.
MOST_FORMS = {
    "forward_kernel": 3, "query_kernel": 2, "prompt_kernel": 4, "delta_kernel": 4, "key_value_kernel": 2,
    "reduce_kernel": 1, "branches_kernel": 4, "branches_query_kernel": 4, "branch_kernel": 3,
}  # fmt: skip


def test_recompilations_over_typical_shapes(found):
    """Batch, heads, lengths and numbers of prompts by themselves do not compile a kernel again."""
    assert found["forms"].keys() == MOST_FORMS.keys()
    assert {name: n for name, n in found["forms"].items() if n > MOST_FORMS[name]} == {}


def plan_of(x):
    return [torch.empty_like(x)], []


def test_a_plan_allocates_and_views_alone():
    """What it computed would be missing from every later call."""
    x = torch.ones(3, 4)
    assert launch.launch(plan_of, (x,))[0].shape == x.shape
    with pytest.raises(RuntimeError, match="may only allocate and view"):
        launch.launch(lambda t: ([t.T.contiguous()], []), (x,))


def test_plans_are_kept_by_signature(monkeypatch):
    made = []

    def plan(x, y, factor):
        made.append((tuple(x.shape), factor))
        return plan_of(x)

    x = torch.ones(3, 4)
    for tensors, factor in (((x, None), 1), ((x + 1, None), 1), ((x.T, None), 1), ((x, x), 1), ((x, None), 2)):
        launch.launch(plan, tensors, (factor,))
    assert len(made) == 4
    launch.launch(plan, (x[:, 1:], None), (1,))
    launch.launch(plan, (torch.ones(3, 5)[:, 1:4], None), (1,))
    assert len(made) == 6, "another alignment or other strides"
    monkeypatch.setattr(launch, "MOST_PLANS", 1)
    launch.launch(plan, (x, None), (3,))
    assert len(launch._plans) == 1
