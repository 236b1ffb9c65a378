# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md and bench/results/README.md from the committed results: ``python -m bench.report``."""

from __future__ import annotations

import importlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import gpu_report
from bench.roofline import share
from bench.rows import RESULTS, Row, by_params, ceilings, read, varying
from bench.run import names
from bench.tables import best_peer, ceilings_text, detail, pivot
from fastprompt.cli_compress import read as read_runs
from fastprompt.cli_compress import table as compressed_table
from fastprompt.cli_continual import table as continual_table
from fastprompt.cli_count import table as counted
from fastprompt.cli_recipes import markdown
from fastprompt.demo import table
from fastprompt.tuning.continual import ContinualResult

ROOT = Path(__file__).parent.parent
CEILINGS = RESULTS / "ceilings-cpu.jsonl"

#: What a machine without a compiler runs.
COMPOSED = "fastprompt without its C++ kernels"

#: What the table of C++ kernels shows: a case, parameters, and how to name them.
CPP_ROWS = (
    (
        "prompt_attention",
        {"prompts": 100, "mode": "forward+backward"},
        "16 x 12 heads, 197 tokens, 100 prompts; training",
    ),
    ("prompt_attention", {"prompts": 100, "mode": "forward"}, "the same, forward"),
    ("prompt_attention_varlen", {"mode": "forward+backward"}, "{classes:,} texts, {prompts} shared keys, training"),
    ("decoupled_attention", {"shape": "sd15", "mode": "forward+backward"}, "4,096 queries, 77 and 4 keys, training"),
    ("decoupled_attention", {"shape": "sd15", "mode": "forward"}, "the same, forward"),
    ("diffuse_prompts", {"prompts": 100, "mode": "forward+backward"}, "16 x 197 tokens of 768, 100 prompts, training"),
    ("key_scores", {"tokens": 4096}, "{tokens:,} tokens, {heads} heads on {heads_kv}, causal"),
    ("decode_attention", {"tokens": 8192}, "one token over {tokens:,}, {heads} heads on {heads_kv}"),
)


def replace_block(text: str, name: str, content: str) -> str:
    """``text`` with what stands between the markers of ``name`` replaced.

    Raises:
        ValueError: the markers are not there.
    """
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", flags=re.S)
    if not pattern.search(text):
        raise ValueError(f"name: got {name!r}, but the text has no <!-- {name}:begin --> ... <!-- {name}:end -->")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def demo_block() -> str:
    """The demo's table."""
    return table(RESULTS / "demo-textile.jsonl")


def vpt_step_block() -> str:
    """The step of deep visual prompts."""
    names = {
        "published": "published: tokens inserted",
        "kv_concat": "keys and values computed once, concatenated (SDPA)",
        "fastprompt": "**fastprompt**",
        "fastprompt/composed": COMPOSED,
        "floor": "floor: no prompts",
    }
    p, lines = step_table("vpt_step", names)
    return f"{p['prompts']} prompts in each of {p['layers']} layers:\n\n{lines}"


def apt_step_block() -> str:
    """The step of prompts that are read behind attention."""
    names = {
        "eager": "APT as released, eager",
        "fastprompt": "**APT, fastprompt**",
        "fastprompt/composed": COMPOSED,
        "vpt/published": "as many deep visual prompts, as published",
        "vpt/fastprompt": "deep visual prompts, fastprompt",
        "floor": "floor: no prompts",
    }
    parts = []
    for model in dict.fromkeys(r["params"]["model"] for r in _cpu("apt_step")):
        p, lines = step_table("apt_step", names, model=model)
        parts.append(f"{model}, batch {p['batch']}, {p['prompts']} prompts in each of {p['layers']} layers:\n\n{lines}")
    return "\n\n".join(parts)


def branches_block() -> str:
    """Attention over text and image tokens apart, once and over a generation."""
    head = ("cross-attention", "published", "**fastprompt**", "ratio", "peak memory")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for case, title in (
        ("decoupled_attention", lambda p: f"{p['shape']}, {p['dtype']}, {p['mode']}"),
        ("ipadapter", lambda p: f"{p['shape']}, {p['dtype']}, {p['steps']} denoising steps, all layers"),
    ):
        for group in by_params(_cpu(case)):
            rows = {r["provider"]: r for r in group}
            ours, theirs = rows["fastprompt"], rows[rows["fastprompt"]["baseline"]]
            seconds = [
                f"{1e3 * r['p50_s']:,.1f} ms" if r["p50_s"] < 1 else f"{r['p50_s']:.1f} s" for r in (theirs, ours)
            ]
            peaks = " against ".join(f"{r['peak_bytes'] / 2**20:,.0f}" for r in (ours, theirs))
            lines.append(
                f"| {title(ours['params'])} | {' | '.join(seconds)} | {ours['ratio_p50']:.2f}x | {peaks} MiB |"
            )
    return "\n".join(lines)


def lanes_block() -> str:
    """Logits of all tasks at once, and one after the other."""
    names = ("released", "loop", "fastprompt", "fastprompt/batch", "stream")
    lines = ["| tasks | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for group in by_params(_cpu("multilane")):
        rows = {r["provider"]: r for r in group}
        cells = [f"{rows[n]['p50_s']:.2f} s" for n in names]
        lines.append(f"| {group[0]['params']['tasks']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def continual_block() -> str:
    """Accuracy of classes learned task after task."""
    file = RESULTS / "continual-openmoji.json"
    if not file.exists():
        return "*Not measured.*"
    found = json.loads(file.read_text())
    result = ContinualResult(found["accuracy"], found["seen"])
    task, config = found["task"], found["config"]
    return (
        f"`fastprompt continual --tasks {task['tasks']} --seed {task['seed']}`: DINOv2-S, {task['shots']} OpenMoji "
        f"drawings a class, {config['epochs']} epochs a task, {found['trainable']:,} parameters learned for the last; "
        f"accuracy in % on every task's test drawings:\n\n```\n{continual_table(result)}\n```"
    )


def count_block() -> str:
    """What deep prompts and APT add to ViLT, counted."""
    return "```\n" + counted(json.loads((RESULTS / "count-vilt.json").read_text())) + "\n```"


def cpp_block() -> str:
    """The C++ kernels against the best that PyTorch's calls do in the same run."""
    found = ceilings(CEILINGS)
    head = ("operation", "", "dtype", "PyTorch's best", "composed", "C++", "against the best", "of the nearer ceiling")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for case, params, title in CPP_ROWS:
        for group in by_params(r for r in _cpu(case) if params.items() <= r["params"].items()):
            rows = {r["provider"]: r for r in group if "p50_s" in r}
            if "fastprompt/composed" not in rows:
                continue
            best = best_peer(rows)
            ours, theirs = rows.get("kernel", rows["fastprompt"]), rows[best]
            times = [f"{1e3 * r['p50_s']:,.1f} ms" for r in (theirs, rows["fastprompt/composed"], ours)]
            times[0] += f" (`{best}`)"
            part = share(ours, found) if found else None
            reached = "" if part is None else f"{100 * part[1]:.0f} % ({part[0]})"
            p = ours["params"]
            cells = (f"`{case}`", title.format(**p), p["dtype"], *times,
                     f"{ours['ratio_p50'] / theirs['ratio_p50']:.2f}x", reached)  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def prefix_step_block() -> str:
    """The step of prefix tuning in bfloat16."""
    names = {
        "peft": "PEFT prefix tuning: a key-value cache",
        "kv_concat": "keys and values concatenated in every layer (SDPA)",
        "fastprompt": "**fastprompt**",
        "fastprompt/composed": COMPOSED,
        "floor": "floor: no prefix",
    }
    p, lines = step_table("prefix_step", names, dtype="bfloat16", checkpointing=0)
    return f"{p['prompts']} prompts in each of {p['layers']} layers, {p['batch']} x {p['tokens']} tokens:\n\n{lines}"


def clip_prompts_block() -> str:
    """Steps of CLIP prompt learning in float32: one table for all cases."""
    cases = {
        "coop_text": lambda p: f"CoOp, text side, {p['classes']:,} classes",
        "cocoop_step": lambda p: f"CoCoOp, batch {p['batch']}, {p['classes']} classes" + ", images too" * p["tower"],
        "maple_step": lambda p: f"MaPLe, batch {p['batch']}, {p['classes']} classes",
    }
    names = {
        "published": "published: 77 tokens a class",
        "trimmed": "cut behind the longest class",
        "shared": "cut, shared context (SDPA)",
        "fastprompt": "**fastprompt**",
        "fastprompt/composed": COMPOSED,
    }
    head = ("step", "form", "token rows", "s a step", "against published", "peak memory of a step")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for case, title in cases.items():
        groups = by_params(_cpu(case))
        groups = [g for g in groups if g[0]["params"]["dtype"] == "float32"]
        lines += [f"| `{case}` | | | *not measured* | | |"] * (not groups)
        for group in groups:
            rows = {r["provider"]: r for r in group}
            for provider in (name for name in names if name in rows):
                cells = " | ".join(_clip_cells(rows[provider]))
                lines.append(f"| {title(group[0]['params'])} | {names[provider]} | {cells} |")
    return "\n".join(lines)


def _clip_cells(r: Row) -> tuple[str, str, str, str]:
    if "why_not" in r:
        return "", r["why_not"], "", ""
    against = f"{r['ratio_p50']:.3f}x" if "ratio_p50" in r else "-"
    return f"{r['tokens']:,}", f"{r['p50_s']:.2f}", against, f"{r['peak_bytes'] / 2**20:,.0f} MiB"


def step_table(case: str, names: dict[str, str], **params: Any) -> tuple[dict[str, Any], str]:
    """Parameters of a whole-step benchmark on the CPU, and its table: each provider against the first and the floor."""
    found = [r for r in _cpu(case) if params.items() <= r["params"].items()]
    rows = {r["provider"]: r for r in found}
    first, floor = (rows[name]["ratio_p50"] for name in (next(iter(names)), "floor"))
    head = ("form", "s a step", f"against {next(iter(names))}", "against the floor", "peak memory of a step")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for provider, name in names.items():
        if provider not in rows:
            continue
        r = rows[provider]
        ratios = f"{r['ratio_p50'] / first:.2f}x | {r['ratio_p50'] / floor:.2f}x"
        lines.append(f"| {name} | {r['p50_s']:.2f} | {ratios} | {r['peak_bytes'] / 2**20:,.0f} MiB |")
    return rows["floor"]["params"], "\n".join(lines)


def tune_text_block() -> str:
    """Accuracy on text before and after, in one sentence."""
    rows = {r["method"]: r for r in map(json.loads, (RESULTS / "tune-text.jsonl").read_text().splitlines())}
    values = {name: 100 * np.asarray(r["accuracy"]) for name, r in rows.items()}
    spread = {name: f"{v.mean():.1f} ± {v.std(ddof=1):.1f} %" for name, v in values.items()}
    r = rows["PrefixKV"]
    return (
        f"`fastprompt tune --task text`, {r['model']} on the {r['data']}, {r['shots']} messages a class, "
        f"{len(r['seeds'])} seeds:\n{values['zero-shot'].mean():.1f} % before, {spread['PrefixKV']} after; "
        f"a linear head on the frozen features, {spread['linear head']}."
    )


def tune_openmoji_block() -> str:
    """Accuracy of a CLIP with learned prompts."""
    results = RESULTS / "tune-openmoji.jsonl"
    if not results.exists():
        return "*Not measured.*"
    from bench.tune_openmoji import table as accuracies

    return accuracies(results)


def cache_block() -> str:
    """What compressing a cache costs while the prompt is read, and what it gives while decoding."""
    names = {
        ("prefill_compress", "plain"): "no compression",
        ("prefill_compress", "h2o"): "**fastprompt**, H2O",
        ("prefill_compress", "lookm"): "**fastprompt**, LOOK-M",
        ("prefill_compress", "lookm/composed"): "LOOK-M, " + COMPOSED,
        ("prefill_compress", "snapkv"): "**fastprompt**, SnapKV",
        ("prefill_compress", "keydiff"): "**fastprompt**, KeyDiff",
        ("prefill_compress", "observed"): "H2O's scores from eager attention",
        ("prefill_kvpress", "plain"): "no compression, in kvpress' environment",
        ("prefill_kvpress", "observed attention"): "kvpress, observed attention",
        ("prefill_kvpress", "SnapKV"): "kvpress, SnapKV",
    }
    rows = {(r["case"], r["provider"]): r for case in ("prefill_compress", "prefill_kvpress") for r in _cpu(case)}
    head = ("prefill", "s", "against no compression", "peak memory")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key, name in names.items():
        if key in rows:
            lines.append(f"| {name} | {' | '.join(_clip_cells(rows[key])[1:])} |")
    tokens = {r["params"]["tokens"] for r in rows.values()}
    parts = [f"{' and '.join(f'{n:,}' for n in sorted(tokens))} tokens, four fifths dropped:\n\n" + "\n".join(lines)]
    head = ("decoding", "ms a token", "against all keys", "read a token: weights and keys")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in _cpu("decode"):
        steps = r["params"]["steps"]
        ratio, read_mib = f"{r['ratio_p50']:.2f}x", f"{r['bytes'] / steps / 2**20:,.0f} MiB"
        lines.append(f"| {r['provider']} | {1e3 * r['p50_s'] / steps:.1f} | {ratio} | {read_mib} |")
    if len(lines) > 2:
        parts.append(f"Behind {_cpu('decode')[0]['params']['tokens']:,} tokens:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _cpu(case: str) -> list[Row]:
    return read(RESULTS / f"{case}-cpu.jsonl")


def compress_block(model: str) -> str:
    """What a compressed cache of a real model still knows."""
    results = RESULTS / f"compress-{model}.jsonl"
    return compressed_table(read_runs(results)) if results.exists() else "*Not measured.*"


def cases_block() -> str:
    """Every case and where it was measured."""
    on_gpu = {r["case"]: file.with_suffix(".md").name for file in gpu_report.files() for r in read(file)}
    lines = ["| case | what it times | CPU | CUDA |", "|---|---|---|---|"]
    for name in names():
        doc = importlib.import_module(f"bench.cases.{name}").__doc__ or ""
        what = doc.splitlines()[0].rstrip(".")
        files = [f"{name}-cpu.jsonl" if _cpu(name) else None, on_gpu.get(name)]
        places = [f"[{file}]({file})" if file else "*not measured*" for file in files]
        lines.append(f"| `{name}` | {what} | {' | '.join(places)} |")
    return "\n".join(lines)


def results_block() -> str:
    """Every JSON-lines file of benchmark cases on a CPU; those of a GPU have a page each."""
    pages = [f"[{file.stem}]({file.with_suffix('.md').name})" for file in gpu_report.files()]
    found = ceilings(CEILINGS)
    parts = [f"On GPUs: {', '.join(pages) or '*not measured*'}."]
    parts += [f"Ceilings, CPU: {ceilings_text(found)}"] if found else []
    for file in sorted(set(RESULTS.glob("*.jsonl")) - set(gpu_report.files())):
        groups = by_params(read(file))
        if groups:
            parts.append(f"## `{groups[0][0]['case']}` ([{file.name}]({file.name}))")
            many = len(groups) > 4 and "prompts" in varying(groups)[0]
            parts += [pivot(groups)] if many else [detail(group, found) for group in groups]
    return "\n\n".join(parts)


def written() -> dict[Path, str]:
    """The two files with their tables as the results are now."""
    found = {}
    steps = {"vpt_step": vpt_step_block, "prefix_step": prefix_step_block, "clip_prompts": clip_prompts_block}
    steps |= {"cache": cache_block, "recipes": markdown, "count": count_block, "apt_step": apt_step_block}
    steps |= {"gpu": gpu_report.block, "cpp": cpp_block}
    steps |= {"branches": branches_block, "lanes": lanes_block, "continual": continual_block}
    for name, model in (("compress_text", "smollm2-135m"), ("compress_pictures", "tiny-llava")):
        steps[name] = partial(compress_block, model)
    for file, blocks in (
        (
            ROOT / "README.md",
            {"demo": demo_block, "tune_text": tune_text_block, "tune_openmoji": tune_openmoji_block, **steps},
        ),
        (RESULTS / "README.md", {"cases": cases_block, "results": results_block}),
    ):
        found[file] = file.read_text()
        for name, make in blocks.items():
            found[file] = replace_block(found[file], name, make())
    return found


def main() -> None:
    """Rewrite the tables."""
    for file, text in written().items():
        file.write_text(text)


if __name__ == "__main__":
    main()
