# SPDX-License-Identifier: Apache-2.0
"""``fastprompt count``: parameters and multiply-adds of prompts, from a model's shapes alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

#: Tokens of a sample where a preset does not show them, and why.
TOKENS = {"vilt": ((243,), "243 tokens make the paper's own multiply-adds; it does not state them")}

RECIPES = ("vpt", "apt", "prefix")


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the options."""
    sub.add_argument(
        "model",
        help="vilt, vit-b16, clip-vit-b16, dinov2-s; a model type of transformers (its defaults); or a config.json",
    )
    sub.add_argument("--recipe", nargs="+", choices=RECIPES, help="[vpt apt, or prefix apt where there is only text]")
    sub.add_argument("--length", type=int, default=200, help="prompts a layer [%(default)s]")
    sub.add_argument("--rank", type=int, default=4, help="of APT's key map [%(default)s]")
    sub.add_argument("--layers", type=int, nargs="+", help="layers with prompts, from 0; from -1 backwards [all]")
    sub.add_argument("--tower", choices=("vision", "text", "joint"), help="where a model has several")
    sub.add_argument("--tokens", type=int, nargs="+", help="tokens of a sample, one number or one a stack of layers "
                     "[those of an image of the config's size]")  # fmt: skip
    sub.add_argument("--context", type=int, help="tokens that cross-attention reads [as many]")
    sub.add_argument("--batch", type=int, default=32, help="samples that share what a batch needs once [%(default)s]")
    sub.add_argument("--json", type=Path, help="write the numbers here")


def command(args: argparse.Namespace) -> None:
    """Count, print a table, and write JSON if asked to."""
    found = count(args)
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def count(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a command line."""
    from fastprompt.hf.outputs import attention_towers
    from fastprompt.hf.shapes import empty_model, image_tokens, layers_of
    from fastprompt.hf.sites import choose_tower
    from fastprompt.recipes.cost import BASELINE, own_cost, prompt_costs

    for name in ("batch", "context", *(("tokens",) if args.tokens else ())):
        values = getattr(args, name)
        if any(value is not None and value < 1 for value in (values if isinstance(values, list) else [values])):
            raise ValueError(f"--{name}: got {values}, expected numbers >= 1")
    model = empty_model(args.model)
    tower = choose_tower(model, args.tower, attention_towers(model))
    layers = layers_of(model, tower)
    tokens, note = _tokens(args, image_tokens(tower), layers[-1].stack + 1)
    own = own_cost(layers, tokens, args.context)
    names = args.recipe or (("prefix", "apt") if tower.kind == "text" else ("vpt", "apt"))
    costs = [c for name in names for c in prompt_costs(layers, _recipe(name, args), tokens, args.batch)]
    against = next((c.multiply_adds for c in costs if c.form == BASELINE), None)
    rows = [
        {
            "recipe": c.recipe, "form": c.form, "trained": c.trained, "multiply_adds": c.multiply_adds,
            "share": c.multiply_adds / own, "against": against and c.multiply_adds / against - 1,
        }
        for c in costs
    ]  # fmt: skip
    return {
        "model": args.model, "class": type(tower.module).__name__, "tower": tower.kind, "layers": len(layers),
        "attentions": sum(len(layer.attentions) for layer in layers), "width": layers[0].attentions[0].site.width,
        "tokens": list(tokens), "tokens_note": note, "length": args.length, "batch": args.batch,
        "own_multiply_adds": own, "baseline": BASELINE if against else None, "rows": rows,
    }  # fmt: skip


def _tokens(args: argparse.Namespace, shown: int | None, stacks: int) -> tuple[tuple[int, ...], str]:
    """Tokens of a sample in every stack, and where the numbers come from."""
    if args.tokens:
        if len(args.tokens) not in (1, stacks):
            raise ValueError(f"--tokens: got {len(args.tokens)} numbers, expected 1 or {stacks}, one a stack of layers")
        return tuple(args.tokens) * (stacks if len(args.tokens) == 1 else 1), "given"
    if args.model in TOKENS:
        return TOKENS[args.model]
    if shown is None:
        raise ValueError(f"--tokens: got none, which {args.model} does not tell, expected the tokens of a sample")
    return (shown,) * stacks, "an image of the config's size"


def _recipe(name: str, args: argparse.Namespace) -> Any:
    import fastprompt

    layers = tuple(args.layers) if args.layers else None
    if name == "vpt":
        return fastprompt.VPT(args.length, layers=layers, init="normal")
    if name == "apt":
        return fastprompt.APT(args.length, args.rank, layers=layers)
    return fastprompt.PrefixKV(args.length, layers=layers)


def table(found: dict[str, Any]) -> str:
    """What `count` found, for people."""
    tokens = " and ".join(str(n) for n in dict.fromkeys(found["tokens"]))
    lines = [
        f"{found['class']} ({found['tower']}): {found['layers']} layers, {found['attentions']} attention modules, "
        f"width {found['width']}, {tokens} tokens ({found['tokens_note']})",
        f"its layers alone: {found['own_multiply_adds'] / 1e9:.2f} G multiply-adds a sample; {found['length']} prompts "
        "add:",
        "",
    ]
    head = ["recipe", "trained", "form", "G a sample", "of its own"]
    cells = [
        [
            r["recipe"], f"{r['trained'] / 1e6:.3f} M", r["form"], f"{r['multiply_adds'] / 1e9:.3f}",
            f"{100 * r['share']:.2f} %", *([f"{100 * r['against']:+.2f} %"] if found["baseline"] else []),
        ]
        for r in found["rows"]
    ]  # fmt: skip
    if found["baseline"]:
        head.append("against [1]")
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    for row in (head, *cells):
        fitted = [c.ljust(w) if i in (0, 2) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(fitted).rstrip())
    if found["baseline"]:
        lines += ["", f"[1] {found['baseline']}: how APT's paper counts deep prompts"]
    return "\n".join(lines)
