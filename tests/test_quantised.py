# SPDX-License-Identifier: Apache-2.0
"""Bases whose linear layers are packed: visual prompts go through them where they can, a prefix needs none of them."""

import copy
import warnings

import pytest
import torch
from tiny_decoders import build, concatenate, leaves, logits, sentences
from tiny_models import assert_close, attach_prompts, insert_prompts, outputs, step, untouched
from tiny_models import build as build_vit
from torch import nn

import fastprompt
from fastprompt import VPT, CheckpointError, PrefixKV, UnsupportedModelError


class Packed(nn.Module):
    """A linear layer in int8, with a scale a row; no nn.Linear and no floating point parameter of two dimensions."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = nn.Parameter(weight.abs().amax(dim=1) / 127)
        self.register_buffer("codes", (weight / self.scale[:, None]).round().to(torch.int8))
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale[:, None], self.bias)


class BatchesOnly(Packed):
    """Takes [B,T,C] alone."""

    def forward(self, x):
        if x.dim() != 3:
            raise RuntimeError(f"packed kernel: expected 3 dimensions, got {x.dim()}")
        return super().forward(x)


class Tiles(Packed):
    """Works in tiles of 16 rows and leaves the cutting to its caller, where a sentence is no batch."""

    def forward(self, x):
        if x.dim() == 2:
            x = nn.functional.pad(x, (0, 0, 0, -len(x) % 16))
        return super().forward(x)


class NoDerivative(Packed):
    def forward(self, x):
        return super().forward(x.detach())


def packed(model, kind, which=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")):
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in which:
            setattr(model.get_submodule(parent), last, kind(module))
    return model


def unpacked(model):
    """The same model with the packed weights written out as floats."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Packed):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.codes.to(module.scale.dtype) * module.scale.detach()[:, None]
            if module.bias is not None:
                linear.bias = module.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, linear)
    return model


@pytest.mark.parametrize("kind", [Packed, BatchesOnly, Tiles])
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_a_prefix_needs_no_projection(name, kind):
    model = packed(build(name, torch.float64), kind)
    batch = sentences("left")
    with untouched(model):
        handle = fastprompt.attach(model, PrefixKV(5, init="ptuning"))
        prefixes = leaves(handle)
        found = logits(model, batch)
        found.pow(2).sum().backward()
        got = {"": found.detach()} | {f"{i}": p.grad for i, p in enumerate(handle.parameters())}
        tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
        handle.detach()
    other = unpacked(packed(build(name, torch.float64), Packed))
    concatenate(other, "text", {i: lambda pair=pair: pair for i, pair in prefixes.items()})
    want = logits(other, batch)
    want.pow(2).sum().backward()
    gradients = [p.grad for pair in prefixes.values() for p in pair]
    assert_close(got, {"": want.detach()} | {f"{i}": x for i, x in enumerate(gradients)})
    assert torch.equal(tokens, other.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=False))


def test_a_prefix_moves_between_a_float_base_and_its_packed_form(tmp_path):
    """Shapes are compared; packed weights have no values to compare."""
    fastprompt.attach(build("Llama"), PrefixKV(5, init="ptuning")).save(tmp_path / "float")
    model = packed(build("Llama"), Packed)
    fastprompt.load(model, tmp_path / "float").bake().save(tmp_path / "packed")
    want = logits(model, sentences())
    again = packed(build("Llama"), Packed)
    fastprompt.load(again, tmp_path / "packed")
    assert torch.equal(logits(again, sentences()), want)
    fastprompt.load(build("Llama"), tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"got kv_heads 1"):
        fastprompt.load(packed(build("Qwen2"), Packed), tmp_path / "packed")


@pytest.mark.parametrize("which", [("k_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")])
def test_visual_prompts_go_through_packed_projections_that_take_rows(which):
    model = packed(build_vit("ViT", torch.float64), Packed, which)
    other = unpacked(packed(build_vit("ViT", torch.float64), Packed, which))
    plain = outputs(model)
    handle = attach_prompts(model)
    assert_close(step(model, handle.parameters()), step(other, insert_prompts(other).parameters()))
    handle.detach()
    assert_close(outputs(model), plain, 0)


@pytest.mark.parametrize(
    "kind, message",
    [
        (BatchesOnly, r"its projections cannot be called on rows \[P,C\] \(RuntimeError: packed kernel: expected 3"),
        (Tiles, "its key projection gives 16 rows for 2"),
        (NoDerivative, "its key projection passes no gradient to its input"),
    ],
)
def test_projections_that_cannot_be_called_once_a_step_are_told(kind, message):
    model = packed(build_vit("ViT"), kind)
    with untouched(model):
        with pytest.raises(UnsupportedModelError, match=rf"layer 3 \(ViTAttention\): {message}.*use PrefixKV"):
            fastprompt.attach(model, VPT(5))
        fastprompt.attach(model, PrefixKV(5)).detach()


def test_torchs_dynamic_quantisation():
    """It runs, and has no derivative: prompts that need one are refused, a prefix is for inference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, vit = (
            torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8)
            for m in (build("Llama"), build_vit("ViT"))
        )
        with pytest.raises(UnsupportedModelError, match=r"its key projection passes no gradient .*use PrefixKV"):
            fastprompt.attach(vit, VPT(5))
    batch = sentences("left")
    with torch.no_grad():
        plain = logits(model, batch)
        for which, found in (("text", model), ("vision", vit)):
            handle = fastprompt.attach(found, PrefixKV(5, init="ptuning"))
            assert handle.tower.kind == which and handle.num_trainable > 0
        assert (logits(model, batch) - plain).abs().max() > 0.1
        tokens = [model.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False)]
        assert tokens[0].shape == tokens[1].shape == (3, 11)


@pytest.mark.parametrize("kind", [Packed, BatchesOnly, Tiles])
def test_apt_reads_behind_packed_layers(kind):
    """It runs no projection of the base itself, so it does not matter what they can be called on."""
    model, batch = packed(build("Llama", torch.float64), kind), sentences()
    plain = unpacked(copy.deepcopy(model))
    found = []
    for each in (model, plain):
        torch.manual_seed(0)
        handle = fastprompt.attach(each, fastprompt.APT(length=3, rank=2))
        found.append(step(each, handle.parameters(), batch))
    assert_close(found[0], found[1])
