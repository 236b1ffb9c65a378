# SPDX-License-Identifier: Apache-2.0
"""Instructions of innermost loops, counted from machine code."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench import instructions
from bench.sass import Loop, loops, serialised

ROOT = Path(__file__).parents[1]

# Two nested loops, and the jump to itself that ends every kernel.
SASS = """
.L_x_1:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/              @!P2 FFMA.FTZ R8, R9, R10, -R11 ;
        /*0060*/                   MUFU.EX2 R8, R8 ;
        /*0070*/               @P0 BRA `(.L_x_0) ;
        /*0080*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0090*/              @!P1 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
"""


def test_innermost_loops_are_found_and_counted():
    (loop,) = loops(SASS)
    assert loop.opcodes == Counter(HGMMA=2, WARPGROUP=2, FFMA=1, MUFU=1, BRA=1)
    assert (loop.wgmma, loop.mma) == (2 * 64 * 128 * 16 // 4, 0)
    assert loops(SASS.replace("@P0 BRA `(.L_x_0)", "NOP"))[0].mma == 16 * 8 * 16


def test_products_that_wait_for_each_other_are_seen():
    assert not serialised(SASS)
    assert serialised(SASS.replace("MUFU.EX2 R8, R8", "WARPGROUP.DEPBAR.LE gsb0, 0x0"))
    assert not serialised("")


def test_clocks():
    """128 x 128 scores by 8 warps: what the rates of the units say."""
    loop = Loop(Counter(HGMMA=8, MUFU=64, FFMA=64, FMNMX=64, LDS=8, BAR=2), 2 * 8 * 64 * 64 * 16, 0)
    one = instructions.Pass("forward", "plain", 64, 1, 128, 128, 8, loop)
    assert one.per_score() == {"exp": 1, "float": 1, "other": 1, "memory": 1 / 8, "rest": 10 / 64}
    clocks = one.clocks()
    assert clocks["exp"] == 128 * 128 / 16 and clocks["float"] == 128 * 128 / 128 and clocks["other"] == 128 * 128 / 64
    assert clocks["issue"] == 8 * (64 * 3 + 18) / 4
    assert clocks["tensor"] == 8 * loop.wgmma / 2048


def test_the_committed_table():
    """Of attention's unmasked loops: wgmma everywhere, one exponential a score, and next to nothing else beside it."""
    text = (ROOT / "kernels" / "README.md").read_text().split(instructions.BEGIN)[1].split(instructions.END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]
    assert {(row[1], int(row[2])) for row in rows} == {(v, dim) for v in instructions.SHOWN for dim in (64, 128)}
    unmasked = {row[0]: row for row in rows if (row[1], row[2]) in (("plain", "64"), ("cache", "64"))}
    for kernel in ("forward", "query", "key_value", "prompt", "scores"):
        assert not any("mma" in row[4] for row in rows if row[0] == kernel)
        assert float(unmasked[kernel][5]) == pytest.approx(1, abs=0.1)


@pytest.mark.timeout(300)
def test_scores_are_bound_by_exponentials():
    """The unmasked loop of key scores: no unit is busier than the exponentials'."""
    command = [sys.executable, "-m", "bench.instructions", "scores", "--variants", "cache", "--dims", "64"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    *_, last = done.stdout.strip().splitlines()
    tensor, exponentials, *others = (float(cell) for cell in last.strip("| ").split("|")[10:16])
    assert max(tensor, *others) <= exponentials == 64 * 128 / 16
