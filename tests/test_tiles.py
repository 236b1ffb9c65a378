# SPDX-License-Identifier: Apache-2.0
"""Tables of tiles: complete, from the candidates or from a measurement, chosen by shapes, dtype and architecture."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import choose_tiles
from bench.choose_tiles import Slot, choose, rank, resident_warps, reuse
from bench.resources import SHARED_LIMIT, VARIANTS, Job, Usage
from fastprompt.kernels import configs
from fastprompt.kernels.candidates import candidates
from fastprompt.kernels.configs import Config, Entry
from fastprompt.ops import dispatch
from fastprompt.ops.dispatch import HEAD_SIZES, MORE_HEAD_SIZES, MOST_COLUMNS, MOST_PROMPTS, reasons_against

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
HALF, FLOAT = torch.empty(0, dtype=torch.bfloat16, device="meta"), torch.empty(0, device="meta")
SOURCE = "".join(path.read_text() for path in Path(configs.__file__).parent.glob("*.py"))


@pytest.fixture
def compiled(monkeypatch):
    """As where kernels are compiled, with tables of this test's own."""
    monkeypatch.setattr(configs, "INTERPRET", False)
    configs.table.cache_clear()
    configs.architecture.cache_clear()
    yield
    configs.table.cache_clear()
    configs.architecture.cache_clear()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_shipped_tables_are_complete_and_say_where_every_entry_comes_from(name):
    architecture, entries = configs.read(configs.TABLES / f"{name}.json")
    assert architecture == name and entries.keys() == configs.slots()
    for key, entry in entries.items():
        if entry.origin.startswith("measured on "):
            assert re.match(r"measured on .+, \d{4}-\d\d-\d\d, ", entry.origin), key
        else:
            assert re.fullmatch(r"compile gate, Triton \d\.\d+\.\d+( and \d\.\d+\.\d+)?", entry.origin), key
            assert entry.config in candidates(*configs.parse(key)), key


def test_float32_is_chosen_once():
    tables = [configs.read(configs.TABLES / f"{name}.json")[1] for name in ARCHITECTURES]
    for key in configs.slots():
        if "-32bit-" in key:
            assert len({x[key].config for x in tables if x[key].origin.startswith("compile gate")}) <= 1, key


def test_tuning_is_bounded():
    for key in configs.slots():
        found = candidates(*configs.parse(key))
        assert 2 <= len(set(found)) == len(found) <= 8, key


def test_every_size_that_an_operation_takes_has_an_entry():
    heads = {*HEAD_SIZES, *MORE_HEAD_SIZES["decoupled_attention"]}
    most = {"diffuse": MOST_PROMPTS, "diffuse_rows": MOST_PROMPTS, "summarize": MOST_COLUMNS}
    for kernel, itemsize in itertools.product(configs.SIZES, (2, 4)):
        for size in (0, most.get(kernel, max(heads)), *heads):
            assert configs.slot(kernel, itemsize, size) in configs.slots()


def test_a_tile_is_no_larger_than_the_problem(compiled):
    lengths = (1, 77, 197, 577)
    for name, x, kernel in itertools.product(ARCHITECTURES, (HALF, FLOAT), ("forward", "key_value", "branches")):
        for rows, keys, masked in itertools.product(lengths, lengths, (False, True)):
            with configs.compiling_for(name):
                config = configs.choose(kernel, x, 80, rows, keys, masked)
            assert 16 <= config.rows <= configs.padded(rows) and 16 <= config.keys <= configs.padded(keys)


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"),
     ((10, 3), "sm_100"), ((11, 0), "sm_100"), ((12, 0), "sm_80"), ((13, 0), "sm_80")],
)  # fmt: skip
def test_the_table_that_serves_a_gpu(compiled, monkeypatch, capability, name):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.architecture(torch.device("cuda", 0)) == name
    monkeypatch.setattr(torch.version, "hip", "7.0")
    configs.architecture.cache_clear()
    assert configs.architecture(torch.device("cuda", 0)) == "sm_80"


@pytest.mark.parametrize(("capability", "little"), [((8, 0), 0), ((8, 6), 1), ((8, 9), 1), ((9, 0), 0), ((12, 0), 1)])
def test_what_a_small_gpu_cannot_hold_is_refused(monkeypatch, capability, little):
    """No tile of float32 rows wider than 512 columns fits 99 KiB of shared memory."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "capability", lambda device: capability)
    for dtype, width, refused in ((torch.float32, 513, little), (torch.float32, 512, 0), (torch.float16, 1024, 0)):
        x = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, 1, width))
        found = [reason for reason in reasons_against("summarize_tokens", "triton", [x]) if "shared memory" in reason]
        assert len(found) == refused


def test_the_interpreter_runs_pinned_tiles(monkeypatch):
    monkeypatch.setattr(configs, "INTERPRET", True)
    assert configs.choose("forward", FLOAT, 64, 1000, 1000) == configs.PINNED
    assert configs.choose("forward", FLOAT, 64, 5, 1000) == configs.PINNED._replace(rows=16)


def test_tuned_entries_are_saved_and_used_for_their_architecture(compiled, tmp_path):
    file, found = tmp_path / "tuned.json", Config(32, 16, 2, 1)
    configs.save(file, "sm_90", {"forward-16bit-d64": Entry(found, "measured on X, 2026-01-01, heads 1")})
    configs.save(file, "sm_90", {"query-32bit-d96": Entry(found, "measured on X, 2026-01-01, heads 1")})
    assert configs.read(file)[1].keys() == {"forward-16bit-d64", "query-32bit-d96"}

    def chosen(name, x=HALF, size=64):
        with configs.compiling_for(name):
            return configs.choose("forward", x, size, 500, 500)

    before = chosen("sm_90")
    assert before != found
    configs.load(file)
    assert chosen("sm_90") == chosen("sm_90", size=16) == found
    assert found not in (chosen("sm_90", FLOAT), chosen("sm_90", size=80), chosen("sm_80"), chosen("sm_100"))
    good = file.read_text()
    for damage in ("{", "[1]", good.replace("32, 16, 2, 1", "32, 16"), good.replace("sm_90", "sm_75"),
                   good.replace("forward", "backward")):  # fmt: skip
        file.write_text(damage)
        with pytest.raises(ValueError, match=r"tuned\.json: damaged .*; delete it"):
            configs.load(file)


def test_a_candidate_is_used_inside_its_context_alone(compiled):
    before, candidate = dict(configs.table("sm_80")), Config(16, 16, 1, 1)
    with configs.override("sm_80", "forward-16bit-d64", candidate):
        assert configs.choose("forward", HALF, 64, 500, 500) == candidate
    assert configs.table("sm_80") == before


# What the gate makes of its candidates.


def test_every_kernel_is_compiled_in_every_variant_that_has_it():
    # Of the others, three have nothing to choose, and two the tiles of `forward` and `query`.
    others = ("delta", "norms", "reduce", "prompt_forward", "prompt_query")
    known = {f"{name}_kernel" for name in (*configs.SIZES, *others)}
    assert known == set(re.findall(r"^def (\w+_kernel)\(", SOURCE, re.M))
    assert choose_tiles.COMPILED_IN.keys() == configs.SIZES.keys()
    variants = {x for names in choose_tiles.COMPILED_IN.values() for x in names}
    assert variants | {"library", "library bank"} == set(VARIANTS)


def test_resident_warps():
    fine = Usage(registers=128, stack=0, shared=0, warps=4)
    # 65,536 registers are 16 warps of 128 a thread; those of a warp come in units of 256.
    assert resident_warps("sm_80", fine) == 16
    assert resident_warps("sm_80", fine._replace(registers=129)) == 12
    # A block of 81 KiB and the system's one: two fit 164 KiB; of 82, one.
    assert resident_warps("sm_80", fine._replace(shared=81 * 1024)) == 8
    assert resident_warps("sm_80", fine._replace(shared=82 * 1024)) == 4
    assert resident_warps("sm_90", fine._replace(shared=82 * 1024)) == 8
    assert resident_warps("sm_100", fine._replace(columns=512)) == 4
    assert resident_warps("sm_80", fine._replace(registers=1, warps=1)) == 32


def test_what_streams_by_is_reused_by_what_stays():
    wide, tall = Config(64, 128, 4, 2), Config(128, 64, 4, 2)
    assert reuse("forward", tall, 2) == 64 and reuse("forward", wide, 2) == reuse("forward", tall, 4) == 32
    assert reuse("key_value", wide, 2) == 64
    # 64 prompts by 64 columns: 4,096 products for 128 numbers.
    assert reuse("diffuse_prompt", tall, 2) == 64 * 64 / 128 / 2
    # Two products of every pair, for a column of the tokens and three of the rows.
    assert reuse("summarize_slopes", tall, 2) == 2 * 128 * 64 / (3 * 128 + 64) / 2


def test_the_order_of_candidates():
    slot = Slot("sm_90", "forward", 2, 64)
    large, small = Config(128, 64, 8, 2), Config(64, 64, 8, 2)
    fine = Usage(registers=128, stack=0, shared=1024, warps=8)
    assert rank(slot, large, fine) > rank(slot, small, fine)
    assert rank(slot, large, fine._replace(stack=8)) < rank(slot, small, fine)
    # The table of sm_80 serves GPUs with 99 KiB of shared memory.
    sm_80, much = slot._replace(architecture="sm_80"), fine._replace(shared=99 * 1024 + 1)
    assert rank(sm_80, large, much) < rank(sm_80, small, fine) and rank(slot, large, much) > rank(slot, small, fine)
    # At L2's full rate float32 needs few rows to keep its units busy: past that, warps decide.
    float32 = Slot("sm_90", "forward", 4, 64)
    assert rank(float32, small, fine) > rank(float32, large, fine._replace(registers=255))
    # No candidate is better than what is assumed of it before it is compiled.
    assert all(rank(slot, x) >= rank(slot, x, fine) for x in (large, small))


def test_the_gate_chooses_the_best_that_passes(compiled, monkeypatch):
    """The largest tile does not fit, the next one spills under a mask; others are not compiled at all."""
    slot, seen = Slot("sm_80", "forward", 2, 64), []

    def compile_job(job: Job) -> Usage:
        config = configs.table("sm_80")[slot.name].config
        seen.append((config, job.variant))
        spills = config == Config(128, 64, 8, 3) and job.variant == "masked"
        shared = 1024 if config.keys < 128 else SHARED_LIMIT[80] + 1
        return Usage(registers=128, stack=8 * spills, shared=shared, warps=config.warps)

    monkeypatch.setattr(choose_tiles, "compile_job", compile_job)
    before = dict(configs.table("sm_80"))
    best = choose(slot)
    assert best in candidates("forward", 2, 64) and best.keys < 128 and best != Config(128, 64, 8, 3)
    assert [variant for config, variant in seen if config == best] == ["plain", "masked", "packed", "bank"]
    assert len({config for config, _ in seen}) < len(candidates("forward", 2, 64))
    assert configs.table("sm_80") == before
    monkeypatch.setattr(choose_tiles, "compile_job", lambda job: Usage(255, 8, 1024, 4))
    with pytest.raises(RuntimeError, match="no candidate passes the gate"):
        choose(slot)


def test_measured_entries_are_shipped_if_they_pass_the_gate(compiled, monkeypatch, tmp_path, capsys):
    shipped, file = tmp_path / "tables" / "sm_90.json", tmp_path / "tuned.json"
    configs.write(shipped, "sm_90", configs.read(configs.TABLES / "sm_90.json")[1])
    monkeypatch.setattr(configs, "TABLES", shipped.parent)
    good = Entry(Config(16, 16, 2, 1), "measured on X, 2026-01-01, heads 1")
    bad = good._replace(config=Config(512, 512, 4, 9))
    configs.save(file, "sm_90", {"forward-32bit-d64": good, "diffuse-16bit-d128": bad})

    def compile_job(job: Job) -> Usage:
        return Usage(128, 0, 1024 if job.kernel == "forward_kernel" else SHARED_LIMIT[90] + 1, 4)

    monkeypatch.setattr(choose_tiles, "compile_job", compile_job)
    before = configs.read(shipped)[1]
    choose_tiles.main(["--ship", str(file)])
    assert configs.read(shipped)[1] == before | {"forward-32bit-d64": good}
    assert "diffuse-16bit-d128: (512, 512, 4, 9) is left out: 232449 bytes of shared memory" in capsys.readouterr().err
