# SPDX-License-Identifier: Apache-2.0
"""The examples run as a user runs them, and learn."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(name, *arguments):
    """Run ``examples/name`` in a fresh process from the repository root."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, f"examples/{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def learns(done):
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss (\S+)", done.stdout)]
    assert losses[-1] < losses[0] / 2
    assert float(re.search(r"accuracy on new images (\S+)", done.stdout)[1]) > 0.9


def test_plain_vit_block():
    learns(run("plain_vit_block.py"))


def test_timm_vit():
    """Timm is optional: without it the example says so."""
    done = run("timm_vit.py")
    if importlib.util.find_spec("timm"):
        learns(done)
    else:
        assert done.returncode == 1
        assert done.stderr.strip() == "This example needs timm: pip install timm"


@pytest.mark.assets
@pytest.mark.parametrize(("name", "some"), [("coop_loop.py", "2"), ("coop_trainer.py", "30")])
def test_coop_on_the_shipped_clip(name, some):
    done = run(name, some)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss'?:? '?([\d.]+)", done.stdout)]
    before, after = (float(re.search(rf"accuracy {when} (\S+)", done.stdout)[1]) for when in ("before", "after"))
    assert losses[-1] < losses[0] and 0.05 < before < 1 and 0.05 < after < 1


def test_train_ip_adapter(tmp_path):
    done = run("train_ip_adapter.py", "--steps", "60", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    losses = [re.search(rf"loss with {which} picture: (\S+)", done.stdout) for which in ("its own", "another")]
    own, other = (float(found[1]) for found in losses)
    assert own < other / 1.5
    names = {"prompts.safetensors", "prompt_config.json", "ip_adapter.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == names
