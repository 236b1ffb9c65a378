# SPDX-License-Identifier: Apache-2.0
"""The command line: ``fastprompt COMMAND``, with ``--help`` for the commands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import fastprompt
from fastprompt import cli_compress, cli_continual, cli_count, cli_generate, cli_recipes, cli_tune
from fastprompt.errors import AssetError, AttachError, CheckpointError, DataError, ImplUnavailableError

EXPECTED = (
    AssetError, AttachError, CheckpointError, DataError, ImplUnavailableError,
    ValueError, OSError, FloatingPointError, ImportError,
)  # fmt: skip


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
        "  fastprompt tune --task text --out runs/sms\n  fastprompt tune --recipe coop --out runs/coop\n"
        "  fastprompt eval runs/photos\n"
        "  fastprompt inspect runs/photos\n  fastprompt assets fetch dinov2-small",
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

    sub = add("demo", _demo, "Tune DINOv2-S on real images: linear head, VPT as published and through fastprompt, APT.",
              "fastprompt demo --out runs/demo")  # fmt: skip
    sub.add_argument("--full", action="store_true", help="three seeds and a larger evaluation set (the README's table)")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), help="table, log and plot go here [%(default)s]")
    cli_tune.add_cache_dir(sub)

    sub = add("tune", cli_tune.tune_command,
              "Tune prompts of a vision model or a CLIP on a folder of images, or on a file of labelled texts.",
              "fastprompt tune --data photos/ --shots 16 --length 10 --epochs 30 --out runs/photos\n"
              "  fastprompt tune --task text --data reviews.csv --out runs/reviews\n"
              "  fastprompt tune --recipe coop --model clip/ --data photos/ --out runs/coop")  # fmt: skip
    cli_tune.add_tune_arguments(sub)

    sub = add("continual", cli_continual.command,
              "Learn the classes of an image folder task after task, each in a lane of its own (MULTI-LANE).",
              "fastprompt continual --data photos/ --tasks 5 --out runs/lanes")  # fmt: skip
    cli_continual.add_arguments(sub)

    sub = add("eval", cli_tune.eval_command,
              "Evaluate a tuned run on its held-out examples, or on others of the same classes.",
              "fastprompt eval runs/photos --data more-photos/")  # fmt: skip
    cli_tune.add_eval_arguments(sub)

    sub = add("generate", cli_generate.command,
              "Make pictures from a text and an image prompt (IP-Adapter), with a saved diffusers pipeline.",
              'fastprompt generate "a cat in the snow" --pipeline sd15/ --adapter ip-adapter_sd15.safetensors '
              "--image cat.png --out runs/cat.png")  # fmt: skip
    cli_generate.add_arguments(sub)

    sub = add("compress-eval", cli_compress.command,
              "What a compressed KV cache still knows of a long prompt: a hidden number, the loss of real "
              "text, or pictures.",
              "fastprompt compress-eval --policy lookm snapkv --ratio 0.8 --out runs/compress")  # fmt: skip
    cli_compress.add_arguments(sub)

    sub = add("count", cli_count.command,
              "Count what prompts train, and what they add to the model's own multiply-adds.",
              "fastprompt count vilt --recipe vpt apt --length 200\n"
              "  fastprompt count llama --tokens 512 --recipe prefix")  # fmt: skip
    cli_count.add_arguments(sub)

    sub = add("bench", _bench, "Run a benchmark case of a source checkout; what follows is for python -m bench.run.",
              "fastprompt bench prompt_attention --set prompts=10,50 mode=forward")  # fmt: skip
    sub.add_argument("arguments", nargs=argparse.REMAINDER, metavar="CASE ...", help="a case and its options")

    sub = add("recipes", cli_recipes.command, "Every method that is here, and the card of one of them.",
              "fastprompt recipes\n  fastprompt recipes apt")  # fmt: skip
    cli_recipes.add_arguments(sub)

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
    cli_tune.add_cache_dir(sub)
    return parser


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
    from fastprompt.ops.cpp.extension import ISAS, best_isa, compiler, missing
    from fastprompt.ops.dispatch import tuned_file
    from fastprompt.tuning.images import best_autocast

    print(f"fastprompt {fastprompt.__version__}, Python {platform.python_version()}, {platform.platform()}")
    packages = (
        "torch",
        "transformers",
        "triton",
        "safetensors",
        "numpy",
        "pillow",
        "onnx",
        "gguf",
        "accelerate",
        "diffusers",
    )
    for package in (*packages, "matplotlib"):
        try:
            print(f"  {package:<13} {version(package)}")
        except PackageNotFoundError:
            print(f"  {package:<13} not installed")
    bf16 = "in hardware" if best_autocast() else "emulated"
    print(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, bfloat16 {bf16}")
    kernels = missing() or f"{best_isa()} is the best of this processor (of {', '.join(ISAS)}), built by {compiler()}"
    print(f"C++ kernels: {kernels}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"cuda: {', '.join(gpus) or 'none'}")
    device = "cuda" if gpus else "cpu"
    x, row = torch.zeros(1, 1, 1, 64, device=device), torch.zeros(1, 1, 1, device=device)
    print(f"operations on {device}:")
    ends = torch.tensor([0, 1], dtype=torch.int32, device=device)
    ops = fastprompt.ops
    for op, inputs in (
        (ops.prompt_attention, (x,) * 5),
        (ops.prompt_attention_varlen, (*(x[0],) * 5, ends)),
        (ops.merge_states, (x, row, x, row)),
        (ops.decoupled_attention, (x, [x], [x], [1.0])),
        (ops.diffuse_prompts, (x[0], x[0], x[0, 0], x[0, 0], x[0, 0].T, row[0, 0, 0])),
        (ops.summarize_tokens, (x[0], x[0])),
        (ops.key_scores, (x, x, row)),
        (ops.compress_kv, (x, x, row, 1)),
    ):
        try:
            shown = str(fastprompt.explain(op, *inputs))
        except (ImplUnavailableError, ValueError) as error:
            shown = str(error)
        print("  " + shown.replace("\n", "\n  "))
    if tuned_file().exists():
        print(f"triton tiles: {tuned_file()}")
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
    classes = len(content.get("classnames", ()))
    what = f"learned for {classes} classes of" if classes else f"on the {content['tower']} tower of"
    print(f"{content['method']}({options}) {what} {base['class']}")
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
