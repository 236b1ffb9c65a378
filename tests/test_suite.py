# SPDX-License-Identifier: Apache-2.0
"""The run of all cases, on a CPU with tiny ones: in order, resumed, cut off; and the pages and tables of GPUs."""

import json
import os
import signal

import pytest
import torch
from bench_cases import NEEDS, TINY

from bench import forks, gpu_report, report, rows, run, suite
from bench.case import CannotRun, Case, Provider
from bench.cases import decode
from bench.measure import machine
from bench.run import GO_ON, grid, names
from bench.suite import Runs

SMALL = [f"{name}={value}" for name, value in TINY["compress_kv"].items()]
CEILINGS = {"copy": 1e9, "float32": 1e11, "bfloat16": 1e12}


@pytest.fixture
def here(monkeypatch):
    """Modules run in this process, without a look at memory in processes of their own; what ran is recorded."""
    ran = []

    def module(name, *arguments, told=None):
        ran.append((name, arguments[0]))
        if name == "bench.roofline":
            rows.append(
                suite.Path(arguments[arguments.index("--json") + 1]),
                [{"ceilings": CEILINGS, "machine": machine("cpu")}],
            )
            return 0
        return run.main(list(arguments))

    monkeypatch.setattr(suite, "module", module)
    monkeypatch.setattr(forks, "run", module)
    monkeypatch.setattr(run, "peak_in_fresh_process", lambda *args: 1 << 20)
    return ran


@pytest.fixture
def tiny(monkeypatch):
    """Two cases: one with two sets of parameters, and one that cannot run."""
    plan = [Runs("compress_kv", 1, [*SMALL, "merge=drop,pivot"]), Runs("ipadapter", 1, [])]
    monkeypatch.setattr(suite, "rest", lambda device: iter(plan))

    def build(name, device, params, only=None):
        if name == "ipadapter":
            return Case(name, {"fastprompt": Provider(list, why_not="no diffusers")}, "fastprompt", list, 0.0, params)
        return real(name, device, params, only)

    real = run.build
    monkeypatch.setattr(run, "build", build)


def sets(file):
    return [line.get("set") for line in map(json.loads, file.read_text().splitlines())]


def test_everything_goes_into_one_file_and_nothing_is_measured_again(here, tiny, tmp_path, capsys):
    file = tmp_path / "abacus-2026-01-02.jsonl"
    assert suite.main(["--json", str(file)]) == 0
    assert here == [("bench.roofline", "--device"), ("bench.run", "compress_kv"), ("bench.run", "ipadapter")]
    first = file.read_text()
    assert [r["provider"] for r in rows.read(file)][-1] == "fastprompt" and "no diffusers" in first
    here.clear()
    assert suite.main(["--json", str(file)]) == 0
    assert not here and file.read_text() == first
    page = file.with_suffix(".md").read_text()
    assert "## `compress_kv`" in page and "no diffusers" in page and "copy 1 GB/s" in page
    assert str(file.with_suffix(".md")) in capsys.readouterr().out


def test_a_case_that_was_cut_off_goes_on_where_it_stopped(here, tiny, tmp_path, monkeypatch):
    file = tmp_path / "abacus-2026-01-02.jsonl"
    measure, count = run.measure, []

    def interrupted(case, *args):
        count.append(case.params["merge"])
        if len(count) == 2:
            raise KeyboardInterrupt
        return measure(case, *args)

    monkeypatch.setattr(run, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        suite.main(["--json", str(file), "compress_kv"])
    assert {s["merge"] for s in sets(file)[1:]} == {"drop"}
    assert "*Not measured*: `ipadapter`" in file.with_suffix(".md").read_text()
    assert suite.main(["--json", str(file), "compress_kv"]) == 0
    assert count == ["drop", "pivot", "pivot"] and {s["merge"] for s in sets(file)[1:]} == {"drop", "pivot"}


def test_a_run_that_is_told_to_end_leaves_its_page(here, tiny, tmp_path, monkeypatch):
    file, before = tmp_path / "abacus-2026-01-02.jsonl", signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run, "measure", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit, match="143"):
            suite.main(["--json", str(file), "compress_kv"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "*Not measured*: `compress_kv`" in file.with_suffix(".md").read_text()


def test_when_time_is_up_the_status_says_to_go_on(here, tiny, tmp_path, monkeypatch, capsys):
    file = tmp_path / "abacus-2026-01-02.jsonl"
    assert suite.main(["--json", str(file), "--minutes", "0"]) == GO_ON
    assert not here and not file.exists()
    clock = iter([0.0, 1.0, 700.0])
    monkeypatch.setattr(suite, "monotonic", lambda: next(clock))
    assert suite.main(["--json", str(file), "--minutes", "10"]) == GO_ON
    assert len(here) == 1 and "10 minutes are over, in or before compress_kv" in capsys.readouterr().out


def test_a_case_stops_between_its_parameters(here, tmp_path, monkeypatch):
    file = tmp_path / "result.jsonl"
    clock = iter([0.0, 1.0, 90.0])
    monkeypatch.setattr(run, "monotonic", lambda: next(clock))
    arguments = ["compress_kv", "--rounds", "1", "--json", str(file), "--resume", "--set", *SMALL, "merge=drop,pivot"]
    monkeypatch.setattr(run, "measure", lambda case, *args: {"fastprompt": {"why_not": "oom"}})
    assert run.main([*arguments[:1], "--minutes", "1", *arguments[1:]]) == GO_ON
    assert [s["merge"] for s in sets(file)] == ["drop"]


def test_failures_are_told_and_the_rest_goes_on(here, tiny, tmp_path, monkeypatch, capsys):
    file = tmp_path / "abacus-2026-01-02.jsonl"
    bad = lambda case, *args: {"fastprompt": {"why_not": "wrong: off by 1"}}  # noqa: E731
    monkeypatch.setattr(run, "measure", bad)
    assert suite.main(["--json", str(file)]) == 1
    assert len(here) == 3 and "compress_kv failed, exit status 1" in capsys.readouterr().err
    assert suite.main(["--json", str(file)]) == 1  # it is in the file


def test_tests_are_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "find_spec", lambda name: None)  # one process is enough
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "test_three.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    file = tmp_path / "abacus-2026-01-02.jsonl"
    assert suite.run_tests(file, "cpu", suite.SAMPLE, [str(folder / "test_three.py")], 1.0) == 1
    (line,) = rows.holding(file, "tests")
    assert (line["passed"], line["skipped"], line["failed"]) == (1, 1, ["test_three::test_bad"])
    page = gpu_report.summary(file, [])
    assert "on this GPU (a sample of all): 1 passed, 1 skipped, 1 failed: `test_three::test_bad`" in page
    assert suite.run_tests(file, "cpu", "none", [str(folder / "test_none.py")], 1.0) > 1  # a file that is not there
    assert len(rows.holding(file, "tests")) == 1
    rows.append(file, [line | {"tests": "test_three", "passed": 5}])
    assert "on this GPU: 5 passed, 1 skipped" in gpu_report.summary(file, [])  # which hold the sample, too


def test_every_planned_case_takes_its_parameters(monkeypatch):
    """The names of parameters; that values are right, only the device shows."""
    import importlib
    import inspect

    for device in ("cpu", "cuda"):
        planned = list(suite.plan(device))
        assert {r.case for r in planned} <= set(names())
        for runs in planned:
            known = inspect.signature(importlib.import_module(f"bench.cases.{runs.case}").build).parameters
            for params in grid(runs.settings):
                assert set(params) <= set(known) - {"device"}, runs
    assert {r.case for r in suite.plan("cuda")} == set(names()) - {"cpu_candidates", "prefill_kvpress"}


def test_all_tests_of_kernels_are_run():
    """But for the timing of tiny cases, and what is there for compute-sanitizer."""
    marked = {f.stem for f in (suite.ROOT / "tests").glob("test_*.py") if "@pytest.mark.gpu" in f.read_text()}
    assert marked - {"test_bench", "test_sanitized", "test_suite"} <= set(suite.TESTS)
    assert all((suite.ROOT / "tests" / f"{name}.py").exists() for name in suite.TESTS)


def test_a_case_without_what_it_needs_is_a_row(monkeypatch, tmp_path):
    def build(device):
        raise CannotRun("no moon")

    monkeypatch.setattr(decode, "build", build)
    assert run.main(["decode", "--json", str(tmp_path / "a"), "--rounds", "1"]) == 0
    (row,) = rows.read(tmp_path / "a")
    assert row["why_not"] == "not run: no moon" and row["set"] == {}


def rows_of_a_gpu(date, seconds, case="prompt_attention", **more):
    """The rows of one set of parameters, as a GPU of 2026 might leave them."""
    params = {"batch": 64, "heads": 12, "tokens": 197, "dim": 64, "prompts": 10, "dtype": "bfloat16",
              "mode": "forward+backward", **more}  # fmt: skip
    machine = {"device": "NVIDIA Abacus", "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0",
               "date": f"{date}T00:00:00+00:00"}  # fmt: skip
    common = {"case": case, "baseline": "concat", "params": params, "set": {}, "rounds": 3, "machine": machine}
    times = {"floor": 0.5, "concat": 2.0, "concat/flash": 1.5, "fastprompt": 1.0}
    lines = [{"ceilings": {"copy": 1e12, "bfloat16": 1e14}, "machine": machine}]
    for name, factor in times.items():
        time = {f"p{p}_s": factor * seconds for p in (20, 50, 80)} | {f"ratio_p{p}": factor / 2 for p in (20, 50, 80)}
        work = {"flops": int(2e13 * seconds), "bytes": int(1e11 * seconds)}
        lines.append({**common, "provider": name, **time, "difference": 1e-3, "peak_bytes": 1 << 30, **work})
    lines.append({**common, "provider": "xformers", "why_not": "not run: not installed"})
    return lines


def test_the_readme_shows_the_newest_rows_of_every_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert gpu_report.block() == "On a GPU: *not measured* (`make bench-gpu`)."
    rows.append(tmp_path / "nvidia-abacus-2026-01-02.jsonl", rows_of_a_gpu("2026-01-02", 1.0))
    rows.append(tmp_path / "nvidia-abacus-2026-01-01.jsonl", rows_of_a_gpu("2026-01-01", 7.0))
    rows.append(
        tmp_path / "nvidia-abacus-2026-01-01.jsonl", rows_of_a_gpu("2026-01-01", 7.0, "vpt_step", model="ViT-B")
    )
    rows.append(tmp_path / "prompt_attention-cpu.jsonl", rows_of_a_gpu("2026-01-03", 9.0))
    text = gpu_report.block()
    assert "[2026-01-02](bench/results/nvidia-abacus-2026-01-02.md)" in text
    (line,) = [x for x in text.splitlines() if "64 x 12 heads, 197 tokens, 10 prompts" in x]
    assert "| 1.5e+03 ms (`concat/flash`) | 1e+03 ms | 0.67x | 20 % (product) | 1,024 against 1,024 MiB |" in line


@pytest.mark.parametrize("shown", [pytest.param(x, marks=NEEDS.get(x.case, ()), id=x.case) for x in gpu_report.SHOWN])
def test_what_is_shown_are_parameters_and_providers_of_the_case(shown):
    case = run.build(shown.case, "cpu", TINY[shown.case])
    assert shown.title.format(**case.params) and set(shown.params) <= set(case.params)
    assert {shown.ours, shown.theirs or shown.ours} <= set(case.providers)


def test_a_page_has_shares_ratios_memory_and_reasons(tmp_path):
    file = tmp_path / "nvidia-abacus-2026-01-02.jsonl"
    rows.append(file, rows_of_a_gpu("2026-01-02", 1.0))
    page = gpu_report.summary(file, ["prompt_attention", "decode"])
    assert page.startswith("# NVIDIA Abacus, 2026-01-02\n") and "torch 2.11.0" in page
    assert "| fastprompt | 1,000.0 | 1,000.0 | 1,000.0 | 0.500x | 1,024 | 20 (20 % of the product ceiling) |" in page
    assert "`xformers` not run: not installed." in page and "*Not measured*: `decode`." in page
    assert "Tests of the kernels on this GPU: *not run*." in page


def test_results_of_a_gpu_are_linked_where_results_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "files", lambda: [tmp_path / "nvidia-abacus-2026-01-02.jsonl"])
    rows.append(tmp_path / "nvidia-abacus-2026-01-02.jsonl", rows_of_a_gpu("2026-01-02", 1.0))
    (line,) = [x for x in report.cases_block().splitlines() if x.startswith("| `prompt_attention` |")]
    assert line.endswith("| [nvidia-abacus-2026-01-02.md](nvidia-abacus-2026-01-02.md) |")
    assert report.results_block().startswith("On GPUs: [nvidia-abacus-2026-01-02](nvidia-abacus-2026-01-02.md).")


def test_a_gpu_is_asked_for_where_there_is_none(capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            suite.main(["--device", "cuda"])
        assert "PyTorch sees no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        suite.main(["nonsense"])
    assert "CASE: got nonsense, expected some of apt_step" in capsys.readouterr().err
