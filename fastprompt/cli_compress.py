# SPDX-License-Identifier: Apache-2.0
"""``fastprompt compress-eval``: what a compressed KV cache still knows of a long prompt, or of its pictures."""

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
TASKS = ("passkey", "loss", "pictures")
TINY_LLAVA = "tiny-llava"
COLOURS = ("#2f7f8f", "#d98a5b", "#7b6fb0", "#b59ad6", "#5a9e5f", "#c25b6a", "#8a6d4b", "#777777")
#: Tokens of real text that are predicted behind the compressed prompt.
PREDICTED = 256
#: Pictures of a context, and contexts of a run.
PICTURES, CONTEXTS = 4, 10


class Run(NamedTuple):
    """One measurement; ``length`` is in tokens, or in pictures."""

    task: str
    policy: str
    ratio: float
    length: int
    depth: float
    seed: int


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the options."""
    sub.add_argument("--model", default="smollm2-135m", help="smollm2-135m (an asset), tiny-llava (of two assets), or "
                     "a local folder of a causal language model [%(default)s]")  # fmt: skip
    sub.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES),
                     help="lookm with its text prior where there are pictures [all]")  # fmt: skip
    sub.add_argument("--ratio", nargs="+", type=float, default=[0.5, 0.8, 0.9], metavar="R",
                     help="share of the keys that goes; 0 is measured for comparison [0.5 0.8 0.9]")  # fmt: skip
    sub.add_argument("--task", nargs="+", choices=TASKS, help="passkey: a number hidden in filler; loss: of real text; "
                     "pictures: questions about four drawings [what the model can do]")  # fmt: skip
    sub.add_argument("--length", nargs="+", type=int, default=[1024, 2048], metavar="T",
                     help="tokens of a prompt of text [1024 2048]")  # fmt: skip
    sub.add_argument("--depth", nargs="+", type=float, default=[0.1, 0.5, 0.9], metavar="D",
                     help="where the number is hidden, 0 to 1 [0.1 0.5 0.9]")  # fmt: skip
    sub.add_argument("--seeds", type=int, default=3, help="prompts of each kind, or tens of prompts with pictures "
                     "[%(default)s]")  # fmt: skip
    sub.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="[%(default)s]")
    add_device(sub)
    sub.add_argument("--out", type=Path, default=Path("runs/compress"), help="results.jsonl and results.png; runs that "
                     "the file holds are not run again [%(default)s]")  # fmt: skip
    add_cache_dir(sub)


def make_policy(name: str, ratio: float, text_prior: bool = False) -> Policy:
    """A policy that drops ``ratio`` of a prompt's keys; LOOK-M with ``text_prior`` fewer where there is more text."""
    import fastprompt

    # Shares are rounded down to keys, so 1 - 0.8 must be 0.2.
    keep = round(1 - ratio, 9)
    policies = {
        "lookm": lambda: fastprompt.LookM(recent=keep / 2, important=keep / 2, text_prior=text_prior),
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
        model, reader = _load(args)
        with open(results, "a") as file:
            for run in tqdm(left, "compress-eval", unit="run"):
                began = time.perf_counter()
                measured = measure_pictures if run.task == "pictures" else measure
                row = run._asdict() | measured(run, model, reader)
                row |= {"seconds": round(time.perf_counter() - began, 2), "model": args.model, "dtype": args.dtype}
                file.write(json.dumps(row) + "\n")
                file.flush()
    rows = read(results)
    print(table(rows))
    print(overfull(_rows(results)), end="")
    plot(rows, args.out / "results.png")
    print(f"\n{results}\n{args.out / 'results.png'}")


def _check(args: argparse.Namespace) -> None:
    for ratio in args.ratio:
        if not 0 <= ratio < 1:
            raise ValueError(f"--ratio: got {ratio}, expected shares in [0, 1); 1 would keep nothing")
    if args.seeds < 1:
        raise ValueError(f"--seeds: got {args.seeds}, expected at least 1")
    able = TASKS[2:] if args.model == TINY_LLAVA else TASKS[:2]
    args.task = args.task or list(able)
    if not set(args.task) <= set(able):
        raise ValueError(f"--task: got {' '.join(args.task)}, expected {' or '.join(able)} with --model {args.model}")


def runs(args: argparse.Namespace) -> Iterator[Run]:
    """Every measurement of a command line; the plain cache first."""
    for task in args.task:
        kinds = [("none", 0.0), *((policy, ratio) for policy in args.policy for ratio in args.ratio if ratio)]
        depths = args.depth if task == "passkey" else [0.0]
        for length in [PICTURES] if task == "pictures" else args.length:
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
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            break
        rows.append(row)
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
    if results.exists():
        results.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model, and its tokenizer; or its processor, with the test drawings of every kind."""
    import torch

    from fastprompt.data import assets, load_openmoji
    from fastprompt.data.pictures import held_out_drawings
    from fastprompt.hf.language_models import SMOLLM2, load_language_model
    from fastprompt.hf.tiny_llava import ASSETS, load_tiny_llava

    wanted = {SMOLLM2: (SMOLLM2,), TINY_LLAVA: (*ASSETS, "openmoji", "emoji-names")}.get(args.model, ())
    for status in assets.status(cache_dir=args.cache_dir):
        if status.asset.name in wanted and status.state == "missing":
            assets.fetch(status.asset.name, cache_dir=args.cache_dir)
    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype), "cache_dir": args.cache_dir}
    found: Any
    if args.model == TINY_LLAVA:
        found = load_tiny_llava(**options)
        model, processor = found
        return model.to(device_of(args.device)), (processor, held_out_drawings(load_openmoji(cache_dir=args.cache_dir)))
    found = load_language_model(args.model, **options)
    model, tokenizer = found
    return model.to(device_of(args.device)), tokenizer


def measure(run: Run, model: Any, tokenizer: Any) -> dict[str, float]:
    """1 or 0 for a number that is found or not; nats a token for real text."""
    from fastprompt.data.long_texts import excerpt, passkey
    from fastprompt.tuning.long_context import continuation_loss, recalls

    policy = make_policy(run.policy, run.ratio) if run.ratio else None
    if run.task == "passkey":
        return {"value": float(recalls(model, tokenizer, passkey(tokenizer, run.length, run.depth, run.seed), policy))}
    ids = excerpt(tokenizer, run.length + PREDICTED, run.seed).to(model.device)
    return {"value": continuation_loss(model, ids, run.length, policy)}


def measure_pictures(run: Run, model: Any, reader: tuple[Any, dict[str, list[Path]]]) -> dict[str, float]:
    """Share of right answers about test drawings, and share of the keys that was kept."""
    from fastprompt.data.pictures import picture_questions
    from fastprompt.tuning.pictures import answer_pictures

    processor, drawings = reader
    seeds = range(CONTEXTS * run.seed, CONTEXTS * (run.seed + 1))
    tasks = [picture_questions(drawings, run.length, seed) for seed in seeds]
    policy = make_policy(run.policy, run.ratio, text_prior=True) if run.ratio else None
    right, kept = answer_pictures(model, processor, tasks, policy)
    return {"value": round(right.float().mean().item(), 6), "kept": round(kept, 4)}


def _mean(rows: dict[Run, float], task: str, policy: str, ratio: float) -> float | None:
    """None where fewer or other prompts were measured than with the plain cache: means over them do not compare."""
    values = {run[3:]: v for run, v in rows.items() if run[:3] == (task, policy, ratio)}
    plain = {run[3:] for run in rows if run[:3] == (task, "none", 0.0)}
    return statistics.mean(values.values()) if values and set(values) == plain else None


def _kinds(rows: dict[Run, float], task: str) -> tuple[list[str], list[float]]:
    there = [run for run in rows if run.task == task and run.ratio]
    return [p for p in POLICIES if any(r.policy == p for r in there)], sorted({r.ratio for r in there})


#: Whether values are shares, what they are, and what prompts are counted in.
_WHAT = {
    "passkey": (True, "numbers found, %", "tokens"),
    "loss": (False, "loss, nats a token", "tokens"),
    "pictures": (True, "right answers, %", "pictures"),
}


def table(rows: dict[Run, float]) -> str:
    """Markdown: the mean over lengths, depths and seeds, for every policy and ratio."""
    lines = []
    for task in TASKS:
        policies, ratios = _kinds(rows, task)
        full = _mean(rows, task, "none", 0.0)
        if full is None:
            continue
        percent, what, unit = _WHAT[task]
        lengths = ", ".join(str(n) for n in sorted({r.length for r in rows if r.task == task}))
        lines += ["", f"| {task}: {what} ({lengths} {unit}) | " + " | ".join(f"{r:.0%} dropped" for r in ratios) + " |"]
        lines += ["|---" * (len(ratios) + 1) + "|"]
        for policy in policies:
            cells = [_mean(rows, task, policy, ratio) for ratio in ratios]
            lines.append(f"| {policy} | " + " | ".join("" if c is None else _cell(c, percent) for c in cells) + " |")
        lines.append(f"| plain cache: {_cell(full, percent)} |{'  |' * len(ratios)}")
    return "\n".join(lines[1:])


def overfull(rows: list[dict[str, Any]]) -> str:
    """A line for every policy and ratio where more keys were kept than the ratio leaves, as the policy's rule says."""
    kept: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if "kept" in row and row["ratio"]:
            kept.setdefault((row["policy"], row["ratio"]), []).append(row["kept"])
    lines = []
    for (policy, ratio), shares in sorted(kept.items()):
        share = statistics.mean(shares)
        if share > 1 - ratio + 0.005:
            lines.append(f"{policy} kept {share:.1%} of the keys where {ratio:.0%} should go\n")
    return "".join(lines)


def _cell(value: float, percent: bool) -> str:
    return f"{100 * value:.0f}" if percent else f"{value:.3f}"


def plot(rows: dict[Run, float], png: Path) -> None:
    """What is found, the loss, and what is answered, over the share of keys that is dropped."""
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if _mean(rows, task, "none", 0.0) is not None]
    figure = Figure(figsize=(4.8 * len(tasks), 3.8), layout="constrained")
    titles = {"passkey": ("numbers found (%)", 100.0), "loss": ("loss of real text (nats a token)", 1.0),
              "pictures": ("right answers (%)", 100.0)}  # fmt: skip
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
