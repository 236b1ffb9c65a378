# SPDX-License-Identifier: Apache-2.0
"""APT attached to transformers models, against the released module put by hand where it belongs."""

import copy
import json

import pytest
import tiny_decoders
import tiny_models
import torch
from tiny_models import TEXT, assert_close, checkpointing, inputs, loss_of, outputs, same, step, untouched
from torch.nn.functional import linear
from transformers import BertConfig, BertModel

import fastprompt
from fastprompt.errors import UnsupportedModelError

BERT = {name: TEXT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
#: Family -> tower, class of the attention module, and the name of its output projection.
PLACES = {
    "ViT": (None, "ViTAttention", "o_proj"),
    "Dinov2": (None, "Dinov2Attention", "o_proj|output.dense"),  # newer transformers, and 5.17
    "CLIP": ("vision", "CLIPAttention", "out_proj"),
    "CLIP text": ("text", "CLIPAttention", "out_proj"),
    "BERT": (None, "BertAttention", "output.dense"),
    "Llama": (None, "LlamaAttention", "o_proj"),
}


def build(name, dtype=torch.float32):
    if name == "Llama":
        return tiny_decoders.build(name, dtype)
    if name == "BERT":
        config = BertConfig(**BERT, vocab_size=50, max_position_embeddings=16)
        return tiny_models.randomised(BertModel(config)).to(dtype)
    return tiny_models.build(name.removesuffix(" text"), dtype)


def attach(model, name="ViT", **options):
    """Prompts of which every part matters."""
    torch.manual_seed(3)
    handle = fastprompt.attach(model, fastprompt.APT(**{"length": 5, "rank": 2} | options), tower=PLACES[name][0])
    with torch.no_grad():
        for p in handle.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return handle


def release(model, name, layers):
    """Put the released module behind every output projection of a tower, by name; its parameters in order."""
    tower, kind, projection = PLACES[name]
    found = [m for n, m in model.named_modules() if type(m).__name__ == kind and n.startswith(tower or "")]
    found = [m for n, m in model.named_modules() if m in found]
    for attention, (prompts, down, up, log_scale) in zip(found, layers, strict=True):
        entered = []

        def enter(module, args, kwargs, entered=entered):
            entered.append(args[0] if args else kwargs["hidden_states"])

        def leave(module, args, y, entered=entered, prompts=prompts, down=down, up=up, log_scale=log_scale):
            keys = prompts + linear(linear(prompts, down), up)
            active = linear(entered.pop(), keys).relu()
            return log_scale.exp() * (y + active.detach().max(-1, keepdim=True).values * (active @ prompts))

        attention.register_forward_pre_hook(enter, with_kwargs=True)
        behind = next(m for n, m in attention.named_modules() if n in projection.split("|"))
        behind.register_forward_hook(leave)
    return [p for layer in layers for p in layer]


def batch_of(model, name):
    if name in ("BERT", "Llama"):
        return {"input_ids": torch.tensor([[4, 9, 30, 7, 11, 3], [12, 3, 3, 20, 8, 40]])}
    return inputs(model)


@pytest.mark.parametrize("name", PLACES)
def test_equals_the_released_module(name):
    """Outputs and every gradient."""
    model = build(name)
    published = copy.deepcopy(model).requires_grad_(False)
    handle = attach(model, name)
    copies = [p.detach().clone().requires_grad_() for p in handle.parameters()]
    layers = [copies[i : i + 4] for i in range(0, len(copies), 4)]
    want = step(published, release(published, name, layers), batch_of(model, name))
    assert_close(step(model, handle.parameters(), batch_of(model, name)), want)


@pytest.mark.parametrize("name", ["ViT", "BERT", "Llama"])
def test_zero_init_starts_as_the_frozen_model_and_learns(name):
    model = build(name)
    want = outputs(model, batch_of(model, name))
    handle = fastprompt.attach(model, fastprompt.APT(length=5, zero_init=True))
    found = outputs(model, batch_of(model, name))
    assert same(found, want)
    loss_of(found).backward()
    moved = [n.rpartition(".")[2] for n, p in handle.named_parameters() if p.grad.any()]
    assert moved.count("gate") == len(handle.sites) and set(moved) == {"gate", "log_scale"}


def test_as_released_it_does_not():
    model = build("ViT")
    want = outputs(model)
    fastprompt.attach(model, fastprompt.APT(length=5))
    assert not same(outputs(model), want)


def test_what_is_learned():
    model = build("ViT")
    with fastprompt.attach(model, fastprompt.APT(length=5, rank=3, layers=(0, -1))) as handle:
        names = [n.split(".", 2)[1:] for n, _ in handle.named_parameters()]
        assert names == [[i, n] for i in "03" for n in ("prompt", "down", "up", "log_scale")]
        assert handle.num_trainable == 2 * (5 * 32 + 2 * 3 * 32 + 1)
    with fastprompt.attach(model, fastprompt.APT(length=5, scale_trainable=False)) as handle:
        assert not [n for n, _ in handle.named_parameters() if "scale" in n]


def test_detach_restores_the_model():
    model = build("BERT")
    with untouched(model), attach(model, "BERT"):
        outputs(model, batch_of(model, "BERT"))


@pytest.mark.parametrize("options", [{}, {"zero_init": True, "activation": "softmax", "weight": "none"}])
def test_save_and_load(tmp_path, options):
    model = build("ViT")
    handle = attach(model, **options)
    want = outputs(model)
    handle.save(tmp_path)
    assert json.loads((tmp_path / "prompt_config.json").read_text())["method"] == "APT"
    handle.detach()
    fastprompt.load(model, tmp_path)
    assert same(outputs(model), want)


@pytest.mark.parametrize("zero_init", [False, True])
def test_bake_keeps_the_numbers(tmp_path, zero_init):
    model = build("ViT")
    handle = attach(model, zero_init=zero_init)
    with torch.no_grad():
        want = outputs(model)
    assert same(outputs(handle.bake().model), want)
    assert handle.num_trainable == 0
    handle.save(tmp_path)
    handle.detach()
    fastprompt.load(model, tmp_path)
    with torch.no_grad():  # a training step computes the keys of all layers in one product
        assert same(outputs(model), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast(dtype):
    """Prompts stay float32; the model's outputs are of its dtype and near those of float32."""
    model = build("ViT")
    attach(model)
    want = outputs(model)["last_hidden_state"]
    with torch.autocast("cpu", dtype):
        mixed = outputs(model)["last_hidden_state"]
    half = build("ViT", dtype)
    handle = attach(half)
    low = step(half, handle.parameters())
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    for found in (mixed, low["last_hidden_state"]):
        assert (found.float() - want).norm() < 16 * torch.finfo(dtype).eps * want.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = build("ViT").train()
    handle = attach(model)
    want = step(model, handle.parameters())
    checkpointing(model, reentrant)
    assert_close(step(model, handle.parameters()), want)


def test_a_copied_model_keeps_its_prompts():
    model = build("ViT")
    handle = attach(model)
    copied = copy.deepcopy(model)
    want = outputs(model)
    with torch.no_grad():
        next(handle.parameters()).add_(1.0)
    assert same(outputs(copied), want) and not same(outputs(model), want)


def test_compiles_in_one_graph():
    model = build("ViT")
    attach(model)
    want = outputs(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs(model)).last_hidden_state, want["last_hidden_state"])


def test_decoding_with_a_cache_equals_recomputing():
    model = build("Llama")
    attach(model, "Llama")
    ids = torch.tensor([[4, 9, 30, 7]])
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_attention_dropout_is_no_hindrance():
    """It acts on the softmax, which prompts do not enter."""
    config = BertConfig(**BERT, vocab_size=50, max_position_embeddings=16, attention_probs_dropout_prob=0.5)
    model = BertModel(config).train()
    fastprompt.attach(model, fastprompt.APT(length=5))
    assert torch.isfinite(model(torch.tensor([[4, 9]])).last_hidden_state).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length: got 0, expected an integer >= 1"),
        ({"length": 5, "rank": 0}, "rank: got 0, expected an integer >= 1"),
        ({"length": 5, "rank": 33}, "rank: got 33, expected at most 32, the width of layer 0"),
        ({"length": 5, "activation": "gelu"}, "activation: got 'gelu', expected one of 'relu', 'softmax'"),
        ({"length": 5, "weight": "max"}, "weight: got 'max', expected one of 'rowmax', 'none'"),
        ({"length": 5, "layers": (4,)}, "layers: got [4], expected distinct numbers"),
        ({"length": 5, "scale_trainable": "no"}, "scale_trainable: got 'no', expected True or False"),
        ({"length": 5, "zero_init": 3}, "zero_init: got 3, expected True or False"),
    ],
)
def test_errors(options, message):
    model = build("ViT")
    with untouched(model), pytest.raises(ValueError) as raised:
        fastprompt.attach(model, fastprompt.APT(**options))
    assert message in str(raised.value)


def test_a_layer_without_output_projection():
    model = build("ViT")
    for layer in model.layers:
        layer.attention.o_proj = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="no linear layer from 32 to 32 columns follows its attention"):
        fastprompt.attach(model, fastprompt.APT(length=5))
