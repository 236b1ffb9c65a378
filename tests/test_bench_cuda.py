# SPDX-License-Identifier: Apache-2.0
"""What the benchmark and `fastprompt warmup` do on a GPU, on a pretended one: every case, the suite, its clock."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from bench_cases import TINY
from library_cases import stand_ins
from pretend_cuda import NAME, Event, pretend_cuda
from test_suite import rows_of_a_gpu
from test_warmup import SHAPE, shipped  # noqa: F401

from bench import forks, gpu_report, measure, roofline, rows, run, suite, targets
from bench.case import Case, Provider
from bench.measure import DIED, DeviceClock
from bench.run import GO_ON, grid, measured, names
from bench.suite import Runs
from fastprompt import cli
from fastprompt.kernels import configs
from fastprompt.warmup import tune

#: Smaller yet: kernels are interpreted.
SMALLER = {
    "compress_kv": {"tokens": 20}, "decoupled_attention": {"batch": 1, "heads": 1}, "diffuse_prompts": {"batch": 1},
    "key_scores": {"tokens": 40}, "prompt_attention": {"batch": 1, "heads": 1},
    "prompt_attention_varlen": {"classes": 3, "heads": 1}, "prompt_bank": {"batch": 2, "heads": 1},
    "summarize_tokens": {"batch": 1}, "apt_step": {"layers": 1, "batch": 1}, "vpt_step": {"layers": 1, "batch": 1},
    "cocoop_step": {"batch": 1, "classes": 2, "layers": 1}, "coop_text": {"classes": 2, "layers": 1},
    "maple_step": {"classes": 2, "layers": 2}, "ipadapter": {"steps": 1, "batch": 1},
}  # fmt: skip
#: These run kernels; steps made of them take the reference, whose values are the same.
WITH_KERNELS = ("compress_kv", "decoupled_attention", "diffuse_prompts", "key_scores", "prompt_attention",
                "prompt_attention_varlen", "prompt_bank", "summarize_tokens")  # fmt: skip
#: These time what leaves the instance keys to one of PyTorch's CUDA kernels.
WITH_LIBRARIES = ("key_scores", "prompt_attention")
ON_A_GPU = sorted(set(names()) - {"cpu_candidates", "prefill_kvpress"})


def tiny(name):
    return [f"{key}={value}" for key, value in (TINY[name] | SMALLER.get(name, {})).items()]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is compiled, and nothing warmed up."""
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    interleave = run.interleave
    monkeypatch.setattr(run, "interleave", lambda *args: interleave(*args, warmup=0))
    monkeypatch.setattr(measure.DeviceClock, "__init__", small_clock)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for case in ("prompt_attention", "prompt_attention_varlen", "decoupled_attention"):
        monkeypatch.setattr(
            f"bench.cases.{case}.no_flex", lambda device, train: "no backward on a CPU" if train else None
        )


def small_clock(self):
    self.flush, self.naps = torch.empty(16, dtype=torch.uint8, device="cuda"), {}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ON_A_GPU)
def test_every_case_runs_on_a_gpu(name, tmp_path):
    if name == "ipadapter":
        pytest.importorskip("diffusers")
    file = tmp_path / "a.jsonl"
    libraries = stand_ins() if name in WITH_LIBRARIES else nullcontext()
    with pretend_cuda(kernels=name in WITH_KERNELS), libraries:
        assert run.main([name, "--device", "cuda", "--rounds", "1", "--json", str(file), "--set", *tiny(name)]) == 0
    found = {r["provider"]: r for r in rows.read(file)}
    ours = [r for n, r in found.items() if n.split("/")[0] not in ("floor", "stream") and "p50_s" in r]
    assert ours and all(r["machine"]["device"] == NAME and r["peak_bytes"] == 2 << 20 for r in ours)
    assert not [n for n in found if n.endswith("/composed")]  # that is for a CPU
    (group,) = [x for x in suite.first("cuda") if x.case == name][:1] or [None]
    if group:
        assert set(group.only) <= set(found)  # what is measured first, there is
    if name in WITH_KERNELS:
        assert "p50_s" in found["fastprompt/triton"] and "not on the CPU" in found["fastprompt/cpp"]["why_not"]


class Scripted(Event):
    """Is late as often as ``late`` says."""

    late: list = []  # noqa: RUF012

    def query(self):
        return Scripted.late.pop(0) if Scripted.late else False


@pytest.fixture
def naps(monkeypatch):
    """Of a clock on a device whose events a test writes, and a host whose seconds it writes."""
    slept, seconds = [], []
    with pretend_cuda():
        monkeypatch.setattr(torch.cuda, "Event", Scripted)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: slept.append(cycles / DeviceClock.CYCLES))
        at = iter(range(10**6))
        monkeypatch.setattr(measure.time, "perf_counter", lambda: 0.0 if next(at) % 2 == 0 else seconds.pop(0))
        monkeypatch.setattr(Scripted, "record", lambda self: None)
        yield slept, seconds


def test_the_device_naps_as_long_as_a_step_needs(naps):
    slept, seconds = naps
    clock, step = DeviceClock(), lambda: None
    Scripted.late, seconds[:] = [True, False], [0.004, 0.004]
    clock(step)
    assert slept == [0.001, 0.008] and clock.naps[step] == (0.008, False)
    seconds[:] = [0.004, 0.0001]
    clock(step)
    assert slept[2:] == [0.008]
    clock(lambda: None)
    assert slept[3:] == [0.001]  # every step has its own


def test_a_first_call_that_compiles_does_not_leave_long_naps(naps):
    slept, seconds = naps
    clock, step = DeviceClock(), lambda: None
    Scripted.late, seconds[:] = [True, False], [20.0, 0.0002]
    clock(step)
    assert slept == [0.001, 0.25] and clock.naps[step] == (0.001, False)


def test_a_step_that_waits_for_the_device_gets_no_longer_nap(naps):
    """However long the nap, the host comes back after it."""
    slept, seconds = naps
    clock, step = DeviceClock(), lambda: None
    Scripted.late, seconds[:] = [True, True], [0.003, 0.008]
    clock(step)
    assert slept == [0.001, 0.006] and clock.naps[step] == (0.006, True)
    Scripted.late, seconds[:] = [True], [0.008]
    clock(step)
    assert slept[2:] == [0.006]


@pytest.fixture
def here(monkeypatch):
    """What the suite starts runs in this process; what was started is recorded, and may be told to die."""
    started, dying = [], {}

    def start(name, *arguments, told=None):
        started.append((name, arguments[0]))
        if name == "pytest":
            return 5  # no tests
        module = {"bench.run": run, "bench.roofline": roofline}[name]

        def tell(doing):
            told.append(doing)
            if dying.get(doing.get("provider"), 0):
                raise SystemError

        try:
            return (module.main(list(arguments), tell) if name == "bench.run" else module.main(list(arguments))) or 0
        except SystemError:
            return -signal.SIGSEGV

    monkeypatch.setattr(forks, "run", start)
    monkeypatch.setattr(suite, "module", start)
    monkeypatch.setattr(suite, "compile_ahead", lambda lacking, device, minutes: started.append(len(lacking)) or 0)
    monkeypatch.setattr(suite, "TESTS", ("test_key_scores",))
    monkeypatch.setattr(roofline, "SIDES", {"cuda": 8})
    monkeypatch.setattr(roofline, "COPIES", {"cuda": 64})
    with pretend_cuda(kernels=False):
        yield started, dying


def planned(monkeypatch, first, rest=()):
    monkeypatch.setattr(suite, "first", lambda device: iter(first))
    monkeypatch.setattr(suite, "rest", lambda device: iter(rest))


def test_the_suite_on_a_gpu(here, monkeypatch, tmp_path, capsys):
    started, _ = here
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    file = tmp_path / "a-gpu-2026-01-01.jsonl"
    settings = [*tiny("decode_attention"), "dtype=bfloat16"]
    planned(
        monkeypatch, [Runs("decode_attention", 1, settings, ("fastprompt",))], [Runs("decode_attention", 1, settings)]
    )
    assert suite.main(["--device", "cuda", "--json", str(file)]) == 1  # no tests, which is told
    ran = ("bench.run", "decode_attention")
    assert started == [("bench.roofline", "--device"), ("pytest", "-q"), 1, ran, ("pytest", "-q"), 1, ran]
    held = rows.read(file)
    assert len(held) == 8 and not any("only" in r for r in held)  # measured again, with all
    page = file.with_suffix(".md").read_text()
    assert page.startswith(f"# {NAME}") and "What was aimed at:" in page and "TFLOP/s in tf32" in page
    assert NAME in gpu_report.block()
    assert "aim | measured" in capsys.readouterr().out
    before = file.read_text()
    started.clear()
    assert suite.main(["--device", "cuda", "--json", str(file), "decode_attention"]) == 0
    assert not started and file.read_text() == before
    assert suite.main(["--device", "cuda", "--json", str(file), "--minutes", "0"]) == GO_ON
    capsys.readouterr()
    roofline.main(["--device", "cuda"])  # which finds the rows of GPUs
    assert "of the nearer ceiling" in capsys.readouterr().out


def test_what_ends_a_process_is_a_row_and_the_rest_is_measured(here, monkeypatch, tmp_path):
    _, dying = here
    file = tmp_path / "a.jsonl"
    planned(monkeypatch, [Runs("decode_attention", 1, tiny("decode_attention"))])
    dying["sdpa/folded"] = True
    assert suite.main(["--device", "cuda", "--json", str(file), "decode_attention"]) == 1
    found = {r["provider"]: r for r in rows.read(file)}
    assert found["sdpa/folded"]["why_not"] == DIED and "p50_s" in found["fastprompt"]
    dying.clear()
    before = file.read_text()
    assert suite.main(["--device", "cuda", "--json", str(file), "decode_attention"]) == 1  # told again, not run again
    assert file.read_text() == before


def test_parameters_that_end_a_process_are_left_behind(here, monkeypatch, tmp_path):
    """Where no provider had begun: the reference, say."""
    _, dying = here
    file = tmp_path / "a.jsonl"
    planned(monkeypatch, [Runs("decode_attention", 1, tiny("decode_attention"))])
    dying[None] = True
    assert suite.main(["--device", "cuda", "--json", str(file), "decode_attention"]) == 1
    (row,) = rows.read(file)
    assert (
        row["why_not"] == DIED
        and row["provider"] == "reference"
        and measured(file, "decode_attention", (), set=row["set"])
    )
    assert "## `decode_attention`" in file.with_suffix(".md").read_text()


def test_everything_is_run_once_ahead_of_time(monkeypatch):
    """With one layer, whatever fails."""
    ran = []
    monkeypatch.setattr(forks.os, "dup2", lambda *args: None)
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 2)

    def toy(case, device, params, only):
        step = lambda name: lambda: ran.append(name)  # noqa: E731
        providers = {n: Provider(lambda n=n: step(n)) for n in ("a", "b", "c")}
        providers["b"] = Provider(lambda: 1 / 0)
        providers["d"] = Provider(lambda: step("d"), why_not="not here")
        ran.append((case, params))
        return Case("toy", providers, "a", list, 0.0)

    monkeypatch.setattr(forks, "build", toy)
    forks.run_once("vpt_step", "cuda", {"prompts": 10, "layers": 12}, ("a", "b"))
    forks.run_once("key_scores", "cuda", {"tokens": 40}, ())
    assert ran == [("vpt_step", {"prompts": 10, "layers": 1}), "a", "c", ("key_scores", {"tokens": 40}), "a", "c"]
    assert torch._inductor.config.compile_threads == 1


def test_compiling_ahead_takes_a_part_of_the_time(monkeypatch):
    forks.FORKS.set_forkserver_preload(["bench.run"])
    start = forks.start
    monkeypatch.setattr(forks, "start", lambda target, seconds, *rest: start(time.sleep, seconds))
    monkeypatch.setattr(suite, "PROCESSES", 2)
    monkeypatch.setattr(suite, "COMPILING", 0.1)
    waits = [(Runs(seconds, 1, []), {}) for seconds in (0, 0, 60, 60, 60)]
    begun = time.monotonic()
    assert suite.compile_ahead(waits, "cuda", 99.0) == 0
    assert time.monotonic() - begun < 30


def test_forks_tell_what_they_do_and_how_they_end(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(forks, "PATIENCE", 20)
    forks.FORKS.set_forkserver_preload(["bench.run"])  # all cases take long
    (tmp_path / "forked.py").write_text(
        "import os, signal, time\n"
        "def main(arguments):\n"
        "    if arguments == ['killed']: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    if arguments == ['raises']: raise RuntimeError('lost')\n"
        "    if arguments == ['silent']: time.sleep(60)\n"
        "    return 3\n"
    )
    assert [forks.run("forked", a) for a in ("", "killed", "raises")] == [3, -signal.SIGKILL, forks.CRASHED]
    monkeypatch.setattr(forks, "PATIENCE", 0.5)
    assert forks.run("forked", "silent") == -signal.SIGKILL
    monkeypatch.setattr(forks, "PATIENCE", 20)
    before = signal.signal(signal.SIGUSR1, lambda *args: sys.exit(1))
    timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    with pytest.raises(SystemExit):
        forks.run("forked", "silent")
    signal.signal(signal.SIGUSR1, before)
    for child in multiprocessing.active_children():
        child.join(10)
    assert not multiprocessing.active_children()  # it does not outlive who asked for it
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"


def test_a_part_of_the_providers_does_not_count_as_all(tmp_path):
    file = tmp_path / "a.jsonl"
    row = {"case": "toy", "params": {"n": 1}, "set": {"n": 1}, "provider": "a", "only": ["a", "b"]}
    rows.append(file, [row])
    assert measured(file, "toy", ("a",), set={"n": 1}) and not measured(file, "toy", ("a", "c"), set={"n": 1})
    assert not measured(file, "toy", (), set={"n": 1}) and not measured(file, "toy", ("a",), set={"n": 2})


def test_what_is_measured_first_serves_every_target():
    """Of the parameters that a target names, as far as the plan names them."""
    for target in targets.TARGETS:
        sets = [params for runs in suite.first("cuda") if runs.case == target.case for params in grid(runs.settings)]
        assert any(all(params.get(n, v) == v for n, v in target.params.items()) for params in sets), target


def test_targets_have_their_figures():
    found = {"copy": 1e12, "bfloat16": 1e14}
    lines = rows_of_a_gpu("2026-01-01", 1.0, tokens=257, heads=16)
    assert targets.table([], {}).count("*not measured*") == len(targets.TARGETS)
    group = [r for r in lines if r.get("case")]
    group.append({**group[0], "provider": "same_keys", "p50_s": 0.95, "ratio_p50": 0.475})
    other = [{**r, "params": r["params"] | {"prompts": 50}} for r in group]
    text = targets.table([group, other], found)
    assert "prompts 10: 1.50x `concat/flash`; prompts 50: 1.50x `concat/flash` | yes |" in text
    assert "0.95x `same_keys`" in text and text.count("*not measured*") == len(targets.TARGETS) - 2

    def of(case, params, *made):
        return [{"case": case, "params": params, "provider": n, "p50_s": s, "flops": 10**13, "bytes": 10**11,
                 "peak_bytes": m} for n, s, m in made]  # fmt: skip

    groups = [
        of("vpt_step", {"model": "ViT-B", "prompts": 10}, ("floor", 1.0, 1), ("fastprompt", 1.04, 1)),
        of("coop_text", {"classes": 1000, "dtype": "float32"}, ("published", 13.0, 11), ("fastprompt", 1.0, 1)),
        of("key_scores", {"dtype": "bfloat16", "tokens": 9}, ("flash", 1.3, 1), ("fastprompt", 1.0, 1)),
        of("compress_kv", {"dtype": "bfloat16", "tokens": 9}, ("fastprompt", 0.25, 1)),
        of("decode", targets.TARGETS[-1].params, ("plain", 1.4, 1), ("lookm 20%", 1.0, 1)),
    ]
    text = targets.table(groups, found)
    for figure in ("+4.0 % | no", "13.0x in time, 11.0x in memory | yes", "65 % | yes", "40 % | no",
                   "1.40x, 0.10 of the bytes' bound | no"):  # fmt: skip
        assert f"| {figure} |" in text
    (products,) = of("compress_kv", {"dtype": "bfloat16"}, ("fastprompt", 0.25, 1))
    figure = targets.of_copy(0.5)({"fastprompt": products | {"bytes": 10**10}}, found)
    assert figure == ("4 %, 40 % of its bound (product)", False)


def test_warmup_on_a_gpu(shipped, capsys):  # noqa: F811
    sizes = "--batch 1 --heads 1 --tokens 4 --prompts 2 --head-dim 16".split()
    with pretend_cuda():
        assert cli.main(["warmup", *sizes]) == 0
        file = tune(replace(SHAPE, dtype=torch.bfloat16), timer=lambda step: 1.0)
    assert "ready in" in capsys.readouterr().out
    assert all(entry.origin.startswith(f"measured on {NAME}, ") for entry in configs.read(file)[1].values())
    assert file.stem == "pretended-h200"
