# SPDX-License-Identifier: Apache-2.0
"""``fastprompt generate``: a picture from a text, an image prompt and a saved diffusers pipeline."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import fastprompt
from fastprompt.cli_tune import add_device, device_of
from fastprompt.errors import DataError


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the options."""
    sub.add_argument("prompt", help="the text")
    sub.add_argument("--pipeline", type=Path, required=True, metavar="DIR", help="a folder that diffusers' "
                     "pipeline.save_pretrained wrote (Stable Diffusion 1.5, SDXL)")  # fmt: skip
    sub.add_argument("--adapter", type=Path, required=True, metavar="FILE", help="a published IP-Adapter "
                     "(.safetensors, .bin), or a folder of a trained one")  # fmt: skip
    sub.add_argument("--image", type=Path, nargs="+", required=True, help="image prompts")
    sub.add_argument("--image-encoder", type=Path, metavar="DIR", help="the CLIP vision model that the adapter reads, "
                     "where the pipeline's folder holds none")  # fmt: skip
    sub.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from")
    sub.add_argument("--scale", type=float, help="weight of the image [that of the adapter]")
    sub.add_argument("--steps", type=int, default=30, help="denoising steps [%(default)s]")
    sub.add_argument("--guidance", type=float, default=7.5, help="1 is none [%(default)s]")
    sub.add_argument(
        "--size", type=int, nargs="+", metavar="PIXELS", help="one side, or height and width [the model's]"
    )
    sub.add_argument("--count", type=int, default=1, help="pictures [%(default)s]")
    sub.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="[%(default)s]")
    add_device(sub)
    sub.add_argument("--out", type=Path, default=Path("runs/picture.png"), help="the PNG; -1, -2, ... are added where "
                     "there are several [%(default)s]")  # fmt: skip


def command(args: argparse.Namespace) -> None:
    """Run ``fastprompt generate``."""
    _check(args)
    import torch
    from PIL import Image, UnidentifiedImageError

    from fastprompt import diffusers

    images = []
    for path in args.image:
        try:
            images.append(Image.open(path).convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"--image: cannot read {path} ({error}), expected pictures") from error
    pipeline = diffusers.load_pipeline(
        args.pipeline, image_encoder=args.image_encoder, dtype=getattr(torch, args.dtype), device=device_of(args.device)
    )
    load = fastprompt.load if args.adapter.is_dir() else diffusers.load_ip_adapter
    load(pipeline.unet, args.adapter)
    size = args.size and (args.size[0], args.size[-1])
    pipeline.set_progress_bar_config(desc="generate")
    found = diffusers.generate(
        pipeline, args.prompt, images, negative_prompt=args.negative_prompt, scale=args.scale, steps=args.steps,
        guidance=args.guidance, size=size, count=args.count, seed=args.seed,
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(found, 1):
        path = args.out if args.count == 1 else args.out.with_stem(f"{args.out.stem}-{i}")
        picture.save(path)
        print(path)


def _check(args: argparse.Namespace) -> None:
    for name in ("steps", "count"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: got {getattr(args, name)}, expected at least 1")
    for name in ("scale", "guidance"):
        value = getattr(args, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"--{name}: got {value}, expected a finite number")
    if args.size and (len(args.size) > 2 or any(n < 8 or n % 8 for n in args.size)):
        raise ValueError(f"--size: got {' '.join(map(str, args.size))}, expected one or two positive multiples of 8")
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out: got {args.out}, expected a name that ends with .png")
