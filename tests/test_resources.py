# SPDX-License-Identifier: Apache-2.0
"""The compile gate: kernels compile for GPUs that are not here, without spills and within their shared memory."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from bench import first_call
from bench.resources import SHARED_LIMIT, SHARED_SERVED, SHOWN, VARIANTS, Job, Usage, faults, plans, table
from fastprompt.kernels.tiles import SIZES

ROOT = Path(__file__).parents[1]
TARGETS = ("cuda:80", "cuda:90", "cuda:100")
SOURCE = "".join(path.read_text() for path in (ROOT / "kernels" / "triton").glob("*.py"))
KERNELS = re.findall(r"^def (\w+_kernel)\(", SOURCE, re.M)


def gate(tmp_path, *arguments):
    """Rows of `bench.resources`, run in a process of its own: here Triton may be interpreting."""
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "bench.resources", "--json", str(file), *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.timeout(900)
def test_half_precision_does_not_spill(tmp_path):
    rows = gate(tmp_path, "--variants", *VARIANTS, "--dtypes", "bf16", "--dims", "64", "128", "--targets", *TARGETS)
    found = {(row["kernel"], row["dim"], row["target"]) for row in rows}
    assert found == {(kernel, dim, target) for kernel in KERNELS for dim in (64, 128) for target in TARGETS}
    for row in rows:
        assert row["stack"] == 0 and not row["serialised"], row
        assert 0 < row["registers"] <= 255 and row["shared"] <= SHARED_SERVED[int(row["target"][5:])], row


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_triton_must_know_of_arguments_reaches_it(variant):
    """That pointers are aligned, or it loads number by number; and constants in tuples, of which 3.6 loses some."""
    for launch in plans(variant, torch.bfloat16, 64):
        for name, value in launch.arguments.items():
            assert not (isinstance(value, torch.Tensor) and name in SIZES), f"{name}: a pointer, not a size"
            if isinstance(value, tuple):
                assert len({isinstance(x, tuple) for x in value}) == 1, f"{name}: {value} has two depths"


def test_the_committed_table_has_no_spills_in_half_precision():
    text = (ROOT / "kernels" / "README.md").read_text().split("resources: begin -->")[1].split("<!-- resources")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]
    half = [row for row in rows if row[2] == "bf16" and int(row[3]) <= 128]
    assert {(row[2], int(row[3])) for row in rows} == set(product(("bf16", "fp32"), SHOWN))
    assert not [row for row in half if "stack" in " ".join(row)]


def test_no_first_call_takes_three_seconds():
    """As measured with the shipped tiles; a timing of the moment would depend on what else the machine does."""
    rows = json.loads(first_call.RESULTS.read_text())["compiled"]
    assert {row["kernel"] for row in rows} == set(KERNELS)
    assert not [row for row in rows if not 0 < row["seconds"] <= first_call.LIMIT]


def test_what_the_gate_forbids():
    job = Job("plain", "forward_kernel", "bf16", 64, "cuda:80")
    fine = Usage(128, 0, 1000, 4)
    assert faults(job, fine) == []
    assert "spilled" in faults(job, fine._replace(stack=8))[0]
    assert "serialised" in faults(job, fine._replace(serialised=True))[0]
    assert "shared memory" in faults(job, fine._replace(shared=SHARED_LIMIT[80] + 1))[0]
    # Other cases report what they spill.
    assert faults(job._replace(dtype="fp32"), fine._replace(stack=8)) == []
    assert faults(job._replace(dim=256), fine._replace(stack=8)) == []
    assert "**stack 8**" in table([(job, fine._replace(stack=8))])
