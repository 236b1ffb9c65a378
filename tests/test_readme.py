# SPDX-License-Identifier: Apache-2.0
"""The README: every Python block runs; that its tables are fresh is checked in test_bench."""

import re
from pathlib import Path

import pytest

from bench.report import replace_block

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


@pytest.mark.assets
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_block_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})


def test_a_block_without_markers_is_an_error():
    with pytest.raises(ValueError, match="name: got 'speed', but the text has no <!-- speed:begin -->"):
        replace_block("text", "speed", "table")
