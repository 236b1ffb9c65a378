# SPDX-License-Identifier: Apache-2.0
"""The shipped CLIP on OpenMoji drawings: few-shot, base-to-new and a change of style, zero-shot and learned prompts.

``python -m bench.tune_openmoji --json FILE --png FILE``. Prompts learn from drawings in colour, which the CLIP was
pretrained on, or from outlines, a style that it never saw. Training is as published (`fastprompt.recipes.dassl`).
Every record is one run; those of the same model that the file holds already are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import fastprompt
from fastprompt.cli_clip import EVAL_BATCH, Learned
from fastprompt.data import DecodedImages
from fastprompt.data.openmoji import Style, class_part
from fastprompt.hf.openmoji_clip import FOLDER, WEIGHTS
from fastprompt.tuning import TuneConfig, evaluate, tune
from fastprompt.tuning.clips import ClipTask

SEEDS, SHOTS = (1, 2, 3), (1, 2, 4, 8, 16)
STYLES: dict[Style, Style] = {"colour": "outline", "outline": "colour"}
"""Styles to learn from and to test on, each with the other one."""
ZERO = "zero-shot"
RECIPES = {"CoOp": fastprompt.CoOp(), "CoCoOp": fastprompt.CoCoOp(), "MaPLe": fastprompt.MaPLe()}
METHODS = (ZERO, *RECIPES)
COLOURS = {ZERO: "#777777", "CoOp": "#d98a5b", "CoCoOp": "#7b6fb0", "MaPLe": "#2f7f8f"}

#: Method, style and classes of the training, shots, seed.
Key = tuple[str, Style, str, int, int]
Rows = dict[Key, dict[str, Any]]


def keys() -> list[Key]:
    """Every run, the longest first, so that processes finish together."""
    shots = {"all": SHOTS, "base": SHOTS[-1:]}
    kinds = [(style, part) for style in STYLES for part in shots]
    trained = [(m, *kind, n, s) for kind in kinds for n in shots[kind[1]] for s in SEEDS for m in RECIPES]
    return [*sorted(trained, key=lambda key: -key[3]), *((ZERO, *kind, 0, 0) for kind in kinds)]


@cache
def model_digest() -> str:
    return hashlib.sha256((FOLDER / WEIGHTS).read_bytes()).hexdigest()[:16]


@cache
def task_of(seed: int, style: Style = "colour") -> ClipTask:
    return ClipTask(shots=SHOTS[-1], seed=seed, style=style, train_style=style)


@cache
def loaded() -> tuple[Any, Any, Any]:
    """The CLIP, its tokenizer and the drawings, once a process."""
    return *task_of(0).build_model(), task_of(0).images()


@cache
def training(seed: int, style: Style) -> DecodedImages:
    clip, _, images = loaded()
    return task_of(seed, style).training(images, clip)


@cache
def testing(style: Style) -> DecodedImages:
    clip, _, images = loaded()
    return task_of(0, style).evaluation(images, clip)


def chosen(images: DecodedImages, part: str, shots: int | None = None) -> DecodedImages:
    """The images of a part of the classes, labelled anew; ``shots`` of each, from the front (sets are nested)."""
    labels = class_part(images.classes, part)
    rows = [(images.labels == label).nonzero()[:shots, 0] for label in labels]
    new = torch.cat([torch.full_like(row, index) for index, row in enumerate(rows)])
    return DecodedImages(images.pixel_values[torch.cat(rows)], new, [images.classes[label] for label in labels])


def classifier(recipe: Any, classes: Sequence[str]) -> Any:
    clip, tokenizer, _ = loaded()
    still = isinstance(recipe, (fastprompt.CoOp, fastprompt.CoCoOp))
    return fastprompt.CLIPClassifier(clip, tokenizer, classes, recipe, cache_images=still)


def accuracy(clf: Any, images: DecodedImages) -> float:
    return evaluate(clf, images, batch_size=EVAL_BATCH, progress=False).accuracy


def measure(key: Key) -> dict[str, Any]:
    """One run: train, and the accuracy on what it is for."""
    method, style, part, shots, seed = key
    began = time.perf_counter()
    recipe = RECIPES.get(method, fastprompt.ZeroShot())
    test = chosen(testing(style), part)
    torch.manual_seed(seed)
    clf = classifier(recipe, test.classes)
    row: dict[str, Any] = {"method": method, "style": style, "part": part, "shots": shots, "seed": seed}
    row |= {
        "recipe": repr(recipe),
        "trainable": clf.num_trainable,
        "classes": len(test.classes),
        "evaluation_images": len(test),
    }
    if shots:
        config = TuneConfig(**recipe.published(shots), seed=seed)
        result = tune(
            clf, Learned(clf), chosen(training(seed, style), part, shots), None, config=config, progress=False
        )
        row |= {"steps": result.steps, "batch_size": config.batch_size, "lr": config.lr, "epochs": config.epochs}
    row["accuracy"] = {"base" if part == "base" else style: accuracy(clf, test)}
    if part == "all" and shots in (0, SHOTS[-1]):
        other = STYLES[style]
        row["accuracy"][other] = accuracy(clf, testing(other))
    clf.detach()
    if part == "base":
        new = chosen(testing(style), "new")
        moved = classifier(recipe, new.classes)
        moved.learner.load_state_dict(clf.learner.state_dict())
        row["accuracy"]["new"] = accuracy(moved, new)
        moved.detach()
    return row | {"seconds": round(time.perf_counter() - began, 1), "model": model_digest(), "torch": torch.__version__}


def read(results: Path) -> Rows:
    """The rows of a results file; a torn last line is left out."""
    found = {}
    for line in results.read_text().splitlines() if results.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        found[row["method"], row["style"], row["part"], row["shots"], row["seed"]] = row
    return found


def _points(rows: Rows, method: str, style: Style, part: str, shots: int, name: str) -> list[float]:
    """Per cent of every seed."""
    kind = (method, style, part, shots if method != ZERO else 0)
    found = [row for key, row in sorted(rows.items()) if key[:4] == kind]
    if name == "H":
        pairs = [(r["accuracy"]["base"], r["accuracy"]["new"]) for r in found]
        return [200 * base * new / (base + new) for base, new in pairs]
    return [100 * r["accuracy"][name] for r in found]


def measured(rows: Rows) -> list[Style]:
    """The styles of which every run is there."""
    return [style for style in STYLES if all(key in rows for key in keys() if key[1] == style)]


def _cell(points: list[float]) -> str:
    spread = f" ± {statistics.stdev(points):.1f}" if len(points) > 1 else ""
    return f"{statistics.mean(points):.1f}{spread}"


def _tables(rows: Rows, style: Style) -> list[str]:
    """Accuracy by shots; and base-to-new and the change of style."""
    most, other = SHOTS[-1], STYLES[style]
    lines = [f"| {style}: shots a class | 0 | {' | '.join(map(str, SHOTS))} |", "|---" * (len(SHOTS) + 2) + "|"]
    zero = _cell(_points(rows, ZERO, style, "all", 0, style))
    lines.append(f"| {ZERO} | {zero} |{'  |' * len(SHOTS)}")
    for method in RECIPES:
        lines.append(
            f"| {method} |  | {' | '.join(_cell(_points(rows, method, style, 'all', n, style)) for n in SHOTS)} |"
        )
    columns = (("base", "base"), ("base", "new"), ("base", "H"), ("all", style), ("all", other))
    lines += ["", f"| {style}: {most} shots | base classes | new classes | harmonic mean | all classes | in {other} |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for method in METHODS:
        cells = [_cell(_points(rows, method, style, part, most, name)) for part, name in columns]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def table(results: Path) -> str:
    """The Markdown tables of a results file: per cent, mean and standard deviation over the seeds."""
    rows, most = read(results), SHOTS[-1]
    first, base = rows[ZERO, "colour", "all", 0, 0], rows[ZERO, "colour", "base", 0, 0]
    used = {m: next(r for key, r in rows.items() if key[0] == m and key[3] == most) for m in RECIPES}
    about = ", ".join(f"{m} {r['trainable']:,} and {r['batch_size']}" for m, r in used.items())
    seeds = len({key[4] for key in rows if key[3]})
    lines = [
        f"Accuracy in %, mean ± standard deviation over {seeds} seeds, on {first['evaluation_images']} drawings of "
        f"{first['classes']} classes that pretraining did not see (chance: {100 / first['classes']:.1f}; "
        f"{base['classes']} base classes). Training as published, without random crops (trained numbers and images a "
        f"step: {about})."
    ]
    return "\n".join([*lines, *(line for style in measured(rows) for line in ("", *_tables(rows, style)))])


def plot(results: Path, png: Path) -> None:
    """Accuracy over shots in each style: mean and spread of every method."""
    from matplotlib.figure import Figure

    rows = read(results)
    styles = measured(rows)
    figure = Figure(figsize=(4.75 * len(styles), 4.2), layout="constrained")
    titles = {"colour": "in colour, as pretrained", "outline": "outlines, never seen in pretraining"}
    for axes, style in zip(figure.subplots(1, len(styles), squeeze=False)[0], styles, strict=True):
        zero = _points(rows, ZERO, style, "all", 0, style)[0]
        axes.axhline(zero, color=COLOURS[ZERO], lw=1.5, ls="--", label=f"{ZERO} ({zero:.1f})")
        for shift, method in zip((-0.04, 0.0, 0.04), RECIPES, strict=True):
            points = [_points(rows, method, style, "all", n, style) for n in SHOTS]
            means = [statistics.mean(p) for p in points]
            spreads = [statistics.stdev(p) if len(p) > 1 else 0 for p in points]
            xs = [index + shift for index in range(len(SHOTS))]
            axes.errorbar(xs, means, spreads, color=COLOURS[method], marker="o", ms=5, lw=2, capsize=3,
                          label=f"{method} ({means[-1]:.1f} at {SHOTS[-1]})")  # fmt: skip
        axes.set_xticks(range(len(SHOTS)), [str(n) for n in SHOTS])
        axes.set(xlabel="training drawings a class", ylabel="accuracy (%)")
        axes.set_title(titles[style], fontsize=10)
        axes.grid(axis="y", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle("Learned prompts of the shipped CLIP on OpenMoji drawings that it never saw", fontsize=11)
    figure.savefig(png, dpi=150)


def one_thread() -> None:
    torch.set_num_threads(1)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    args = parser.parse_args()
    done = {key: row for key, row in read(args.json).items() if row["model"] == model_digest()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    # A torn line goes, and with it what another model gave.
    args.json.write_text("".join(json.dumps(row) + "\n" for row in done.values()))
    left = [key for key in keys() if key not in done]
    with ProcessPoolExecutor(args.processes, get_context("spawn"), one_thread) as pool, open(args.json, "a") as file:
        futures = [pool.submit(measure, key) for key in left]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                row = future.result()
                file.write(json.dumps(row) + "\n")
                file.flush()
                shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in row["accuracy"].items())
                what = f"{row['method']}, {row['style']}, {row['part']} classes"
                what += f", {row['shots']} shots, seed {row['seed']}"
                print(f"{count}/{len(left)} {what}: {shown} ({row['seconds']:.0f} s)", flush=True)
        finally:
            for future in futures:
                future.cancel()
    print(table(args.json))
    if args.png:
        plot(args.json, args.png)
    return 0


if __name__ == "__main__":
    raise SystemExit(run())
