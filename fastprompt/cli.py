# SPDX-License-Identifier: Apache-2.0
"""The command line: ``fastprompt demo | tune | eval | bench | info | warmup | inspect | assets``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fastprompt
from fastprompt.errors import AssetError, AttachError, CheckpointError, DataError, ImplUnavailableError

EXPECTED = (
    AssetError, AttachError, CheckpointError, DataError, ImplUnavailableError,
    ValueError, OSError, FloatingPointError, ImportError,
)  # fmt: skip

RUN = "run.json"


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 a clear error, 2 wrong usage, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except EXPECTED as error:
        print(f"fastprompt: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = f"; go on with --resume --out {args.out}" if getattr(args, "out", None) else ""
        print(f"fastprompt: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastprompt",
        description="Exact prompts for frozen transformers, without the wasted work.",
        epilog="examples:\n  fastprompt demo\n  fastprompt tune --data photos/ --shots 16 --out runs/photos\n"
        "  fastprompt eval runs/photos\n  fastprompt inspect runs/photos\n  fastprompt assets fetch dinov2-small",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastprompt {fastprompt.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, function, text: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(command=function)
        return sub

    sub = add("demo", _demo, "Tune DINOv2-S on real images: linear head, VPT as published, VPT through fastprompt.",
              "fastprompt demo --out runs/demo")  # fmt: skip
    sub.add_argument("--full", action="store_true", help="three seeds and a larger evaluation set (the README's table)")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), help="table, log and plot go here [%(default)s]")
    _add_cache_dir(sub)

    sub = add("tune", _tune, "Tune visual prompts and a linear head on a folder of images.",
              "fastprompt tune --data photos/ --shots 16 --length 10 --epochs 30 --out runs/photos")  # fmt: skip
    _add_tune_arguments(sub)

    sub = add("eval", _eval, "Evaluate a tuned run on its held-out images, or on other images of the same classes.",
              "fastprompt eval runs/photos --data more-photos/")  # fmt: skip
    sub.add_argument("run", type=Path, help="the folder that `fastprompt tune --out` wrote")
    sub.add_argument("--data", help="evaluate on all images of this folder instead (same class names)")
    sub.add_argument("--batch-size", type=int, default=32)

    sub = add("bench", _bench, "Run a benchmark case of a source checkout; what follows is for python -m bench.run.",
              "fastprompt bench prompt_attention --set prompts=10,50 mode=forward")  # fmt: skip
    sub.add_argument("arguments", nargs=argparse.REMAINDER, metavar="CASE ...", help="a case and its options")

    add("info", _info, "Versions, devices, and which implementation runs here and why not the others.",
        "fastprompt info")  # fmt: skip

    sub = add("warmup", _warmup, "Compile the Triton kernels ahead of the first step; --tune measures their tiles.",
              "fastprompt warmup --heads 12 --head-dim 64 --tokens 197 --prompts 50 --tune")  # fmt: skip
    _add_warmup_arguments(sub)

    sub = add(
        "inspect", _inspect, "Show what a saved prompt holds, and verify its digests.", "fastprompt inspect runs/demo"
    )
    sub.add_argument("directory", type=Path)

    sub = add("assets", _assets, "List, fetch and verify the models and data sets of demo and tests.",
              "fastprompt assets fetch dinov2-small textile")  # fmt: skip
    sub.add_argument("action", nargs="?", default="list", choices=("list", "fetch", "verify", "path"))
    sub.add_argument("names", nargs="*", metavar="NAME")
    _add_cache_dir(sub)
    return parser


def _add_cache_dir(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--cache-dir", help="where assets are kept [~/.cache/fastprompt]")


def _add_tune_arguments(sub: argparse.ArgumentParser) -> None:
    from fastprompt.tuning.config import TuneConfig

    default = TuneConfig(epochs=30, batch_size=16, lr=1e-2)
    sub.add_argument("--out", type=Path, required=True, help="prompts, checkpoint, log and plot go here")
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    sub.add_argument("--model", default="dinov2-small", help="'dinov2-small' or a local folder [%(default)s]")
    sub.add_argument("--data", default="textile", help="'textile' or a folder with one folder a class [%(default)s]")
    sub.add_argument("--shots", type=int, default=16, help="training images a class [%(default)s]")
    sub.add_argument("--eval-size", type=int, help="evaluation images, balanced over classes [all of the rest]")
    sub.add_argument("--image-size", type=int, default=224, help="pixels a side [%(default)s]")
    sub.add_argument("--length", type=int, default=10, help="prompts a layer [%(default)s]")
    sub.add_argument("--depth", choices=("deep", "shallow"), default="deep")
    sub.add_argument("--layers", type=int, nargs="+", help="layers that get prompts, from 0 [all]")
    sub.add_argument("--epochs", type=int, default=default.epochs, help="[%(default)s]")
    sub.add_argument("--batch-size", type=int, default=default.batch_size, help="[%(default)s]")
    sub.add_argument("--lr", type=float, default=default.lr, help="[%(default)s]")
    sub.add_argument("--weight-decay", type=float, default=default.weight_decay, help="[%(default)s]")
    sub.add_argument("--optimizer", choices=("adamw", "sgd"), default=default.optimizer)
    sub.add_argument("--warmup", type=float, default=default.warmup, help="fraction of all steps [%(default)s]")
    sub.add_argument("--autocast", choices=("auto", "bfloat16", "off"), default="auto")
    sub.add_argument("--save-every", type=int, default=20, help="steps between checkpoints [%(default)s]")
    sub.add_argument("--eval-every", type=int, default=0, help="epochs between evaluations; 0 is at the end only")
    sub.add_argument("--seed", type=int, default=0)
    _add_cache_dir(sub)


def _add_warmup_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="cuda", help="[%(default)s]")
    sub.add_argument("--batch", type=int, default=64, help="[%(default)s]")
    sub.add_argument("--heads", type=int, default=12, help="query heads [%(default)s]")
    sub.add_argument("--heads-kv", type=int, help="key heads, where they are fewer (grouped queries)")
    sub.add_argument("--head-dim", type=int, nargs="+", default=[64], help="head sizes [64]")
    sub.add_argument("--tokens", type=int, default=197, help="queries and instance keys of a sample [%(default)s]")
    sub.add_argument("--prompts", type=int, default=50, help="[%(default)s]")
    sub.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16", "float32"))
    sub.add_argument("--causal", action="store_true", help="causal attention, as in language models")
    sub.add_argument("--tune", action="store_true", help="measure candidate tiles and keep the fastest for this GPU")


def _demo(args: argparse.Namespace) -> None:
    from fastprompt.demo import run

    run(args.out, full=args.full, cache_dir=args.cache_dir)


def _tune(args: argparse.Namespace) -> None:
    from fastprompt.tuning import TuneConfig, plot_log, tune
    from fastprompt.tuning.images import ImageTask, best_autocast, head_names

    # Absolute paths, so that `eval` finds them from anywhere.
    model_name = args.model if args.model == "dinov2-small" else str(Path(args.model).resolve())
    data = args.data if args.data == "textile" else str(Path(args.data).resolve())
    task = ImageTask(model_name, data, args.shots, args.eval_size, args.image_size, args.seed, args.cache_dir)
    recipe = fastprompt.VPT(args.length, args.depth, args.layers)
    autocast = {"auto": best_autocast(), "off": None}.get(args.autocast, args.autocast)
    config = TuneConfig(
        epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, weight_decay=args.weight_decay,
        optimizer=args.optimizer, warmup=args.warmup, autocast=autocast, seed=args.seed,
        save_every=args.save_every, eval_every=args.eval_every,
    )  # fmt: skip
    classes = task.images().classes
    model = task.build_model(len(classes))
    handle = fastprompt.attach(model, recipe, tower="vision", train=head_names(model))
    train_set, eval_set = task.split(model)
    print(f"{handle!r}\n{len(train_set)} training and {len(eval_set)} evaluation images of {', '.join(classes)}")
    about: dict[str, str | int] = {
        "recipe": repr(recipe), "model": task.model, "data": task.data, "shots": task.shots,
        "image_size": task.image_size, "classes": ", ".join(classes),
    }  # fmt: skip
    result = tune(
        model, handle, train_set, eval_set, config=config, out_dir=args.out, resume=args.resume, about=about
    )  # fmt: skip
    run = {"task": asdict(task), "classes": list(classes), "autocast": autocast, "fastprompt": fastprompt.__version__}
    (args.out / RUN).write_text(json.dumps(run, indent=2))
    took = "was finished" if math.isnan(result.seconds_per_step) else f"{result.seconds_per_step:.3f} s a step"
    print(f"{result.steps} steps, {took}, train loss {result.train_loss:.4f}")
    _print_accuracy(result.evaluation, classes)
    print(f"saved: {args.out}/prompts.safetensors, log.jsonl")
    if find_spec("matplotlib"):
        plot_log(args.out / "log.jsonl", args.out / "curves.png")
        print(f"plotted: {args.out}/curves.png")
    else:
        print('no plot: matplotlib is not installed (pip install "fastprompt[demo]")')


def _print_accuracy(result: Any, classes: Any) -> None:
    print(f"accuracy {100 * result.accuracy:.1f} % on {result.n} images (loss {result.loss:.4f})")
    for name, accuracy in zip(classes, result.class_accuracy, strict=True):
        print(f"  {name:<20} {100 * accuracy:5.1f} %")


def _eval(args: argparse.Namespace) -> None:
    from fastprompt.data import ImageDataset, ImageFolder
    from fastprompt.hf.images import image_transform
    from fastprompt.tuning import evaluate
    from fastprompt.tuning.images import ImageTask

    file = args.run / RUN
    if not file.is_file():
        raise FileNotFoundError(f"run: no {file}, expected a folder that `fastprompt tune --out` finished")
    try:
        run = json.loads(file.read_text())
        task, classes, autocast = ImageTask(**run["task"]), run["classes"], run["autocast"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: damaged ({error!r}), expected what `fastprompt tune` writes") from error
    model = task.build_model(len(classes))
    fastprompt.load(model, args.run)
    if args.data:
        folder = ImageFolder(args.data)
        if list(folder.classes) != classes:
            raise DataError(f"data: got classes {list(folder.classes)}, expected {classes}, those of the run")
        images = ImageDataset(folder.samples, folder.classes, image_transform(model, task.image_size))
        examples = images.load_all()
    else:
        _, examples = task.split(model)
    _print_accuracy(evaluate(model, examples, batch_size=args.batch_size, autocast=autocast), classes)


def _bench(args: argparse.Namespace) -> None:
    root = Path(fastprompt.__file__).parent.parent
    if not (root / "bench" / "run.py").is_file():
        raise FileNotFoundError(f"bench: no {root}/bench/run.py, expected a source checkout (pip install -e .)")
    sys.path.insert(0, str(root))
    from bench.run import main as run

    if run(args.arguments):
        raise SystemExit(1)


def _info(args: argparse.Namespace) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from fastprompt.data import assets
    from fastprompt.tuning.images import best_autocast

    print(f"fastprompt {fastprompt.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "transformers", "triton", "safetensors", "numpy", "pillow", "onnx", "matplotlib"):
        try:
            print(f"  {package:<13} {version(package)}")
        except PackageNotFoundError:
            print(f"  {package:<13} not installed")
    bf16 = "in hardware" if best_autocast() else "emulated"
    print(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, bfloat16 {bf16}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"cuda: {', '.join(gpus) or 'none'}")
    device = "cuda" if gpus else "cpu"
    x, row = torch.zeros(1, 1, 1, 8, device=device), torch.zeros(1, 1, 1, device=device)
    print(f"operations on {device}:")
    for op, inputs in ((fastprompt.ops.prompt_attention, (x,) * 5), (fastprompt.ops.merge_states, (x, row, x, row))):
        try:
            shown = str(fastprompt.explain(op, *inputs))
        except (ImplUnavailableError, ValueError) as error:
            shown = str(error)
        print("  " + shown.replace("\n", "\n  "))
    print("assets: " + ", ".join(f"{s.asset.name} ({s.state})" for s in assets.status()))


def _warmup(args: argparse.Namespace) -> None:
    import time

    import torch

    from fastprompt.warmup import Shape, tune, warmup

    for dtype in args.dtype:
        for dim in args.head_dim:
            shape = Shape(args.batch, args.heads, args.heads_kv or args.heads, args.tokens, dim, args.prompts,
                          getattr(torch, dtype), args.causal)  # fmt: skip
            start = time.perf_counter()
            if args.tune:
                print(f"tuned: {tune(shape, args.device)}")
            else:
                warmup(shape, args.device)
            print(f"{dtype}, head size {dim}: ready in {time.perf_counter() - start:.1f} s")


def _inspect(args: argparse.Namespace) -> None:
    from fastprompt.hf.checkpoint import read

    content, tensors = read(args.directory)
    options = ", ".join(f"{k}={v!r}" for k, v in content["config"].items())
    base = content["base"]
    print(f"{content['method']}({options}) on the {content['tower']} tower of {base['class']}")
    print(f"base: {base['layers']} layers, width {base['width']}, {base['kv_heads']} key heads of {base['head_dim']}")
    print(f"trained beside the prompts: {', '.join(content['train']) or 'nothing'}")
    for name, x in tensors.items():
        shape = "x".join(map(str, x.shape))
        print(f"  {name:<40} {shape:>12} {str(x.dtype)[6:]:>9}  rms {x.float().square().mean().sqrt():.4g}")
    print(f"{sum(x.numel() for x in tensors.values()):,} numbers; both sha256 digests match")


def _assets(args: argparse.Namespace) -> None:
    from fastprompt.data import assets

    if args.action == "list":
        for status in assets.status(cache_dir=args.cache_dir):
            a = status.asset
            print(
                f"{a.name:<14} {status.state:<8} {a.size_mb:>5} MB  {a.what}\n"
                f"{'':<14} {a.content_licence}; {a.attribution}"
            )
        return
    if not args.names:
        raise ValueError(f"NAME: got none, expected one or more of {', '.join(assets.ASSETS)}")
    action = {"fetch": assets.fetch, "verify": assets.verify, "path": assets.entry}[args.action]
    for name in args.names:
        place = action(name, cache_dir=args.cache_dir)
        print(place if args.action == "path" else f"{name}: {args.action} ok, {place}")


if __name__ == "__main__":
    sys.exit(main())
