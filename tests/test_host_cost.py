# SPDX-License-Identifier: Apache-2.0
"""What the host pays for a call: the committed figures, and that the benchmark still runs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "host-cost.json"


def test_the_committed_costs():
    """Against PyTorch's own attention on one number, in the same file: what Python and launches may add to it."""
    found = json.loads(RESULTS.read_text())
    cost = {name: row["least"] for name, row in found["microseconds"].items()}
    assert all(0 < row["least"] <= row["median"] for row in found["microseconds"].values())
    assert cost["prompt_attention, both"] < 8 * cost["PyTorch's attention of one number, both"]


@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not shutil.which("cc") or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="Triton's launcher is compiled: needs a C compiler and Python's headers",
)
def test_every_step_runs(tmp_path):
    """Without code: what kernels compute does not matter here."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    file = tmp_path / "costs.json"
    command = [sys.executable, "-m", "bench.host_cost", "--rounds", "1", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    now, committed = (json.loads(x.read_text())["microseconds"] for x in (file, RESULTS))
    assert now.keys() == committed.keys()
