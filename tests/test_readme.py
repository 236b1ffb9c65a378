# SPDX-License-Identifier: Apache-2.0
"""The README: every Python block runs, and every table is the one its results file makes."""

import re
from pathlib import Path

import pytest

from bench.report import demo_block, replace_block, results_block, vpt_step_block

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


@pytest.mark.assets
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_block_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})


@pytest.mark.parametrize(
    ("file", "name", "make"),
    [
        ("README.md", "demo", demo_block),
        ("README.md", "vpt_step", vpt_step_block),
        ("bench/results/README.md", "results", results_block),
    ],
)
def test_table_comes_from_its_results_file(file, name, make):
    text = (ROOT / file).read_text()
    assert replace_block(text, name, make()) == text
