# SPDX-License-Identifier: Apache-2.0
"""The registered pair of attention and mask function, on models whose masks matter: causal and padded text."""

import pytest
import torch
from tiny_models import TEXT, assert_close, build, randomised
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.masking_utils import sdpa_mask

from fastprompt.hf.attention import CHILD, NAME, observe, register

TOKENS = torch.tensor([[48, 3, 9, 4, 7, 49], [48, 11, 7, 30, 2, 49], [48, 5, 6, 8, 1, 49]])
MASKS = {
    "no padding": None,
    "padded right": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]),
    "padded left": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]),
}


def clip_text():
    return randomised(CLIPTextModel(CLIPTextConfig(**TEXT))).double()


def qwen2():
    return randomised(Qwen2ForCausalLM(Qwen2Config(**TEXT, num_key_value_heads=1))).double()


MODELS = {"CLIPText": clip_text, "Qwen2": qwen2}


def visible(model, mask):
    """What the model says of the tokens that are not padding."""
    with torch.no_grad():
        out = model(input_ids=TOKENS, attention_mask=mask)[0]
    return out if mask is None else out[mask.bool()]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_masks_reach_attention(name, mask):
    register()
    # What a missing mask function does: every mask is lost.
    AttentionInterface.register("tests_without_mask", AttentionInterface()[NAME])
    found = {}
    for implementation in ("sdpa", NAME, "tests_without_mask"):
        model = MODELS[name]()
        model.set_attn_implementation(implementation)
        calls = []
        with observe(lambda *args, calls=calls: calls.append(args)):
            found[implementation] = visible(model, MASKS[mask])
        assert bool(calls) == (implementation != "sdpa")
    assert_close({"": found[NAME]}, {"": found["sdpa"]})
    if mask == "padded left":
        assert (found["tests_without_mask"] - found["sdpa"]).abs().max() > 0.01


class Keys(nn.Module):
    """Stands in for a prompt of an attention module: keys and values of its own."""

    def __init__(self, heads, dim, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.keys, self.values = torch.randn(2, heads, 3, dim, dtype=torch.float64, generator=generator)

    def key_value(self):
        return self.keys, self.values


def by_concatenation(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """The same prompts in front of keys and values, in plain matrix products, with the mask written out."""
    keys, values = (x.expand(len(key), -1, -1, -1) for x in getattr(module, CHILD).key_value())
    key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    tokens = query.shape[2]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1) if attention_mask is None else ~attention_mask
    hidden = torch.cat([torch.zeros(*hidden.shape[:-1], 3, dtype=torch.bool), hidden], dim=-1)
    scores = (scaling * query @ key.transpose(-1, -2)).masked_fill(hidden, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_prompts_in_causal_attention_take_no_mask_and_no_place(name, mask):
    register()
    AttentionInterface.register("tests_concatenation", by_concatenation)
    AttentionMaskInterface.register("tests_concatenation", sdpa_mask)
    found = {}
    for implementation in (NAME, "tests_concatenation", "plain"):
        model = MODELS[name]()
        model.set_attn_implementation(NAME if implementation == "plain" else implementation)
        attentions = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "k_proj")]
        assert len(attentions) == 2
        for i, attention in enumerate(attentions):
            heads = attention.k_proj.out_features // attention.head_dim
            if implementation != "plain":
                attention.add_module(CHILD, Keys(heads, attention.head_dim, seed=i))
        found[implementation] = visible(model, MASKS[mask])
    assert_close({"": found[NAME]}, {"": found["tests_concatenation"]})
    assert (found[NAME] - found["plain"]).abs().max() > 0.01


def test_generation_with_a_cache_sees_prompts_at_every_step():
    register()
    tokens = {}
    for cache in (True, False):
        model = qwen2()
        model.set_attn_implementation(NAME)
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.add_module(CHILD, Keys(1, layer.self_attn.head_dim, seed=i))
        given = {"input_ids": TOKENS, "attention_mask": MASKS["padded left"]}
        tokens[cache] = model.generate(
            **given, max_new_tokens=6, do_sample=False, use_cache=cache, eos_token_id=None, pad_token_id=0
        )
    assert tokens[True].shape == (3, 12)
    assert torch.equal(tokens[True], tokens[False])


def test_registering_is_repeatable_and_changes_no_other_name():
    before = {name: AttentionInterface()[name] for name in ("sdpa", "flash_attention_2")}
    register()
    register()
    assert {name: AttentionInterface()[name] for name in before} == before
    assert AttentionMaskInterface()[NAME] is AttentionMaskInterface()["sdpa"]


def test_a_module_without_prompts_runs_torchs_own_attention():
    register()
    plain, switched = build(), build()
    switched.set_attn_implementation(NAME)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(images)[0], switched(images)[0])
