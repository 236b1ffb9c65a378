# SPDX-License-Identifier: Apache-2.0
"""PromptCache in what surrounds a forward: autocast, inference mode, default devices, compiling, masks that change."""

import importlib

import pytest
import torch
from cache_cases import generate, inputs, prompts
from tiny_decoders import CACHED, build, rotate_vision
from transformers import DynamicCache

import fastprompt
from fastprompt import H2O, AdaKV, Decoding, KeyDiff, LookM, PromptCache, Random, SnapKV, StreamingLLM
from fastprompt.errors import AttachError, UnsupportedModelError

POLICIES = [
    H2O(0.2, 0.2), SnapKV(0.3, window=4), KeyDiff(0.3), Random(0.3), LookM(0.2, 0.2, text_prior=False),
    AdaKV(SnapKV(0.3, window=4)),
]  # fmt: skip


def forward(model, ids, mask, cache):
    """Logits of some tokens; ``mask`` is of all so far."""
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits


def longer(mask, columns):
    return torch.cat([mask, torch.tensor(columns, dtype=mask.dtype)], dim=1)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_autocast(policy):
    """Rotation under autocast leaves keys in float32 beside values in bfloat16; decoding may leave the context, too."""
    model, batch = build("Llama"), prompts("left")
    mask, token = batch["attention_mask"], batch["input_ids"][:, :1]
    with fastprompt.compress(model, policy), torch.autocast("cpu", torch.bfloat16):
        assert generate(model, batch).sequences.shape == (3, 40)
    cache = PromptCache(model, policy)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            forward(model, batch["input_ids"], mask, cache)
        got = forward(model, token, longer(mask, [[1]] * 3), cache)
    assert got.isfinite().all() and cache.stats()[0].kept < 30


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_what_inference_mode_began_goes_on_without(policy, steps):
    model, batch = build("Llama", torch.float64), prompts("left")
    found = []
    for context in (torch.inference_mode, torch.no_grad):
        cache, mask = PromptCache(model, policy), batch["attention_mask"]
        with context():
            forward(model, batch["input_ids"], mask, cache)
            for _ in range(steps):
                mask = longer(mask, [[1]] * 3)
                forward(model, batch["input_ids"][:, :1], mask, cache)
        with torch.no_grad():
            for _ in range(3):
                mask = longer(mask, [[1]] * 3)
                found.append(forward(model, batch["input_ids"][:, 1:2], mask, cache))
    for got, want in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_default_device_does_not_matter(policy):
    """Whatever it is: "meta" holds no numbers, so every tensor that lands there by mistake fails."""
    model, batch, kept = build("Llama"), prompts("left"), []
    for device in ("cpu", "meta"):
        cache = PromptCache(model, policy)
        with torch.no_grad():
            forward(model, batch["input_ids"], batch["attention_mask"], cache)
        with torch.device(device):
            cache.finalize()
        kept.append(cache.layers[0].keys)
    assert torch.equal(*kept)


@pytest.mark.parametrize("part", ["forward", "layer"])
def test_a_compiled_model_is_refused(part):
    model, batch = build("Llama"), prompts()
    if part == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    with fastprompt.compress(model, H2O(0.2, 0.2)), pytest.raises(AttachError, match="the model is compiled"):
        generate(model, batch)
    torch._dynamo.reset()


@pytest.mark.parametrize("hidden", ["a step", "an earlier turn"])
def test_masks_after_the_prompt_hide(hidden):
    """As with the plain cache: a sample that goes on later than others, and padding of a turn that is over."""
    model, batch = build("Llama", torch.float64), prompts("left")
    found = []
    for cache in (DynamicCache(config=model.config), PromptCache(model, SnapKV(1.0))):
        mask, ids = batch["attention_mask"], batch["input_ids"]
        with torch.no_grad():
            forward(model, ids, mask, cache)
            for i in range(4):
                mask = longer(mask, [[1], [int(hidden != "a step" or i != 1)], [1]])
                forward(model, ids[:, i : i + 1] * 0 + 7, mask, cache)
            if hidden == "an earlier turn":
                mask[1, -2:] = 0
            mask = longer(mask, [[1] * 5] * 3)
            found.append(forward(model, ids[:, -5:], mask, cache))
            mask = longer(mask, [[1]] * 3)
            found.append(forward(model, ids[:, -1:], mask, cache))
    for got, want in zip(found[2:], found[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_prompt_cannot_be_hidden_later(rows):
    model, batch = build("Llama"), prompts("left")
    cache, mask = PromptCache(model, SnapKV(0.3, window=4)), batch["attention_mask"]
    with torch.no_grad():
        forward(model, batch["input_ids"], mask, cache)
        cache.finalize()
        changed = longer(mask, [[1] * rows] * 3)
        changed[0, 3] = 0
        with pytest.raises(ValueError, match="got other zeros among the 30 tokens of the prompt"):
            forward(model, batch["input_ids"][:, :rows], changed, cache)
        forward(model, batch["input_ids"][:, :rows], longer(mask, [[1] * rows] * 3), cache)


def test_another_batch_is_refused():
    model, batch = build("Llama"), prompts()
    cache = PromptCache(model, H2O(0.2, 0.2))
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        with pytest.raises(ValueError, match="got 1 samples, expected 3, as many as the cache holds"):
            model(input_ids=batch["input_ids"][:1, :1], past_key_values=cache)


def test_layers_that_share_keys_are_refused():
    model = build("Llama")
    model.config.num_kv_shared_layers = 1
    with pytest.raises(UnsupportedModelError, match="last 1 layers of LlamaForCausalLM read keys that another"):
        PromptCache(model, H2O())


def test_an_image_mask_follows_the_batch():
    model, batch = build("Llama", torch.float64), prompts()
    images = torch.zeros(3, 30, dtype=torch.bool)
    images[0, 5:15], images[1, 12:22], images[2, 2:12] = True, True, True
    order, found = torch.tensor([2, 0, 1]), []
    for swapped in (False, True):
        mask, ids = (images[order], batch["input_ids"][order]) if swapped else (images, batch["input_ids"])
        cache = PromptCache(model, LookM(0.1, 0.1), image_mask=mask)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
        if not swapped:
            cache.batch_select_indices(order)
        cache.finalize()
        found.append(cache.layers[1].keys)
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_a_last_chunk_of_one_token_is_behind_the_prompt():
    """It counts as generated; masks of images have it, too."""
    model, batch = build("Llama"), prompts()
    images = torch.zeros(3, 30, dtype=torch.bool)
    images[:, 5:15] = True
    cache = PromptCache(model, LookM(0.2, 0.2), image_mask=images)
    got = generate(model, batch, past_key_values=cache, prefill_chunk_size=29)
    assert got.sequences.shape == (3, 40) and cache.stats()[0].kept < 39


def test_a_policy_that_keeps_all_keeps_what_decoding_adds():
    model, batch = build("Llama"), prompts("left")
    want = generate(model, batch)
    with fastprompt.compress(model, Decoding(StreamingLLM(1.0), every=4)):
        got = generate(model, batch)
    assert torch.equal(got.sequences, want.sequences)
    assert {x.kept for x in got.past_key_values.stats()} == {39}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("name", CACHED)
def test_every_strategy_of_a_multimodal_model(name, options, monkeypatch):
    """A whole budget gives the plain cache's tokens; LOOK-M compresses."""
    for module in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        path = f"transformers.models.{module}.modeling_{module}"
        monkeypatch.setattr(importlib.import_module(path), "apply_rotary_pos_emb_vision", rotate_vision)
    model = build(name, torch.float64)
    batch = inputs(name, model)
    want = generate(model, batch, **options)
    with fastprompt.compress(model, SnapKV(1.0)):
        assert torch.equal(generate(model, batch, **options).sequences, want.sequences)
    with fastprompt.compress(model, LookM(0.2, 0.3, overflow="cap")):
        got = generate(model, batch, **options)
    assert got.sequences.shape == want.sequences.shape
    assert all(x.kept < x.seen for x in got.past_key_values.stats())
