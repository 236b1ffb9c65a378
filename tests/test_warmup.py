# SPDX-License-Identifier: Apache-2.0
"""`fastprompt warmup`: kernels run once ahead of time, tiles are tuned only when asked."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import TRITON_DEVICE

from fastprompt import H2O, TOVA, SnapKV, cli, config
from fastprompt.cache import Observed, compress
from fastprompt.errors import ImplUnavailableError
from fastprompt.kernels import configs
from fastprompt.kernels.launch import Launch
from fastprompt.ops import dispatch, key_scores
from fastprompt.warmup import Shape, tune, warmup

SHAPE = Shape(batch=1, heads=2, heads_kv=1, tokens=5, head_dim=16, prompts=3, dtype=torch.float32)


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """No tuned tiles at first, and a cache folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "_tuned", {})
    return configs._tuned


def test_every_kernel_runs_once(monkeypatch):
    seen = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (seen.append(self.kernel.__name__), run(self))[1])
    warmup(SHAPE, TRITON_DEVICE)
    source = "".join(path.read_text() for path in Path(configs.__file__).parent.glob("*.py"))
    assert set(seen) == set(re.findall(r"^def (\w+_kernel)\(", source, re.M))


def test_keys_are_scored_and_merged_in_the_variants_of_a_cache(monkeypatch):
    """Every form in which a cache calls `scores_kernel`: masks are there or not, and pointers that are None compile."""
    seen = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (seen.append(self), run(self))[1])
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

    warm = forms(seen)
    seen.clear()
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
    assert forms(seen) == warm


def test_the_fastest_candidate_is_kept(tuned, capsys):
    tried = []

    def timer(step):
        (name,) = configs._tuned
        tried.append((name, configs._tuned[name]))
        return 1.0 if tried[-1][1] == configs.CANDIDATES[name.split("-")[0]][2] else 2.0

    expected = [{configs.choose(k, 4, 16, 1 << 20, 1 << 20), *c} for k, c in configs.CANDIDATES.items()]
    file = tune(SHAPE, TRITON_DEVICE, timer)
    assert len(tried) == sum(map(len, expected))
    for kernel in configs.KERNELS:
        assert configs.choose(kernel, 4, 16, 1 << 20, 1 << 20) == configs.CANDIDATES[kernel][2]
    assert set(json.loads(file.read_text())) == {configs.slot(kernel, 4, 16) for kernel in configs.KERNELS}
    assert "shipped 2.0000 ms" in capsys.readouterr().out


def test_tuned_tiles_are_read_by_the_next_process(tuned):
    configs.save(dispatch.tuned_file(), {configs.slot("forward", 2, 64): configs.Config(16, 16, 1, 1)})
    dispatch.backend.cache_clear()
    try:
        dispatch.backend("prompt_attention", "triton")
        assert configs.choose("forward", 2, 64, 100, 100) == configs.Config(16, 16, 1, 1)
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
