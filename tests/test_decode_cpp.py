# SPDX-License-Identifier: Apache-2.0
"""Steps of generation on the C++ kernels: few query rows over many keys, also of caches with ragged heads."""

import oracles
import pytest
import torch
from attention_cases import check, make
from cpp_cases import isa, needs_cpp  # noqa: F401
from oracles import assert_close, tolerance
from tiny_decoders import build
from transformers import DynamicCache

import fastprompt
from fastprompt.cache.blocks import Blocks
from fastprompt.hf import attention
from fastprompt.ops.cpp import decode_blocks

pytestmark = needs_cpp
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "heads_kv", "tq"), [(1, 1, 1), (6, 2, 1), (9, 3, 1), (16, 1, 1), (4, 2, 8)])
def test_few_queries_over_many_keys(heads, heads_kv, tq, dtype, isa):  # noqa: F811
    """Ranges of 512 keys, the last of one key, and prompts in front."""
    for tk in (511, 1025):
        inputs = make(dtype, 2, heads, heads_kv, tq, tk, prompts=3, dim=64)
        check(inputs, impl="cpp")
        visible = torch.rand(2, 1, 1, tk) < 0.5
        visible[..., :520] = False  # a whole range that nobody sees
        check(inputs, impl="cpp", attn_mask=visible, is_causal=tq > 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_heads(dtype, isa):  # noqa: F811
    """Every head of every sample has a number of keys of its own, none too, and new tokens that all have."""
    counts, dim = [[3, 600, 0], [17, 1, 130]], 40
    total = sum(map(sum, counts))
    key, value = (torch.randn(total, dim).to(dtype) for _ in range(2))
    new_key, new_value = (torch.randn(2, 3, 2, dim).to(dtype) for _ in range(2))
    query = torch.randn(2, 6, 1, dim).to(dtype)
    ends = torch.tensor([0, *(n for of_sample in counts for n in of_sample)]).cumsum(0)
    out, lse = decode_blocks.forward(query, new_key, new_value, key, value, ends, 0.3)
    for i in range(6):
        s, h, rows = i // 3, i % 3, slice(int(ends[i]), int(ends[i + 1]))
        one = [query[s : s + 1, 2 * h : 2 * h + 2]]
        one += [torch.cat([x[rows], y[s, h]])[None, None] for x, y in ((key, new_key), (value, new_value))]
        none = key.new_empty(1, 1, 0, dim)
        exact, noise = oracles.prompt_attention(*one, none, none, scale=0.3)
        plain = oracles.plain_prompt_attention(*one, none, none, scale=0.3)
        place = (slice(s, s + 1), slice(2 * h, 2 * h + 2))
        assert_close("out", out[place], exact.out, tolerance(exact.out, plain.out, noise.out))
        assert_close("lse", lse[place], exact.lse, tolerance(exact.lse, plain.lse, noise.lse))


def test_blocks_take_one_call(monkeypatch):
    """And give what the composition gives, which goes from head to head."""
    counts = [[3, 60], [17, 1]]
    key, value = (torch.randn(81, 1, 16) for _ in range(2))
    query, new = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16)
    calls, forward = [], decode_blocks.forward
    monkeypatch.setattr(decode_blocks, "forward", lambda *args: (calls.append(args), forward(*args))[1])
    for more in ((), (0.25, new, new)):
        got = Blocks(key, value, counts).attend(query, *more)
        assert len(calls) == 1
        with monkeypatch.context() as patch:
            patch.setattr("fastprompt.ops.dispatch.CPP_OPS", ())
            want = Blocks(key, value, counts).attend(query, *more)
        assert len(calls) == 1
        torch.testing.assert_close(got, want)
        calls.clear()


def test_many_queries_over_blocks_go_from_head_to_head(monkeypatch):
    """The kernel for a few rows would keep a partial result of each for every range of keys."""
    key, value = (torch.randn(81, 1, 16) for _ in range(2))
    monkeypatch.setattr(decode_blocks, "forward", None)
    out, _ = Blocks(key, value, [[3, 60], [17, 1]]).attend(torch.randn(2, 4, decode_blocks.MOST_ROWS // 2 + 1, 16))
    assert out.shape == (2, 4, 9, 16)


def test_a_compressed_cache_decodes_on_the_kernel_and_a_whole_one_as_the_model_does(monkeypatch):
    model, seen = build("Llama"), []
    decode = attention._decode
    monkeypatch.setattr(attention, "_decode", lambda *args: (seen.append(args), decode(*args))[1])
    ids = torch.randint(5, model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    steps = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_scores": True,
             "return_dict_in_generate": True}  # fmt: skip
    plain = model.generate(ids, past_key_values=DynamicCache(config=model.config), **steps)
    with fastprompt.compress(model, fastprompt.H2O(1.0, 0.0)):
        whole = model.generate(ids, **steps)
    assert not seen and all(map(torch.equal, whole.scores, plain.scores))
    with fastprompt.compress(model, fastprompt.H2O(0.2, 0.2)):
        got = model.generate(ids, **steps)
    assert seen
    monkeypatch.setattr("fastprompt.ops.dispatch.CPP_OPS", ())
    seen.clear()
    with fastprompt.compress(model, fastprompt.H2O(0.2, 0.2)):
        want = model.generate(ids, **steps)
    assert not seen
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-4, atol=1e-4)
