# SPDX-License-Identifier: Apache-2.0
"""`fastprompt warmup`: kernels run once ahead of time, tiles are tuned only when asked."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from attention_cases import TRITON_DEVICE

from fastprompt import H2O, TOVA, SnapKV, cli, config
from fastprompt.cache import Observed, compress
from fastprompt.errors import ImplUnavailableError
from fastprompt.kernels import configs
from fastprompt.kernels.candidates import candidates
from fastprompt.ops import dispatch, key_scores
from fastprompt.ops.cuda import wins
from fastprompt.warmup import Shape, _steps, tune, warmup

SHAPE = Shape(batch=1, heads=2, heads_kv=1, tokens=5, head_dim=16, prompts=3, dtype=torch.float32)


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """A cache folder of this test's own, and tables that it may change."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs.table.cache_clear()
    yield {name: dict(configs.table(name)) for name in configs.ARCHITECTURES.values()}
    configs.table.cache_clear()


def test_every_kernel_runs_once(launched):
    warmup(SHAPE, TRITON_DEVICE)
    source = "".join(path.read_text() for path in Path(configs.__file__).parent.glob("*.py"))
    seen = {x.kernel.__name__ for x in launched}
    # The prompt's part is launched where a library was measured to win: nowhere yet.
    assert not wins.WINS
    assert seen | {"prompt_forward_kernel", "prompt_query_kernel"} == set(
        re.findall(r"^def (\w+_kernel)\(", source, re.M)
    )


def test_keys_are_scored_and_merged_in_the_variants_of_a_cache(monkeypatch, launched):
    """Every form in which a cache calls `scores_kernel`: masks are there or not, and pointers that are None compile."""
    causal = replace(SHAPE, is_causal=True, tokens=9)
    warmup(causal, TRITON_DEVICE)

    def forms(launches):
        names = ("query_mask", "key_mask")
        return {
            (tuple(x.arguments[n] is None for n in names), x.constants["CAUSAL"], x.constants["VISIBLE"],
             x.constants["REDUCE"], x.constants["D"])
            for x in launches
            if x.kernel.__name__ == "scores_kernel"
        }  # fmt: skip

    warm = forms(launched)
    launched.clear()
    query, key, value, *_ = (x.detach() for x in causal.tensors(TRITON_DEVICE))
    lse, valid = torch.zeros(1, 2, 9, device=TRITON_DEVICE), torch.arange(9, device=TRITON_DEVICE)[None] >= 2
    monkeypatch.setattr(config, "IMPL", "triton")
    for mask in (None, valid):
        for rows in (9, 4):
            last = {"query": query[:, :, -rows:], "lse": lse[:, :, -rows:]}
            sums = key_scores(**last, key=key, query_mask=None if mask is None else mask[:, -rows:], key_mask=mask)
            observed = Observed(key, value, mask, None, sums, **last)
            for policy in (H2O(0.2, 0.2), SnapKV(0.5, window=4), TOVA(0.5)):
                compress(policy, observed)
    assert forms(launched) == warm


def test_the_fastest_candidate_of_every_kernel_is_kept(shipped, capsys):
    """In float32 and half precision; the second candidate wins."""
    target = configs.architecture(torch.device(TRITON_DEVICE, 0))
    entries = configs.table(target)
    tried: dict[str, list] = {}

    def timer(step):
        (name,) = (name for name, x in entries.items() if x.origin == "a candidate")
        config = entries[name].config
        tried.setdefault(name, []).append(config)
        return 1.0 if config == candidates(*configs.parse(name))[1] else 2.0

    for dtype in (torch.float32, torch.float16):
        file = tune(replace(SHAPE, dtype=dtype), TRITON_DEVICE, timer)
    architecture, found = configs.read(file)
    assert architecture == target
    assert {configs.parse(name)[:2] for name in found} == set(product(configs.SIZES, (2, 4)))
    for name, entry in found.items():
        before, possible = shipped[target][name].config, candidates(*configs.parse(name))
        assert tried[name] == list(dict.fromkeys((before, *possible)))
        assert entry.config == possible[1] and entries[name] == entry
        assert re.match(r"measured on .+, \d{4}-\d\d-\d\d, batch 1, heads 2, heads_kv 1, tokens 5, ", entry.origin)
    assert "before 2.0000 ms" in capsys.readouterr().out


def test_what_no_kernel_can_hold_is_left_out(monkeypatch):
    """More prompts than `diffuse_prompts` takes, more columns than `summarize_tokens` does."""
    assert len(_steps(SHAPE, "meta")) == 6
    assert "diffuse_prompts" not in _steps(replace(SHAPE, prompts=513), "meta")
    assert "summarize_tokens" not in _steps(replace(SHAPE, heads=12, head_dim=128), "meta")


def test_tuned_tiles_are_read_by_the_next_process(shipped):
    entry = configs.Entry(configs.Config(16, 16, 1, 1), "measured on X, 2026-01-01, heads 1")
    configs.save(dispatch.tuned_file(), "sm_90", {"forward-16bit-d64": entry})
    dispatch.backend.cache_clear()
    try:
        dispatch.backend("prompt_attention", "triton")
        assert configs.table("sm_90") == shipped["sm_90"] | {"forward-16bit-d64": entry}
    finally:
        dispatch.backend.cache_clear()


def test_it_says_why_triton_cannot_run(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ImplUnavailableError, match="the tensors are on the CPU"):
        warmup(SHAPE, "cpu")
    with pytest.raises(ImplUnavailableError, match="tiles are tuned for a GPU"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        tune(SHAPE, "cpu")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="device: got 'gpu', expected a PyTorch device"):
        warmup(SHAPE, "gpu")
    with pytest.raises(ValueError, match="batch: got -1, expected 1 or more"):
        Shape(batch=-1)
    if not torch.cuda.is_available():
        with pytest.raises(ImplUnavailableError, match="PyTorch sees no CUDA device"):
            warmup(SHAPE)
    assert cli.main(["warmup", "--device", "cpu", "--head-dim", "72"]) == 1
    message = capsys.readouterr().err
    assert "on the CPU" in message and "head size 72 is not one of" in message


def test_command_line(capsys):
    sizes = "--batch 1 --heads 1 --tokens 4 --prompts 2 --head-dim 16 32".split()
    assert cli.main(["warmup", "--device", TRITON_DEVICE, *sizes]) == 0
    assert capsys.readouterr().out.count("ready in") == 2
