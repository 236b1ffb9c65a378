# SPDX-License-Identifier: Apache-2.0
"""What PromptCache observes and holds, and its use by hand: bytes, places, several questions, copies."""

import copy
from itertools import pairwise

import pytest
import torch
from cache_cases import Kept, generate, inputs, probabilities, prompts, stepwise, with_masks
from tiny_decoders import build
from tiny_models import assert_close
from transformers import DynamicCache

from fastprompt import H2O, Decoding, KeyDiff, LookM, PromptCache, SnapKV
from fastprompt.hf import cache_layer
from fastprompt.hf.attention import observe

# Observing


def test_column_sums_are_those_of_the_matrix():
    """Of every layer, over chunks and left padding; over keys they sum to the number of live rows."""
    model, batch = build("Llama", torch.float64), prompts("left")
    calls = []
    with torch.no_grad(), observe(lambda module, query, key, value: calls.append((query, key))):
        cache = PromptCache(model, H2O())
        for start, end in ((0, 13), (13, 30)):
            model(batch["input_ids"][:, start:end], batch["attention_mask"][:, :end], past_key_values=cache)
    valid = batch["attention_mask"].bool()
    for i, layer in enumerate(cache.layers):
        query, key = torch.cat([calls[i][0], calls[i + 3][0]], dim=2), calls[i + 3][1]
        attention, _ = probabilities(query, key, valid)
        want = attention.sum(dim=2).view(3, 2, 2, 30).mean(dim=2)
        assert (layer._sums - want).abs().max() <= 1e-12 * want.max()
        assert (layer._sums.sum(-1) - valid.sum(-1, keepdim=True)).abs().max() <= 1e-12 * 30


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_window_keeps_no_more_queries_than_it_needs(padding):
    model, batch = build("Llama"), prompts(padding)
    with torch.no_grad():
        cache = PromptCache(model, SnapKV(window=4))
        model(**batch, past_key_values=cache)
    rows = {x._query.shape[2] for x in cache.layers}
    # The shortest sentence has 12 tokens of 30: its last 4 begin 22 from the end where it is padded on the right.
    assert rows == {4 if padding == "left" else 22}
    assert all(x._query.untyped_storage().nbytes() == x._query.nbytes for x in cache.layers)


# Memory


@pytest.mark.parametrize("policy", [H2O(0.1, 0.1), SnapKV(6, window=4), KeyDiff(0.2)], ids=repr)
def test_bytes(policy):
    model, batch = build("Llama"), prompts()
    with torch.no_grad():
        cache = PromptCache(model, policy)
        model(**batch, past_key_values=cache)
        states = 3 * 2 * 3 * 2 * 30 * 8 * 4
        assert states <= cache.nbytes() < 1.6 * states
        model(batch["input_ids"][:, :1], past_key_values=cache)
    # Three layers, keys and values, three sentences, two heads, six keys and room, eight floats.
    assert cache.nbytes() == 3 * 2 * 3 * 2 * (6 + cache_layer.ROOM) * 8 * 4
    assert [(x.layer, x.seen, x.kept) for x in cache.stats()] == [(i, 31, 7) for i in range(3)]
    assert sum(x.nbytes for x in cache.stats()) == cache.nbytes()
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.nbytes() // 2


def test_steps_write_in_place(monkeypatch):
    monkeypatch.setattr(cache_layer, "ROOM", 6)
    model, batch = build("Llama"), prompts()
    places = []

    def remember():
        if cache.stats()[0].seen > 30:
            places.append(cache.layers[0].keys.data_ptr())

    cache = PromptCache(model, KeyDiff(0.2))
    stepwise(model, batch, 15, cache, before=remember)
    assert len(places) == 14 and sum(a != b for a, b in pairwise(places)) == 2


# Use by hand


def test_a_cache_answers_several_questions_in_turn():
    """New prompts after the first are appended to what was kept, padding and all."""
    model, other = build("Llama", torch.float64), with_masks(build("Llama", torch.float64))
    batch, more = prompts("left"), torch.tensor([[7, 8, 9, 4], [5, 6, 0, 0], [3, 0, 0, 0]])
    mask = torch.cat([batch["attention_mask"], (more != 0).long()], dim=1)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        recorded = Kept(patch)
        cache, plain = PromptCache(model, H2O(0.2, 0.2)), DynamicCache(config=other.config)
        model(**batch, past_key_values=cache)
        cache.finalize()
        other(**batch, past_key_values=plain)
        recorded.apply(other)
        got = model(more, mask, past_key_values=cache).logits
        want = other(more, mask, past_key_values=plain).logits
        assert_close({"": got[more != 0]}, {"": want[more != 0]})
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
        got = model(more[:, :1], mask, past_key_values=cache).logits
        assert_close({"": got}, {"": other(more[:, :1], mask, past_key_values=plain).logits})


def test_a_reset_cache_is_as_new():
    model, batch = build("Llama"), prompts("left")
    cache = PromptCache(model, SnapKV(0.3, window=4))
    first = generate(model, batch, past_key_values=cache).sequences
    assert cache.get_seq_length() == 39
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes() == 0
    assert torch.equal(generate(model, batch, past_key_values=cache).sequences, first)


def test_a_copy_goes_its_own_way():
    """One prompt, several questions."""
    model, batch = build("Llama", torch.float64), prompts("left")
    found = []
    with torch.no_grad():
        cache = PromptCache(model, H2O(0.2, 0.2))
        model(**batch, past_key_values=cache)
        for _ in range(2):
            other = copy.deepcopy(cache)
            assert other.nbytes() == cache.nbytes() and other.model is model
            steps = [model(torch.full((3, 1), t), past_key_values=other).logits for t in (5, 6)]
            found.append(torch.cat(steps, dim=1))
            assert cache.get_seq_length() == 30 and other.get_seq_length() == 32
            cache.finalize()
        mine = [model(torch.full((3, 1), t), past_key_values=cache).logits for t in (5, 6)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], torch.cat(mine, dim=1))


def test_batches_can_be_repeated_and_chosen():
    model, batch = build("Llama", torch.float64), prompts("left")
    found = []
    for change in ("before", "after"):
        cache = PromptCache(model, Decoding(SnapKV(0.3, window=4), every=2))
        with torch.no_grad():
            model(**batch, past_key_values=cache)
            if change == "after":
                cache.finalize()
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([1, 2, 4]))
            cache.reorder_cache(torch.tensor([2, 0, 1]))
            mask = batch["attention_mask"][[2, 0, 1]]
            for token in (5, 6, 7, 8):
                mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
                out = model(torch.full((3, 1), token), mask, past_key_values=cache)
        found.append(out.logits)
    plain = PromptCache(model, Decoding(SnapKV(0.3, window=4), every=2))
    with torch.no_grad():
        mask = batch["attention_mask"][[2, 0, 1]]
        model(batch["input_ids"][[2, 0, 1]], mask, past_key_values=plain)
        for token in (5, 6, 7, 8):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            out = model(torch.full((3, 1), token), mask, past_key_values=plain)
    for got in found:
        assert_close({"": got}, {"": out.logits})


def test_image_positions_can_be_given():
    model, batch = build("LLaVA, CLIP", torch.float64), inputs("LLaVA, CLIP", build("LLaVA, CLIP"))
    batch = {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}
    images = batch["input_ids"] == model.config.image_token_id
    found = generate(model, batch, past_key_values=PromptCache(model, LookM(0.1, 0.3)), num_beams=2)
    given = generate(
        model, batch, past_key_values=PromptCache(model, LookM(0.1, 0.3), image_mask=images), num_beams=2
    )  # fmt: skip
    assert torch.equal(found.sequences, given.sequences)
    text = build("Llama", torch.float64)
    cache = PromptCache(text, LookM(0.1, 0.1, merge="drop"), image_mask=torch.arange(30)[None] < 20)
    generate(text, prompts(), past_key_values=cache)
    assert [x.kept for x in cache.stats()] == [10 + 9] * 3
