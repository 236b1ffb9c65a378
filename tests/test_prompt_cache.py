# SPDX-License-Identifier: Apache-2.0
"""PromptCache in real forwards: dropped keys are masked keys, for every decoder, decoding strategy and padding."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from cache_cases import ALLOWED, Kept, generate, inputs, prompts, stepwise, with_masks
from tiny_decoders import CACHED, DECODERS, PREFIXES, build, leaves, rotate_vision
from tiny_models import assert_close, untouched

import fastprompt
from fastprompt import H2O, TOVA, Decoding, KeyDiff, LookM, PrefixKV, PromptCache, Random, SnapKV, StreamingLLM
from fastprompt.hf import cache_layer
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


# Dropping is masking


@pytest.mark.parametrize("name", [*DECODERS, *CACHED])
def test_every_decoder(name, monkeypatch):
    model, recorded = build(name, torch.float64), Kept(monkeypatch)
    multimodal = name in CACHED
    policy = LookM(0.2, 0.3, merge="drop", overflow="cap") if multimodal else H2O(0.2, 0.3)
    batch = inputs(name, model)
    # Transformers adds hooks in a model's first forward.
    plain = generate(model, batch)
    with untouched(model), fastprompt.compress(model, policy):
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
    budget = policy.budget(SimpleNamespace(lengths=batch["attention_mask"].sum(-1).tolist()))
    for layer in range(3):
        allowed = recorded.allowed(layer)
        assert not (allowed & ~batch["attention_mask"].bool()[:, None]).any()
        assert torch.equal(allowed.sum(-1), torch.tensor(budget)[:, None].expand(-1, 2))
    full, _ = stepwise(build("Llama", torch.float64), batch, 17)
    assert (full[0] - got[0]).abs().max() < 1e-10 and (full[1:] - got[1:]).abs().amax(dim=(1, 2)).min() > 0.01


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
    budget = max(policy.budget(SimpleNamespace(lengths=batch["attention_mask"].sum(-1).tolist())))
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
