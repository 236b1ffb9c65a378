# SPDX-License-Identifier: Apache-2.0
"""Machine code of NVIDIA GPUs, read without one: the instructions of a kernel's innermost loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"

#: Address, predicate, opcode, operands.
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")

#: Rows, columns and depth of a product that one warp asks for.
MMA = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}


class Loop(NamedTuple):
    """One pass of a loop by one warp: how often each opcode (up to its first dot), multiply-adds on tensor cores."""

    opcodes: Counter[str]
    #: By wgmma, a warp's quarter of what its group of four asks for; and by mma.sync.
    wgmma: int
    mma: int


def disassemble(cubin: bytes) -> str:
    """What nvdisasm makes of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOL, "-c", file.name], capture_output=True, text=True, check=True).stdout


def loops(sass: str) -> list[Loop]:
    """The innermost loops, in the order of the code: what lies between a label and a jump back to it."""
    code: list[str] = []
    labels: dict[str, int] = {}
    spans = []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.search(line):
            code.append(found[1])
            target = TARGET.search(found[2])
            # The code ends in a jump to itself, which is no loop.
            if found[1].startswith("BRA") and target and labels.get(target[1], len(code)) < len(code) - 1:
                spans.append((labels[target[1]], len(code)))
    inner = [x for x in spans if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in spans)]
    return [_count(code[begin:end]) for begin, end in inner]


def _count(code: list[str]) -> Loop:
    wgmma = mma = 0
    for opcode in code:
        head, _, rest = opcode.partition(".")
        if head == "HGMMA":
            m, n, k = map(int, rest.split(".")[0].split("x"))
            wgmma += m * n * k // 4
        elif head == "HMMA":
            m, n, k = MMA[rest.split(".")[0]]
            mma += m * n * k
    return Loop(Counter(opcode.partition(".")[0] for opcode in code), wgmma, mma)


def serialised(sass: str) -> bool:
    """Whether ptxas waits for every wgmma before it issues the next (its note C7515 and others)."""
    products, waits = sass.count("HGMMA."), sass.count("WARPGROUP.DEPBAR")
    return products > 1 and waits >= products
