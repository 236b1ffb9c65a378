# SPDX-License-Identifier: Apache-2.0
"""The progress bar of a run and of an evaluation."""

import sys

from tqdm import tqdm

_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}s [{elapsed}<{remaining}{postfix}]"


def progress_bar(name: str, total: int, *, unit: str, shown: bool, initial: int = 0, leave: bool = True) -> tqdm:
    """Return a bar on standard error; where that is no terminal, it prints a line every ten seconds at most."""
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=name,
        total=total,
        initial=initial,
        unit=unit,
        leave=leave,
        disable=not shown,
        bar_format=_FORMAT,
        dynamic_ncols=terminal,
        mininterval=0.1 if terminal else 10.0,
    )
