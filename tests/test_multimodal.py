# SPDX-License-Identifier: Apache-2.0
"""Multimodal models with prompts in the vision tower, a prefix in the language model, or both."""

import importlib

import pytest
import torch
from tiny_decoders import (
    IMAGE,
    MULTIMODAL,
    build,
    concatenate,
    image_inputs,
    logits,
    rotate_vision,
)
from tiny_models import assert_close, checkpointing, mixed, same, untouched
from torch import nn

import fastprompt
from fastprompt import VPT, AttachError, PrefixKV, UnsupportedModelError
from fastprompt.hf.published import InsertedPrompts
from fastprompt.hf.sites import choose_tower

VISION, TEXT = VPT(4, init="normal"), PrefixKV(5, init="ptuning")
QWEN = ["Qwen2-VL", "Qwen2.5-VL"]
OTHERS = [name for name in MULTIMODAL if name not in QWEN]
#: Layers of the vision towers that the model reads: LLaVA takes the last hidden state but one.
READ = {name: 2 if name.startswith("LLaVA") else 3 for name in MULTIMODAL}


@pytest.fixture(autouse=True)
def exact_rotation(monkeypatch):
    for name in ("qwen2_vl", "qwen2_5_vl"):
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        monkeypatch.setattr(module, "apply_rotary_pos_emb_vision", rotate_vision)


def attach(model, *towers):
    """Handles with prompts large enough to matter, in the order of ``towers``."""
    handles = []
    for tower in towers:
        handles.append(fastprompt.attach(model, VISION if tower == "vision" else TEXT, tower=tower))
        with torch.no_grad():
            for p in handles[-1].parameters():
                p.normal_()
    return handles


def own_keys(layer, prompt):
    """Keys and values of prompt rows by the layer's own weights, never rotated."""
    attention = getattr(layer, "attn", None) or layer.self_attn
    rows = getattr(layer, "norm1", getattr(layer, "layer_norm1", None))(prompt)
    if hasattr(attention, "qkv"):
        _, key, value = attention.qkv(rows).view(len(rows), 3, attention.num_heads, -1).permute(1, 2, 0, 3)
        return key, value
    heads = (len(rows), attention.num_heads, -1)
    return attention.k_proj(rows).view(heads).transpose(0, 1), attention.v_proj(rows).view(heads).transpose(0, 1)


def published(name, *handles):
    """The same model in plain matrix products, with the handles' prompts as keys in front; and its parameters."""
    model = build(name, torch.float64)
    parameters = []
    for handle in handles:
        own = [nn.Parameter(p.detach().clone()) for p in handle.parameters()]
        parameters += own
        layers = choose_tower(model, handle.tower.kind).layers
        if handle.tower.kind == "vision":
            sources = {i: lambda i=i, own=own, layers=layers: own_keys(layers[i], own[i]) for i in range(len(own))}
        else:
            sources = {i: lambda i=i, own=own: (own[2 * i], own[2 * i + 1]) for i in range(len(own) // 2)}
        concatenate(model, handle.tower.kind, sources)
    return model, parameters


def step(model, parameters, batch):
    """Logits of all but padding, and gradients."""
    parameters = list(parameters)
    for p in parameters:
        p.grad = None
    found = logits(model, batch)
    generator = torch.Generator().manual_seed(3)
    (found * torch.randn(found.shape, generator=generator).to(found.dtype)).sum().backward()
    return {"logits": found.detach()} | {f"gradient {i}": p.grad for i, p in enumerate(parameters)}


def generate(model, batch, **options):
    torch.manual_seed(4)
    suppressed = [IMAGE, 51, 52, 53]
    return model.generate(
        **batch, max_new_tokens=5, eos_token_id=None, pad_token_id=0, suppress_tokens=suppressed, **options
    )


# Parity


@pytest.mark.parametrize("towers", [("vision",), ("text",), ("vision", "text")], ids=" and ".join)
@pytest.mark.parametrize("name", MULTIMODAL)
def test_prompts_are_keys_in_front(name, towers):
    model = build(name, torch.float64)
    batch = image_inputs(name, model)
    plain = logits(model, batch).detach()
    handles = attach(model, *towers)
    counts = {"vision": READ[name], "text": 2 * 3}
    assert [len(list(h.parameters())) for h in handles] == [counts[t] for t in towers]
    got = step(model, [p for h in handles for p in h.parameters()], batch)
    other, parameters = published(name, *handles)
    want = step(other, parameters, batch)
    assert_close(got, want)
    assert (got["logits"] - plain).abs().max() > 0.1
    assert all(x.abs().max() > 1e-3 for x in want.values())


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("name", OTHERS)
def test_visual_prompts_are_inserted_tokens(name, depth):
    model, other = build(name, torch.float64), build(name, torch.float64)
    batch = image_inputs(name, model)
    # Transformers records hidden states by hooks, which the prompts must not come after.
    logits(model, batch), logits(other, batch)
    handle = fastprompt.attach(model, VPT(4, depth=depth, init="normal"), tower="vision")
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_()
    prompts = {i: nn.Parameter(p.detach().clone()) for i, p in enumerate(handle.parameters())}
    inserted = InsertedPrompts(other, prompts, at=1 if "CLIP" in name else 0, tower="vision")
    assert_close(step(model, handle.parameters(), batch), step(other, inserted.parameters(), batch))


@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
def test_padding_of_images_is_hidden_and_prompts_are_not(name):
    model = build(name, torch.float64)
    batch = image_inputs(name, model)
    mask = torch.ones(2, 1, 16, 16, dtype=torch.long)
    mask[1, :, 8:] = 0
    whole = logits(model, batch).detach()
    handles = attach(model, "vision")
    got = step(model, handles[0].parameters(), {**batch, "pixel_attention_mask": mask})
    other, parameters = published(name, *handles)
    assert_close(got, step(other, parameters, {**batch, "pixel_attention_mask": mask}))
    assert (got["logits"] - whole).abs().max() > 0.1


@pytest.mark.parametrize("name", MULTIMODAL)
def test_generation_is_that_of_the_published_form(name):
    model = build(name, torch.float64)
    batch = image_inputs(name, model)
    plain = generate(model, batch, do_sample=False)
    other, _ = published(name, *attach(model, "vision", "text"))
    for options in ({"do_sample": False}, {"do_sample": True}, {"do_sample": False, "num_beams": 2}):
        want = generate(other, batch, use_cache=False, **options)
        assert torch.equal(generate(model, batch, **options), want)
        assert torch.equal(generate(model, batch, use_cache=False, **options), want)
    assert not torch.equal(generate(model, batch, do_sample=False), plain)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_an_image_sees_prompts_and_no_other_image(name):
    """Alone or in a batch, packed or not, an image's features are the same."""
    model = build(name, torch.float64)
    attach(model, "vision")
    batch = image_inputs(name, model)
    with torch.no_grad():
        if name in QWEN:
            grids = batch["image_grid_thw"]
            both = model.model.visual(batch["pixel_values"], grid_thw=grids).pooler_output
            parts = zip(batch["pixel_values"].split(grids.prod(-1).tolist()), grids, strict=True)
            alone = [model.model.visual(x, grid_thw=g[None]).pooler_output for x, g in parts]
        else:
            tower = choose_tower(model, "vision").module
            images = batch["pixel_values"].reshape(2, 3, 16, 16)
            both = tower(images, output_hidden_states=True).hidden_states[READ[name]]
            alone = [tower(x[None], output_hidden_states=True).hidden_states[READ[name]] for x in images]
    assert_close({"": both}, {"": torch.cat(alone)})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["LLaVA, CLIP", "Qwen2.5-VL", "SmolVLM"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    model = build(name, torch.float64).train()
    batch = image_inputs(name, model)
    handles = attach(model, "vision", "text")
    parameters = [p for h in handles for p in h.parameters()]
    want = step(model, parameters, batch)
    checkpointing(model, reentrant)
    assert_close(step(model, parameters, batch), want)


def test_the_published_start_knows_the_values_of_a_packed_patch():
    handle = fastprompt.attach(build("Qwen2-VL"), VPT(400), tower="vision")
    bound = (6 / (3 * 2 * 4 * 4 + 32)) ** 0.5
    assert all(0.98 * bound < p.max() <= bound for p in handle.parameters())


# A handle a tower


@pytest.mark.parametrize("towers", [("vision", "text"), ("text", "vision")], ids=" first, then ".join)
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ["LLaVA, CLIP", "Qwen2-VL", "SmolVLM"])
def test_handles_are_detached_in_any_order(name, towers, first):
    model = build(name)
    batch = image_inputs(name, model)
    plain = logits(model, batch).detach()
    with untouched(mixed(model)):
        handles = attach(model, *towers)
        last = 1 - first
        trainable = {id(p) for h in handles for p in h.parameters()}
        assert {id(p) for p in model.parameters() if p.requires_grad} == trainable
        attention = {t: choose_tower(model, t).module.config for t in towers}
        handles[first].detach()
        assert attention[towers[first]]._attn_implementation == "sdpa"
        assert attention[towers[last]]._attn_implementation == "fastprompt"
        # The model stays frozen, and sees what is left.
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in handles[last].parameters()}
        modes = {m: m.training for m in model.modules()}
        got = logits(model.eval(), batch)
        alone = build(name)
        (other,) = attach(alone, towers[last])
        with torch.no_grad():
            for p, q in zip(other.parameters(), handles[last].parameters(), strict=True):
                p.copy_(q)
        assert torch.equal(got, logits(alone, batch))
        again = attach(model, towers[first])
        again[0].detach()
        for module, training in modes.items():
            module.training = training
        handles[last].detach()
    assert torch.equal(logits(model.eval(), batch), plain)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_each_handle_is_saved_and_loaded(tmp_path, name):
    model = build(name)
    batch = image_inputs(name, model)
    for handle in attach(model, "vision", "text"):
        handle.save(tmp_path / handle.tower.kind)
    want = logits(model, batch)
    for order in (("vision", "text"), ("text", "vision")):
        other = build(name)
        logits(other, batch)  # transformers keeps hooks from the first forward on
        with untouched(other):
            loaded = [fastprompt.load(other, tmp_path / tower) for tower in order]
            assert torch.equal(logits(other, batch), want)
            for handle in loaded:
                handle.bake()
            assert torch.equal(logits(other, batch), want)
            for handle in loaded:
                handle.detach()


def test_what_one_handle_trains_the_other_leaves():
    name = "LLaVA, CLIP"
    model = build(name)
    batch = image_inputs(name, model)
    logits(model, batch)
    with untouched(model):
        first = fastprompt.attach(model, VISION, tower="vision", train=("model.multi_modal_projector",))
        with pytest.raises(ValueError, match=r"train: another handle of this model trains .*projector"):
            fastprompt.attach(model, TEXT, tower="text", train=("model.multi_modal_projector.linear_1",))
        with pytest.raises(ValueError, match="matches no parameter"):
            fastprompt.attach(model, TEXT, tower="text", train=("*.fastprompt.prompt",))
        second = fastprompt.attach(model, TEXT, tower="text", train=("lm_head",))
        parameters = [*first.parameters(), *second.parameters()]
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
        step(model, parameters, batch)
        assert all(p.grad.abs().max() > 0 for p in parameters)
        torch.optim.SGD(parameters, lr=0.1).step()
        first.detach()
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in second.parameters()}
        second.detach()


def test_handles_of_a_part_and_of_the_whole():
    """The part is held by both, and put back by whichever goes last."""
    name = "LLaVA, SigLIP"
    for first in (0, 1):
        model = build(name)
        batch = image_inputs(name, model)
        plain = logits(model, batch).detach()
        with untouched(model):
            part = fastprompt.attach(model.model.language_model, TEXT)
            handles = [part, *attach(model, "vision")]
            assert model.config.text_config is model.model.language_model.config
            assert not same({"": logits(model, batch)}, {"": plain})
            handles[first].detach()
            logits(model, batch)
            handles[1 - first].detach()
        assert torch.equal(logits(model, batch), plain)


# Errors


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_tower_must_be_chosen_and_fit(name):
    model = build(name)
    with untouched(model):
        for recipe in (VISION, TEXT):
            with pytest.raises(ValueError, match="pass tower='vision' or tower='text'"):
                fastprompt.attach(model, recipe)
        with pytest.raises(ValueError, match="VPT is for vision towers, but this tower is text"):
            fastprompt.attach(model, VISION, tower="text")
        handles = attach(model, "vision", "text")
        for recipe, tower in ((VISION, "vision"), (TEXT, "vision"), (TEXT, "text")):
            with pytest.raises(AttachError, match="already hold prompts"):
                fastprompt.attach(model, recipe, tower=tower)
        for handle in handles:
            handle.detach()


@pytest.mark.parametrize("options", [{"depth": "shallow"}, {"layers": (0, 1)}, {"layers": (0, 2)}], ids=str)
@pytest.mark.parametrize("name", QWEN)
def test_packed_images_take_no_rows(name, options):
    model = build(name)
    with untouched(model), pytest.raises(ValueError, match="which a tower of packed images cannot take"):
        fastprompt.attach(model, VPT(2, **options), tower="vision")
    fastprompt.attach(model, VPT(2, layers=(1, 2)), tower="vision")
    logits(model, image_inputs(name, model))


def test_attention_that_is_more_than_a_softmax_is_unsupported():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                          head_dim=8, intermediate_size=16, vocab_size=20)  # fmt: skip
    model = Gemma2ForCausalLM(config)
    with untouched(model), pytest.raises(UnsupportedModelError, match="Gemma2Attention passes softcap to attention"):
        fastprompt.attach(model, PrefixKV(2))
