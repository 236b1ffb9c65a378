# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M on real text messages: accuracy before and after ``fastprompt tune --task text``, and of a linear head.

``python -m bench.tune_text --out runs/text --json FILE --png FILE``. No seed trains on a test text; how settings were
chosen is told in bench/results/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprompt.cli import main
from fastprompt.hf.texts import EncodedTexts, LabelScorer
from fastprompt.tuning.texts import TextTask

SEEDS, EVAL_SIZE = (1, 2, 3), 300
FORMS = ("zero-shot", "linear head", "PrefixKV")


@torch.no_grad()
def features(scorer: LabelScorer, texts: EncodedTexts, batch: int = 16) -> Tensor:
    """The last hidden state ``[N, C]`` of every prompt, which the language model reads its next token from."""
    found = []
    for start in range(0, len(texts), batch):
        ids, mask = texts.input_ids[start : start + batch], texts.attention_mask[start : start + batch]
        first = int(mask.any(0).int().argmax())
        ids, mask = ids[:, first:], mask[:, first:]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found.append(
            scorer.lm.model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state[:, -1]
        )
    return torch.cat(found).double()


def linear_head(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, penalty: float = 1.0) -> float:
    """Accuracy of logistic regression (L2, the penalty that scikit-learn starts from) on standardised features."""
    mean, std = train[0].mean(0), train[0].std(0).clamp(min=1e-6)
    x, y = (train[0] - mean) / std, train[1]
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = nn.functional.linear(x, weight, bias)
        loss = nn.functional.cross_entropy(logits, y, reduction="sum") + 0.5 * penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    predicted = nn.functional.linear((test[0] - mean) / std, weight, bias).argmax(-1)
    return (predicted == test[1]).double().mean().item()


def collect(out: Path) -> list[dict]:
    """One row a form, with an accuracy a seed, of finished runs ``out/SEED``."""
    runs = [json.loads((out / str(seed) / "run.json").read_text()) for seed in SEEDS]
    task = TextTask(**runs[0]["task"])
    scorer = task.build_model(tuple(runs[0]["classes"]), torch.bfloat16 if runs[0]["autocast"] else torch.float32)
    heads, test = [], None
    for run in runs:
        train_texts, test_texts = TextTask(**run["task"]).split(scorer)
        # The test texts are the same for every seed.
        test = test or (features(scorer, test_texts), test_texts.labels)
        train = features(scorer, train_texts), train_texts.labels
        heads.append(linear_head(train, test, len(run["classes"])))
    first = runs[0]
    setting = {
        "model": "SmolLM2-135M-Instruct", "data": "SMS Spam Collection", "shots": task.shots, "recipe": first["recipe"],
        "template": scorer.template, "words": list(scorer.words), "seeds": list(SEEDS),
        "evaluation_texts": first["after"]["n"], "autocast": first["autocast"], "max_tokens": task.max_tokens,
        **{key: first["config"][key] for key in ("epochs", "batch_size", "lr", "optimizer", "weight_decay", "warmup")},
        "steps": first["steps"], "torch": first["torch"],
    }  # fmt: skip
    accuracies = ([run["before"]["accuracy"] for run in runs], heads, [run["after"]["accuracy"] for run in runs])
    trainable = (0, len(first["classes"]) * (scorer.lm.config.hidden_size + 1), first["trainable"])
    return [
        {"method": form, "accuracy": accuracy, "trainable": count, **setting}
        for form, accuracy, count in zip(FORMS, accuracies, trainable, strict=True)
    ]


def table(results: Path) -> str:
    """The Markdown table of a results file."""
    lines = ["| method | accuracy | trainable |", "|---|---|---|"]
    for row in map(json.loads, results.read_text().splitlines()):
        mean = 100 * statistics.mean(row["accuracy"])
        spread = f" ± {100 * statistics.stdev(row['accuracy']):.1f}" if row["trainable"] else ""
        lines.append(f"| {row['method']} | {mean:.1f}{spread} % | {row['trainable']:,} |")
    return "\n".join(lines)


def plot(results: Path, png: Path) -> None:
    """Accuracy of each method: every seed, and the mean."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in results.read_text().splitlines()]
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for i, (row, color) in enumerate(zip(rows, ("#9aa5b1", "#d98a5b", "#2f7f8f"), strict=True)):
        points = [100 * a for a in row["accuracy"]]
        mean = statistics.mean(points)
        axes.plot([i] * len(points), points, "o", color=color, markersize=7, alpha=0.5)
        axes.plot(i, mean, "_", color=color, markersize=44, markeredgewidth=3)
        axes.annotate(f"{mean:.1f}", (i, max(points)), (0, 7), textcoords="offset points", ha="center")
    axes.axhline(100 / len(rows[0]["words"]), color="#bbbbbb", lw=1, ls="--", zorder=0)
    axes.annotate(
        "chance", (len(rows) - 0.6, 100 / len(rows[0]["words"])), (0, 4), textcoords="offset points", ha="right"
    )
    axes.set(xlim=(-0.6, len(rows) - 0.4), ylim=(40, 103), ylabel="accuracy (%): each seed, and the mean")
    axes.set_xticks(range(len(rows)), [row["method"] for row in rows])
    axes.spines[["top", "right"]].set_visible(False)
    first = rows[0]
    axes.set_title(
        f"{first['model']} on the {first['data']}, {first['shots']} texts a class\n{first['recipe']}", fontsize=9
    )
    figure.savefig(png, dpi=150)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    for seed in SEEDS:
        out = args.out / str(seed)
        command = ["tune", "--task", "text", "--eval-size", str(EVAL_SIZE), "--seed", str(seed), "--out", str(out)]
        # A run that is finished is not run again.
        if not (out / "run.json").exists() and (code := main([*command, "--resume"])):
            return code
    args.json.write_text("".join(json.dumps(row) + "\n" for row in collect(args.out)))
    print(table(args.json))
    if args.png:
        plot(args.json, args.png)
    return 0


if __name__ == "__main__":
    raise SystemExit(run())
