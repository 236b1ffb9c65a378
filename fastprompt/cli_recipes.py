# SPDX-License-Identifier: Apache-2.0
"""``fastprompt recipes``: every method that is here, and what is known of it."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict, fields
from inspect import getdoc
from typing import Any

from fastprompt.recipes.card import STATUSES, USES, Card
from fastprompt.recipes.registry import CARDS

_HEAD = ("recipe", "row", "tier", "status", "family", "learns")


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastprompt recipes``."""
    sub.add_argument("name", nargs="?", metavar="NAME", help="show this one's card and options")
    sub.add_argument("--tier", type=int, nargs="+", choices=(1, 2, 3, 4), help="only these tiers")
    sub.add_argument("--status", nargs="+", choices=STATUSES, help="only these")
    sub.add_argument("--json", action="store_true", help="one line of JSON a recipe")


def command(args: argparse.Namespace) -> None:
    """Run ``fastprompt recipes``."""
    chosen = _chosen(args)
    if args.json:
        for recipe, card in chosen.items():
            print(json.dumps({"recipe": recipe.__name__, **asdict(card)}, default=repr))
    elif args.name:
        for recipe, card in chosen.items():
            print(describe(recipe, card))
    else:
        print(listing(chosen))


def _chosen(args: argparse.Namespace) -> dict[type, Card]:
    """The recipes of a command line, by tier and row.

    Raises:
        ValueError: no recipe has the name.
    """
    names = {recipe.__name__.lower(): recipe for recipe in CARDS}
    if args.name is not None and args.name.lower() not in names:
        raise ValueError(f"NAME: got {args.name!r}, expected one of {', '.join(r.__name__ for r in names.values())}")
    return {
        recipe: card
        for recipe, card in ordered().items()
        if args.name is None or names[args.name.lower()] is recipe
        if not args.tier or card.tier in args.tier
        if not args.status or card.status in args.status
    }


def ordered() -> dict[type, Card]:
    """All recipes by use, then those of the list of methods in its order, then the baselines beside it."""
    uses = list(USES)
    return dict(sorted(CARDS.items(), key=lambda x: (uses.index(x[1].use), x[1].row is None, x[1].row or 0)))


def listing(cards: dict[type, Card]) -> str:
    """A line a recipe, under a line for every use."""
    rows = {recipe: _cells(recipe, card) for recipe, card in cards.items()}
    widths = [max(map(len, column)) for column in zip(_HEAD, *rows.values(), strict=True)]
    line = lambda cells: "  ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)).rstrip()  # noqa: E731
    found = [line(_HEAD)]
    use = None
    for recipe, cells in rows.items():
        if cards[recipe].use != use:
            use = cards[recipe].use
            found += ["", USES[use]]
        found.append(line(cells))
    return "\n".join(found)


def _cells(recipe: type, card: Card) -> tuple[str, ...]:
    row = "-" if card.row is None else str(card.row)
    return recipe.__name__, row, str(card.tier), card.status, card.family, "yes" if card.trains else "nothing"


def markdown() -> str:
    """The README's table of all recipes."""
    lines = [
        "| recipe | method | tier | status | used as |",
        "|---|---|---|---|---|",
    ]
    for recipe, card in ordered().items():
        method = f"[{card.title}]({card.paper})" + (f" (row {card.row})" if card.row else "")
        lines.append(f"| `{recipe.__name__}` | {method} | {card.tier} | {card.status} | `{card.use}` |")
    return "\n".join(lines)


def describe(recipe: Any, card: Card) -> str:
    """A card in full, and what the recipe's own documentation says."""
    wrapped = lambda text: textwrap.fill(text, 100, initial_indent="  - ", subsequent_indent="    ")  # noqa: E731
    identity = ", ".join(f"{k}={v!r}" for k, v in (card.identity or {}).items())
    lines = [
        f"{recipe.__name__}: {card.title}",
        f"  {card.paper}" + (f", code {card.repo}" if card.repo else ""),
        f"  tier {card.tier}, {card.status}, {card.family}" + (f", row {card.row}" if card.row else ""),
        f"  use:       {USES[card.use]}",
        f"  learns:    {', '.join(card.trains) or 'nothing'}",
        f"  identity:  {'none' if card.identity is None else identity or 'always'}",
    ]
    lines += [f"  headline:  {card.headline} (the paper's own; not confirmed here)"] if card.headline else []
    lines += [f"  needs:     {', '.join(card.needs)}"] if card.needs else []
    lines += ["  not the paper's, or not verified:", *map(wrapped, card.deviations)] if card.deviations else []
    options = ", ".join(f.name for f in fields(recipe))
    return "\n".join([*lines, f"  options:   {options}", "", getdoc(recipe) or ""])
