# SPDX-License-Identifier: Apache-2.0
"""PromptCache in real forwards: dropped keys are masked keys, for every decoder, decoding strategy and padding."""

import copy
import importlib
from itertools import pairwise

import pytest
import torch
from cache_cases import ALLOWED, Kept, generate, inputs, probabilities, prompts, with_masks
from tiny_decoders import CACHED, DECODERS, PREFIXES, build, leaves, rotate_vision
from tiny_models import assert_close, untouched
from transformers import DynamicCache

import fastprompt
from fastprompt import TOVA, Decoding, H2O, KeyDiff, LookM, PrefixKV, PromptCache, Random, SnapKV, StreamingLLM
from fastprompt.hf import cache_layer
from fastprompt.hf.attention import observe
from fastprompt.hf.sites import choose_tower

DROPPING = [
    LookM(0.2, 0.2, merge="drop", text_prior=False), H2O(0.2, 0.2), SnapKV(0.4, window=4), TOVA(0.4),
    StreamingLLM(0.4), KeyDiff(0.4), Random(0.4),
]  # fmt: skip
STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "three samples": {"do_sample": True, "num_return_sequences": 3},
    "chunks": {"prefill_chunk_size": 7},
}


@pytest.fixture(autouse=True)
def exact_rotation(monkeypatch):
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        monkeypatch.setattr(module, "apply_rotary_pos_emb_vision", rotate_vision)


def together(got, want):
    """The same tokens for the same reasons; generate gives float32 scores."""
    assert torch.equal(got.sequences, want.sequences)
    scores = [torch.stack(x.scores) for x in (got, want)]
    finite = scores[1].isfinite()
    assert torch.equal(scores[0].isfinite(), finite)
    assert_close({"": scores[0][finite]}, {"": scores[1][finite]})


@torch.no_grad()
def stepwise(model, batch, steps, cache=None, before=lambda: None):
    """float64 logits of the last prompt token and of ``steps`` given tokens after it; ``before`` runs between them."""
    generator = torch.Generator().manual_seed(3)
    given = torch.randint(3, 40, (len(batch["input_ids"]), steps), generator=generator)
    mask, found = batch["attention_mask"], []
    out = model(**batch, past_key_values=cache, use_cache=True)
    for i in range(steps + 1):
        found.append(out.logits[:, -1])
        if i == steps:
            return torch.stack(found), out.past_key_values
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        before()
        tokens = given[:, i : i + 1]
        out = model(input_ids=tokens, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)


# Dropping is masking


@pytest.mark.parametrize("name", [*DECODERS, *CACHED])
def test_every_decoder(name, monkeypatch):
    model, recorded = build(name, torch.float64), Kept(monkeypatch)
    multimodal = name in CACHED
    policy = LookM(0.2, 0.3, merge="drop", overflow="cap") if multimodal else H2O(0.2, 0.3)
    batch = inputs(name, model)
    with untouched(model):
        plain = generate(model, batch)
        with fastprompt.compress(model, policy):
            got = generate(model, batch)
    assert isinstance(got.past_key_values, PromptCache)
    kept = got.past_key_values.stats()
    length = batch["input_ids"].shape[1]
    assert len(kept) == (1 if "sliding" in name else 3)
    assert all(x.seen == length + 9 and x.kept == int(0.2 * length) + int(0.3 * length) + 9 for x in kept)
    other = with_masks(build(name, torch.float64))
    recorded.apply(other)
    together(got, generate(other, batch))
    assert not torch.allclose(plain.scores[-1], got.scores[-1], atol=0.01)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("policy", DROPPING, ids=repr)
def test_a_long_decode_sees_a_full_cache_without_the_dropped_keys(policy, padding, monkeypatch):
    model, other = build("Llama", torch.float64), with_masks(build("Llama", torch.float64))
    recorded, batch = Kept(monkeypatch), prompts(padding)
    monkeypatch.setattr(cache_layer, "ROOM", 5)
    got, cache = stepwise(model, batch, 17, PromptCache(model, policy))
    other_mask = []

    def mask():
        if not other_mask:
            recorded.apply(other)
            other_mask.append(True)

    want, _ = stepwise(other, batch, 17, before=mask)
    assert_close({"": got}, {"": want})
    assert torch.equal(torch.tensor([cache.get_seq_length(i) for i in range(3)]), torch.tensor([47] * 3))
    lengths = batch["attention_mask"].sum(-1)
    for layer in range(3):
        allowed = recorded.allowed(layer)
        assert not (allowed & ~batch["attention_mask"].bool()[:, None]).any()
        assert (allowed.sum(-1) == policy.budget(_lengths(lengths))[0] if padding is None else allowed.any()).all()
    full, _ = stepwise(build("Llama", torch.float64), batch, 17)
    assert (full[0] - got[0]).abs().max() < 1e-10 and (full[1:] - got[1:]).abs().amax(dim=(1, 2)).min() > 0.01


class _lengths:  # noqa: N801
    """Stands in for what a policy sees, as far as budgets go."""

    def __init__(self, lengths):
        self.lengths = lengths.tolist()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("policy", [H2O(0.2, 0.2), SnapKV(0.4, window=4)], ids=["H2O", "SnapKV"])
def test_every_strategy(strategy, policy, monkeypatch):
    model, recorded = build("Qwen3", torch.float64), Kept(monkeypatch)
    options = STRATEGIES[strategy]
    with fastprompt.compress(model, policy):
        got = generate(model, prompts("left"), **options)
    other = with_masks(build("Qwen3", torch.float64))
    recorded.apply(other)
    # The masked model must not take chunks for what comes after the prompt.
    together(got, generate(other, prompts("left"), **{k: v for k, v in options.items() if "chunk" not in k}))


@pytest.mark.parametrize("policy", DROPPING, ids=repr)
@pytest.mark.parametrize("chunk", [4, 11])
def test_chunks_keep_what_the_whole_prompt_keeps(policy, chunk, monkeypatch):
    model = build("Llama", torch.float64)
    found = []
    for size in (None, chunk):
        recorded = Kept(monkeypatch)
        with fastprompt.compress(model, policy):
            out = generate(model, prompts("left"), prefill_chunk_size=size)
        found.append(([recorded.allowed(i) for i in range(3)], out.sequences))
    assert all(torch.equal(a, b) for a, b in zip(*(x for x, _ in found), strict=True))
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("policy", [Decoding(SnapKV(9, window=3), every=4), Decoding(StreamingLLM(0.3), every=5),
                                    Decoding(KeyDiff(40), every=4)], ids=repr)  # fmt: skip
def test_decoding_returns_to_the_budget(policy, monkeypatch):
    model, other = build("Llama", torch.float64), with_masks(build("Llama", torch.float64))
    recorded, batch, held = Kept(monkeypatch), prompts("left"), []
    cache = PromptCache(model, policy)
    steps, ours = [], []

    def remember():
        # What is kept when the next token comes is known once it came: `allowed` of the forward before.
        ours.append({i: recorded.allowed(i) for i in recorded.positions})
        held.append(cache.stats()[0].kept)

    got, _ = stepwise(model, batch, 25, cache, before=remember)
    remember()

    def mask():
        steps.append(True)
        recorded.positions = {}
        for layer, allowed in ours[len(steps)].items():
            ALLOWED[choose_tower(other, "text").attentions[layer]] = allowed

    want, _ = stepwise(other, batch, 25, before=mask)
    assert_close({"": got}, {"": want})
    budget = max(policy.budget(_lengths(batch["attention_mask"].sum(-1))))
    assert max(held[1:]) == budget + policy.every and len(recorded.policies) > 3 * 2
    with pytest.raises(AssertionError):
        full, _ = stepwise(build("Llama", torch.float64), batch, 25)
        assert_close({"": got}, {"": full})


def test_prefixes_take_part():
    """Attached prompts are in the log-sum-exp that scores are made of, and stay visible to every token."""
    model = build("Llama", torch.float64)
    handle = fastprompt.attach(model, PrefixKV(5, init="ptuning"))
    other = with_masks(build("Llama", torch.float64))
    pairs = leaves(handle)
    attentions = choose_tower(other, "text").attentions
    PREFIXES.update({attentions[i]: lambda pair=pair: pair for i, pair in pairs.items()})
    with pytest.MonkeyPatch.context() as patch:
        recorded = Kept(patch)
        with fastprompt.compress(model, H2O(0.2, 0.2)):
            got = generate(model, prompts("left"))
        recorded.apply(other)
    together(got, generate(other, prompts("left")))


# What is not compressed


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "policy",
    [H2O(0.5, 0.5), LookM(1.0, 0.0, text_prior=False), SnapKV(1.0), KeyDiff(30), SnapKV(64, window=4), H2O(100, 1)],
    ids=repr,
)
def test_a_budget_of_the_whole_prompt_changes_no_token(policy, strategy):
    model, options = build("Llama"), STRATEGIES[strategy]
    plain = generate(model, prompts("left"), **options)
    with fastprompt.compress(model, policy):
        got = generate(model, prompts("left"), **options)
    assert torch.equal(got.sequences, plain.sequences)
    if policy.keeps_all:
        assert all(torch.equal(a, b) for a, b in zip(got.scores, plain.scores, strict=True))


@pytest.mark.parametrize("name", CACHED)
def test_images_under_a_whole_budget(name):
    model = build(name)
    batch = inputs(name, model)
    plain = generate(model, batch)
    for policy in (LookM(0.4, 0.6), LookM(500, 500)):
        with fastprompt.compress(model, policy):
            assert torch.equal(generate(model, batch).sequences, plain.sequences)


def test_padding_changes_no_token():
    model = build("Llama", torch.float64)
    with fastprompt.compress(model, H2O(0.2, 0.2)):
        batch = prompts("left")
        found = generate(model, batch)
        for i, n in enumerate(batch["attention_mask"].sum(-1).tolist()):
            alone = generate(model, {"input_ids": batch["input_ids"][i : i + 1, -n:]})
            assert torch.equal(alone.sequences[0, -10:], found.sequences[i, -10:])
            got = torch.stack([s[i] for s in found.scores])
            want = torch.stack([s[0] for s in alone.scores])
            assert_close({"": got[got.isfinite()]}, {"": want[want.isfinite()]})


def test_prompts_of_one_token():
    model = build("Llama")
    batch = {"input_ids": torch.tensor([[5], [6]])}
    plain = generate(model, batch)
    for policy in (H2O(), KeyDiff(0.5), SnapKV()):
        with fastprompt.compress(model, policy):
            assert torch.equal(generate(model, batch).sequences, plain.sequences)


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
