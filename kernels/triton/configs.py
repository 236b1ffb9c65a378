# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of every kernel: chosen from shapes, dtype and architecture alone, so that no result depends on a timing.

`tables/` ships one file an architecture; every entry says where it comes from: a measurement (GPU, date), or the
compile gate (``python -m bench.choose_tiles``). `fastprompt warmup --tune` measures the candidates on the GPU at hand
and saves the winners to a file of the same form that `load` reads; nothing is ever tuned behind a user's back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

#: Whether kernels are interpreted on the CPU; Triton decides that when they are decorated.
INTERPRET = triton.knobs.runtime.interpret

TABLES = Path(__file__).parent / "tables"

#: Major compute capability -> the table that serves it. Where a GPU has none of its own, sm_80's does: its kernels ask
#: for nothing newer, and for no more shared memory than the smallest of 8.x and 12.x has.
ARCHITECTURES = {8: "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100"}

HEADS = (64, 96, 128, 256)

#: Kernel -> the largest size that each of its entries serves: head sizes; the number of prompts or the width, where a
#: program of `diffuse_prompts` or `summarize_tokens` holds all of them; one entry where the tile depends on neither.
SIZES: dict[str, tuple[int, ...]] = {
    "forward": HEADS, "query": HEADS, "key_value": HEADS, "prompt": HEADS,
    "branches": HEADS, "branches_query": HEADS, "branch": HEADS,
    "scores": HEADS, "nearest": HEADS, "merge": (256,),
    "diffuse": (128, 256, 512), "diffuse_rows": (128, 256, 512), "diffuse_prompt": (512,),
    "summarize": (256, 512, 1024), "summarize_slopes": (1024,), "summarize_tokens": (1024,),
}  # fmt: skip


class Config(NamedTuple):
    """Rows (queries) and keys of a tile, warps of a program, depth of the load pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


class Entry(NamedTuple):
    """A configuration, and where it comes from."""

    config: Config
    origin: str


#: What the interpreter runs, and tests with it: small, so that few numbers still make several ragged tiles.
PINNED = Config(rows=32, keys=32, warps=4, stages=1)

#: Another number whenever `choose` may answer differently, or somebody listens: plans made before are made anew.
stamp = 0

_asked: dict[str, None] = {}
_compiling_for: str | None = None
_planning_for: torch.device | None = None


@lru_cache
def slot(kernel: str, itemsize: int, size: int) -> str:
    """The name of the entry that serves a kernel for elements of ``itemsize`` bytes and a size of its problem."""
    return f"{kernel}-{8 * itemsize}bit-d{next(largest for largest in SIZES[kernel] if size <= largest)}"


def parse(name: str) -> tuple[str, int, int]:
    """Kernel, bytes of an element and largest size of an entry that `slot` named."""
    kernel, bits, size = name.split("-")
    return kernel, int(bits.removesuffix("bit")) // 8, int(size.removeprefix("d"))


def choose(kernel: str, x: Tensor, size: int, rows: int, keys: int, crowded: bool = False) -> Config:
    """The configuration of a kernel for the dtype and device of ``x``, its tile no larger than the (padded) problem.

    A mask takes registers for a tile of addresses and values; a smaller tile makes room for them. Where gradients of
    keys fill the registers, a shorter pipeline does; a prompt's loop over the query heads of a key head needs it too.
    """
    name = slot(kernel, x.element_size(), size)
    _asked[name] = None
    if INTERPRET:
        return fit(PINNED, rows, keys)
    config = table(architecture(_planning_for or x.device))[name].config
    if crowded and kernel != "prompt":
        config = config._replace(rows=max(16, config.rows // 2))
        if kernel == "forward" or (kernel == "query" and size > 64):
            config = config._replace(keys=max(16, config.keys // 2))
    if crowded and kernel in ("key_value", "prompt"):
        config = config._replace(stages=1)
    return fit(config, rows, keys)


def fit(config: Config, rows: int, keys: int) -> Config:
    """Shrink a tile to the problem; 16 is the least that tensor cores multiply."""
    return config._replace(rows=min(config.rows, padded(rows)), keys=min(config.keys, padded(keys)))


def padded(size: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length()) if size else 16


@lru_cache
def architecture(device: torch.device) -> str:
    """The table that serves a device; of a device that is not there, the one that is compiled for."""
    if device.type != "cuda":
        return _compiling_for or "sm_80"
    if torch.version.hip is not None:
        return "sm_80"
    return ARCHITECTURES.get(torch.cuda.get_device_capability(device)[0], "sm_80")


@contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Inside, tensors without a GPU are configured for this architecture; how the compile gate asks."""
    global _compiling_for
    before, _compiling_for = _compiling_for, name
    architecture.cache_clear()
    _change()
    try:
        yield
    finally:
        _compiling_for = before
        architecture.cache_clear()
        _change()


@contextmanager
def planning_for(device: torch.device) -> Iterator[None]:
    """Inside, tensors stand for those of this device, whatever their own."""
    global _planning_for
    before, _planning_for = _planning_for, device
    try:
        yield
    finally:
        _planning_for = before


def _change() -> None:
    global stamp
    stamp += 1


@contextmanager
def asked() -> Iterator[dict[str, None]]:
    """Collects the entries that launches inside the context ask for, in their order."""
    _asked.clear()
    _change()
    yield _asked


@lru_cache
def table(name: str) -> dict[str, Entry]:
    """The entries of an architecture: the shipped ones, and those that `load` put in their place."""
    return read(TABLES / f"{name}.json")[1]


@contextmanager
def override(architecture: str, name: str, config: Config) -> Iterator[None]:
    """Use ``config`` for one entry inside the context; how candidates are tried."""
    entries = table(architecture)
    before = entries.get(name)
    entries[name] = Entry(config, "a candidate")
    _change()
    try:
        yield
    finally:
        _change()
        if before is None:
            del entries[name]
        else:
            entries[name] = before


def read(path: Path) -> tuple[str, dict[str, Entry]]:
    """Architecture and entries of a file that `write` wrote."""
    try:
        content = json.loads(path.read_text())
        entries = {
            name: Entry(Config(*map(int, numbers)), str(origin))
            for name, (*numbers, origin) in content["tiles"].items()
        }
        if content["architecture"] not in ARCHITECTURES.values() or not entries.keys() <= slots():
            raise ValueError("unknown names")
        return content["architecture"], entries
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path}: damaged ({error}), expected what `fastprompt warmup --tune` writes; delete it, or tune again"
        ) from error


def slots() -> set[str]:
    """The names of all entries of a complete table."""
    return {slot(kernel, itemsize, size) for kernel in SIZES for itemsize in (2, 4) for size in SIZES[kernel]}


def write(path: Path, architecture: str, entries: dict[str, Entry]) -> None:
    """Write a table, one line an entry, in the order of `SIZES`."""
    lines = [f'  "{name}": {json.dumps([*entries[name].config, entries[name].origin])}' for name in _ordered(entries)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'{{"architecture": "{architecture}", "tiles": {{\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8"
    )


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (list(SIZES).index(parse(name)[0]), *parse(name)[1:]))


def save(path: Path, architecture: str, found: dict[str, Entry]) -> None:
    """Write tuned entries, beside those the file already holds."""
    write(path, architecture, (read(path)[1] if path.exists() else {}) | found)


def load(path: Path) -> dict[str, Entry]:
    """Use the entries of a file that `save` wrote in place of the shipped ones; returns them."""
    architecture, found = read(path)
    table(architecture).update(found)
    _change()
    return found
