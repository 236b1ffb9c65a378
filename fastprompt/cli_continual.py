# SPDX-License-Identifier: Apache-2.0
"""``fastprompt continual``: classes learned task after task, each in a lane of its own (MULTI-LANE)."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import fastprompt
from fastprompt.cli_job import resolved
from fastprompt.cli_tune import add_cache_dir, add_device, device_of

if TYPE_CHECKING:
    from fastprompt.tuning import ContinualResult

RESULT = "continual.json"


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastprompt continual``."""
    sub.add_argument("--out", type=Path, required=True, help="lanes, checkpoints, logs and the result go here")
    sub.add_argument("--resume", action="store_true", help="go on from what --out holds")
    sub.add_argument("--model", default="dinov2-small", help="a local folder of a vision model [%(default)s]")
    sub.add_argument("--data", default="openmoji", help="a folder with one folder of images a class, textile, or "
                     "openmoji [%(default)s]")  # fmt: skip
    sub.add_argument("--tasks", type=int, default=5, help="tasks that the classes are dealt out to [%(default)s]")
    sub.add_argument("--shots", type=int, default=16, help="training images a class [%(default)s]")
    sub.add_argument("--eval-size", type=int, help="evaluation images, balanced over classes [all of the rest]")
    sub.add_argument("--image-size", type=int, default=224, help="pixels a side [%(default)s]")
    sub.add_argument("--summaries", type=int, default=20, help="summaries a task and layer [%(default)s]")
    sub.add_argument("--length", type=int, default=20, help="prompts a task and layer [%(default)s]")
    sub.add_argument("--layers", type=int, nargs="+", help="layers with prompts, from 0 [the first 5]")
    sub.add_argument("--replace", default="residual", choices=("residual", "reset", "none"),
                     help="what selects next: as released, as in the paper, or nothing [%(default)s]")  # fmt: skip
    sub.add_argument("--epochs", type=int, default=10, help="of every task [%(default)s]")
    sub.add_argument("--batch-size", type=int, default=16, help="[%(default)s]")
    sub.add_argument("--lr", type=float, default=0.03, help="[%(default)s]")
    sub.add_argument("--autocast", choices=("auto", "bfloat16", "off"), default="auto")
    sub.add_argument("--save-every", type=int, default=20, help="steps between checkpoints [%(default)s]")
    sub.add_argument("--seed", type=int, default=0)
    add_device(sub)
    add_cache_dir(sub)


def command(args: argparse.Namespace) -> None:
    """Run ``fastprompt continual``."""
    from fastprompt.tuning import TuneConfig, continual
    from fastprompt.tuning.class_tasks import ClassTasks
    from fastprompt.tuning.images import best_autocast

    device = device_of(args.device)
    autocast = {"auto": best_autocast(device), "off": None}.get(args.autocast, args.autocast)
    model, data = resolved(args.model, "dinov2-small"), args.data
    data = data if data in ("openmoji", "textile") else str(Path(data).resolve())
    images = ClassTasks(
        model, data, args.tasks, args.shots, args.eval_size, args.image_size, args.seed, args.cache_dir
    )  # fmt: skip
    options = {} if args.layers is None else {"layers": args.layers}
    recipe = fastprompt.MultiLane(args.summaries, args.length, replace=args.replace, **options)
    config = TuneConfig(
        epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, weight_decay=0.0, autocast=autocast,
        seed=args.seed, save_every=args.save_every,
    )  # fmt: skip
    base = images.build_model().to(device)  # type: ignore[arg-type]
    tasks = images.split(base)
    for number, task in enumerate(tasks):
        print(f"task {number}: {', '.join(task.classes)} ({len(task.train)} training, {len(task.test)} test images)")
    pathways = fastprompt.TaskPathways(base, recipe)
    about = {name: str(value) for name, value in asdict(images).items() if name not in ("cache_dir", "eval_size")}
    result = continual(
        pathways, tasks, config=config, out_dir=args.out, resume=args.resume, about=about | {"recipe": repr(recipe)}
    )
    found = {"task": asdict(images), "recipe": repr(recipe), "config": asdict(config), **asdict(result),
             "average": result.average, "incremental": result.incremental, "forgetting": result.forgetting,
             "classes": [task.classes for task in tasks], "trainable": pathways.num_trainable,
             "fastprompt": fastprompt.__version__}  # fmt: skip
    (args.out / RESULT).write_text(json.dumps(found, indent=2))
    print(table(result))
    print(f"{pathways.num_trainable:,} parameters learned for the last task, its head included")
    print(f"saved: {args.out}/prompts.safetensors, log.jsonl, {RESULT}")


def table(result: ContinualResult) -> str:
    """Accuracy in percent on every task (columns) after each task was learned (rows)."""
    lines = ["after task | " + " ".join(f"{j:>5}" for j in range(len(result.accuracy))) + " |   all"]
    for i, (row, seen) in enumerate(zip(result.accuracy, result.seen, strict=True)):
        cells = [f"{100 * x:5.1f}" for x in row] + ["     "] * (len(result.accuracy) - len(row))
        lines.append(f"{i:>10} | {' '.join(cells)} | {100 * seen:5.1f}")
    lines.append(
        f"average accuracy {100 * result.average:.1f} %, average incremental accuracy "
        f"{100 * result.incremental:.1f} %, forgetting {100 * result.forgetting:.1f} points"
    )
    return "\n".join(lines)
