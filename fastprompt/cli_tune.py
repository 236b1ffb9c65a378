# SPDX-License-Identifier: Apache-2.0
"""``fastprompt tune`` and ``fastprompt eval``: images with VPT and a linear head, texts with PrefixKV."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastprompt
from fastprompt.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from fastprompt.tuning.batches import Examples

RUN = "run.json"
IMAGE, TEXT = "image", "text"

#: What an option is where it is not given, by task; an option of one task alone is refused with the other.
DEFAULTS: dict[str, dict[str, Any]] = {
    IMAGE: {
        "model": "dinov2-small", "data": "textile", "length": 10, "epochs": 30, "lr": 1e-2, "image_size": 224,
        "depth": "deep",
    },
    TEXT: {
        "model": "smollm2-135m", "data": "sms-spam", "length": 8, "epochs": 30, "lr": 1e-2, "reparam": "none",
        "template": None, "words": {}, "max_tokens": 64, "part": "test",
    },
}  # fmt: skip

#: The network that gives keys and values wants smaller steps than keys and values themselves (P-Tuning v2: 1e-2).
MLP_LR = 1e-3


def add_tune_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastprompt tune``."""
    from fastprompt.tuning.config import TuneConfig

    def by_task(name: str) -> str:
        return f"[{DEFAULTS[IMAGE][name]}; text: {DEFAULTS[TEXT][name]}]"

    default = TuneConfig()
    sub.add_argument("--task", choices=(IMAGE, TEXT), default=IMAGE, help="[%(default)s]")
    sub.add_argument("--out", type=Path, required=True, help="prompts, checkpoint, log and plot go here")
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    sub.add_argument("--model", help=f"one of these assets or a local folder {by_task('model')}")
    sub.add_argument("--data", help="a folder with one folder of images a class; text: a .csv or .jsonl file with "
                     f"text and label; or one of these assets {by_task('data')}")  # fmt: skip
    sub.add_argument("--shots", type=int, default=16, help="training examples a class [%(default)s]")
    sub.add_argument("--eval-size", type=int, help="evaluation examples, balanced over classes [all of the rest; text: "
                     "half of the smallest class, of each]")  # fmt: skip
    sub.add_argument("--length", type=int, help=f"prompts a layer {by_task('length')}")
    sub.add_argument("--layers", type=int, nargs="+", help="layers that get prompts, from 0 [all]")
    sub.add_argument("--epochs", type=int, help=by_task("epochs"))
    sub.add_argument("--batch-size", type=int, default=16, help="[%(default)s]")
    sub.add_argument("--lr", type=float, help=by_task("lr")[:-1] + f", with --reparam mlp {MLP_LR}]")
    sub.add_argument("--weight-decay", type=float, default=default.weight_decay, help="[%(default)s]")
    sub.add_argument("--optimizer", choices=("adamw", "sgd"), default=default.optimizer)
    sub.add_argument("--warmup", type=float, default=default.warmup, help="fraction of all steps [%(default)s]")
    sub.add_argument("--autocast", choices=("auto", "bfloat16", "off"), default="auto")
    sub.add_argument("--save-every", type=int, default=20, help="steps between checkpoints [%(default)s]")
    sub.add_argument("--eval-every", type=int, default=0, help="epochs between evaluations; 0 is at the end only")
    sub.add_argument("--seed", type=int, default=0)
    _add_device(sub)
    add_cache_dir(sub)
    group = sub.add_argument_group("images (--task image): VPT and a linear head")
    group.add_argument("--image-size", type=int, help=f"pixels a side [{DEFAULTS[IMAGE]['image_size']}]")
    group.add_argument("--depth", choices=("deep", "shallow"), help=f"[{DEFAULTS[IMAGE]['depth']}]")
    group = sub.add_argument_group("texts (--task text): PrefixKV in a causal language model")
    group.add_argument("--reparam", choices=("mlp", "none"), help="mlp: learn the prompts through a network (prefix "
                       "tuning); none: learn keys and values (P-Tuning v2) [none]")  # fmt: skip
    group.add_argument(
        "--template",
        help="what the model reads, with {text}; \\n is a line break [the asset's own, or '{text}\\nLabel:']",
    )
    group.add_argument("--words", type=_word, nargs="+", metavar="CLASS=WORD", help="the word that names a class "
                       "[the class name]")  # fmt: skip
    group.add_argument("--max-tokens", type=int, help=f"longer texts are cut [{DEFAULTS[TEXT]['max_tokens']}]")
    group.add_argument("--part", choices=("test", "validation"), help="evaluate on validation texts to choose settings "
                       f"[{DEFAULTS[TEXT]['part']}]")  # fmt: skip


def add_eval_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastprompt eval``."""
    sub.add_argument("run", type=Path, help="the folder that `fastprompt tune --out` wrote")
    sub.add_argument("--data", help="evaluate on all images of this folder, or texts of this file, instead (same class "
                     "names)")  # fmt: skip
    sub.add_argument("--batch-size", type=int, default=32)
    _add_device(sub)


def add_cache_dir(sub: argparse.ArgumentParser) -> None:
    """Declare ``--cache-dir``."""
    sub.add_argument("--cache-dir", help="where assets are kept [~/.cache/fastprompt]")


def _add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")


def _word(text: str) -> tuple[str, str]:
    name, equals, word = text.partition("=")
    if not (name and equals and word):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected CLASS=WORD")
    return name, word


@dataclass
class Job:
    """A task with all that its names stand for; ``model`` is what runs and ``base`` what holds the prompts."""

    kind: str
    task: Any
    classes: list[str]
    model: Any
    base: Any

    @property
    def noun(self) -> str:
        """What an example is."""
        return {IMAGE: "images", TEXT: "texts"}[self.kind]


def tune_command(args: argparse.Namespace) -> None:
    """Run ``fastprompt tune``."""
    import torch

    from fastprompt.tuning import TuneConfig, evaluate, plot_log, tune
    from fastprompt.tuning.images import best_autocast, head_names

    _fill_in(args)
    device = _device(args.device)
    autocast = {"auto": best_autocast(device), "off": None}.get(args.autocast, args.autocast)
    recipe = (
        fastprompt.VPT(args.length, args.depth, args.layers)
        if args.task == IMAGE
        else fastprompt.PrefixKV(args.length, None if args.reparam == "none" else args.reparam, layers=args.layers)
    )
    config = TuneConfig(
        epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, weight_decay=args.weight_decay,
        optimizer=args.optimizer, warmup=args.warmup, autocast=autocast, seed=args.seed,
        save_every=args.save_every, eval_every=args.eval_every,
    )  # fmt: skip
    job = _build(args.task, _task(args), autocast, device)
    train_set, eval_set = job.task.split(job.base if job.kind == IMAGE else job.model)
    print(f"{len(train_set)} training and {len(eval_set)} evaluation {job.noun} of {', '.join(job.classes)}")
    free = {"cache_dir", "seed"} | ({"eval_size"} if job.kind == IMAGE else set())
    about = {name: str(value) for name, value in asdict(job.task).items() if name not in free}
    about |= {"recipe": repr(recipe), "classes": ", ".join(job.classes)}
    before = None
    if job.kind == IMAGE:
        handle = fastprompt.attach(job.base, recipe, tower="vision", train=head_names(job.base))
    else:
        cut = train_set.cut + eval_set.cut
        if cut:
            print(f"{cut} texts were longer than {job.task.max_tokens} tokens and are cut (--max-tokens)")
        before = evaluate(job.model, eval_set, batch_size=config.batch_size, autocast=autocast)
        print("without prompts: ", end="")
        _print_accuracy(before, job)
        handle = fastprompt.attach(job.base, recipe, tower="text")
    print(repr(handle))
    result = tune(
        job.model, handle, train_set, eval_set, config=config, out_dir=args.out, resume=args.resume, about=about
    )  # fmt: skip
    run = {"kind": job.kind, "task": asdict(job.task), "classes": job.classes, "autocast": autocast,
           "recipe": repr(recipe), "config": asdict(config), "before": before, "after": result.evaluation,
           "trainable": result.trainable_parameters, "steps": result.steps, "fastprompt": fastprompt.__version__,
           "torch": torch.__version__}  # fmt: skip
    (args.out / RUN).write_text(json.dumps(run, indent=2, default=asdict))
    took = "was finished" if math.isnan(result.seconds_per_step) else f"{result.seconds_per_step:.3f} s a step"
    print(f"{result.steps} steps, {took}, train loss {result.train_loss:.4f}")
    _print_accuracy(result.evaluation, job)
    print(f"saved: {args.out}/prompts.safetensors, log.jsonl")
    if find_spec("matplotlib"):
        plot_log(args.out / "log.jsonl", args.out / "curves.png")
        print(f"plotted: {args.out}/curves.png")
    else:
        print('no plot: matplotlib is not installed (pip install "fastprompt[demo]")')


def eval_command(args: argparse.Namespace) -> None:
    """Run ``fastprompt eval``."""
    from fastprompt.tuning import evaluate
    from fastprompt.tuning.images import ImageTask
    from fastprompt.tuning.texts import TextTask

    file = args.run / RUN
    if not file.is_file():
        raise FileNotFoundError(f"run: no {file}, expected a folder that `fastprompt tune --out` finished")
    try:
        run = json.loads(file.read_text())
        kind, classes, autocast = run["kind"], run["classes"], run["autocast"]
        task = {IMAGE: ImageTask, TEXT: TextTask}[kind](**run["task"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: damaged ({error!r}), expected what `fastprompt tune` writes") from error
    job = _build(kind, task, autocast, _device(args.device), classes)
    fastprompt.load(job.base, args.run)
    examples = job.task.split(job.base if kind == IMAGE else job.model)[1] if args.data is None else _other(job, args)
    _print_accuracy(evaluate(job.model, examples, batch_size=args.batch_size, autocast=autocast), job)


def _fill_in(args: argparse.Namespace) -> None:
    """Give options that were left out their value for the task.

    Raises:
        ValueError: an option of the other task was given.
    """
    (other,) = DEFAULTS.keys() - {args.task}
    for name in DEFAULTS[other].keys() - DEFAULTS[args.task].keys():
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option}: got a value with --task {args.task}, but it is for --task {other}; leave it out"
            )
    if args.reparam == "mlp" and args.lr is None:
        args.lr = MLP_LR
    for name, value in DEFAULTS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _task(args: argparse.Namespace) -> Any:
    from fastprompt.tuning.images import ImageTask
    from fastprompt.tuning.texts import TextTask

    # Absolute paths, so that `eval` finds them from anywhere.
    model, data = (
        getattr(args, name)
        if getattr(args, name) == DEFAULTS[args.task][name]
        else str(Path(getattr(args, name)).resolve())
        for name in ("model", "data")
    )
    if args.task == IMAGE:
        return ImageTask(model, data, args.shots, args.eval_size, args.image_size, args.seed, args.cache_dir)
    # A shell passes a line break most easily as these two characters.
    template = args.template and args.template.replace("\\n", "\n")
    return TextTask(
        model, data, args.shots, args.eval_size, args.part, template, dict(args.words), args.max_tokens,
        args.seed, args.cache_dir,
    )  # fmt: skip


def _build(kind: str, task: Any, autocast: str | None, device: str, classes: list[str] | None = None) -> Job:
    """Load the model; ``classes`` are those of the data where they are not given."""
    import torch

    if kind == IMAGE:
        classes = classes or list(task.images().classes)
        model = task.build_model(len(classes)).to(device)
        return Job(kind, task, classes, model, model)
    classes = classes or list(task.texts().classes)
    # Frozen weights need no more than the type they are used in.
    scorer = task.build_model(tuple(classes), torch.bfloat16 if autocast else torch.float32).to(device)
    torch.manual_seed(task.seed)
    return Job(kind, task, classes, scorer, scorer.lm)


def _other(job: Job, args: argparse.Namespace) -> Examples:
    """All examples of another folder or file, with the classes of the run."""
    from fastprompt.data import ImageDataset, ImageFolder, read_texts
    from fastprompt.hf.images import image_transform

    data: Any = ImageFolder(args.data) if job.kind == IMAGE else read_texts(args.data)
    if list(data.classes) != job.classes:
        raise DataError(f"data: got classes {list(data.classes)}, expected {job.classes}, those of the run")
    if job.kind == TEXT:
        return job.model.encode(data.samples, job.task.max_tokens)
    return ImageDataset(data.samples, data.classes, image_transform(job.base, job.task.image_size)).load_all()


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but torch sees none; use --device cpu, or see `fastprompt info`")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _print_accuracy(result: Any, job: Job) -> None:
    print(f"accuracy {100 * result.accuracy:.1f} % on {result.n} {job.noun} (loss {result.loss:.4f})")
    for name, accuracy in zip(job.classes, result.class_accuracy, strict=True):
        print(f"  {name:<20} {100 * accuracy:5.1f} %")
