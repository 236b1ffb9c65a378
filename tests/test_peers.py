# SPDX-License-Identifier: Apache-2.0
"""Peers that no test machine has, as their documentation describes them."""

import math
import sys
from itertools import pairwise

import pytest
import torch
from bench_cases import TINY

from bench import run
from bench.case import CannotRun, difference


class StandIn:
    """FlashInfer's functions as its documentation has them, in plain PyTorch: log-sum-exps are of powers of 2."""

    @staticmethod
    def attend(query, key, value, causal):
        """``[T,H,D]`` over ``[K,H,D]``, the last query at the last key."""
        q, k, v = (x.transpose(0, 1).double() for x in (query, key, value))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1 + k.shape[1] - q.shape[1]).bool(), -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
        return out, (scores.logsumexp(-1) / math.log(2)).T.float()

    @staticmethod
    def single_prefill_with_kv_cache(q, k, v, *, causal, kv_layout, return_lse):
        assert kv_layout == "HND" and return_lse and k.is_contiguous() and v.is_contiguous()
        return StandIn.attend(q, k.transpose(0, 1), v.transpose(0, 1), causal)

    @staticmethod
    def single_decode_with_kv_cache(q, k, v, kv_layout, use_tensor_cores):
        assert kv_layout == "HND"
        k, v = (x.transpose(0, 1).repeat_interleave(len(q) // len(x), dim=1) for x in (k, v))
        return StandIn.attend(q.unsqueeze(0), k, v, False)[0].squeeze(0)

    @staticmethod
    def merge_state(v_a, s_a, v_b, s_b):
        assert s_a.dtype == s_b.dtype == torch.float32 and s_a.shape == s_b.shape == v_a.shape[:2]
        a = torch.sigmoid((s_a - s_b) * math.log(2)).unsqueeze(-1)
        return (a * v_a + (1 - a) * v_b).to(v_a.dtype), torch.logaddexp2(s_a, s_b)

    class BatchPrefillWithRaggedKVCacheWrapper:
        def __init__(self, float_workspace_buffer, kv_layout):
            assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"

        def plan(self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, *, causal, q_data_type):
            assert qo_indptr.dtype == torch.int32 and num_qo_heads == num_kv_heads
            self.planned = qo_indptr.tolist(), causal, q_data_type

        def run(self, q, k, v, *, return_lse):
            ends, causal, dtype = self.planned
            assert return_lse and q.dtype == dtype
            parts = [StandIn.attend(q[a:b], k[a:b], v[a:b], causal) for a, b in pairwise(ends)]
            return tuple(torch.cat(x) for x in zip(*parts, strict=True))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("prompt_attention", {"mode": "forward"}),
        ("prompt_attention_varlen", {"mode": "forward"}),
        ("decode_attention", {}),
    ],
)
def test_flashinfer_is_called_as_documented(name, settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", StandIn)
    monkeypatch.setattr(f"bench.cases.{name}.missing", lambda *args: None)
    case = run.build(name, "cpu", TINY[name] | settings)
    want = case.reference()
    found = [difference(case, n, want) for n in case.providers if n.startswith("flashinfer")]
    assert found and all(0 < x < 0.02 for x in found)
    single = run.build(name, "cpu", TINY[name] | settings | {"dtype": "float32"})
    with pytest.raises(CannotRun, match=r"flashinfer takes no torch\.float32"):
        single.providers["flashinfer"].check()


def test_flashinfer_does_not_train():
    case = run.build("prompt_attention", "cpu", TINY["prompt_attention"])
    assert case.providers["flashinfer"].why_not == "flashinfer has no backward"
