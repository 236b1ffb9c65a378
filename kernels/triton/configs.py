# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of every kernel: chosen from shapes and dtypes alone, so that a result never depends on a timing.

The shipped table is written by hand from the compile gate (no spills, fits shared memory) and from measurements where
there are any. `fastprompt warmup --tune` measures `CANDIDATES` on the GPU at hand and saves the winners to a file that
`load` reads; nothing is ever tuned behind a user's back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Config(NamedTuple):
    """Rows (queries) and keys of a tile, warps of a program, depth of the load pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


KERNELS = ("forward", "query", "key_value", "prompt")

#: What the interpreter runs, and tests with it: small, so that few numbers still make several ragged tiles.
PINNED = Config(rows=32, keys=32, warps=4, stages=1)

#: (kernel, bytes of an element) -> the largest head size a configuration serves -> configuration.
TABLE: dict[tuple[str, int], dict[int, Config]] = {
    ("forward", 2): {
        64: Config(128, 64, 8, 3), 96: Config(128, 32, 8, 1), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2),
    },
    ("query", 2): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 1)},
    ("key_value", 2): {64: Config(64, 32, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 1)},
    ("prompt", 2): {64: Config(32, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 1)},
    ("forward", 4): {64: Config(32, 32, 4, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 1)},
    ("query", 4): {64: Config(32, 32, 4, 2), 128: Config(32, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    ("key_value", 4): {64: Config(32, 32, 4, 2), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    ("prompt", 4): {64: Config(32, 32, 4, 2), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    ("scores", 2): {
        32: Config(32, 128, 4, 3), 64: Config(64, 64, 4, 3), 128: Config(32, 128, 8, 3), 256: Config(64, 64, 8, 2),
    },
    ("scores", 4): {64: Config(32, 64, 4, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 1)},
    ("branches", 2): {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 1)},
    ("branches_query", 2): {64: Config(64, 64, 4, 2), 128: Config(64, 32, 8, 1), 256: Config(32, 32, 8, 1)},
    ("branch", 2): {64: Config(32, 64, 4, 2), 128: Config(32, 64, 8, 2), 256: Config(32, 32, 8, 1)},
    ("branches", 4): {64: Config(32, 32, 4, 2), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    ("branches_query", 4): {64: Config(32, 32, 4, 2), 128: Config(32, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    ("branch", 4): {64: Config(32, 32, 4, 2), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    ("nearest", 2): {128: Config(128, 64, 8, 3), 256: Config(64, 64, 8, 2)},
    ("nearest", 4): {64: Config(64, 32, 4, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 1)},
    # Of `diffuse_prompts`: by the number of prompts, whose scores a program holds; keys are columns of a tile.
    ("diffuse", 2): {128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 3), 512: Config(64, 32, 8, 2)},
    ("diffuse_rows", 2): {128: Config(64, 64, 8, 2), 256: Config(32, 64, 8, 2), 512: Config(16, 32, 8, 2)},
    ("diffuse_prompt", 2): {512: Config(64, 128, 8, 3)},
    ("diffuse", 4): {128: Config(32, 32, 8, 1), 256: Config(16, 32, 8, 1), 512: Config(16, 16, 8, 1)},
    ("diffuse_rows", 4): {128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1), 512: Config(16, 16, 8, 1)},
    ("diffuse_prompt", 4): {512: Config(32, 32, 8, 1)},
    # Of `summarize_tokens`: the forward by the width, all of which a program holds; keys are tokens.
    ("summarize", 2): {256: Config(32, 32, 4, 2), 512: Config(32, 32, 8, 2), 1024: Config(16, 32, 8, 2)},
    ("summarize_slopes", 2): {0: Config(64, 64, 8, 3)},
    ("summarize_tokens", 2): {0: Config(32, 64, 4, 3)},
    ("summarize", 4): {256: Config(16, 16, 4, 1), 1024: Config(16, 16, 8, 1)},
    ("summarize_slopes", 4): {0: Config(32, 32, 4, 2)},
    ("summarize_tokens", 4): {0: Config(32, 32, 4, 2)},
}  # fmt: skip

#: What `fastprompt warmup --tune` tries for each kernel in half precision, beside the shipped configuration.
CANDIDATES: dict[str, tuple[Config, ...]] = {
    "forward": (
        Config(64, 32, 4, 3), Config(64, 64, 4, 3), Config(64, 128, 4, 2), Config(128, 32, 4, 3),
        Config(128, 64, 8, 3), Config(128, 128, 8, 2), Config(128, 64, 4, 2),
    ),
    "query": (
        Config(64, 32, 4, 3), Config(64, 64, 4, 3), Config(64, 128, 8, 2), Config(128, 32, 4, 3),
        Config(128, 64, 8, 2), Config(128, 64, 8, 3), Config(32, 64, 4, 2),
    ),
    "key_value": (
        Config(32, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 128, 8, 2), Config(32, 128, 4, 3),
        Config(64, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 32, 4, 2),
    ),
    "prompt": (
        Config(32, 64, 4, 3), Config(64, 64, 4, 3), Config(128, 64, 8, 2), Config(64, 32, 4, 3),
        Config(128, 32, 4, 3), Config(64, 64, 8, 2), Config(64, 128, 8, 2),
    ),
}  # fmt: skip

_tuned: dict[str, Config] = {}


def slot(kernel: str, itemsize: int, dim: int) -> str:
    """The name under which a tuned configuration is kept."""
    return f"{kernel}-{8 * itemsize}bit-d{dim}"


def choose(kernel: str, itemsize: int, dim: int, rows: int, keys: int, masked: bool = False) -> Config:
    """The configuration of a kernel, its tile no larger than the (padded) problem.

    A mask takes registers for a tile of addresses and values; a smaller tile makes room for them.
    """
    config = _tuned.get(slot(kernel, itemsize, dim))
    if config is None:
        config = next(c for largest, c in TABLE[kernel, itemsize].items() if dim <= largest)
    if masked:
        config = config._replace(rows=max(16, config.rows // 2))
        if kernel == "forward":
            config = config._replace(keys=max(16, config.keys // 2))
        elif kernel == "key_value" and dim > 64:
            config = config._replace(stages=1)
    return fit(config, rows, keys)


def fit(config: Config, rows: int, keys: int) -> Config:
    """Shrink a tile to the problem; 16 is the least that tensor cores multiply."""
    return config._replace(rows=min(config.rows, padded(rows)), keys=min(config.keys, padded(keys)))


def padded(size: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length()) if size else 16


@contextmanager
def override(name: str, config: Config) -> Iterator[None]:
    """Use ``config`` for the slot ``name`` inside the context; how a tuner tries candidates."""
    before = _tuned.get(name)
    _tuned[name] = config
    try:
        yield
    finally:
        if before is None:
            del _tuned[name]
        else:
            _tuned[name] = before


def save(path: Path, found: dict[str, Config]) -> None:
    """Write tuned configurations, beside those the file already holds."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known | {name: list(config) for name, config in found.items()}, indent=1) + "\n")


def load(path: Path) -> dict[str, Config]:
    """Use the configurations of a file that `save` wrote; returns them."""
    try:
        found = {name: Config(*map(int, values)) for name, values in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: damaged ({error}), expected what `fastprompt warmup --tune` writes; delete it, or tune again"
        ) from error
    _tuned.update(found)
    return found
