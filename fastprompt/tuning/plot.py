# SPDX-License-Identifier: Apache-2.0
"""The curves of a run, drawn from its log."""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAIN, _EVAL, _INK = "#3b6ea5", "#d1495b", "#333333"


def plot_log(jsonl_path: str | Path, png_path: str | Path) -> None:
    """Draw loss and accuracy against the step, one panel each, from the ``log.jsonl`` of `tune`.

    A faint line shows every training batch, a strong one the mean of each epoch, dots the evaluations.

    Args:
        jsonl_path: the log.
        png_path: the picture to write; its folder must exist.

    Raises:
        ValueError: a line is no record of `tune`, or the log has no step.
        ImportError: matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> record = {"event": "step", "step": 1, "epoch": 1, "loss": 0.5, "accuracy": 1.0}
        >>> _ = (folder / "log.jsonl").write_text(json.dumps(record))
        >>> plot_log(folder / "log.jsonl", folder / "log.png")
        >>> (folder / "log.png").exists()
        True
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot_log needs matplotlib; install it with: pip install "fastprompt[demo]"') from error

    records = _read(Path(jsonl_path))
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    _draw(loss, records, "loss", 1.0, lambda value: f"{value:.3g}")
    _draw(accuracy, records, "accuracy", 100.0, lambda value: f"{value:.1f} %")
    loss.set(title="Loss", ylabel="cross-entropy (nats)")
    loss.set_ylim(bottom=0)
    accuracy.set(title="Accuracy", ylabel="correct (%)", ylim=(0, 103))
    last = [record for record in records if record["event"] == "step"][-1]
    figure.suptitle(f"Tuning: {last['step']} steps in {last['epoch']} epochs", color=_INK, fontweight="bold")
    figure.savefig(png_path, dpi=150, format="png")


def _read(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"jsonl_path: line {number} of {path} is not JSON ({error}); pass the log.jsonl of a run, uncut."
            ) from error
        if not isinstance(record, dict) or not {"event", "step", "epoch", "loss", "accuracy"} <= record.keys():
            raise ValueError(
                f"jsonl_path: line {number} of {path} is {line[:60]!r}, expected event, step, epoch, loss and "
                "accuracy; pass the log.jsonl of a run."
            )
        records.append(record)
    if not any(record["event"] == "step" for record in records):
        raise ValueError(f"jsonl_path: {path} has no training step, expected at least one; plot it once the run began.")
    return records


def _draw(axes: "Axes", records: list[dict[str, Any]], key: str, scale: float, text: Callable[[float], str]) -> None:
    """Draw one quantity against the step; the legend tells its last evaluation."""
    known = [record for record in records if record[key] is not None]
    train = [record for record in known if record["event"] == "step"]
    evals = [record for record in known if record["event"] == "eval"]
    xs, ys = [r["step"] for r in train], [scale * r[key] for r in train]
    axes.plot(xs, ys, color=_TRAIN, alpha=0.25, lw=1, label="train, each batch")
    epochs = [list(group) for _, group in groupby(train, key=lambda record: record["epoch"])]
    middles = [mean(r["step"] for r in epoch) for epoch in epochs]
    means = [scale * mean(r[key] for r in epoch) for epoch in epochs]
    axes.plot(middles, means, color=_TRAIN, lw=2, marker="." if len(epochs) < 20 else None, label="train, epoch mean")
    if evals:
        xs, ys = [r["step"] for r in evals], [scale * r[key] for r in evals]
        axes.plot(xs, ys, color=_EVAL, lw=1.5, marker="o", ms=5, label=f"evaluation, last {text(ys[-1])}")
    axes.set_xlabel("optimizer step")
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=True, framealpha=0.85, edgecolor="none")
