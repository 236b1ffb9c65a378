# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite on tiny versions of its cases."""

import dataclasses
import importlib
import json
import math
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from bench_cases import NEEDS, TINY, agreed
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from bench import compare, gpu_report, plot, report, roofline, rows, run, tables
from bench.case import CannotRun, Case, Provider, attention_work
from bench.cases import coop_text
from bench.measure import OOM, interleave, summary, too_large, wall_clock
from bench.published_clip import activation_bytes
from bench.run import build, grid, main, measure, names
from fastprompt.tuning.memory import peak_memory

OPERATIONS = (
    "cpu_candidates",
    "decoupled_attention",
    "prompt_attention",
    "prompt_attention_varlen",
    "prompt_bank",
    "summarize_tokens",
)

#: PEFT asks transformers under a name that goes away.
PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    """Compiling takes most of a minute; what flex_attention computes is the same without."""
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)


def test_every_case_has_a_tiny_version():
    assert set(TINY) == set(names())


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_agree_with_the_reference(name, dtype, mode):
    settings = {"mode": mode} if name != "cpu_candidates" else {}
    case = build(name, "cpu", TINY[name] | settings | {"dtype": dtype})
    compared, reasons = agreed(case)
    assert case.baseline in compared and "fastprompt" in compared
    assert compared | set(reasons) | {"floor"} == set(case.providers) | {"floor"}
    if name == "prompt_attention":
        assert {"concat/efficient", "concat/cudnn", "xformers"} <= set(reasons)
        assert ("flex/packed" in reasons) == (mode != "forward")
        assert {"same_keys", "concat/flash", "expand/math", "compiled"} <= compared
    if name == "prompt_attention_varlen":
        assert {"concat/flash", "concat/math", "trimmed/flash", "compiled"} <= compared
        assert ("flex/packed" in compared) == (mode == "forward") and reasons["flash_attn"].endswith("runs on CUDA")


def test_packed_sequences_are_laid_out_for_flash_attn(monkeypatch):
    """Its stand-in attends sequence by sequence, as its documentation says: the last query sees the last key."""
    from torch.nn.attention.bias import causal_lower_right

    def stand_in(query, key, value, query_ends, key_ends, longest):
        out = []
        for mine, seen in zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True):
            q, k, v = (x[slice(*at)].transpose(0, 1) for x, at in ((query, mine), (key, seen), (value, seen)))
            assert q.shape[1] <= longest[0] and k.shape[1] <= longest[1]
            out.append(scaled_dot_product_attention(q, k, v, causal_lower_right(q.shape[1], k.shape[1])))
        return torch.cat(out, dim=1).transpose(0, 1)

    monkeypatch.setattr("bench.cases.prompt_attention_varlen.flash_attn_varlen", stand_in)
    monkeypatch.setattr("bench.cases.prompt_attention_varlen.missing", lambda *args: None)
    case = build("prompt_attention_varlen", "cpu", TINY["prompt_attention_varlen"] | {"dtype": "float32"})
    assert "flash_attn" in agreed(case)[0]


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_diffuse_prompts_agrees_with_the_released_module(mode):
    compared, _ = agreed(build("diffuse_prompts", "cpu", TINY["diffuse_prompts"] | {"mode": mode}))
    assert {"eager", "compiled", "fastprompt", "fastprompt/reference"} <= compared


COMPOSED = "fastprompt/composed"
CLASSES = ("published", "trimmed", "shared", "fastprompt")


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("apt_step", {"fastprompt", COMPOSED}),
        ("cocoop_step", {"published", "trimmed", "fastprompt", COMPOSED}),
        ("coop_text", {f"{n}{c}" for n in CLASSES for c in ("", "/compiled")} | {COMPOSED}),
        pytest.param("ipadapter", {"diffusers", "fastprompt/every-step", "fastprompt"}, marks=NEEDS["ipadapter"]),
        ("maple_step", {"published", "trimmed", "fastprompt", COMPOSED}),
        ("multilane", {"released", "loop", "fastprompt", "fastprompt/batch"}),
        ("prefix_step", {"peft", "kv_concat", "fastprompt", COMPOSED}),
        ("vpt_step", {"kv_concat", "fastprompt", COMPOSED}),
    ],
)
def test_steps_agree_with_the_reference(name, expected):
    assert agreed(build(name, "cpu", TINY[name])) == (expected, {})


def test_apt_step_on_a_larger_model():
    assert agreed(build("apt_step", "cpu", TINY["apt_step"] | {"layers": 1, "batch": 1, "model": "ViT-B"}))[1] == {}


@NEEDS["ipadapter"]
def test_ipadapter_counts_what_is_saved():
    """Without its projections at 19 of 20 steps, for 16 layers whose widths add up to 12,480."""
    work = {n: p.work.flops for n, p in build("ipadapter", "meta", {"dtype": "float32"}).providers.items()}
    assert work["fastprompt/every-step"] == work["diffusers"]
    assert work["diffusers"] - work["fastprompt"] == 2 * 19 * 2 * (2 * (77 + 4) * 768 * 12480)


def test_multilane_trains_the_newest_task():
    case = build("multilane", "cpu", TINY["multilane"] | {"mode": "step"})
    assert agreed(case)[0] == {"released", "loop", "fastprompt", "fastprompt/batch"}


def test_coop_text_agrees_in_bfloat16_and_in_chunks(monkeypatch):
    monkeypatch.setattr(coop_text, "CHUNK", 3)
    case = build("coop_text", "cpu", TINY["coop_text"] | {"dtype": "bfloat16"})
    assert agreed(case) == (set(case.providers), {})


@pytest.mark.parametrize("provider", ["published", "trimmed", "shared", "fastprompt"])
def test_coop_text_counts_the_products_it_computes(provider):
    shape = TINY["coop_text"]
    step = build("coop_text", "cpu", shape).providers[provider].build()
    step()  # fastprompt computes what no prompt changes once
    with FlopCounterMode(display=False) as counter:
        step()
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "b" not in str(op))
    found = build("coop_text", "cpu", shape).providers[provider]
    assert 0 < found.work.flops - products < 0.1 * products  # the rest is attention's


def test_cocoop_step_with_the_image_tower():
    assert agreed(build("cocoop_step", "cpu", TINY["cocoop_step"] | {"tower": 1}))[1] == {}


@pytest.mark.parametrize("name", ["cocoop_step", "coop_text", "maple_step"])
def test_what_would_not_fit_is_a_reason_with_an_estimate(name, monkeypatch):
    case = importlib.import_module(f"bench.cases.{name}")
    monkeypatch.setattr(case, "too_large", lambda n, device: too_large(n << 30, device))
    reasons = {n: p.why_not for n, p in build(name, "cpu", TINY[name]).providers.items()}
    assert reasons["fastprompt"] is None
    assert "activations need" in reasons["published"] and "GiB free" in reasons["published"]


def test_published_activations_are_28_7_kb_a_row_and_layer():
    assert activation_bytes(1, 512, 1, torch.float32) == 28672


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_peft_with_gradient_checkpointing_is_a_reason():
    compared, reasons = agreed(build("prefix_step", "cpu", TINY["prefix_step"] | {"checkpointing": 1}))
    assert compared == {"kv_concat", "fastprompt", COMPOSED}
    assert "does not work with gradient checkpointing" in reasons["peft"]


def test_a_wrong_provider_is_not_timed(monkeypatch):
    from bench.cases import vpt_step

    honest = vpt_step._kv_concat
    monkeypatch.setattr(vpt_step, "_kv_concat", lambda *a, **k: (2 * honest(*a, **k)[0], None))
    found = measure(build("vpt_step", "cpu", TINY["vpt_step"]), "cpu", 1, lambda name: 0)
    assert found["kv_concat"]["why_not"].startswith("wrong: off by") and list(found["kv_concat"]) == ["why_not"]
    assert found["fastprompt"]["p50_s"] > 0


@pytest.mark.parametrize(
    ("check", "why_not"),
    [
        (lambda: [torch.full((1,), 1.01)], "wrong: off by 0.01, expected at most 1e-06"),
        (lambda: [torch.full((1,), torch.nan)], "wrong: off by nan, expected at most 1e-06"),
        (lambda: [torch.ones(2) @ torch.ones(3)], "failed: RuntimeError: "),
    ],
)
def test_a_run_with_a_wrong_provider_fails(check, why_not, monkeypatch, tmp_path):
    wrong = toy(wrong=Provider(lambda: None, check))
    monkeypatch.setattr(run, "build", lambda *args: wrong)
    monkeypatch.setattr(run, "peak_in_fresh_process", lambda *args: 0)
    file = tmp_path / "result.jsonl"
    assert main(["vpt_step", "--rounds", "1", "--json", str(file)]) == 1
    good, bad = rows.read(file)
    assert "why_not" not in good and bad["why_not"].startswith(why_not)


def toy(**providers):
    """A case whose baseline returns [1.0]."""
    good = lambda: [torch.ones(1)]  # noqa: E731
    given = {"good": Provider(lambda: good, good)} | providers
    return Case("toy", given, "good", lambda: [torch.ones(1, dtype=torch.float64)], 1e-6)


def raises(error):
    def step(*_):
        raise error

    return step


def late(error, calls):
    """A step that works ``calls`` times."""
    left = iter(range(calls))
    return lambda: [torch.ones(1)] if next(left, None) is not None else raises(error)()


def test_what_cannot_run_is_a_row_and_stops_nobody():
    full = torch.OutOfMemoryError("CUDA out of memory")
    case = toy(
        build_oom=Provider(raises(full)),
        check_oom=Provider(lambda: None, raises(full)),
        cpu_oom=Provider(lambda: lambda: [torch.empty(1 << 60)]),
        late_oom=Provider(lambda: late(full, 3)),
        refuses=Provider(raises(CannotRun("needs a moon")), raises(CannotRun("needs a moon"))),
        absent=Provider(raises(RuntimeError("never built")), why_not="CUDA only"),
        fine=Provider(lambda: lambda: [torch.ones(1)]),
    )
    found = measure(case, "cpu", 3, lambda name: 17)
    assert [n for n, r in found.items() if r.get("why_not") == OOM] == ["build_oom", "check_oom", "cpu_oom", "late_oom"]
    assert found["refuses"] == {"why_not": "not run: needs a moon"}
    assert found["absent"] == {"why_not": "not run: CUDA only"}
    for name in ("good", "fine"):
        assert found[name]["p20_s"] <= found[name]["p50_s"] <= found[name]["p80_s"]
        assert found[name]["peak_bytes"] == 17 and found[name]["ratio_p50"] > 0
    assert list(found) == list(case.providers)


def test_a_reference_that_cannot_run_is_the_reason_of_every_row():
    case = dataclasses.replace(toy(), reference=raises(torch.OutOfMemoryError()))
    assert measure(case, "cpu", 1, lambda name: 0) == {"good": {"why_not": "failed: the reference: oom"}}


def test_memory_that_runs_out_while_measured_is_a_row():
    assert measure(toy(), "cpu", 1, lambda name: OOM)["good"] == {"why_not": OOM}


def test_errors_are_rows_that_name_them(capsys):
    case = toy(broken=Provider(raises(RuntimeError("a bug\nin detail"))), short=Provider(lambda: list, list))
    found = measure(case, "cpu", 1, lambda name: 0)
    assert found["broken"] == {"why_not": "failed: RuntimeError: a bug"} and "in detail" in capsys.readouterr().err
    assert found["short"]["why_not"].startswith("failed: ValueError: zip()")  # a missing result
    assert found["good"]["p50_s"] > 0


def test_without_its_baseline_a_case_has_times_but_no_ratios():
    case = toy(other=Provider(lambda: lambda: [torch.ones(1)]))
    case.providers["good"] = Provider(raises(torch.OutOfMemoryError()))
    found = measure(case, "cpu", 2, lambda name: 1)
    assert found["good"] == {"why_not": OOM} and "ratio_p50" not in found["other"] and found["other"]["p50_s"] > 0


def test_rounds_rotate_and_ratios_are_taken_within_a_round():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    times, failed = interleave(steps, 2, wall_clock, warmup=1)
    assert "".join(order) == "cab" + "abc" + "bca" and not failed
    assert {n: len(t) for n, t in times.items()} == dict.fromkeys("abc", 2)
    times = {"a": [1.0, 10.0, 2.0], "b": [0.5, 5.0, 1.0]}
    found = summary(times, "a")
    assert found["b"]["ratio_p50"] == pytest.approx(0.5)
    assert found["b"]["p50_s"] == pytest.approx(np.median(times["b"]))


def test_the_clock_waits_for_the_step():
    assert wall_clock(lambda: time.sleep(0.01)) >= 0.01


def test_grid_is_every_combination():
    assert list(grid(["a=1,0.5", "b=x"])) == [{"a": 1, "b": "x"}, {"a": 0.5, "b": "x"}]
    assert list(grid([])) == [{}]


def test_counted_work():
    # 6 queries, 10 keys, 60 pairs of head size 4 in 2 bytes: two products forward, five backward.
    forward = attention_work(6, 10, 60, 4, 2, backward=False)
    assert forward.flops == 2 * (2 * 60 * 4)
    assert forward.bytes == 2 * (6 * 4 + 10 * 4 + 10 * 4 + 6 * 4) + 4 * 6
    both = attention_work(6, 10, 60, 4, 2, backward=True)
    assert both.flops == 7 * (2 * 60 * 4)
    assert both.bytes == forward.bytes + 2 * (4 * 6 * 4 + 4 * 10 * 4) + 4 * 6


def test_run_writes_lines_and_resumes(tmp_path, capsys):
    file = tmp_path / "result.jsonl"
    small = [f"{k}={v}" for k, v in TINY["prompt_attention"].items() if k != "prompts"]
    arguments = ["prompt_attention", "--rounds", "2", "--json", str(file), "--resume", "--providers", "xformers"]
    main([*arguments, "--set", *small, "prompts=3", "mode=forward"])
    main([*arguments, "--set", *small, "prompts=3,4", "mode=forward"])
    found = rows.read(file)
    assert len(found) == len(file.read_text().splitlines()) == 4  # prompts=3 was not measured again
    for base, absent in (found[:2], found[2:]):
        assert base["provider"] == "concat" and absent["provider"] == "xformers"
        assert absent["why_not"] == "not run: xformers runs on CUDA"
        assert 0 < base["p20_s"] <= base["p50_s"] <= base["p80_s"] and base["ratio_p50"] == 1
        assert base["peak_bytes"] > 0 and base["flops"] > 0 and base["difference"] < 0.1
        assert base["params"]["tokens"] == 19 and base["machine"]["torch"] and base["rounds"] == 2
    assert "xformers runs on CUDA" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nonsense"):
        main(["prompt_attention", "--providers", "nonsense"])


def row(provider, p50, spread=0.1, case="toy", baseline="good", **more):
    times = {f"p{p}_s": p50 * f for p, f in ((20, 1 - spread), (50, 1), (80, 1 + spread))}
    ratios = {f"ratio_p{p}": f for p, f in ((20, 1 - spread), (50, 1.0), (80, 1 + spread))}
    common = {"case": case, "provider": provider, "baseline": baseline, "peak_bytes": 1 << 20}
    machine = {"device": "abacus", "threads": 1, "torch": "2", "date": "2026-01-01T00:00:00"}
    return {**common, **times, **ratios, "params": {"n": 1}, "machine": machine, **more}


def absent(provider, why_not, **more):
    whole = row(provider, 1.0, **more)
    return {k: v for k, v in whole.items() if not k.startswith(("p20", "p50", "p80", "ratio"))} | {"why_not": why_not}


def write(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def test_compare_flags_what_lies_outside_the_spread(tmp_path, capsys):
    before = [row("good", 1.0), row("slow", 1.0), row("quick", 1.0), row("gone", 1.0), absent("never", "oom")]
    after = [row("good", 1.05), row("slow", 1.5), row("quick", 0.5), absent("gone", "oom"), absent("never", "oom")]
    files = write(tmp_path / "a", before), write(tmp_path / "b", after)
    assert compare.main(list(files)) == 0
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert not shown["good"].endswith("slower") and "1.050" in shown["good"]
    assert shown["slow"].endswith("slower") and shown["quick"].endswith("faster")
    assert shown["gone"].endswith("ran -> oom")
    assert compare.main([*files, "--threshold", "2"]) == 1  # for the one that is gone
    still = write(tmp_path / "c", after[:3])
    assert compare.main([files[0], still, "--threshold", "2"]) == 0
    assert compare.main([files[0], still, "--threshold", "1.2"]) == 1


def test_of_a_row_measured_again_the_last_counts(tmp_path):
    file = tmp_path / "a"
    write(file, [row("good", 1.0), {"method": "of the demo"}, row("good", 2.0)])
    assert [r["p50_s"] for r in rows.read(file)] == [2.0]


def test_plot_writes_a_picture(tmp_path):
    lines = [row("good", 1.0), row("fastprompt", 0.5), absent("gone", "oom"), row("good", 1.0, case="other")]
    plot.main([write(tmp_path / "a", lines), "--out", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_roofline_takes_the_nearer_ceiling(tmp_path, monkeypatch, capsys):
    found = {"copy": 100.0, "float32": 1000.0}
    params = {"params": {"dtype": "float32"}}
    assert roofline.share(row("a", 1.0, flops=500, bytes=10, **params), found) == ("product", 0.5)
    assert roofline.share(row("a", 1.0, flops=500, bytes=80, **params), found) == ("copy", 0.8)
    assert roofline.share(row("a", 1.0, **params), found) is None
    assert roofline.share(absent("a", "oom", flops=1, bytes=1, **params), found) is None
    monkeypatch.setattr(roofline, "SIDES", {"cpu": 32})
    monkeypatch.setattr(roofline, "COPIES", {"cpu": 1 << 12})
    results = write(tmp_path / "a", [row("a", 1.0, flops=500, bytes=80, **params), absent("b", "oom", **params)])
    roofline.main([results, "--json", str(tmp_path / "ceilings")])
    (line,) = map(json.loads, (tmp_path / "ceilings").read_text().splitlines())
    assert set(line["ceilings"]) == {"copy", "float32", "bfloat16"} and all(c > 0 for c in line["ceilings"].values())
    shown = capsys.readouterr().out
    assert "GFLOP/s" in shown and "oom" in shown


def test_tables_show_reasons_and_out_of_memory():
    group = [row("good", 0.0123, flops=10**9, bytes=1), absent("full", "oom"), absent("x", "not run: no GPU")]
    text = tables.detail(group, {})
    assert "| good | 12.3 |" in text and "| full | out of memory |" in text and "`x` not run: no GPU." in text
    sets = [
        [{**r, "params": {"n": 1, "prompts": p, "mode": m}} for r in group] for m in ("up", "down") for p in (10, 20)
    ]
    text = tables.pivot(sets)
    assert "| provider | P=10 | P=20 |" in text and "mode up:" in text and "mode down:" in text
    assert "| good | 12.3, 1.00x | 12.3, 1.00x |" in text and "| full | oom | oom |" in text
    assert text.count("`x` not run: no GPU.") == 2 and "| x |" not in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(widths) == {4}


def test_results_list_every_case_and_are_up_to_date():
    block = report.cases_block()
    for name in names():
        (line,) = [x for x in block.splitlines() if x.startswith(f"| `{name}` |")]
        assert (f"{name}-cpu.jsonl" in line) == (rows.RESULTS / f"{name}-cpu.jsonl").exists()
        assert line.count("*not measured*") == 2 - line.count("](")
    for file, text in report.written().items():
        assert file.read_text() == text, f"{file}: run python -m bench.report"


def test_committed_rows_can_be_read():
    for file in rows.RESULTS.glob("*.jsonl"):
        for r in rows.read(file):
            assert r["case"] in names() and (file.name.startswith(r["case"] + "-") or file in gpu_report.files())
            assert "why_not" in r or all(math.isfinite(r[k]) for k in ("p20_s", "p50_s", "p80_s", "peak_bytes"))


@pytest.mark.gpu
def test_operations_are_timed_on_the_device():
    for name in ("prompt_attention", "prompt_attention_varlen"):
        case = build(name, "cuda", TINY[name], ["fastprompt", "concat"])
        found = measure(case, "cuda", 3, lambda n, case=case: peak_memory(case.providers[n].build(), "cuda"))
        for r in found.values():
            assert 0 < r["p50_s"] < 0.1 and r["peak_bytes"] > 0
