# SPDX-License-Identifier: Apache-2.0
"""``fastprompt tune`` and ``fastprompt eval``: what all tasks share."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastprompt
from fastprompt.cli_clip import ClipJob
from fastprompt.cli_image import ImageJob
from fastprompt.cli_job import Job
from fastprompt.cli_text import MLP_LR, TextJob
from fastprompt.errors import CheckpointError

if TYPE_CHECKING:
    from fastprompt.tuning import EvalResult, TuneConfig, TuneResult

RUN = "run.json"

JOBS: dict[str, type[Job]] = {job.kind: job for job in (ImageJob, TextJob, ClipJob)}

#: The task of every recipe; the first of two that share one.
RECIPES = {recipe: kind for kind, job in reversed(JOBS.items()) for recipe in job.options}


def add_tune_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastprompt tune``."""
    from fastprompt.tuning.config import TuneConfig

    image, text, clip = ImageJob.options["vpt"], TextJob.options["prefix"], ClipJob.options["coop"]
    apt = ImageJob.options["apt"]
    default, published = TuneConfig(), "coop, ...: as published"

    sub.add_argument("--task", choices=tuple(JOBS), help="[that of --recipe, or image]")
    sub.add_argument("--recipe", choices=sorted(RECIPES), help="[image: vpt; text: prefix; clip: coop]")
    sub.add_argument("--out", type=Path, required=True, help="prompts, checkpoint, log and plot go here")
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    sub.add_argument("--model", help="one of these built-in names or a local folder "
                     f"[{image['model']}; text: {text['model']}; clip: {clip['model']}]")  # fmt: skip
    sub.add_argument("--data", help="a folder with one folder of images a class; text: a .csv or .jsonl file with "
                     "text and label; or one of these built-in names "
                     f"[{image['data']}; text: {text['data']}; clip: {clip['data']}]")  # fmt: skip
    sub.add_argument("--shots", type=int, default=16, help="training examples a class [%(default)s]")
    sub.add_argument("--eval-size", type=int, help="evaluation examples, balanced over classes [all of the rest; text: "
                     "half of the smallest class, of each]")  # fmt: skip
    sub.add_argument("--length", type=int, help="vpt, prefix, apt: prompts a layer "
                     f"[{image['length']}; {text['length']}; {apt['length']}]")  # fmt: skip
    sub.add_argument("--layers", type=int, nargs="+", help="vpt, prefix, apt: layers that get prompts, from 0 [all]")
    sub.add_argument("--depth", type=_depth, help="vpt: deep or shallow [deep]; maple, ivlp, dpl: layers, from the "
                     "first, that get prompts [9; 12; 9]")  # fmt: skip
    sub.add_argument("--image-size", type=int, help=f"pixels a side [{image['image_size']}; clip: the model's]")
    sub.add_argument("--epochs", type=int, help=f"[{image['epochs']}; {published}]")
    sub.add_argument("--batch-size", type=int, help=f"[{image['batch_size']}; {published}]")
    sub.add_argument("--lr", type=float, help=f"[{image['lr']}, apt {apt['lr']}, with --reparam mlp {MLP_LR}; "
                     f"{published}]")  # fmt: skip
    sub.add_argument("--weight-decay", type=float, help=f"[{default.weight_decay}; {published}]")
    sub.add_argument("--optimizer", choices=("adamw", "sgd"), help=f"[{default.optimizer}; {published}]")
    sub.add_argument("--warmup", type=float, help=f"fraction of all steps [{default.warmup}; {published}]")
    sub.add_argument("--autocast", choices=("auto", "bfloat16", "off"), default="auto")
    sub.add_argument("--save-every", type=int, default=20, help="steps between checkpoints [%(default)s]")
    sub.add_argument("--eval-every", type=int, default=0, help="epochs between evaluations; 0 is at the end only")
    sub.add_argument("--seed", type=int, default=0)
    add_device(sub)
    add_cache_dir(sub)
    for job in JOBS.values():
        job.add_arguments(sub)


def add_eval_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastprompt eval``."""
    sub.add_argument("run", type=Path, help="the folder that `fastprompt tune --out` wrote")
    sub.add_argument("--data", help="evaluate on all images of this folder, or texts of this file, instead (same class "
                     "names, but for a CLIP)")  # fmt: skip
    sub.add_argument("--batch-size", type=int, default=32)
    add_device(sub)
    group = sub.add_argument_group("a CLIP: classes and drawings that it was not trained on")
    group.add_argument("--classes", choices=("all", "base", "new"), help="[those of the run; with --data all]")
    group.add_argument("--class-names", type=Path, metavar="FILE", help="as in tune [the folders' names]")
    group.add_argument("--style", choices=("colour", "outline"), help="of OpenMoji's drawings [colour]")


def add_cache_dir(sub: argparse.ArgumentParser) -> None:
    """Declare ``--cache-dir``."""
    sub.add_argument("--cache-dir", help="where assets are kept [~/.cache/fastprompt]")


def add_device(sub: argparse.ArgumentParser) -> None:
    """Declare ``--device``."""
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")


def _depth(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def tune_command(args: argparse.Namespace) -> None:
    """Run ``fastprompt tune``."""
    from fastprompt.nn.terms import terms_of
    from fastprompt.tuning import TuneConfig, plot_log, tune
    from fastprompt.tuning.images import best_autocast

    kind = fill_in(args)
    device = device_of(args.device)
    autocast = {"auto": best_autocast(device), "off": None}.get(args.autocast, args.autocast)
    job = kind.start(args, autocast, device)
    config = TuneConfig(
        **job.settings(args), autocast=autocast, seed=args.seed, save_every=args.save_every, eval_every=args.eval_every
    )
    train_set, eval_set = job.split()
    print(f"{len(train_set)} training and {len(eval_set)} evaluation {job.noun} of {', '.join(job.classes)}")
    before = None
    if job.baseline:
        before = job.without_prompts(eval_set, config.eval_batch_size or config.batch_size)
        print(f"{job.baseline}: {_accuracy(before, job)}")
    handle = job.attach(train_set)
    if handle is None:
        result = _nothing_to_train(job, before, args.out)
    else:
        print(repr(handle))
        result = tune(
            job.model, handle, train_set, eval_set, config=config, out_dir=args.out, resume=args.resume,
            about=job.about(), terms=terms_of(job.recipe),
        )  # fmt: skip
        took = "was finished" if math.isnan(result.seconds_per_step) else f"{result.seconds_per_step:.3f} s a step"
        print(f"{result.steps} steps, {took}, train loss {result.train_loss:.4f}")
    _write_run(job, config, before, result, args.out / RUN)
    _print_accuracy(result.evaluation, job, before if handle else None)
    print(f"saved: {args.out}/prompts.safetensors, log.jsonl")
    if handle is None:
        return
    if find_spec("matplotlib"):
        plot_log(args.out / "log.jsonl", args.out / "curves.png")
        print(f"plotted: {args.out}/curves.png")
    else:
        print('no plot: matplotlib is not installed (pip install "fastprompt[demo]")')


def eval_command(args: argparse.Namespace) -> None:
    """Run ``fastprompt eval``."""
    from fastprompt.tuning import evaluate

    file = args.run / RUN
    if not file.is_file():
        raise FileNotFoundError(f"run: no {file}, expected a folder that `fastprompt tune --out` finished")
    try:
        run = json.loads(file.read_text())
        kind = JOBS[run["kind"]]
        task, _, _ = kind.read_task(run["task"]), run["classes"], run["autocast"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: damaged ({error!r}), expected what `fastprompt tune` writes") from error
    _refuse_for_others(args, kind)
    job = kind.restore(task, run, args, device_of(args.device))
    examples, before = job.evaluation(args.data), None
    if job.baseline:
        before = job.without_prompts(examples, args.batch_size)
    job.load(args.run)
    result = evaluate(job.model, examples, batch_size=args.batch_size, autocast=job.autocast)
    _print_accuracy(result, job, before)


def fill_in(args: argparse.Namespace) -> type[Job]:
    """Give task, recipe and options that were left out their value; return the task's job.

    Raises:
        ValueError: task and recipe do not belong together, or an option of another recipe was given.
    """
    args.task = args.task or RECIPES.get(args.recipe, ImageJob.kind)
    kind = JOBS[args.task]
    args.recipe = args.recipe or next(iter(kind.options))
    if args.recipe not in kind.options:
        raise ValueError(
            f"--recipe: got {args.recipe} with --task {args.task}, expected one of {', '.join(kind.options)}; leave "
            "--task out"
        )
    own = kind.options[args.recipe]
    owners: dict[str, dict[str, None]] = {}
    for job in JOBS.values():
        for recipe, options in job.options.items():
            for name in options.keys() - own.keys():
                owners.setdefault(name, {})[recipe] = None
    for name, recipes in owners.items():
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')}: got a value with --recipe {args.recipe}, but it is for --recipe "
                f"{', '.join(recipes)}; leave it out"
            )
    for name, value in own.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return kind


def _refuse_for_others(args: argparse.Namespace, kind: type[Job]) -> None:
    for name in ("classes", "class_names", "style"):
        if kind is not ClipJob and getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: got a value, but the run is of --task {kind.kind}, not clip")


def _nothing_to_train(job: Job, result: EvalResult | None, out: Path) -> TuneResult:
    """Write what a run leaves behind, but for a checkpoint."""
    from fastprompt.tuning.journal import Journal
    from fastprompt.tuning.loop import CHECKPOINT, LOG
    from fastprompt.tuning.supervised import TuneResult

    if (out / CHECKPOINT).exists():
        raise FileExistsError(f"out: {out} holds the {CHECKPOINT} of a trained run, expected another folder")
    out.mkdir(parents=True, exist_ok=True)
    job.save(out)
    journal = Journal(out / LOG)
    if result is not None:
        journal.write({"event": "eval", "step": 0, "epoch": 0, "accuracy": result.accuracy, "loss": result.loss,
                       "n": result.n})  # fmt: skip
    journal.close()
    return TuneResult(0, 0, math.nan, result, math.nan, 0)


def _write_run(job: Job, config: TuneConfig, before: EvalResult | None, result: TuneResult, file: Path) -> None:
    import torch

    run = {"kind": job.kind, "task": asdict(job.task), "classes": job.classes, "autocast": job.autocast,
           "recipe": repr(job.recipe), "config": asdict(config), "before": before, "after": result.evaluation,
           "trainable": result.trainable_parameters, "steps": result.steps, "fastprompt": fastprompt.__version__,
           "torch": torch.__version__}  # fmt: skip
    file.write_text(json.dumps(run, indent=2, default=asdict))


def device_of(name: str) -> str:
    """The device that ``--device`` names."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but torch sees none; use --device cpu, or see `fastprompt info`")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _accuracy(result: EvalResult, job: Job) -> str:
    return f"accuracy {100 * result.accuracy:.1f} % on {result.n} {job.noun} (loss {result.loss:.4f})"


def _print_accuracy(result: Any, job: Job, before: EvalResult | None = None) -> None:
    """Accuracy of the whole and of every class, that of ``before`` beside it."""
    print(_accuracy(result, job))
    if before:
        print(f"{job.baseline}: {_accuracy(before, job)}")
    earlier = before.class_accuracy if before else [None] * len(job.classes)
    for name, accuracy, was in zip(job.classes, result.class_accuracy, earlier, strict=True):
        beside = "" if was is None else f"  ({job.baseline} {100 * was:.1f} %)"
        print(f"  {name:<20} {100 * accuracy:5.1f} %{beside}")
