# SPDX-License-Identifier: Apache-2.0
"""Fill the shipped tables of tiles: ``python -m bench.choose_tiles``, or with measurements: ``--ship FILE``.

Without a GPU the compile gate chooses among a kernel's candidates. Out go those that spill registers in half precision
with D <= 128, in any variant of the kernel, or ask for more shared memory than the architecture has. The rest are
ranked; the first of these that differs decides:

0. whether it runs on every GPU that the table serves: 8.6, 8.9 and 12.x have 99 KiB of shared memory a block;
1. bytes of the stack, the fewest (where float32 or D = 256 spill whatever the tile);
2. multiply-adds a byte that streams from L2 into the tile, the most, up to what keeps the multipliers busy while L2 is
   read at full rate: more than that buys nothing;
3. warps that fit a multiprocessor at once by registers, shared and tensor memory, the most, up to enough: with tensor
   cores two a scheduler, of which one multiplies while the other does its softmax; in float32 four, as many as a
   dependent multiply-add has cycles of latency;
4. numbers in the tile, the most: fewer passes of the loop, fewer reads of shared memory a product;
5. stages of the load pipeline, the most.

A measurement is better than any of this: what `fastprompt warmup --tune` saved on a GPU goes into the table of its
architecture with ``--ship``, if it passes the gate, and the gate never overwrites it.

Float32 entries are chosen once, for sm_80, which has the least shared memory: its units work alike in all of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from tqdm import tqdm

from bench.resources import SHARED_SERVED, Job, Usage, compile_job, faults
from fastprompt.kernels import configs
from fastprompt.kernels.candidates import HOLD_KEYS, candidates
from fastprompt.kernels.configs import Config, Entry
from fastprompt.kernels.diffuse_prompts import PROMPT_TILE
from fastprompt.kernels.summarize_tokens import COLUMNS

#: The variants of `bench.resources` that compile a kernel; the first one is ranked, the others must pass the gate.
COMPILED_IN = {
    "forward": ("plain", "masked", "packed", "bank"), "query": ("plain", "masked", "packed", "bank"),
    "key_value": ("plain", "masked", "packed", "bank"), "prompt": ("plain", "packed", "bank"),
    "branches": ("branches", "branches masked"), "branches_query": ("branches", "branches masked"),
    "branch": ("branches", "branches masked"),
    "scores": ("cache", "cache masked"), "nearest": ("cache",), "merge": ("cache",),
    "diffuse": ("diffuse", "diffuse softmax"), "diffuse_rows": ("diffuse", "diffuse softmax"),
    "diffuse_prompt": ("diffuse", "summaries"),
    "summarize": ("summaries",), "summarize_slopes": ("summaries",), "summarize_tokens": ("summaries",),
}  # fmt: skip

#: Multiply-adds a clock of a multiprocessor, in half precision and in float32 (white papers of A100, H100, B200), and
#: multiprocessors. All have L2 deliver 5,120 bytes a clock, as the A100's does.
MULTIPLIERS = {"sm_80": {2: 1024, 4: 64}, "sm_90": {2: 2048, 4: 128}, "sm_100": {2: 4096, 4: 128}}
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
L2_BYTES = 5120

#: Of a multiprocessor: registers, bytes of shared memory (1 KiB more a block is the system's), columns of tensor
#: memory, blocks.
REGISTERS = 65536
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
TENSOR_COLUMNS = 512
BLOCKS = 32
ENOUGH_WARPS = {2: 8, 4: 16}


#: How the tables mark what was chosen here.
GATE = "compile gate"
ORIGIN = f"{GATE}, Triton {triton.__version__}"


class Slot(NamedTuple):
    """One entry of a table."""

    architecture: str
    kernel: str
    itemsize: int
    size: int

    @property
    def name(self) -> str:
        """Its name in the file."""
        return configs.slot(self.kernel, self.itemsize, self.size)

    def jobs(self) -> list[Job]:
        """What the gate compiles for it: the largest size it serves, in every variant of the kernel.

        Where it may spill, only shared memory counts, and no variant takes more than the first: masks halve tiles.
        """
        variants = COMPILED_IN[self.kernel][: None if self.itemsize == 2 and self.size <= 128 else 1]
        dtype, target = {2: "bf16", 4: "fp32"}[self.itemsize], f"cuda:{self.architecture.removeprefix('sm_')}"
        return [
            # There, D is a quarter of the width.
            Job(variant, f"{self.kernel}_kernel", dtype, self.size // (4 if variant == "summaries" else 1), target)
            for variant in variants
        ]


def reuse(kernel: str, config: Config, itemsize: int) -> float:
    """Multiply-adds a byte that streams from L2 into a tile."""
    rows, keys = config.rows, config.keys
    if kernel == "merge":
        return 0.0
    if kernel == "diffuse_prompt":
        return PROMPT_TILE * keys / (PROMPT_TILE + keys) / itemsize
    if kernel == "summarize_slopes":
        return 2 * rows * keys / (3 * rows + keys) / itemsize
    if kernel == "summarize_tokens":
        columns = COLUMNS[itemsize]
        return keys * columns / (keys + columns) / itemsize
    # What a tile holds is used once for every number that streams by; a token is both key and value of its summary.
    held = keys if kernel in HOLD_KEYS else rows
    return held * (2 if kernel == "summarize" else 1) / itemsize


def resident_warps(architecture: str, usage: Usage) -> int:
    """Warps of a multiprocessor at once."""
    # Registers are handed out to a warp in units of 256.
    registers = -(-(usage.registers or 1) * 32 // 256) * 256 * usage.warps
    blocks = min(BLOCKS, REGISTERS // registers, SHARED[architecture] // (usage.shared + 1024))
    if usage.columns:
        blocks = min(blocks, TENSOR_COLUMNS // usage.columns)
    return blocks * usage.warps


def rank(slot: Slot, config: Config, usage: Usage | None = None) -> tuple[float, ...]:
    """Of a candidate, as the list above has it; without its usage, what it could be at best."""
    balance = MULTIPLIERS[slot.architecture][slot.itemsize] * MULTIPROCESSORS[slot.architecture] / L2_BYTES
    warps = ENOUGH_WARPS[slot.itemsize]
    warps = warps if usage is None else min(warps, resident_warps(slot.architecture, usage))
    stack = 0 if usage is None else usage.stack or 0
    everywhere = usage is None or usage.shared <= SHARED_SERVED[int(slot.architecture.removeprefix("sm_"))]
    held = min(balance, reuse(slot.kernel, config, slot.itemsize))
    return everywhere, -stack, held, warps, config.rows * config.keys, config.stages


def against(slot: Slot, config: Config, jobs: list[Job]) -> tuple[list[Usage], list[str]]:
    """What a candidate takes in every job, up to the first one in which the gate forbids something; and what."""
    usages: list[Usage] = []
    with configs.override(slot.architecture, slot.name, config):
        for job in jobs:
            usages.append(compile_job(job))
            if found := faults(job, usages[-1]):
                return usages, found
    return usages, []


def choose(slot: Slot) -> Config:
    """The best candidate; it compiles no more of them than it must."""
    best: tuple[tuple[float, ...], Config] | None = None
    first, *others = slot.jobs()
    for config in sorted(candidates(slot.kernel, slot.itemsize, slot.size), key=lambda x: rank(slot, x), reverse=True):
        if best and best[0] >= rank(slot, config):
            break
        (usage, *_), forbidden = against(slot, config, [first])
        ranked = rank(slot, config, usage)
        if forbidden or (best and ranked <= best[0]):
            continue
        usages, forbidden = against(slot, config, others)
        # It runs on every GPU that is served if all its variants do.
        most = max((usage, *usages), key=lambda x: x.shared)
        ranked = min(ranked, rank(slot, config, usage._replace(shared=most.shared)))
        if not forbidden and (best is None or ranked > best[0]):
            best = ranked, config
    if best is None:
        raise RuntimeError(f"{slot}: no candidate passes the gate; add a smaller one to kernels/triton/candidates.py")
    return best[1]


def todo(architectures: list[str], kernels: list[str], float32: tuple[str, ...] = ("sm_80",)) -> list[Slot]:
    """Entries that the gate is to choose: float32 of sm_80 alone."""
    return [
        Slot(architecture, kernel, itemsize, size)
        for architecture in architectures
        for kernel in kernels
        for itemsize in (2, 4)
        for size in configs.SIZES[kernel]
        if itemsize == 2 or architecture in float32
    ]


def ship(file: Path) -> None:
    """Put measured entries into the table of their architecture, if they pass the gate."""
    architecture, found = configs.read(file)
    shipped = configs.TABLES / f"{architecture}.json"
    slots = {slot.name: slot for slot in todo([architecture], list(configs.SIZES), (architecture,))}
    good = {}
    for name, entry in tqdm(found.items(), "gate", leave=False):
        _, forbidden = against(slots[name], entry.config, slots[name].jobs())
        if forbidden:
            print(f"{name}: {tuple(entry.config)} is left out: {'; '.join(forbidden)}", file=sys.stderr)
        else:
            good[name] = entry
    configs.save(shipped, architecture, good)
    print(f"{shipped}: {len(good)} entries of {file}")


def main(argv: list[str] | None = None) -> None:
    """Choose entries, or ship measured ones."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.choose_tiles", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(MULTIPLIERS)
    parser.add_argument("--architectures", nargs="+", default=names, choices=names)
    parser.add_argument("--kernels", nargs="+", default=list(configs.SIZES), choices=configs.SIZES)
    parser.add_argument("--ship", type=Path, metavar="FILE", help="of `fastprompt warmup --tune`")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if args.ship:
        return ship(args.ship)
    kept = set()
    for name in names:
        file = configs.TABLES / f"{name}.json"
        known = configs.read(file)[1] if file.exists() else {}
        kept |= {(name, key) for key, entry in known.items() if not entry.origin.startswith(GATE)}
        # A kernel is planned together with others: those without an entry get their last candidate for the time being.
        last = {slot.name: candidates(*slot[1:])[-1] for slot in todo([name], list(configs.SIZES), (name,))}
        configs.write(file, name, {key: Entry(x, ORIGIN) for key, x in last.items()} | known)
    slots = todo(args.architectures, args.kernels)
    with ProcessPoolExecutor(args.workers) as pool:
        # Written as they come, so that what an interrupted run has found stays.
        for slot, config in zip(slots, tqdm(pool.map(choose, slots), "choose", len(slots), leave=False), strict=True):
            for name in names if slot.itemsize == 4 else [slot.architecture]:
                if (name, slot.name) not in kept:
                    configs.save(configs.TABLES / f"{name}.json", name, {slot.name: Entry(config, ORIGIN)})
    print(f"{len(slots)} entries chosen, {len(kept)} measured ones kept")


if __name__ == "__main__":
    main()
