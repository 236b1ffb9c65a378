# SPDX-License-Identifier: Apache-2.0
"""``fastprompt compress-eval``: what a compressed KV cache still knows of a long prompt."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastprompt.cli_tune import add_cache_dir, add_device, device_of

if TYPE_CHECKING:
    from fastprompt.cache import Policy

POLICIES = ("lookm", "h2o", "snapkv", "adakv", "tova", "streamingllm", "keydiff", "random")
TASKS = ("passkey", "loss")
COLOURS = ("#2f7f8f", "#d98a5b", "#7b6fb0", "#b59ad6", "#5a9e5f", "#c25b6a", "#8a6d4b", "#777777")
#: Tokens of real text that are predicted behind the compressed prompt.
PREDICTED = 256


class Run(NamedTuple):
    """One measurement."""

    task: str
    policy: str
    ratio: float
    length: int
    depth: float
    seed: int


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the options."""
    sub.add_argument("--model", default="smollm2-135m", help="smollm2-135m (an asset), or a local folder of a causal "
                     "language model [%(default)s]")  # fmt: skip
    sub.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES),
                     help="lookm is without its text prior: texts have no images [all]")  # fmt: skip
    sub.add_argument("--ratio", nargs="+", type=float, default=[0.5, 0.8, 0.9], metavar="R",
                     help="share of the keys that goes; 0 is measured for comparison [0.5 0.8 0.9]")  # fmt: skip
    sub.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="a number hidden in filler; the "
                     "loss of real text [both]")  # fmt: skip
    sub.add_argument("--length", nargs="+", type=int, default=[1024, 2048], metavar="T",
                     help="tokens of a prompt [1024 2048]")  # fmt: skip
    sub.add_argument("--depth", nargs="+", type=float, default=[0.1, 0.5, 0.9], metavar="D",
                     help="where the number is hidden, 0 to 1 [0.1 0.5 0.9]")  # fmt: skip
    sub.add_argument("--seeds", type=int, default=3, help="prompts of each kind [%(default)s]")
    sub.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="[%(default)s]")
    add_device(sub)
    sub.add_argument("--out", type=Path, default=Path("runs/compress"), help="results.jsonl and results.png; runs that "
                     "the file holds are not run again [%(default)s]")  # fmt: skip
    add_cache_dir(sub)


def make_policy(name: str, ratio: float) -> Policy:
    """A policy that drops ``ratio`` of a text's keys."""
    import fastprompt

    # Shares are rounded down to keys, so 1 - 0.8 must be 0.2.
    keep = round(1 - ratio, 9)
    policies = {
        "lookm": lambda: fastprompt.LookM(recent=keep / 2, important=keep / 2, text_prior=False),
        "h2o": lambda: fastprompt.H2O(recent=keep / 2, important=keep / 2),
        "snapkv": lambda: fastprompt.SnapKV(keep=keep),
        "adakv": lambda: fastprompt.AdaKV(fastprompt.SnapKV(keep=keep)),
        "tova": lambda: fastprompt.TOVA(keep=keep),
        "streamingllm": lambda: fastprompt.StreamingLLM(keep=keep),
        "keydiff": lambda: fastprompt.KeyDiff(keep=keep),
        "random": lambda: fastprompt.Random(keep=keep),
    }
    return policies[name]()


def command(args: argparse.Namespace) -> None:
    """Run ``fastprompt compress-eval``."""
    from tqdm import tqdm

    _check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    _mend(results, args)
    done = read(results)
    left = [run for run in dict.fromkeys(runs(args)) if run not in done]
    if left:
        model, tokenizer = _load(args)
        with open(results, "a") as file:
            for run in tqdm(left, "compress-eval", unit="run"):
                began = time.perf_counter()
                value = measure(run, model, tokenizer)
                row = run._asdict() | {"value": value, "seconds": round(time.perf_counter() - began, 2),
                                       "model": args.model, "dtype": args.dtype}  # fmt: skip
                file.write(json.dumps(row) + "\n")
                file.flush()
    rows = read(results)
    print(table(rows))
    plot(rows, args.out / "results.png")
    print(f"\n{results}\n{args.out / 'results.png'}")


def _check(args: argparse.Namespace) -> None:
    for ratio in args.ratio:
        if not 0 <= ratio < 1:
            raise ValueError(f"--ratio: got {ratio}, expected shares in [0, 1); 1 would keep nothing")
    if args.seeds < 1:
        raise ValueError(f"--seeds: got {args.seeds}, expected at least 1")


def runs(args: argparse.Namespace) -> Iterator[Run]:
    """Every measurement of a command line; the plain cache first."""
    for task in args.task:
        kinds = [("none", 0.0), *((policy, ratio) for policy in args.policy for ratio in args.ratio if ratio)]
        depths = args.depth if task == "passkey" else [0.0]
        for length in args.length:
            for policy, ratio in kinds:
                for depth in depths:
                    for seed in range(args.seeds):
                        yield Run(task, policy, ratio, length, depth, seed)


def read(results: Path) -> dict[Run, float]:
    """Values of a results file; a torn last line is left out."""
    return {Run(*(row[name] for name in Run._fields)): row["value"] for row in _rows(results)}


def _rows(results: Path) -> list[dict[str, Any]]:
    rows = []
    for line in results.read_text().splitlines() if results.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _mend(results: Path, args: argparse.Namespace) -> None:
    """Take a torn last line away; raise where the rows are of another model."""
    rows = _rows(results)
    for row in rows:
        if (row["model"], row["dtype"]) != (args.model, args.dtype):
            raise ValueError(
                f"--out: {results} holds runs of {row['model']} in {row['dtype']}, expected {args.model} in "
                f"{args.dtype}; name another folder"
            )
    if rows:
        results.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    from fastprompt.data import assets
    from fastprompt.hf.language_models import SMOLLM2, load_language_model

    states = {status.asset.name: status.state for status in assets.status(cache_dir=args.cache_dir)}
    if args.model == SMOLLM2 and states[SMOLLM2] == "missing":
        assets.fetch(SMOLLM2, cache_dir=args.cache_dir)
    found: Any = load_language_model(args.model, dtype=getattr(torch, args.dtype), cache_dir=args.cache_dir)
    model, tokenizer = found
    return model.to(device_of(args.device)), tokenizer


def measure(run: Run, model: Any, tokenizer: Any) -> float:
    """1 or 0 for a number that is found or not; nats a token for real text."""
    from fastprompt.data.long_texts import excerpt, passkey
    from fastprompt.tuning.long_context import continuation_loss, recalls

    policy = make_policy(run.policy, run.ratio) if run.ratio else None
    if run.task == "passkey":
        return float(recalls(model, tokenizer, passkey(tokenizer, run.length, run.depth, run.seed), policy))
    ids = excerpt(tokenizer, run.length + PREDICTED, run.seed).to(model.device)
    return continuation_loss(model, ids, run.length, policy)


def _mean(rows: dict[Run, float], task: str, policy: str, ratio: float) -> float | None:
    values = [v for run, v in rows.items() if (run.task, run.policy, run.ratio) == (task, policy, ratio)]
    return statistics.mean(values) if values else None


def _kinds(rows: dict[Run, float], task: str) -> tuple[list[str], list[float]]:
    there = [run for run in rows if run.task == task and run.ratio]
    return [p for p in POLICIES if any(r.policy == p for r in there)], sorted({r.ratio for r in there})


def table(rows: dict[Run, float]) -> str:
    """Markdown: the mean over lengths, depths and seeds, for every policy and ratio."""
    lines = []
    for task in TASKS:
        policies, ratios = _kinds(rows, task)
        full = _mean(rows, task, "none", 0.0)
        if full is None:
            continue
        percent = task == "passkey"
        what = "numbers found, %" if percent else "loss, nats a token"
        lengths = ", ".join(str(n) for n in sorted({r.length for r in rows if r.task == task}))
        lines += ["", f"| {task}: {what} ({lengths} tokens) | " + " | ".join(f"{r:.0%} dropped" for r in ratios) + " |"]
        lines += ["|---" * (len(ratios) + 1) + "|"]
        for policy in policies:
            cells = [_mean(rows, task, policy, ratio) for ratio in ratios]
            lines.append(f"| {policy} | " + " | ".join("" if c is None else _cell(c, percent) for c in cells) + " |")
        lines.append(f"| plain cache: {_cell(full, percent)} |{'  |' * len(ratios)}")
    return "\n".join(lines[1:])


def _cell(value: float, percent: bool) -> str:
    return f"{100 * value:.0f}" if percent else f"{value:.3f}"


def plot(rows: dict[Run, float], png: Path) -> None:
    """What is found, and the loss, over the share of keys that is dropped."""
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if _mean(rows, task, "none", 0.0) is not None]
    figure = Figure(figsize=(4.8 * len(tasks), 3.8), layout="constrained")
    titles = {"passkey": ("numbers found (%)", 100.0), "loss": ("loss of real text (nats a token)", 1.0)}
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        policies, ratios = _kinds(rows, task)
        label, factor = titles[task]
        full = _mean(rows, task, "none", 0.0)
        for policy in policies:
            points = [(0.0, full), *((r, _mean(rows, task, policy, r)) for r in ratios)]
            xs, ys = zip(*((100 * x, factor * y) for x, y in points if y is not None), strict=True)
            axes.plot(xs, ys, marker="o", ms=4, lw=1.8, label=policy, color=COLOURS[POLICIES.index(policy)])
        axes.set(xlabel="keys dropped (%)", ylabel=label)
        axes.grid(axis="y", color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(png, dpi=150)
