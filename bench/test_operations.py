# SPDX-License-Identifier: Apache-2.0
"""Single operations under pytest-benchmark: ``pytest bench --benchmark-histogram``; nothing committed comes from it."""

import pytest
import torch

from bench.measure import attempt, synchronize
from bench.run import build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    name: build(name, DEVICE, {})
    for name in (
        "decoupled_attention",
        "prompt_attention",
        "prompt_attention_varlen",
        "prompt_bank",
        "summarize_tokens",
    )
}


@pytest.mark.parametrize(("name", "provider"), [(n, p) for n, case in CASES.items() for p in case.providers])
def test_operation(name, provider, benchmark):
    benchmark.group = name
    chosen = CASES[name].providers[provider]
    step, why_not = (None, chosen.why_not) if chosen.why_not else attempt(chosen.build)
    if why_not is None:
        _, why_not = attempt(step)
    if why_not:
        pytest.skip(why_not)
    benchmark(lambda: (step(), synchronize()))
