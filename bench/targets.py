# SPDX-License-Identifier: Apache-2.0
"""What the kernels and the steps made of them are to reach on a GPU of Hopper's class, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench.roofline import share
from bench.rows import Row

#: The rows of one set of parameters, by provider, and the ceilings of their device.
Group = dict[str, Row]
Ceilings = dict[str, float]


class Figure(NamedTuple):
    """What was measured, as text, and whether it is what was aimed at."""

    text: str
    reached: bool


class Target(NamedTuple):
    """One aim.

    Args:
        name: What it is about.
        aim: In words.
        case: The case that measures it.
        params: Of which parameters.
        figure: Gives the figure of one set of parameters; None where something that it needs did not run.
        each: The parameter that tells several sets apart.
    """

    name: str
    aim: str
    case: str
    params: dict[str, Any]
    figure: Callable[[Group, Ceilings], Figure | None]
    each: str = ""


def _times(theirs: Row, ours: Row) -> float:
    """How many times as long theirs takes, within rounds where both have a ratio to the same baseline."""
    if "ratio_p50" in ours and "ratio_p50" in theirs:
        return theirs["ratio_p50"] / ours["ratio_p50"]
    return theirs["p50_s"] / ours["p50_s"]


def _ours(group: Group, name: str = "fastprompt") -> Row | None:
    row = group.get(name, {})
    return row if "p50_s" in row else None


def best(families: Sequence[str], least: float, name: str = "fastprompt") -> Callable[[Group, Ceilings], Figure | None]:
    """Against the fastest of ``families``: ``concat`` is itself and ``concat/flash``."""

    def figure(group: Group, found: Ceilings) -> Figure | None:
        ours = _ours(group, name)
        theirs = {n: r for n, r in group.items() if "p50_s" in r and (n in families or n.split("/")[0] in families)}
        if ours is None or not theirs:
            return None
        fastest = min(theirs, key=lambda n: theirs[n]["p50_s"])
        value = _times(theirs[fastest], ours)
        return Figure(f"{value:.2f}x `{fastest}`", value >= least)

    return figure


def above(floor: str, most: float, name: str = "fastprompt") -> Callable[[Group, Ceilings], Figure | None]:
    """How much longer than another provider, as a share of that."""

    def figure(group: Group, found: Ceilings) -> Figure | None:
        ours, theirs = _ours(group, name), _ours(group, floor)
        if ours is None or theirs is None:
            return None
        more = 1 / _times(theirs, ours) - 1
        return Figure(f"{100 * more:+.1f} %", more <= most)

    return figure


def of_roofline(least: float) -> Callable[[Group, Ceilings], Figure | None]:
    """The share of the nearer ceiling."""

    def figure(group: Group, found: Ceilings) -> Figure | None:
        ours = _ours(group)
        part = share(ours, found) if ours and found else None
        return part and Figure(f"{100 * part[1]:.0f} % ({part[0]})", part[1] >= least)

    return figure


def of_copy(least: float) -> Callable[[Group, Ceilings], Figure | None]:
    """The share of a copy's bandwidth, and of what bounds it where that is its products."""

    def figure(group: Group, found: Ceilings) -> Figure | None:
        ours = _ours(group)
        if ours is None or "copy" not in found:
            return None
        part = ours["bytes"] / ours["p50_s"] / found["copy"]
        name, nearer = share(ours, found) or ("copy", part)
        bound = f", {100 * nearer:.0f} % of its bound ({name})" if name != "copy" else ""
        return Figure(f"{100 * part:.0f} %{bound}", part >= least)

    return figure


def _of_flash(group: Group, found: Ceilings) -> Figure | None:
    """Half of a forward's products, and so the rate is half the ratio of the times."""
    ours, flash = _ours(group), _ours(group, "flash")
    if ours is None or flash is None:
        return None
    part = _times(flash, ours) / 2
    return Figure(f"{100 * part:.0f} %", part >= 0.6)


def _as_published(group: Group, found: Ceilings) -> Figure | None:
    ours, published = _ours(group), _ours(group, "published")
    if ours is None or published is None:
        return None
    time, memory = _times(published, ours), published["peak_bytes"] / ours["peak_bytes"]
    return Figure(f"{time:.1f}x in time, {memory:.1f}x in memory", time >= 12 and memory >= 10)


def _decoding(group: Group, found: Ceilings) -> Figure | None:
    ours, plain = _ours(group, "lookm 20%"), _ours(group, "plain")
    if ours is None or plain is None:
        return None
    faster = _times(plain, ours)
    part = ours["bytes"] / found["copy"] / ours["p50_s"] if "copy" in found else 0.0
    bound = f", {part:.2f} of the bytes' bound" if part else ""
    return Figure(f"{faster:.2f}x{bound}", faster >= 1.5 or part >= 0.9)


BASE = {"heads": 12, "tokens": 197, "dtype": "bfloat16", "mode": "forward+backward"}
LARGE = BASE | {"heads": 16, "tokens": 257}
LONG = BASE | {"tokens": 4096}
CLASSES = {"classes": 1000, "dtype": "bfloat16", "mode": "forward+backward"}
JOINED, SAME = ("concat", "expand"), ("same_keys",)
RATE = "at least 0.9 of SDPA's rate on as many keys"
COMPLETE = "at least 1.25x the best concat + SDPA"
QWEN = {"width": 3584, "dtype": "bfloat16"}

TARGETS = (
    Target("`prompt_attention`, training, ViT-B/16", COMPLETE, "prompt_attention", BASE, best(JOINED, 1.25), "prompts"),
    Target("", RATE, "prompt_attention", BASE, best(SAME, 0.9), "prompts"),
    Target("ViT-L/14", COMPLETE, "prompt_attention", LARGE, best(JOINED, 1.25), "prompts"),
    Target("", RATE, "prompt_attention", LARGE, best(SAME, 0.9), "prompts"),
    Target("4,096 tokens", "at least 0.9 of cuDNN's rate", "prompt_attention", LONG, best(("same_keys/cudnn",), 0.9)),
    Target("`prompt_attention_varlen`, 1,000 texts, training", "at least 1.5x the best that shares and trims",
           "prompt_attention_varlen", CLASSES, best(("concat", "flash_attn", "flex"), 1.5)),
    Target("`diffuse_prompts`, training", "at least 60 % of the roofline", "diffuse_prompts",
           {"dtype": "bfloat16", "mode": "forward+backward"}, of_roofline(0.6), "prompts"),
    Target("`key_scores`", "at least 60 % of a flash forward's rate", "key_scores", {"dtype": "bfloat16"}, _of_flash,
           "tokens"),
    Target("`compress_kv`", "at least 50 % of a copy's bandwidth", "compress_kv", {"dtype": "bfloat16"}, of_copy(0.5),
           "tokens"),
    Target("`decoupled_attention`, forward", "at least 1.5x two calls of SDPA", "decoupled_attention",
           {"dtype": "bfloat16", "mode": "forward"}, best(("sdpa",), 1.5), "shape"),
    *(Target(f"`{case}`, {count} prompts", f"at most {100 * most:.0f} % above the frozen floor", case,
             {"prompts": count}, above("floor", most), "model")
      for case in ("vpt_step", "apt_step") for count, most in ((10, 0.03), (50, 0.05))),
    Target("`coop_text`, 1,000 classes", "at least 12x as published in time, 10x in memory", "coop_text",
           {"classes": 1000}, _as_published, "dtype"),
    Target("LOOK-M, prefill of 8,192 tokens, Qwen2.5-VL-7B shapes", "at most 15 % above plain", "prefill_compress",
           QWEN | {"tokens": 8192}, above("plain", 0.15, "lookm")),
    Target("LOOK-M, decoding behind 32,768 tokens, batch 8, a fifth stays", "at least 1.5x, or 0.9 of the bytes' bound",
           "decode", QWEN | {"tokens": 32768, "batch": 8, "clock": "device"}, _decoding),
)  # fmt: skip


def table(groups: Sequence[list[Row]], found: Ceilings) -> str:
    """Every target with its figures, or that it was not measured."""
    lines = ["| | aim | measured | reached |", "|---|---|---|---|"]
    for target in TARGETS:
        figures = []
        for group in groups:
            if group[0]["case"] == target.case and target.params.items() <= group[0]["params"].items():
                figure = target.figure({r["provider"]: r for r in group}, found)
                if figure:
                    figures.append((group[0]["params"].get(target.each), figure))
        several = len(figures) > 1
        texts = [f"{target.each} {at}: {f.text}" if several and at is not None else f.text for at, f in figures]
        reached = ("yes" if all(f.reached for _, f in figures) else "no") if figures else ""
        lines.append(f"| {target.name} | {target.aim} | {'; '.join(texts) or '*not measured*'} | {reached} |")
    return "\n".join(lines)
