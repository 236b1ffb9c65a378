# SPDX-License-Identifier: Apache-2.0
"""What a compressing cache refuses, and what it leaves of a model: nothing, whoever lets go first."""

import gc

import pytest
import torch
from cache_cases import generate, inputs, prompts
from tiny_decoders import DECODER, build
from tiny_models import build as build_tower
from tiny_models import randomised, untouched
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import fastprompt
from fastprompt import (
    H2O,
    AttachError,
    KeyDiff,
    LookM,
    PrefixKV,
    PromptCache,
    SnapKV,
    StreamingLLM,
    UnsupportedModelError,
)

IDS = prompts()["input_ids"]


@pytest.fixture
def model():
    return build("Llama")


# The model is put back


def test_a_closed_or_forgotten_cache_leaves_nothing(model):
    with untouched(model):
        cache = PromptCache(model, H2O())
        assert model.config._attn_implementation == "fastprompt"
        generate(model, prompts("left"), past_key_values=cache)
        cache.close()
        cache.close()
    with untouched(model):
        cache = PromptCache(model, SnapKV())
        generate(model, prompts("left"), past_key_values=cache)
        del cache
        gc.collect()


def test_a_forward_leaves_no_cycle_that_keeps_a_cache(model):
    gc.collect()
    gc.disable()
    try:
        with untouched(model), torch.no_grad():
            cache = PromptCache(model, SnapKV(window=4))
            model(IDS, past_key_values=cache)
            model(IDS[:, :1], past_key_values=cache)
            del cache
    finally:
        gc.enable()


def test_caches_are_counted(model):
    with untouched(model):
        first, second = PromptCache(model, H2O(0.2, 0.2)), PromptCache(model, KeyDiff(0.4))
        other = build("Llama")
        want = [generate(other, prompts(), past_key_values=PromptCache(other, c.policy)) for c in (first, second)]
        assert torch.equal(generate(model, prompts(), past_key_values=first).sequences, want[0].sequences)
        first.close()
        assert torch.equal(generate(model, prompts(), past_key_values=second).sequences, want[1].sequences)
        with fastprompt.compress(model, KeyDiff(0.4)):
            second.close()
            assert torch.equal(generate(model, prompts()).sequences, want[1].sequences)


@pytest.mark.parametrize("order", ["prompt first", "cache first"])
@pytest.mark.parametrize("leave", ["prompt first", "cache first"])
def test_prompts_come_and_go(model, order, leave):
    with untouched(model):
        cache = PromptCache(model, H2O(0.2, 0.2)) if order == "cache first" else None
        handle = fastprompt.attach(model, PrefixKV(3))
        cache = cache or PromptCache(model, H2O(0.2, 0.2))
        with torch.no_grad():
            for p in handle.parameters():
                p.normal_()
        plain = generate(model, prompts()).sequences
        generate(model, prompts(), past_key_values=cache)
        if leave == "prompt first":
            handle.detach()
            cache.reset()
            fresh = build("Llama")
            want = generate(fresh, prompts(), past_key_values=PromptCache(fresh, H2O(0.2, 0.2)))
            assert torch.equal(generate(model, prompts(), past_key_values=cache).sequences, want.sequences)
            cache.close()
        else:
            cache.close()
            assert torch.equal(generate(model, prompts()).sequences, plain)
            handle.detach()


def test_models_of_one_config_are_not_affected():
    config = LlamaConfig(**DECODER)
    first, second = (randomised(LlamaForCausalLM(config)) for _ in range(2))
    with untouched(second), fastprompt.compress(first, H2O()):
        generate(first, prompts())
        assert second.config._attn_implementation == config._attn_implementation == "sdpa"


def test_an_error_inside_leaves_the_plain_cache_usable(model):
    plain = generate(model, prompts()).sequences
    with untouched(model):
        with pytest.raises(ZeroDivisionError), fastprompt.compress(model, H2O()):
            generate(model, prompts(), stopping_criteria=[lambda ids, scores: 1 / 0])
        assert torch.equal(generate(model, prompts()).sequences, plain)


# Models and policies


def test_models_without_a_cache():
    vision, t5 = build_tower("ViT"), T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, num_layers=1, d_ff=16))
    for other in (vision, t5, build_tower("CLIP")):
        with pytest.raises(UnsupportedModelError, match="has no decoders whose layers have one self-attention"):
            PromptCache(other, H2O())
    mistral = MistralForCausalLM(MistralConfig(**DECODER, sliding_window=4))
    with (
        untouched(mistral),
        pytest.raises(UnsupportedModelError, match="has DynamicSlidingWindowLayer alone, which does not grow"),
        fastprompt.compress(mistral, H2O()),
    ):
        pass
    with pytest.raises(TypeError, match="model: got str, expected a transformers PreTrainedModel"):
        PromptCache("Llama", H2O())


def test_policies_and_masks_of_the_wrong_kind(model):
    with untouched(model):
        for policy in (H2O, "h2o", None):
            with pytest.raises(TypeError, match=r"policy: got .*, expected a policy such as fastprompt\.H2O\(\)"):
                PromptCache(model, policy)
        with pytest.raises(ValueError, match=r"names no image token; use text_prior=False"):
            PromptCache(model, LookM())
        with (
            pytest.raises(ValueError, match=r"names no image token; use text_prior=False"),
            fastprompt.compress(model, LookM()),
        ):
            pass
        with pytest.raises(TypeError, match=r"image_mask: got torch\.int64, expected a bool tensor"):
            PromptCache(model, LookM(), image_mask=IDS)
        with pytest.raises(ValueError, match=r"image_mask: got shape \[30\], expected \[B,T\]"):
            PromptCache(model, LookM(), image_mask=IDS[0] > 5)
        cache = PromptCache(model, LookM(), image_mask=IDS[:, :9] > 5)
        with pytest.raises(ValueError, match=r"image_mask: got shape \[3, 9\], expected \[3,30\]"):
            generate(model, prompts(), past_key_values=cache)
        cache.close()


def test_a_prompt_without_an_image():
    model = build("LLaVA, CLIP")
    batch = inputs("LLaVA, CLIP", model)
    # Transformers adds hooks in a model's first forward.
    generate(model, batch)
    with untouched(model):
        with pytest.raises(ValueError, match="holds no image token"), fastprompt.compress(model, LookM()):
            generate(model, prompts())
        with fastprompt.compress(model, LookM(text_prior=False)):
            generate(model, prompts())
        with fastprompt.compress(model, LookM()):
            generate(model, batch)


def test_embeddings_instead_of_ids(model):
    embeds = model.get_input_embeddings()(IDS).detach()
    with fastprompt.compress(model, H2O()):
        want = generate(model, prompts()).sequences
        assert torch.equal(generate(model, {"inputs_embeds": embeds}).sequences, want[:, 30:])
    llava = build("LLaVA, CLIP")
    with pytest.raises(ValueError, match="text: got None"), fastprompt.compress(llava, LookM()):
        generate(llava, {"inputs_embeds": embeds})


def test_tokens_that_see_later_ones(model):
    model.config.is_causal = False
    batch = prompts("left")
    with fastprompt.compress(model, SnapKV()), pytest.raises(UnsupportedModelError, match="attend to later ones"):
        generate(model, batch)
    with fastprompt.compress(model, StreamingLLM()):
        generate(model, batch)


# Caches


def test_caches_that_are_refused(model):
    with untouched(model):
        with fastprompt.compress(model, H2O()):
            with pytest.raises(ValueError, match="use_cache: got False, expected True"):
                generate(model, prompts(), use_cache=False)
            with pytest.raises(ValueError, match="past_key_values: got a StaticCache, expected none"):
                generate(model, prompts(), cache_implementation="static")
            with pytest.raises(ValueError, match="past_key_values: got a StaticCache"):
                model(IDS, past_key_values=StaticCache(model.config, 40))
            with pytest.raises(ValueError, match="past_key_values: got a plain cache of your own"):
                generate(model, prompts(), past_key_values=DynamicCache(config=model.config))
            with (
                pytest.raises(AttachError, match=r"model: got a second compress\(\)"),
                fastprompt.compress(model, H2O()),
            ):
                pass
            generate(model, prompts())
        full = DynamicCache(config=model.config)
        model(IDS, past_key_values=full)
        with fastprompt.compress(model, H2O()), pytest.raises(ValueError, match="got a plain cache of your own"):
            model(IDS[:, :1], past_key_values=full)


def test_going_back_is_refused(model):
    batch = {"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1])}
    with untouched(model):
        with fastprompt.compress(model, H2O()), pytest.raises(ValueError, match="crop: a compressing cache cannot go"):
            generate(model, batch, prompt_lookup_num_tokens=2)
        cache = PromptCache(model, H2O())
        assert not cache.is_croppable and not cache.is_compileable
        with pytest.raises(ValueError, match="crop: a compressing cache cannot go back"):
            generate(model, batch, past_key_values=cache, prompt_lookup_num_tokens=2)
        for owner in (cache, *cache.layers):
            with pytest.raises(ValueError, match="assisted decoding needs a plain cache"):
                owner.crop(-1)
        cache.close()
        assert generate(model, batch, prompt_lookup_num_tokens=2).sequences.shape == (1, 40)


@torch.no_grad()
def test_a_cache_belongs_to_its_model(model):
    other = build("Llama")
    cache = PromptCache(model, H2O())
    with pytest.raises(AttachError, match=r"layer 0 got 30 tokens after 0, but its cache was told of 0; it was passed"):
        other(IDS, past_key_values=cache)
    theirs = PromptCache(other, H2O())
    with pytest.raises(AttachError, match=r"got a cache made for another model \(LlamaForCausalLM\), or one that is c"):
        other(IDS, past_key_values=cache)
    with pytest.raises(AttachError, match=r"layer 0 got 30 tokens after 0"):
        model.model(IDS, past_key_values=cache)
    theirs.close()
    with pytest.raises(AttachError, match=r"it is closed"):
        other(IDS, past_key_values=theirs)
    cache.close()
    again = PromptCache(model, H2O())
    with pytest.raises(AttachError, match=r"or one that is closed"):
        model(IDS, past_key_values=cache)
    model(IDS, past_key_values=again)


@torch.no_grad()
def test_attention_that_is_switched_away(model):
    cache = PromptCache(model, H2O())
    model.set_attn_implementation("eager")
    with pytest.raises(AttachError, match=r"model: got attention 'eager' in a decoder whose cache is compressed"):
        model(IDS, past_key_values=cache)
    model.set_attn_implementation("fastprompt")
    model(IDS, past_key_values=cache)
    # One module alone, which the model's config does not show.
    cache.reset()
    attention = model.model.layers[1].self_attn
    attention.config = type(attention.config)(**DECODER, attn_implementation="sdpa")
    model(IDS, past_key_values=cache)
    with pytest.raises(AttachError, match=r"no 'fastprompt' attention ran over the keys of layer 1"):
        model(IDS[:, :1], past_key_values=cache)


@torch.no_grad()
def test_masks_that_say_too_little(model):
    cache = PromptCache(model, H2O())
    with pytest.raises(ValueError, match=r"attention_mask: got \[3, 1, 30, 30\], expected \[3,30\] with 0 at padding"):
        model(IDS, torch.ones(3, 1, 30, 30, dtype=torch.bool), past_key_values=cache)
    cache = PromptCache(model, H2O())
    model(IDS, past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask: got \[3, 4\], expected \[3,34\]"):
        model(IDS[:, :4], torch.ones(3, 4, dtype=torch.long), past_key_values=cache)


def test_attention_dropout():
    model = randomised(LlamaForCausalLM(LlamaConfig(**DECODER, attention_dropout=0.1)))
    with fastprompt.compress(model, H2O()):
        generate(model, prompts())
        model.train()
        with pytest.raises(
            ValueError, match=r"dropout: got 0\.1 at .* or a compressing cache, expected 0\.0; call model"
        ):
            model(IDS)
