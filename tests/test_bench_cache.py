# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of cache compression, tiny."""

import pytest
import torch
from bench_cases import TINY, agreed

from bench.cases import key_scores
from bench.run import build


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_key_scores_agree_with_the_matrix(dtype, monkeypatch):
    monkeypatch.setattr(key_scores, "CHUNK", 32)
    case = build("key_scores", "cpu", TINY["key_scores"] | {"dtype": dtype})
    compared, reasons = agreed(case)
    assert {"eager", "chunked", "fastprompt", "fastprompt/reference"} <= compared
    assert set(case.providers) - compared - set(reasons) == {"flash", "forward"}
    case.providers["flash"].build()()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_prefill_is_exact_whatever_is_kept(dtype):
    case = build("prefill_compress", "cpu", TINY["prefill_compress"] | {"dtype": dtype})
    assert agreed(case) == (set(case.providers), {})


def test_decoding_goes_on_behind_every_cache():
    case = build("decode", "cpu", TINY["decode"])
    for provider in case.providers.values():
        step = provider.build()
        assert [x.shape for x in step() + step()] == [(1, 1), (1, 1)]


def test_kvpress_is_asked_for_where_it_is_not_installed():
    case = build("prefill_kvpress", "cpu", TINY["prefill_kvpress"])
    compared, reasons = agreed(case)
    assert "plain" in compared and compared | set(reasons) == set(case.providers)
    assert all("kvpress is not installed" in why_not for why_not in reasons.values())


def test_lookm_as_published_is_what_compress_kv_computes():
    """On inputs without near ties."""
    providers = build("compress_kv", "cpu", TINY["compress_kv"] | {"dtype": "float32"}).providers
    for got, want in zip(providers["published"].build()(), providers["fastprompt/reference"].build()(), strict=True):
        torch.testing.assert_close(got, want)
    assert build("compress_kv", "cpu", TINY["compress_kv"] | {"merge": "average"}).providers["published"].why_not
