# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of cache compression, tiny."""

import pytest
import torch
from bench_cases import TINY, agreed

from bench.cases import key_scores, prefill_compress
from bench.run import build

SMALL = prefill_compress.MODELS["SmolLM2-135M"][2].sized(2, 72, 31)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_key_scores_agree_with_the_matrix(dtype, monkeypatch):
    monkeypatch.setattr(key_scores, "CHUNK", 32)
    case = build("key_scores", "cpu", TINY["key_scores"] | {"dtype": dtype})
    compared, reasons = agreed(case)
    assert {"eager", "chunked", "fastprompt", "fastprompt/reference"} <= compared
    assert set(case.providers) - compared - set(reasons) == {"flash", "forward"}
    case.providers["flash"].build()()


QWEN = {"model": "Qwen2.5-VL-7B", "width": 224}


@pytest.mark.parametrize("more", [{"dtype": "bfloat16"}, {"dtype": "float32"}, QWEN], ids=str)
def test_prefill_is_exact_whatever_is_kept(more):
    case = build("prefill_compress", "cpu", TINY["prefill_compress"] | more)
    assert agreed(case) == (set(case.providers), {})


@pytest.mark.parametrize("more", [{}, QWEN | {"batch": 2, "clock": "device"}], ids=str)
def test_decoding_goes_on_behind_every_cache(more):
    case = build("decode", "cpu", TINY["decode"] | more)
    batch = more.get("batch", 1)
    for provider in case.providers.values():
        step = provider.build()
        assert [x.shape for x in step() + step()] == [(batch, 1), (batch, 1)]


def test_a_token_reads_the_weights_and_the_cache_of_every_sample():
    """28 layers of 3584: 7.07 G numbers without the embedding; 4 heads of 128 a token and layer, twice."""
    providers = build("decode", "cpu", {"tokens": 1000, "model": "Qwen2.5-VL-7B", "batch": 8}).providers
    read = 152064 * 3584 + 28 * (2 * 3584 * (3584 + 512) + 3 * 3584 * 18944)
    assert providers["plain"].work.bytes == 16 * 2 * (read + 8 * 1000 * 28 * 2 * 512)
    assert providers["lookm 20%"].work.bytes == 16 * 2 * (read + 8 * 200 * 28 * 2 * 512)


def test_all_providers_hold_one_copy_of_the_weights():
    lm = prefill_compress.decoder("cpu", torch.float32, "SmolLM2-135M", SMALL, 40)
    other = prefill_compress.sharing(lm)
    assert other is not lm and other.config is not lm.config
    assert {p.data_ptr() for p in other.parameters()} == {p.data_ptr() for p in lm.parameters()}


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
