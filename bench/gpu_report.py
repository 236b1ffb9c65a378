# SPDX-License-Identifier: Apache-2.0
"""What was measured on GPUs: a page beside every results file, and the table of README.md from the newest rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import targets
from bench.roofline import share
from bench.rows import Row, by_params, ceilings, holding, key, read
from bench.rows import gpu_files as files
from bench.tables import best_peer, ceilings_text, detail

TRAINING = {"mode": "forward+backward", "dtype": "bfloat16"}
FORWARD = {"mode": "forward", "dtype": "bfloat16"}


class Shown(NamedTuple):
    """Rows of the table: a case, which parameters, how to name them, our provider and theirs (None: the fastest)."""

    case: str
    params: dict[str, Any]
    title: str
    ours: str = "fastprompt"
    theirs: str | None = None


SHOWN = (
    Shown("prompt_attention", TRAINING, "{batch} x {heads} heads, {tokens} tokens, {prompts} prompts; training"),
    Shown("prompt_attention_varlen", TRAINING, "{classes:,} texts, {prompts} shared keys, causal; training"),
    Shown("decoupled_attention", FORWARD, "{shape}, {tokens:,} queries, {text} and {image} keys"),
    Shown("diffuse_prompts", TRAINING, "{batch} x {tokens} tokens of {width}, {prompts} prompts; training"),
    Shown("summarize_tokens", TRAINING, "{batch} x {tokens} tokens of {width}, {tasks} x {summaries}; training"),
    Shown("key_scores", {"dtype": "bfloat16"}, "{tokens:,} tokens, {heads} heads on {heads_kv}, causal"),
    Shown("compress_kv", {"dtype": "bfloat16"}, "{tokens:,} tokens, {heads_kv} heads, {keep:.0%} stay, {merge}"),
    Shown("decode_attention", {"dtype": "bfloat16"}, "one token over {tokens:,}, {heads} heads on {heads_kv}"),
    Shown("prompt_bank", FORWARD, "{tenants} tenants, {batch} samples, {tokens} tokens, {prompts} prompts"),
    Shown("vpt_step", {}, "{model}, batch {batch}, {prompts} prompts a layer"),
    Shown("apt_step", {}, "{model}, batch {batch}, {prompts} prompts a layer"),
    Shown("prefix_step", {"dtype": "bfloat16", "checkpointing": 0}, "{batch} x {tokens} tokens, {prompts} prompts"),
    Shown("coop_text", {}, "{classes:,} classes"),
    Shown("cocoop_step", {}, "{classes:,} classes, {batch} images"),
    Shown("maple_step", {}, "{classes:,} classes, {batch} images"),
    Shown("multilane", {}, "{tasks} tasks, batch {batch}"),
    Shown("ipadapter", {}, "{shape}, {layers} layers, {steps} denoising steps"),
    Shown("prefill_compress", {}, "{tokens:,} tokens, LOOK-M, {keep:.0%} stay", "lookm", "plain"),
    Shown("decode", {}, "behind {tokens:,} tokens, LOOK-M, 20% stay", "lookm 20%", "plain"),
)
#: The name of the tests that run first.
SAMPLE = "a sample of all"
HEAD = ("case", "", "dtype", "what else there is", "fastprompt", "ratio", "of its bound", "peak memory")


def block() -> str:
    """The table of every GPU: of every case and set of parameters, what was measured last."""
    newest: dict[str, dict[tuple[str, str], list[Row]]] = {}
    found: dict[str, dict[str, float]] = {}
    pages: dict[str, list[str]] = {}
    for file in files():
        for group in by_params(read(file)):
            newest.setdefault(group[0]["machine"]["device"], {})[key(group[0])[:2]] = group
        for line in holding(file, "ceilings"):
            found[line["machine"]["device"]] = line["ceilings"]
        for device in {line["machine"]["device"] for line in holding(file, "machine")}:
            pages.setdefault(device, []).append(f"[{file.stem[-10:]}](bench/results/{file.stem}.md)")
    parts = []
    for device, groups in newest.items():
        parts += [f"{device} ({', '.join(pages[device])}):", table(groups.values(), found.get(device, {}))]
    return "\n\n".join(parts) or "On a GPU: *not measured* (`make bench-gpu`)."


def table(groups: Iterable[list[Row]], found: dict[str, float]) -> str:
    """What is `SHOWN` of groups of rows that ran, a line each; ``found`` are the ceilings."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    groups = [group for group in groups if any("p50_s" in r for r in group)]
    for shown in SHOWN:
        for group in groups:
            params = group[0]["params"]
            if group[0]["case"] == shown.case and shown.params.items() <= params.items():
                cells = _cells({r["provider"]: r for r in group}, shown, found)
                head = (f"`{shown.case}`", shown.title.format(**params), params["dtype"])
                lines.append(f"| {' | '.join((*head, *cells))} |")
    return "\n".join(lines) if len(lines) > 2 else "None of the cases of this table ran."


def _cells(group: dict[str, Row], shown: Shown, found: dict[str, float]) -> Sequence[str]:
    """Their time, ours, the ratio within rounds, the share of what can be had, and the memory of both."""
    ours = group.get(shown.ours, {"why_not": "not run"})
    name = shown.theirs or best_peer(group)
    theirs = group.get(name, {"why_not": "not run"}) if name else {"why_not": "not run"}
    times = [f"{1e3 * r['p50_s']:,.3g} ms" if "p50_s" in r else r["why_not"].split(":")[0] for r in (theirs, ours)]
    if "p50_s" in theirs:
        times[0] += f" (`{name}`)"
    both = "p50_s" in ours and "p50_s" in theirs
    peaks = [f"{r['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in r else "-" for r in (ours, theirs)]
    ratio = f"{ours['p50_s'] / theirs['p50_s']:.2f}x" if both else ""
    if both and "ratio_p50" in ours and "ratio_p50" in theirs:
        ratio = f"{ours['ratio_p50'] / theirs['ratio_p50']:.2f}x"
    return *times, ratio, _bound(group, ours, found), f"{peaks[0]} against {peaks[1]} MiB"


def _bound(group: dict[str, Row], ours: Row, found: dict[str, float]) -> str:
    """Our share of the nearer ceiling, or how many times as long as the model without prompts."""
    part = share(ours, found) if "params" in ours else None
    if part:
        return f"{100 * part[1]:.0f} % ({part[0]})"
    floor = group.get("floor") or group.get("stream") or {}
    if "p50_s" in floor and "p50_s" in ours:
        return f"{ours['p50_s'] / floor['p50_s']:.2f}x the floor"
    return ""


def summary(file: Path, cases: Sequence[str]) -> str:
    """A page with all that a results file holds, and which of ``cases`` it lacks."""
    found, measured = ceilings(file), read(file)
    machine = holding(file, "machine")[-1]["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "transformers"))
    parts = [f"# {machine['device']}, {machine['date'][:10]}", f"{versions}; from [{file.name}]({file.name})."]
    parts += [f"Ceilings: {ceilings_text(found)}"] if found else []
    parts += [_tests(file)]
    groups = by_params(measured)
    parts += [table(groups, found), "What was aimed at:", targets.table(groups, found)]
    for case in dict.fromkeys(r["case"] for r in measured):
        own = [group for group in groups if group[0]["case"] == case]
        parts += [f"## `{case}`", *(detail(group, found) for group in own)]
    missing = [f"`{case}`" for case in dict.fromkeys(cases) if case not in {r["case"] for r in measured}]
    parts += [f"*Not measured*: {', '.join(missing)}."] if missing else []
    return "\n\n".join(parts) + "\n"


def _tests(file: Path) -> str:
    found = holding(file, "tests")
    found = [t for t in found if t["tests"] != SAMPLE] or found  # all of them hold it too
    if not found:
        return "Tests of the kernels on this GPU: *not run*."
    passed, skipped = (sum(t[name] for t in found) for name in ("passed", "skipped"))
    failed = [f"`{name}`" for t in found for name in t["failed"]]
    which = f": {', '.join(failed)}" if failed else ""
    of = f" ({SAMPLE})" if found[0]["tests"] == SAMPLE else ""
    return f"Tests of the kernels on this GPU{of}: {passed} passed, {skipped} skipped, {len(failed)} failed{which}."
