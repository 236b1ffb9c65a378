# SPDX-License-Identifier: Apache-2.0
"""The recipe `PrefixKV`: what it learns, how it starts, saving, baking, and vision and text encoders."""

import io
import json

import pytest
import safetensors.torch
import torch
from tiny_decoders import DECODERS, build, concatenate, leaves, logits, sentences
from tiny_models import FAMILIES, TEXT, assert_close, inputs, mixed, outputs, randomised, same, untouched
from tiny_models import build as build_encoder
from tiny_models import step as encoder_step
from transformers import CLIPTextConfig, CLIPTextModel

import fastprompt
from fastprompt import VPT, CheckpointError, PrefixKV

LENGTH = 5


def attach(model, reparam=None, **options):
    return fastprompt.attach(model, PrefixKV(LENGTH, reparam=reparam, hidden=16), **options)


# What it learns


@pytest.mark.parametrize("name", DECODERS)
def test_parameters_are_keys_and_values_in_layer_order(name):
    model = build(name)
    handle = fastprompt.attach(model, PrefixKV(LENGTH))
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    names = [f"layers.{i}.{what}" for i in range(3) for what in ("key", "value")]
    assert [n for n, _ in handle.named_parameters()] == names
    parameters = list(handle.parameters())
    assert all(p.shape == (config.num_key_value_heads, LENGTH, dim) and p.is_leaf for p in parameters)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert handle.num_trainable == 3 * 2 * config.num_key_value_heads * LENGTH * dim
    attentions = [layer.self_attn for layer in model.model.layers]
    assert all(a.fastprompt.key is p for a, p in zip(attentions, parameters[::2], strict=True))


@pytest.mark.parametrize("layers, chosen", [((1,), [1]), ((-1, 0), [0, 2])])
def test_some_layers_alone(layers, chosen):
    model = build("Llama", torch.float64)
    handle = fastprompt.attach(model, PrefixKV(LENGTH, init="ptuning", layers=layers))
    assert [n for n, _ in handle.named_parameters()] == [f"layers.{i}.{w}" for i in chosen for w in ("key", "value")]
    found = dict(handle.named_parameters())
    prefixes = {i: lambda i=i: (found[f"layers.{i}.key"], found[f"layers.{i}.value"]) for i in chosen}
    other = concatenate(build("Llama", torch.float64), "text", prefixes)
    with torch.no_grad():
        assert_close({"": logits(model, sentences("left"))}, {"": logits(other, sentences("left"))})


def by_hand(encoder, layer):
    """Keys and values of a layer, a column of the network's output at a time."""
    rows = torch.tanh(encoder.prompt @ encoder.inner.weight.T + encoder.inner.bias)
    rows = rows @ encoder.outer.weight.T + encoder.outer.bias
    found = torch.zeros(2, 2, LENGTH, 8, dtype=rows.dtype)
    for what in range(2):
        for head in range(2):
            first = ((layer * 2 + what) * 2 + head) * 8
            found[what, head] = rows[:, first : first + 8]
    return found[0], found[1]


def test_the_mlp_gives_keys_and_values_of_every_layer():
    model = build("Llama", torch.float64)
    handle = attach(model, "mlp")
    names = ["prompt", "inner.weight", "inner.bias", "outer.weight", "outer.bias"]
    assert [n for n, _ in handle.named_parameters()] == [f"layers.0.encoder.{n}" for n in names]
    shapes = [(LENGTH, 32), (16, 32), (16,), (3 * 2 * 2 * 8, 16), (3 * 2 * 2 * 8,)]
    assert [tuple(p.shape) for p in handle.parameters()] == shapes
    assert [n for n in model.state_dict() if "fastprompt" in n] == [
        f"model.layers.0.self_attn.fastprompt.encoder.{n}" for n in names
    ]
    batch = sentences("left")
    logits(model, batch).pow(2).sum().backward()
    got = {f"gradient of {n}": p.grad.clone() for n, p in handle.named_parameters()}
    for p in handle.parameters():
        p.grad = None
    encoder = model.model.layers[0].self_attn.fastprompt.encoder
    prefixes = {i: lambda i=i: by_hand(encoder, i) for i in range(3)}
    other = concatenate(build("Llama", torch.float64), "text", prefixes)
    logits(other, batch).pow(2).sum().backward()
    assert_close(got, {f"gradient of {n}": p.grad for n, p in handle.named_parameters()})
    assert all(x.abs().max() > 1e-3 for x in got.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reparam", [None, "mlp"])
def test_a_half_precision_model_has_a_float32_prefix(dtype, reparam):
    model = build("Llama", dtype)
    handle = attach(model, reparam)
    logits(model, sentences("left")).float().pow(2).sum().backward()
    assert all(p.dtype == torch.float32 == p.grad.dtype and p.grad.isfinite().all() for p in handle.parameters())
    with torch.autocast("cpu", dtype), torch.no_grad():
        assert model.model.layers[1].self_attn.fastprompt.key_value()[0].dtype == torch.float32


# How it starts


def test_plain_prefixes_start_small_or_as_in_p_tuning():
    torch.manual_seed(0)
    for init, std in (("normal", 0.02), ("ptuning", 1.0)):
        with fastprompt.attach(build("Llama"), PrefixKV(400, init=init)) as handle:
            assert all(abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < 0.1 * std for p in handle.parameters())


def test_the_mlp_starts_as_published():
    torch.manual_seed(0)
    model = build("Llama")
    handle = fastprompt.attach(model, PrefixKV(400, reparam="mlp"))
    prompt, inner, _, outer, _ = handle.parameters()
    assert abs(prompt.std() - 1) < 0.05 and inner.shape == (512, 32)
    for weight in (inner, outer):
        bound = weight.shape[1] ** -0.5
        assert 0.98 * bound < weight.max() <= bound


# Baking, saving, loading


@pytest.mark.parametrize("reparam", [None, "mlp"])
def test_baking_gives_plain_keys_and_values_and_changes_no_output(tmp_path, reparam):
    model = build("Llama")
    handle = attach(model, reparam, train=("lm_head",))
    batch = sentences("left")
    want = logits(model, batch).detach()
    assert handle.bake() is handle
    assert torch.equal(logits(model, batch), want)
    names = [f"layers.{i}.{what}" for i in range(3) for what in ("key", "value")]
    assert [n for n, _ in handle.named_parameters()] == [*names, "base.lm_head.weight"]
    assert handle.config == PrefixKV(LENGTH, hidden=16) and handle.num_trainable == 60 * 32
    assert not any("encoder" in n for n in model.state_dict())
    assert torch.equal(logits(model, batch), want)
    handle.bake().save(tmp_path)
    other = build("Llama")
    loaded = fastprompt.load(other, tmp_path)
    assert torch.equal(logits(other, batch), want)
    assert loaded.num_trainable == 60 * 32 + 3 * 2 * 2 * LENGTH * 8
    before = build("Llama")
    handle.detach()
    assert torch.equal(logits(model, batch), logits(before, batch))


@pytest.mark.parametrize(
    "options", [{}, {"reparam": "mlp", "hidden": 16}, {"init": (1, 2, 3, 4, 5), "layers": [0, -1]}], ids=str
)
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_what_is_saved_is_what_is_loaded(tmp_path, name, options):
    model = build(name)
    handle = fastprompt.attach(model, PrefixKV(LENGTH, **options))
    with torch.no_grad():
        for i, p in enumerate(handle.parameters()):
            p.add_(0.1 * (i + 1))
    handle.save(tmp_path)
    content = json.loads((tmp_path / "prompt_config.json").read_text())
    assert content["method"] == "PrefixKV" and content["tower"] == "text" and content["base"]["kv_heads"] == 2
    names = [n for n, _ in handle.named_parameters()]
    assert sorted(safetensors.torch.load_file(tmp_path / "prompts.safetensors")) == sorted(names)
    other = build(name)
    with untouched(other):
        loaded = fastprompt.load(other, tmp_path)
        assert loaded.config == handle.config
        assert same(dict(loaded.named_parameters()), dict(handle.named_parameters()))
        assert torch.equal(logits(other, sentences("left")), logits(model, sentences("left")))
        loaded.detach()


def test_another_base_model_is_refused(tmp_path):
    attach(build("Llama")).save(tmp_path)
    other = randomised(DECODERS["Llama"](), seed=9)
    with untouched(other), pytest.raises(CheckpointError, match=r"the key projection of layer . holds"):
        fastprompt.load(other, tmp_path)
    with untouched(model := build("Qwen2")), pytest.raises(CheckpointError, match=r"got kv_heads 1 .*, expected 2"):
        fastprompt.load(model, tmp_path)


def test_detached_while_the_optimizer_holds_gradients():
    model = build("Llama")
    handle = attach(model, train=("model.norm",))
    before = model.model.norm.weight.detach().clone()
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    logits(model, sentences()).pow(2).sum().backward()
    optimizer.step()
    assert not torch.equal(model.model.norm.weight, before)
    handle.detach()
    assert torch.equal(model.model.norm.weight, before)


@pytest.mark.parametrize("reparam", [None, "mlp"])
def test_an_attached_model_pickles_in_the_middle_of_a_step(reparam):
    model = build("Llama")
    attach(model, reparam)
    want = logits(model, sentences())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), sentences()), want)


@pytest.mark.parametrize("change", ["a step of an optimizer", "a new state", "another dtype"])
def test_keys_of_the_mlp_follow_its_parameters(change):
    model = build("Llama")
    handle = attach(model, "mlp")
    with torch.no_grad():
        logits(model, sentences())
    if change == "a step of an optimizer":
        logits(model, sentences()).sum().backward()
        torch.optim.SGD(handle.parameters(), lr=0.1).step()
    elif change == "a new state":
        model.load_state_dict({n: x + 0.1 * ("fastprompt" in n) for n, x in model.state_dict().items()})
    else:
        model.double()
    encoder = model.model.layers[0].self_attn.fastprompt.encoder
    with torch.no_grad():
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                key, value = model.model.layers[2].self_attn.fastprompt.key_value()
                assert_close(
                    {"key": key, "value": value}, dict(zip(("key", "value"), by_hand(encoder, 2), strict=True))
                )
    logits(model, sentences()).sum().backward()


# Encoders

TOWERS = ["ViT", "Dinov2", "CLIPVision", "SiglipVision", "Blip2Vision, fused qkv", "InternVLVision, qk norm"]


@pytest.mark.parametrize("name", TOWERS)
def test_a_prefix_in_a_vision_tower_is_keys_in_front(name):
    dtype = torch.float32 if "qk norm" in name else torch.float64
    model = build_encoder(name, dtype)
    plain = outputs(model)
    with untouched(model):
        handle = fastprompt.attach(model, PrefixKV(LENGTH, init="ptuning"))
        prefixes = leaves(handle)
        got = encoder_step(model, handle.parameters())
        handle.detach()
    other = concatenate(
        build_encoder(name, dtype), "vision", {i: lambda pair=pair: pair for i, pair in prefixes.items()}
    )
    assert_close(got, encoder_step(other, [p for pair in prefixes.values() for p in pair]))
    assert any((got[k] - x).abs().max() > 0.01 * x.abs().max() for k, x in plain.items())


def test_a_prefix_in_the_text_tower_of_clip():
    """Its tower passes causality by an argument, and its mask by none where nothing is padded."""
    model = randomised(CLIPTextModel(CLIPTextConfig(**TEXT))).double()
    handle = fastprompt.attach(model, PrefixKV(LENGTH, init="ptuning"))
    prefixes = leaves(handle)
    batch = {"input_ids": torch.tensor([[48, 3, 9, 4, 49], [48, 11, 7, 30, 49]])}
    got = encoder_step(model, handle.parameters(), batch)
    other = randomised(CLIPTextModel(CLIPTextConfig(**TEXT))).double()
    other = concatenate(other, "text", {i: lambda pair=pair: pair for i, pair in prefixes.items()})
    assert_close(got, encoder_step(other, [p for pair in prefixes.values() for p in pair], batch))


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_the_chosen_tower_of_clip(tower):
    model = build_encoder("CLIP")
    before = outputs(model)
    handle = attach(model, tower=tower)
    assert handle.tower.kind == tower
    after = outputs(model)
    assert torch.equal(after["text_embeds"], before["text_embeds"]) == (tower == "vision")
    assert torch.equal(after["image_embeds"], before["image_embeds"]) == (tower == "text")
    assert set(inputs(model)) == {"pixel_values", "input_ids"}


# Errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 0}, "length: got 0, expected an integer >= 1"),
        ({"length": 2.0}, "length: got 2.0"),
        ({"length": 2, "hidden": 0}, "hidden: got 0"),
        ({"length": 2, "reparam": "lstm"}, "reparam: got 'lstm', expected None or 'mlp'"),
        ({"length": 2, "init": "ones"}, "init: got 'ones', expected one of 'normal', 'ptuning', or token ids"),
        ({"length": 2, "init": ()}, "init: got ()"),
        ({"length": 2, "init": (1, -2)}, "init: got .*, expected one of"),
        ({"length": 2, "init": (1, 2, 3)}, "init: got 3 token ids, expected 2, one for every prompt"),
        ({"length": 2, "init": "ptuning", "reparam": "mlp"}, "reparam='mlp' starts as published; leave init out"),
        ({"length": 2, "layers": ()}, r"layers: got \(\), expected a non-empty sequence"),
    ],
)
def test_a_wrong_recipe_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrefixKV(**arguments)


def test_a_recipe_compares_by_value():
    assert PrefixKV(2, init=[1, 2], layers=[0]) == PrefixKV(2, init=(1, 2), layers=(0,)) != PrefixKV(2)
    assert hash(PrefixKV(2, init=[1, 2])) == hash(PrefixKV(2, init=(1, 2)))


def test_what_does_not_fit_the_model_is_an_error():
    model = mixed(build("Llama"))
    with untouched(model):
        with pytest.raises(ValueError, match="VPT is for vision towers, but this tower is text"):
            fastprompt.attach(model, VPT(2))
        with pytest.raises(ValueError, match="tower: got 'vision', but LlamaForCausalLM has text"):
            fastprompt.attach(model, PrefixKV(2), tower="vision")
        with pytest.raises(ValueError, match=r"layers: got \[3\], expected distinct numbers in \[-3, 2\]"):
            fastprompt.attach(model, PrefixKV(2, layers=[3]))
        with pytest.raises(ValueError, match=r"init: got token id 60, expected ids below 60"):
            fastprompt.attach(model, PrefixKV(2, init=(1, 60)))
    vit = mixed(build_encoder("ViT"))
    with untouched(vit), pytest.raises(ValueError, match="init: token ids need a text tower, but this one is vision"):
        fastprompt.attach(vit, PrefixKV(2, init=(1, 2)))


def test_every_family_of_vision_towers_takes_a_prefix():
    for name in FAMILIES:
        model = build_encoder(name)
        with untouched(model), attach(model, tower=FAMILIES[name].tower) as handle:
            outputs(model)
            assert handle.num_trainable > 0
