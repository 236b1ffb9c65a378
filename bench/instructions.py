# SPDX-License-Identifier: Apache-2.0
"""The instructions of every kernel's innermost loops, counted without a GPU: ``python -m bench.instructions KERNEL``.

A kernel is compiled for sm_90 as its launcher would launch it (`bench.resources`) and disassembled. What one pass of an
innermost loop issues is sorted by the unit that executes it; from that follow the clocks that each unit of a
multiprocessor is busy for one tile, all warps of a program together, at the throughputs of the CUDA programming guide
(compute capability 9.0). The busiest unit bounds a tile if the work of several warps overlaps perfectly; if nothing
does, it takes tensor cores and the busiest other unit one after the other. It is a prediction, not a measurement: waits
for memory and barriers are not in it, and code that a loop jumps over counts as if it always ran.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import triton

from bench.resources import DTYPES, README, TARGETS, VARIANTS, Job, configured, plans, source
from bench.sass import Loop, disassemble, loops

BEGIN, END = "<!-- instructions: begin -->", "<!-- instructions: end -->"
TARGET = "cuda:90"
SHOWN = ("plain", "packed", "cache", "branches", "diffuse", "summaries")

#: Multiply-adds of half precision a clock of a multiprocessor: by wgmma; mma.sync reaches about half of it.
WGMMA, MMA = 2048, 1024
#: Lanes a clock of a multiprocessor, by class. Memory is loads and stores, shared memory's too, and shuffles.
LANES = {"exp": 16, "float": 128, "other": 64, "memory": 32}
#: Instructions a clock, whatever they are: four schedulers.
ISSUED = 4

#: Opcodes of a class. Those of none (barriers, branches, uniform registers, wgmma itself) are issued and no more.
CLASSES = {
    "exp": ("MUFU",),
    "float": ("FFMA", "FMUL", "FADD"),
    "memory": ("LDS", "STS", "LDSM", "STSM", "SHFL", "LDGSTS", "LDG", "STG"),
    "other": (
        "CS2R", "F2F", "F2FP", "F2I", "FMNMX", "FSEL", "FSET", "FSETP", "HADD2", "HFMA2", "HMUL2", "I2F", "I2FP",
        "IABS", "IADD3", "IMAD", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "P2R", "PLOP3", "POPC", "PRMT", "R2P", "SEL",
        "SGXT", "SHF", "VIADD", "VIMNMX",
    ),
}  # fmt: skip
CLASS = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}


class Pass(NamedTuple):
    """One pass of an innermost loop: a tile of ``rows x keys`` by ``warps``."""

    kernel: str
    variant: str
    dim: int
    number: int
    rows: int
    keys: int
    warps: int
    loop: Loop

    def classes(self) -> Counter[str]:
        """Instructions of a warp, by class."""
        found: Counter[str] = Counter()
        for opcode, n in self.loop.opcodes.items():
            found[CLASS.get(opcode, "rest")] += n
        return found

    def per_score(self) -> dict[str, float]:
        """Instructions of a thread for each of its numbers of the tile, by class."""
        mine = self.rows * self.keys / (32 * self.warps)
        return {name: n / mine for name, n in self.classes().items()}

    def clocks(self) -> dict[str, float]:
        """Clocks that every unit of a multiprocessor is busy for the whole tile."""
        count = self.classes()
        found = {"tensor": self.warps * (self.loop.wgmma / WGMMA + self.loop.mma / MMA)}
        found |= {name: self.warps * 32 * count[name] / lanes for name, lanes in LANES.items()}
        return found | {"issue": self.warps * count.total() / ISSUED}


def passes(variant: str, dtype: str, dim: int, kernels: list[str]) -> Iterator[Pass]:
    """Every innermost loop with products on tensor cores, of every kernel (or those named) of a variant."""
    for launch in plans(variant, DTYPES[dtype], dim):
        name = launch.kernel.__name__
        if kernels and name.removesuffix("_kernel") not in kernels:
            continue
        launch = configured(Job(variant, name, dtype, dim, TARGET))
        compiled = triton.compile(source(launch), target=TARGETS[TARGET], options=launch.options())
        sizes = launch.constants
        keys = next((sizes[x] for x in ("BLOCK_N", "BLOCK_P") if x in sizes), 0) or max(sizes.get("BLOCKS", (0,)))
        for number, loop in enumerate(loops(disassemble(compiled.asm["cubin"])), 1):
            if loop.wgmma or loop.mma:
                kernel = name.removesuffix("_kernel")
                yield Pass(kernel, variant, dim, number, sizes["BLOCK_M"], keys, launch.config.warps, loop)


def table(found: list[Pass]) -> str:
    """Markdown: one line a loop."""
    lines = [
        "| kernel | variant | D | loop | tile | exp | float | other | memory | all "
        "| tensor | exp | float | other | memory | issue | bound | sum |",
        "|---" * 18 + "|",
    ]
    for x in found:
        each, clocks = x.per_score(), x.clocks()
        apart = clocks["tensor"] + max(n for name, n in clocks.items() if name != "tensor")
        cells = [
            x.kernel, x.variant, str(x.dim), str(x.number), f"{x.rows} x {x.keys}" + (" **mma**" if x.loop.mma else ""),
            *(f"{each.get(name, 0):.1f}" for name in LANES), f"{sum(each.values()):.1f}",
            *(f"{n:.0f}" for n in clocks.values()), f"{max(clocks.values()):.0f}", f"{apart:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Count, and print the table or write it into the kernels' README."""
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__)
    parser.add_argument("kernels", nargs="*", help="names without _kernel [all]")
    parser.add_argument("--variants", nargs="+", default=list(SHOWN), choices=VARIANTS, help="[%(default)s]")
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128], help="[%(default)s]")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16"), help="[%(default)s]")
    parser.add_argument("--write", action="store_true", help="write the table into kernels/README.md")
    args = parser.parse_args(argv)
    found = [x for v in args.variants for dim in args.dims for x in passes(v, args.dtype, dim, args.kernels)]
    if args.write:
        before, rest = README.read_text().split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}")
    else:
        print(table(found))


if __name__ == "__main__":
    main()
