# SPDX-License-Identifier: Apache-2.0
"""The main job on real input: few-shot textile classification with a frozen DINOv2-S, four ways.

A linear head; deep visual prompts in the last four layers as published (tokens inserted before each of them); the same
prompts through fastprompt; and approximated prompt tuning there, another method. The two forms of visual prompts start
from the same numbers and are the same maths.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import fastprompt
from fastprompt.data import DecodedImages, assets
from fastprompt.hf.published import InsertedPrompts
from fastprompt.tuning import TuneConfig, tune
from fastprompt.tuning.images import ImageTask, best_autocast
from fastprompt.tuning.memory import peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD, PUBLISHED, OURS, READ = "linear head", "VPT as published", "VPT, fastprompt", "APT, fastprompt"
# Chosen on the split of seed 0, which the three seeds of the full demo leave out.
RECIPE = fastprompt.VPT(length=10, layers=(8, 9, 10, 11))
APT = fastprompt.APT(length=10, layers=(8, 9, 10, 11))
EPOCHS, BATCH = 40, 16
LR = {HEAD: 1e-2, PUBLISHED: 1e-2, OURS: 1e-2, READ: 1e-3}


@dataclass
class Trained:
    """A model and what trains in it; `parameters` makes it a handle for `tune`."""

    model: PreTrainedModel
    trainable: list[nn.Parameter]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable tensors."""
        yield from self.trainable


def build(method: str, task: ImageTask, classes: int) -> Trained:
    """A fresh model for a method; head and prompts depend on the task's seed alone, so both VPT forms start equal."""
    model = task.build_model(classes)
    if method == HEAD:
        model.requires_grad_(False)
        head = model.get_submodule("classifier").requires_grad_(True)
        return Trained(model, list(head.parameters()))
    torch.manual_seed(task.seed)
    handle = fastprompt.attach(model, APT if method == READ else RECIPE, train=("classifier",))
    if method in (OURS, READ):
        return Trained(model, list(handle.parameters()))
    layers = RECIPE.chosen(len(handle.sites))
    prompts = {i: nn.Parameter(p.detach().clone()) for i, p in zip(layers, handle.parameters(), strict=False)}
    handle.detach()
    inserted = InsertedPrompts(model, prompts)
    head = model.get_submodule("classifier").requires_grad_(True)
    return Trained(model, [*inserted.parameters(), *head.parameters()])


def step(trained: Trained, images: DecodedImages, autocast: str | None) -> Callable[[], None]:
    """One forward and backward on the first images."""
    pixels, labels = images.pixel_values[:BATCH], images.labels[:BATCH]

    def run() -> None:
        for p in trained.trainable:
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            loss = trained.model(pixel_values=pixels, labels=labels).loss
        loss.backward()

    return run


def difference(task: ImageTask, images: DecodedImages) -> dict[str, float]:
    """Largest relative difference of logits and of gradients between the two VPT forms, in float32."""
    found = []
    for method in (PUBLISHED, OURS):
        trained = build(method, task, len(images.classes))
        out = trained.model(pixel_values=images.pixel_values[:8], labels=images.labels[:8])
        grads = torch.autograd.grad(out.loss, trained.trainable)
        found.append([out.logits.detach(), *grads])
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found[1], found[0], strict=True)]
    return {"logits": errors[0], "gradients": max(errors[1:])}


def step_seconds(task: ImageTask, images: DecodedImages, autocast: str | None, rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step of every method, interleaved, so that their ratio survives a busy machine."""
    steps = {m: step(build(m, task, len(images.classes)), images, autocast) for m in LR}
    seconds: dict[str, list[float]] = {m: [] for m in steps}
    for r in range(rounds + 1):
        for method, run in steps.items():
            start = time.perf_counter()
            run()
            if r:
                seconds[method].append(time.perf_counter() - start)
    return seconds


def step_memory(method: str, task: ImageTask, autocast: str | None) -> int:
    """Peak bytes of two training steps, measured in a process of its own."""
    order = json.dumps({"method": method, "task": vars(task), "autocast": autocast})
    code = f"from fastprompt import demo; import json; print(demo._memory_here(**json.loads({order!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {method!r} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _memory_here(method: str, task: dict[str, Any], autocast: str | None) -> int:
    trained = build(method, ImageTask(**task), 3)
    images = DecodedImages(torch.randn(BATCH, 3, 224, 224), torch.arange(BATCH) % 3, ("a", "b", "c"))
    run = step(trained, images, autocast)
    return peak_memory(lambda: (run(), run()))


def run(out: Path, *, full: bool = False, cache_dir: str | None = None) -> None:
    """Train, measure, print a table, and write ``results.jsonl`` and ``results.png`` to ``out``.

    Args:
        out: Made if missing; a finished demo there is replaced.
        full: Three seeds and 900 evaluation images instead of one and 300.
        cache_dir: Where assets are kept.
    """
    for name in ("dinov2-small", "textile"):
        assets.fetch(name, cache_dir=cache_dir)
    out.mkdir(parents=True, exist_ok=True)
    seeds, eval_size = ((1, 2, 3), 900) if full else ((1,), 300)
    autocast = best_autocast()
    rows: dict[str, dict[str, Any]] = {m: {"accuracy": []} for m in LR}
    for seed in seeds:
        task = ImageTask(seed=seed, eval_size=eval_size, cache_dir=cache_dir)
        train_set, eval_set = task.split(task.build_model(3))
        if seed == seeds[0]:
            measured = difference(task, train_set)
            print(f"the two VPT forms in float32 differ by {measured['logits']:.1e} (logits) and "
                  f"{measured['gradients']:.1e} (gradients), relative")  # fmt: skip
            seconds = step_seconds(task, train_set, autocast, rounds=7)
        for method, row in rows.items():
            print(f"{method}, seed {seed}", flush=True)
            trained = build(method, task, len(train_set.classes))
            config = TuneConfig(epochs=EPOCHS, batch_size=BATCH, lr=LR[method], autocast=autocast, seed=seed)
            result = tune(trained.model, trained, train_set, eval_set, config=config)
            row["accuracy"].append(result.evaluation.accuracy if result.evaluation else float("nan"))
            row["trainable"] = result.trainable_parameters
    for method, row in rows.items():
        row["step_s"] = statistics.median(seconds[method])
        ratios = [a / b for a, b in zip(seconds[method], seconds[PUBLISHED], strict=True)]
        row["step_ratio"] = statistics.median(ratios)
        row["peak_bytes"] = step_memory(method, task, autocast)
        row["recipe"] = "" if method == HEAD else repr(APT if method == READ else RECIPE)
        row["lr"] = LR[method]
    header = {
        "model": "DINOv2-S/14, 224 px", "data": "textile, 16 shots a class", "seeds": list(seeds),
        "evaluation_images": eval_size, "autocast": autocast, "epochs": EPOCHS, "batch_size": BATCH,
        "float32_difference": measured, "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    with (out / "results.jsonl").open("w") as file:
        file.writelines(json.dumps({"method": m, **row, **header}) + "\n" for m, row in rows.items())
    print(table(out / "results.jsonl"))
    plot(out / "results.jsonl", out / "results.png")
    print(f"written: {out}/results.jsonl, {out}/results.png")


def table(results: Path) -> str:
    """The Markdown table of a results file."""
    lines = [
        "| method | accuracy | trainable | s a step | against published | peak memory of a step |",
        "|---|---|---|---|---|---|",
    ]
    for row in map(json.loads, results.read_text().splitlines()):
        mean = 100 * statistics.mean(row["accuracy"])
        spread = f" ± {100 * statistics.stdev(row['accuracy']):.1f}" if len(row["accuracy"]) > 1 else ""
        lines.append(
            f"| {row['method']} | {mean:.1f}{spread} % | {row['trainable']:,} | {row['step_s']:.2f} | "
            f"{row['step_ratio']:.2f}x | {row['peak_bytes'] / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)


def plot(results: Path, png: Path) -> None:
    """Accuracy, step time and memory of a results file, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in results.read_text().splitlines()]
    names = [r["method"].replace(", ", ",\n").replace(" as ", "\nas ") for r in rows]
    colors = ["#9aa5b1", "#d98a5b", "#2f7f8f", "#7a5ba6"]
    panels: tuple[tuple[str, Callable[[dict], float], str], ...] = (
        ("accuracy (%)", lambda r: 100 * statistics.mean(r["accuracy"]), "{:.1f}"),
        ("seconds a training step", lambda r: r["step_s"], "{:.2f}"),
        ("peak memory of a step (MiB)", lambda r: r["peak_bytes"] / 2**20, "{:,.0f}"),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.0), layout="constrained")
    for axis, (title, value, style) in zip(axes, panels, strict=True):
        values = [value(r) for r in rows]
        if title.startswith("accuracy"):
            for i, r in enumerate(rows):
                points = [100 * a for a in r["accuracy"]]
                axis.plot([i] * len(points), points, "o", color=colors[i], markersize=7, alpha=0.5)
                axis.plot(i, values[i], "_", color=colors[i], markersize=44, markeredgewidth=3)
                axis.annotate(
                    style.format(values[i]), (i, max(points)), (0, 7), textcoords="offset points", ha="center"
                )
            axis.set_xlim(-0.6, len(rows) - 0.4)
            axis.set_xticks(range(len(names)), names)
            axis.set_title(f"{title}: each seed, and the mean", fontsize=10)
        else:
            bars = axis.bar(names, values, color=colors, width=0.62)
            axis.bar_label(bars, [style.format(v) for v in values], padding=3)
            axis.set_title(title, fontsize=10)
        axis.margins(y=0.18)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    recipes = dict.fromkeys(r["recipe"] for r in rows if r["recipe"])
    figure.suptitle("\n".join([f"{rows[0]['model']}; {rows[0]['data']}", *recipes]), fontsize=9)
    figure.savefig(png, dpi=150)
    pyplot.close(figure)
