# SPDX-License-Identifier: Apache-2.0

import io

import pytest
import torch
from tiny_models import (
    DEPTHS,
    FAMILIES,
    LAYERS,
    LENGTH,
    VISION,
    WIDTH,
    attach_prompts,
    build,
    inputs,
    mixed,
    outputs,
    randomised,
    same,
    step,
    untouched,
)
from transformers import (
    ViTConfig,
    ViTModel,
)

import fastprompt
from fastprompt import VPT, AttachError
from fastprompt.hf.attention import observe
from fastprompt.hf.published import InsertedPrompts

# Back to where it was


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", FAMILIES)
def test_detach_leaves_no_trace(name, depth):
    model = build(name)
    before = outputs(model)
    with untouched(mixed(model)):
        handle = attach_prompts(model, depth, tower=FAMILIES[name].tower, train=FAMILIES[name].train)
        handle.detach()
    assert same(outputs(model.eval()), before)


def test_trained_base_values_come_back():
    model = build("ViT classifier")
    before = outputs(model)
    with untouched(model):
        handle = attach_prompts(model, train=("classifier", "vit.layers.1"))
        trained = dict(handle.named_parameters())
        values = {name: p.detach().clone() for name, p in trained.items()}
        optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1)
        for _ in range(2):
            step(model, trained.values())
            optimizer.step()
        assert all((p - values[name]).abs().max() > 0.05 for name, p in trained.items())
        handle.detach()
    assert same(outputs(model), before)


def test_attached_model_keeps_its_class_and_modes():
    model = mixed(build("ViT classifier"))
    kind, modes = type(model), [m.training for m in model.modules()]
    handle = attach_prompts(model)
    names = [name for name, m in model.named_modules() if name.endswith("fastprompt")]
    assert names == [f"vit.layers.{i}.attention.fastprompt" for i in range(LAYERS)]
    assert type(model) is kind is type(handle.model)
    assert [m.training for n, m in model.named_modules() if n not in names] == modes


def test_looking_for_places_draws_no_random_numbers():
    model = build("DINOv3ViT").train()
    before = torch.get_rng_state()
    fastprompt.attach(model, VPT(length=3, init="zeros"))
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_follow_the_global_seed():
    prompts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        handle = fastprompt.attach(build(), VPT(length=3))
        prompts.append(torch.stack(list(handle.parameters())))
    assert torch.equal(prompts[0], prompts[1]) and not torch.equal(prompts[0], prompts[2])


def test_no_other_model_of_the_same_config_is_affected():
    config = ViTConfig(**VISION)
    one, other = randomised(ViTModel(config)), randomised(ViTModel(config))
    assert one.config is other.config
    before = outputs(other)
    with untouched(other):
        handle = attach_prompts(one)
        calls = []
        with observe(lambda module, *qkv: calls.append(module)):
            assert same(outputs(other), before)
            assert not calls
            assert not same(outputs(one), before)
            assert len(calls) == LAYERS
        handle.detach()
    assert same(outputs(one), before)


def test_only_the_chosen_tower_is_affected():
    model = build("CLIP")
    with untouched(model.text_model):
        text = model.text_model.config
        handle = attach_prompts(model, tower="vision")
        # Its config is a copy, like that of the whole model, with the values it had.
        assert model.text_model.config.to_dict() == text.to_dict()
        assert model.text_model.config._attn_implementation == text._attn_implementation != "fastprompt"
        assert model.vision_model.config._attn_implementation == "fastprompt"
        handle.detach()


# What the handle holds


@pytest.mark.parametrize("depth", DEPTHS)
def test_exactly_the_handles_parameters_learn(depth):
    model = build("ViT classifier")
    handle = attach_prompts(model, depth, train=("classifier",))
    layers = DEPTHS[depth][1]
    parameters = list(handle.parameters())
    assert [tuple(p.shape) for p in parameters] == [(LENGTH, WIDTH)] * len(layers) + [(2, WIDTH), (2,)]
    for i, p in zip(layers, parameters, strict=False):
        assert model.vit.layers[i].attention.fastprompt.prompt is p
    assert parameters[-2] is model.classifier.weight and parameters[-1] is model.classifier.bias
    assert all(p.is_leaf and p.requires_grad for p in parameters)
    assert handle.num_trainable == sum(p.numel() for p in parameters) == LENGTH * WIDTH * len(layers) + 2 * WIDTH + 2
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}


def test_prompts_are_in_the_models_state_dict():
    model = build("ViT classifier")
    plain = set(model.state_dict())
    handle = attach_prompts(model, "a gap")
    added = {name: x for name, x in model.state_dict().items() if name not in plain}
    assert list(added) == [f"vit.layers.{i}.attention.fastprompt.prompt" for i in (1, 3)]
    assert all(torch.equal(x, p) for x, p in zip(added.values(), handle.parameters(), strict=True))


def test_the_handle_is_a_context_manager():
    model = build()
    before = outputs(model)
    with untouched(model), attach_prompts(model) as handle:
        assert handle.attached and not same(outputs(model), before)
    assert not handle.attached
    with untouched(model), pytest.raises(KeyError), attach_prompts(model):
        raise KeyError("in the middle")
    with attach_prompts(model) as handle:
        handle.detach()
    assert same(outputs(model), before)


def test_a_detached_handle_says_so(tmp_path):
    handle = attach_prompts(build())
    assert "640 trainable" in repr(handle)
    handle.detach()
    assert "detached" in repr(handle)
    for call in (handle.detach, handle.bake, lambda: handle.save(tmp_path)):
        with pytest.raises(AttachError, match="already detached"):
            call()
    assert not list(tmp_path.iterdir())


def test_attach_again_after_detach():
    model = build()
    first = attach_prompts(model, "a gap")
    want = outputs(model)
    first.detach()
    attach_prompts(model, "shallow").detach()
    attach_prompts(model, "a gap")
    assert same(outputs(model), want)


def test_inputs_are_not_changed():
    model = build("ViT")
    attach_prompts(model, "first two")
    given = inputs(model)
    copied = {k: x.clone() for k, x in given.items()}
    model(**given)
    assert same(given, copied)


def test_attention_switched_away_is_an_error_and_not_a_model_without_prompts():
    model = build("ViT")
    attach_prompts(model)
    with_prompts = outputs(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(AttachError, match="set_attn_implementation"):
        outputs(model)
    model.set_attn_implementation("fastprompt")
    assert same(outputs(model), with_prompts)


def test_an_attached_model_pickles():
    model = build("ViT")
    attach_prompts(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert same(outputs(torch.load(file, weights_only=False)), outputs(model))


def test_a_shared_projection_equals_inserting_what_it_gives():
    model = build("ViT", torch.float64)
    handle = fastprompt.attach(model, VPT(LENGTH, project=8))
    names = [name for name, _ in handle.named_parameters()]
    assert names == [f"layers.{i}.prompt" for i in range(LAYERS)] + [
        f"layers.0.projection.{n}" for n in ("weight", "bias")
    ]
    assert sum("fastprompt.projection" in name for name in model.state_dict()) == 2
    parameters = dict(handle.named_parameters())
    *prompts, weight, bias = parameters.values()
    found = step(model, parameters.values())
    handle.detach()
    rows = {i: torch.nn.Parameter((p @ weight.T + bias).detach()) for i, p in enumerate(prompts)}
    with InsertedPrompts(model, rows):
        want = step(model, rows.values())
        grads = [row.grad for row in rows.values()]
    for name in outputs(model):
        torch.testing.assert_close(found[name], want[name], rtol=1e-10, atol=1e-10)
    for prompt, grad in zip(prompts, grads, strict=True):
        torch.testing.assert_close(prompt.grad, grad @ weight.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bias.grad, sum(grads).sum(0), rtol=1e-9, atol=1e-12)
    expected = sum(grad.T @ prompt.detach() for grad, prompt in zip(grads, prompts, strict=True))
    torch.testing.assert_close(weight.grad, expected, rtol=1e-9, atol=1e-12)


def test_prompt_dropout_acts_in_training_alone_and_serves_the_batch():
    model = build("ViT")
    handle = fastprompt.attach(model, VPT(LENGTH, dropout=0.5))
    child = model.get_submodule("layers.0.attention.fastprompt")
    model.eval()
    with torch.no_grad():
        assert torch.equal(child.rows(), child.prompt)
        assert same(outputs(model), outputs(model))
        model.train()
        rows = child.rows()
        dropped = rows == 0
        assert 0.2 < dropped.float().mean() < 0.8
        torch.testing.assert_close(rows[~dropped], 2 * child.prompt[~dropped])
        keys, values = child.key_value()
        assert keys.dim() == values.dim() == 3  # [Hkv,P,D]: no batch axis
        assert not torch.equal(keys, child.key_value()[0])
    handle.bake()
    assert torch.equal(child.rows(), child.prompt)
