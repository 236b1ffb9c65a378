# SPDX-License-Identifier: Apache-2.0
"""Errors of attach, each of which leaves the model exactly as it was."""

import types

import pytest
from tiny_models import (
    VISION,
    attach_prompts,
    build,
    clip_config,
    mixed,
    outputs,
    same,
    untouched,
)
from torch import nn
from transformers import (
    BlipVisionConfig,
    BlipVisionModel,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

import fastprompt
from fastprompt import VPT, AttachError, UnsupportedModelError
from fastprompt.hf.sites import choose_tower, find_sites


@pytest.mark.parametrize("depth", ["deep", "shallow", "one in the middle"])
def test_a_second_attach_is_an_error_and_the_first_stays(depth):
    model = build("ViT classifier")
    handle = attach_prompts(model, depth)
    before = outputs(model)
    with untouched(model):
        for again in (model, model.vit):
            with pytest.raises(AttachError, match="already hold prompts"):
                fastprompt.attach(again, VPT(length=2))
    assert handle.attached and same(outputs(model), before)


@pytest.mark.parametrize(
    "kind, config, field",
    [
        (ViTModel, ViTConfig, "attention_probs_dropout_prob"),
        (CLIPVisionModel, CLIPVisionConfig, "attention_dropout"),
    ],
)
def test_attention_dropout_is_an_error_that_names_the_field(kind, config, field):
    model = kind(config(**VISION, **{field: 0.1}))
    with untouched(model), pytest.raises(ValueError, match=rf"config\.{field} = 0\.0 \(got 0\.1\)"):
        fastprompt.attach(model, VPT(length=2))
    # The modules keep the value they were built with: training raises, and evaluation draws nothing.
    setattr(model.config, field, 0.0)
    fastprompt.attach(model, VPT(length=2))
    outputs(model.eval())
    with pytest.raises(
        ValueError, match=r"dropout: got 0\.1 at an attention module with prompts or a compressing cache, expected 0\.0"
    ):
        outputs(model.train())


def test_dropout_of_another_tower_is_allowed():
    config = clip_config()
    config.text_config.attention_dropout = 0.1
    model = CLIPModel(config).train()
    fastprompt.attach(model, VPT(length=2), tower="vision")
    outputs(model)


def in_the_way(what):
    """An attention forward with something that no module does: a changed value, key or input."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        hidden = 2 * hidden_states if what == "input" else hidden_states
        heads = (*hidden.shape[:-1], -1, self.head_dim)
        query, key, value = (f(hidden).view(heads).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        key, value = (2 * key if what == "key" else key), (2 * value if what == "value" else value)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling)
        return self.o_proj(out.reshape(hidden.shape)), None

    return forward


def test_an_attention_of_ones_own_is_fine_where_nothing_is_in_the_way():
    model = build()
    want = outputs(model)
    attention = model.layers[2].attention
    attention.forward = types.MethodType(in_the_way(None), attention)
    assert same(outputs(model), want)
    fastprompt.attach(model, VPT(length=2)).detach()


@pytest.mark.parametrize(
    "what, message",
    [
        ("input", "something that is no module stands between the layer's input and its attention"),
        ("key", "projections found give other key norms than the layer"),
        ("value", "no module's output is the value passed to attention"),
    ],
)
def test_an_attention_that_cannot_be_followed_is_unsupported(what, message):
    model = build()
    for i in (1, 2):
        attention = model.layers[i].attention
        attention.forward = types.MethodType(in_the_way(what), attention)
    with untouched(mixed(model)), pytest.raises(UnsupportedModelError) as error:
        fastprompt.attach(model, VPT(length=2))
    lines = str(error.value).splitlines()
    assert "ViTModel cannot hold prompts; missing:" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["layer 1 (ViTAttention)", "layer 2 (ViTAttention)"]
    assert all(message in line for line in lines[1:])


def test_an_attention_that_never_calls_the_interface_is_unsupported():
    model = build()
    attention = model.layers[3].attention
    attention.forward = types.MethodType(lambda self, x, *args, **kwargs: (self.o_proj(x), None), attention)
    with untouched(model), pytest.raises(UnsupportedModelError, match=r"layer 3 .*never reached the attention inter"):
        fastprompt.attach(model, VPT(length=2))


SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "num_heads": [2, 4], "window_size": 4}
UNSUPPORTED = {
    "no attention": (
        lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, num_stages=4)),
        "ConvNextModel has no stack of layers with one self-attention each .* Attention-like modules: none",
    ),
    "attention without the interface": (
        lambda: BlipVisionModel(BlipVisionConfig(**VISION)),
        r"`is_causal` and `config`\). Attention-like modules: encoder\.layers\.0\.self_attn",
    ),
    "windows, two attentions a stage": (
        lambda: SwinModel(SwinConfig(**SWIN, depths=[2, 2])),
        r"SwinModel has no stack of layers .* encoder\.layers\.0\.blocks\.0\.attention",
    ),
    "windows, one attention a stage": (
        lambda: SwinModel(SwinConfig(**SWIN, depths=[1, 1])),
        r"(?s)layer 0 \(SwinAttention\): something that is no module .*layer 1 \(SwinAttention\)",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_told_what_is_missing(name):
    make, message = UNSUPPORTED[name]
    model = mixed(make())
    with untouched(model), pytest.raises(UnsupportedModelError, match=message):
        fastprompt.attach(model, VPT(length=2))


def test_a_layer_that_does_not_run_is_unsupported():
    model, other = build(), build()
    tower = choose_tower(model, None)
    tower.layers.append(other.layers[0])
    tower.attentions.append(other.layers[0].attention)
    with untouched(model), untouched(other), pytest.raises(UnsupportedModelError, match="did not all run in one"):
        find_sites(tower)


def fail(*args, **kwargs):
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("place", ["VPT.build", "find_sites", "install_rows", "third prompt"])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch, place):
    model = mixed(build("ViT classifier"))
    if place == "VPT.build":
        monkeypatch.setattr(VPT, "build", fail)
    elif place == "third prompt":
        attention = type(model.vit.layers[2].attention)
        third = model.vit.layers[2].attention
        add = nn.Module.add_module
        monkeypatch.setattr(attention, "add_module", lambda m, *args: fail() if m is third else add(m, *args))
    else:
        monkeypatch.setattr(f"fastprompt.hf.attach.{place}", fail)
    with untouched(model), pytest.raises(RuntimeError, match="in the middle"):
        fastprompt.attach(model, VPT(length=2, layers=(0, 1, 2)), train=("classifier",))
    monkeypatch.undo()
    fastprompt.attach(model, VPT(length=2)).detach()


@pytest.mark.parametrize(
    "name, tower, message",
    [
        ("CLIP", None, "tower='vision' or tower='text'"),
        ("Siglip", None, r"vision \(vision_model\).*tower='vision' or tower='text'"),
        ("CLIP", "text", "VPT is for vision towers, but this tower is text"),
        ("ViT", "text", r"got 'text', but ViTModel has vision"),
        ("ViT", "audio", "tower: got 'audio', expected 'vision', 'text' or None"),
    ],
)
def test_the_wrong_tower_is_an_error(name, tower, message):
    model = build(name)
    with untouched(model), pytest.raises(ValueError, match=message):
        fastprompt.attach(model, VPT(length=2), tower=tower)


@pytest.mark.parametrize(
    "train, message",
    [
        (("clasifier",), r"pattern 'clasifier' matches no parameter; top-level names: classifier, vit"),
        (("classifier", "vit.head"), "pattern 'vit.head' matches no parameter"),
        (("",), "expected non-empty name patterns"),
        ((3,), "expected non-empty name patterns"),
    ],
)
def test_a_pattern_that_names_nothing_is_an_error(train, message):
    model = mixed(build("ViT classifier"))
    with untouched(model), pytest.raises(ValueError, match=message):
        fastprompt.attach(model, VPT(length=2), train=train)


@pytest.mark.parametrize(
    "train, names",
    [
        ("classifier", ["classifier.weight", "classifier.bias"]),
        (["classifier.b*"], ["classifier.bias"]),
        (("*.2.layernorm_?????.bias", "classifier.weight"), ["vit.layers.2.layernorm_after.bias", "classifier.weight"]),
        (("vit.layernorm", "vit.layernorm.*"), ["vit.layernorm.weight", "vit.layernorm.bias"]),
    ],
)
def test_patterns_name_base_parameters(train, names):
    model = build("ViT classifier")
    handle = fastprompt.attach(model, VPT(length=2), train=train)
    got = [n.removeprefix("base.") for n, _ in handle.named_parameters() if n.startswith("base.")]
    assert got == names
    assert got == [n for n, p in model.named_parameters() if p.requires_grad and "fastprompt" not in n]


def test_what_is_no_model_or_no_recipe_is_a_type_error():
    with pytest.raises(TypeError, match="model: got Linear, expected a transformers PreTrainedModel"):
        fastprompt.attach(nn.Linear(2, 2), VPT(length=2))
    with untouched(model := build()), pytest.raises(TypeError, match="config: got 50, expected a recipe such as"):
        fastprompt.attach(model, 50)
    with untouched(model), pytest.raises(TypeError, match=r"config: got .*VPT'>, expected a recipe such as"):
        fastprompt.attach(model, VPT)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 0}, "length: got 0, expected an integer >= 1"),
        ({"length": 2.0}, "length: got 2.0"),
        ({"length": True}, "length: got True"),
        ({"length": 2, "depth": "middle"}, "depth: got 'middle', expected 'deep' or 'shallow'"),
        ({"length": 2, "init": "ones"}, "init: got 'ones', expected one of 'vpt', 'normal', 'zeros'"),
        ({"length": 2, "layers": ()}, r"layers: got \(\), expected a non-empty sequence"),
        ({"length": 2, "layers": (0.0,)}, "layers: got"),
        ({"length": 2, "depth": "shallow", "layers": (0,)}, "layers: shallow prompts enter the first layer only"),
    ],
)
def test_a_wrong_recipe_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        VPT(**arguments)


@pytest.mark.parametrize("layers", [(4,), (-5,), (1, 1), (1, -3)])
def test_layers_that_the_model_lacks_are_an_error(layers):
    model = mixed(build())
    with untouched(model), pytest.raises(ValueError, match=r"layers: got .*, expected distinct numbers in \[-4, 3\]"):
        fastprompt.attach(model, VPT(length=2, layers=layers))


def test_a_recipe_compares_by_value():
    assert VPT(length=2, layers=[1, 2]) == VPT(length=2, layers=(1, 2)) != VPT(length=2)
    assert hash(VPT(length=2, layers=[1, 2])) == hash(VPT(length=2, layers=(1, 2)))
