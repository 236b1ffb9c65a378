# SPDX-License-Identifier: Apache-2.0
"""The benchmark runner on a two-layer version of its case."""

import importlib
import json

import numpy as np
import pytest

from bench.measure import summary
from bench.run import main


def test_vpt_step_runs_and_writes_lines(tmp_path, capsys):
    file = tmp_path / "result.jsonl"
    small = ["--set", "layers=2", "batch=2", "prompts=3"]
    assert main(["vpt_step", "--rounds", "2", "--json", str(file), *small]) == 0
    rows = {r["provider"]: r for r in map(json.loads, file.read_text().splitlines())}
    assert set(rows) == {"published", "kv_concat", "fastprompt", "floor"}
    assert rows["published"]["ratio_p50"] == 1.0
    for row in rows.values():
        assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"]
        assert row["peak_bytes"] > 0 and row["params"]["layers"] == 2 and row["machine"]["torch"]
    assert max(rows["fastprompt"]["differences"].values()) < 1e-4
    assert "fastprompt" in capsys.readouterr().out


def test_a_wrong_provider_is_not_timed(monkeypatch):
    from bench.cases import vpt_step

    honest = vpt_step._kv_concat
    monkeypatch.setattr(vpt_step, "_kv_concat", lambda *a, **k: 2 * honest(*a, **k))
    with pytest.raises(AssertionError, match="kv_concat differs"):
        main(["vpt_step", "--rounds", "1", "--set", "layers=2", "batch=2", "prompts=3"])


def test_ratios_are_taken_within_a_round():
    times = {"a": [1.0, 10.0, 2.0], "b": [0.5, 5.0, 1.0]}
    rows = summary(times, "a")
    assert rows["b"]["ratio_p50"] == pytest.approx(0.5)
    assert rows["b"]["p50_s"] == pytest.approx(np.median(times["b"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_prompt_attention_candidates_agree(dtype):
    case = importlib.import_module("bench.cases.prompt_attention").build(
        "cpu", batch=2, heads=2, tokens=19, dim=16, prompts=3, dtype=dtype
    )
    assert set(case.check()) == set(case.providers) - {"floor"}
