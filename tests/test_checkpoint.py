# SPDX-License-Identifier: Apache-2.0
import copy
import hashlib
import json
import os
import stat

import pytest
import safetensors.torch
import torch
from tiny_models import (
    DEPTHS,
    FAMILIES,
    LENGTH,
    SIZE,
    VISION,
    WIDTH,
    attach_prompts,
    build,
    mixed,
    outputs,
    randomised,
    same,
    step,
    untouched,
)
from transformers import Dinov2Config, Dinov2ForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

import fastprompt
from fastprompt import VPT, AttachError, CheckpointError

CONFIG, TENSORS = "prompt_config.json", "prompts.safetensors"


def save(folder, name="ViT classifier", depth="deep", train=("classifier",)):
    """Saves prompts and a head with values of their own; returns the outputs and the saved tensors."""
    model = build(name)
    handle = attach_prompts(model, depth, tower=FAMILIES[name].tower, train=train)
    with torch.no_grad():
        for i, p in enumerate(handle.parameters()):
            p.add_(0.1 * (i + 1))
    handle.save(folder)
    return outputs(model), {n: p.detach().clone() for n, p in handle.named_parameters()}


def digest(content):
    """The sha256 of a prompt_config.json, apart from its own entry."""
    rest = {k: v for k, v in content.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def edit(folder, change, sign=True):
    """Changes the JSON file, with a valid sha256 of its own."""
    content = json.loads((folder / CONFIG).read_text())
    change(content)
    if sign:
        content["sha256"] = digest(content)
    (folder / CONFIG).write_text(json.dumps(content))


def refused(model, folder, message):
    with untouched(mixed(model)), pytest.raises(CheckpointError, match=message):
        fastprompt.load(model, folder)
    fastprompt.attach(model, VPT(length=1), tower="vision").detach()


# Round trips


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", ["ViT classifier", "Dinov2 classifier", "CLIP classifier"])
def test_what_is_saved_is_what_is_loaded(tmp_path, name, depth):
    want, tensors = save(tmp_path, name, depth)
    model = build(name)
    with untouched(model):
        handle = fastprompt.load(model, tmp_path)
        assert same(dict(handle.named_parameters()), tensors)
        assert same(outputs(model), want)
        assert all(p.requires_grad for p in handle.parameters())
        assert handle.config == VPT(length=LENGTH, **DEPTHS[depth][0]) and handle.train == ("classifier",)
        handle.detach()


def test_prompts_of_one_of_two_towers(tmp_path):
    want, _ = save(tmp_path, "CLIP", train=())
    model = build("CLIP")
    assert fastprompt.load(model, tmp_path).tower.kind == "vision"
    assert same(outputs(model), want)


def test_training_goes_on_from_a_loaded_checkpoint(tmp_path):
    model = build("ViT classifier")
    handle = attach_prompts(model, train=("classifier",))
    handle.save(tmp_path)
    other = build("ViT classifier")
    loaded = fastprompt.load(other, tmp_path)
    assert same(step(other, loaded.parameters()), step(model, handle.parameters()))


def test_the_files_say_what_they_hold(tmp_path):
    _, tensors = save(tmp_path, depth="a gap")
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, TENSORS]
    content = json.loads((tmp_path / CONFIG).read_text())
    names = ["layers.1.prompt", "layers.3.prompt", "base.classifier.weight", "base.classifier.bias"]
    shapes = [[LENGTH, WIDTH]] * 2 + [[2, WIDTH], [2]]
    assert content["format"] == 1 and content["method"] == "VPT" and content["tower"] == "vision"
    assert content["config"] == {
        "length": LENGTH, "depth": "deep", "layers": [1, 3], "init": "vpt", "project": None, "dropout": 0.0
    }  # fmt: skip
    assert content["train"] == ["classifier"]
    assert content["tensors"] == {n: {"shape": s, "dtype": "torch.float32"} for n, s in zip(names, shapes, strict=True)}
    assert content["base"].items() >= {"class": "ViTModel", "layers": 4, "width": 32, "kv_heads": 4}.items()
    data = (tmp_path / TENSORS).read_bytes()
    assert content["tensors_sha256"] == hashlib.sha256(data).hexdigest()
    assert content["sha256"] == digest(content)
    # A safetensors file starts with the length of its JSON header; nothing in it is pickled.
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).keys() == set(names)
    assert same(safetensors.torch.load(data), tensors)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for folder in ("one", "deep/two"):
        save(tmp_path / folder)
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "deep/two" / name).read_bytes()


def test_files_have_the_permissions_of_new_files(tmp_path):
    save(tmp_path)
    (tmp_path / "other").touch()
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_folder_keeps_its_other_files(tmp_path):
    save(tmp_path, depth="a gap")
    (tmp_path / "notes.txt").write_text("mine")
    want, _ = save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", CONFIG, TENSORS]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    model = build("ViT classifier")
    fastprompt.load(model, tmp_path)
    assert same(outputs(model), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_base_model_may_be_of_another_dtype(tmp_path, dtype):
    saved = build("ViT classifier")
    # Below the normal numbers of float16, where rounding is no longer relative.
    with torch.no_grad():
        saved.vit.layers[1].attention.k_proj.weight[0, 0] = 1e-6
    handle = attach_prompts(saved, train=("classifier",))
    handle.save(tmp_path)
    model = copy.deepcopy(build("ViT classifier"))
    model.vit.layers[1].attention.k_proj.weight.data[0, 0] = 1e-6
    loaded = fastprompt.load(model.to(dtype), tmp_path)
    for got, want in zip(loaded.parameters(), handle.parameters(), strict=True):
        assert got.dtype in (dtype, torch.promote_types(dtype, torch.float32))
        assert torch.equal(got, want.to(got.dtype))
    outputs(model)


def test_loading_onto_attached_prompts_is_an_error(tmp_path):
    save(tmp_path)
    model = build("ViT classifier")
    attach_prompts(model, "shallow")
    with untouched(model), pytest.raises(AttachError, match="already hold prompts"):
        fastprompt.load(model, tmp_path)


# Another base model


def vit(**changes):
    return randomised(ViTForImageClassification(ViTConfig(**VISION | changes)))


def other_weights():
    return randomised(ViTForImageClassification(ViTConfig(**VISION)), seed=9)


def one_other_layer():
    model = build("ViT classifier")
    model.vit.layers[2].attention.k_proj.weight.data *= 1.02
    return model


OTHERS = {
    "width": (lambda: vit(hidden_size=64), "got width 64 .*, expected 32"),
    "fewer layers": (lambda: vit(num_hidden_layers=3), "got layers 3 .*, expected 4"),
    "more layers": (lambda: vit(num_hidden_layers=5), "got layers 5 .*, expected 4"),
    "heads": (lambda: vit(num_attention_heads=2), "got kv_heads 2 .*, expected 4"),
    "classes": (lambda: vit(num_labels=5), r"base.classifier.weight: got shape \[2, 32\], expected \[5, 32\]"),
    "weights": (other_weights, "the key projection of layer . holds .* where the prompts' base model held"),
    "one layer": (one_other_layer, "the key projection of layer 2 holds"),
    "no head": (lambda: build("ViT"), "pattern 'classifier' matches no parameter"),
    "kind": (lambda: build("CLIP"), "do not fit CLIPModel|pattern 'classifier' matches no parameter"),
    "family": (
        lambda: randomised(Dinov2ForImageClassification(Dinov2Config(**SIZE)), seed=9),
        "the key projection of layer",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_base_model_is_refused(tmp_path, name):
    save(tmp_path)
    make, message = OTHERS[name]
    refused(make(), tmp_path, message)


def test_a_layer_that_the_model_lacks_is_refused(tmp_path):
    save(tmp_path, "ViT", "a gap", train=())
    refused(randomised(ViTModel(ViTConfig(**VISION | {"num_hidden_layers": 2}))), tmp_path, "layers: got .*1, 3")


# Damaged files


def cut(name, keep):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(keep * len(data))])

    return damage


def flip(name, position):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[int(position * (len(data) - 1))] ^= 1
        (folder / name).write_bytes(data)

    return damage


def from_another_save(folder):
    save(folder / "other", depth="a gap")
    os.replace(folder / "other" / TENSORS, folder / TENSORS)


def signed(**entries):
    return lambda folder: edit(folder, lambda content: content.update(entries))


def without(entry):
    return lambda folder: edit(folder, lambda content: content.pop(entry))


def swapped_tensors(change):
    """Other tensors, with valid sha256 sums everywhere."""

    def damage(folder):
        tensors = change(safetensors.torch.load_file(folder / TENSORS))
        safetensors.torch.save_file(tensors, folder / TENSORS)
        declared = {n: {"shape": list(x.shape), "dtype": str(x.dtype)} for n, x in tensors.items()}
        signed(tensors_sha256=hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest(), tensors=declared)(folder)

    return damage


def no_safetensors(folder):
    (folder / TENSORS).write_bytes(b"garbage")
    signed(tensors_sha256=hashlib.sha256(b"garbage").hexdigest())(folder)


CHANGED = "got sha256 [0-9a-f]{64}, expected [0-9a-f]{64}; the file was truncated or changed"
DAMAGES = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"cannot read .*{CONFIG}"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), f"cannot read .*{TENSORS}"),
    "half the tensors": (cut(TENSORS, 0.5), f"{TENSORS}: {CHANGED}"),
    "no bytes of tensors": (cut(TENSORS, 0), f"{TENSORS}: {CHANGED}"),
    "a bit in the first byte": (flip(TENSORS, 0), f"{TENSORS}: {CHANGED}"),
    "a bit in the middle": (flip(TENSORS, 0.5), f"{TENSORS}: {CHANGED}"),
    "a bit in the last byte": (flip(TENSORS, 1), f"{TENSORS}: {CHANGED}"),
    "tensors of another save": (from_another_save, f"{TENSORS}: {CHANGED}"),
    "half the config": (cut(CONFIG, 0.5), "not valid JSON"),
    "no bytes of config": (cut(CONFIG, 0), "not valid JSON"),
    "config is no text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "config is a list": (lambda folder: (folder / CONFIG).write_text("[]"), "no 'sha256' entry"),
    "config is empty": (lambda folder: (folder / CONFIG).write_text("{}"), "no 'sha256' entry"),
    "length edited": (
        lambda folder: edit(folder, lambda content: content["config"].update(length=6), sign=False),
        f"{CONFIG}: {CHANGED}",
    ),
    "an entry added": (lambda folder: edit(folder, lambda c: c.update(note="x"), sign=False), f"{CONFIG}: {CHANGED}"),
    "an entry not a number": (lambda folder: edit(folder, lambda c: c.update(x=float("nan")), sign=False), "JSON|sha"),
    "another length, signed": (
        lambda folder: edit(folder, lambda content: content["config"].update(length=6)),
        r"layers.0.prompt: got shape \[5, 32\], expected \[6, 32\]",
    ),
    "an unknown recipe": (signed(method="VPT2"), "method: got 'VPT2', expected one of VPT"),
    "an unknown option": (
        lambda folder: edit(folder, lambda content: content["config"].update(colour=1)),
        "do not fit .*colour",
    ),
    "a newer format": (signed(format=2), "got format 2, expected 1"),
    "no method": (without("method"), "method"),
    "no base": (without("base"), "base"),
    "no tower": (without("tower"), "tower"),
    "no tensors entry": (without("tensors_sha256"), "expected None; the file was truncated or changed"),
    "a tensor missing": (
        swapped_tensors(lambda tensors: {n: x for n, x in tensors.items() if n != "layers.2.prompt"}),
        r"\['layers.2.prompt'\] missing",
    ),
    "a tensor too many": (
        swapped_tensors(lambda tensors: tensors | {"layers.9.prompt": torch.zeros(5, 32)}),
        r"\['layers.9.prompt'\] too many",
    ),
    "a tensor of another shape": (
        swapped_tensors(lambda tensors: tensors | {"layers.3.prompt": torch.zeros(5, 31)}),
        r"layers.3.prompt: got shape \[5, 31\], expected \[5, 32\]",
    ),
    "tensors declared otherwise": (signed(tensors={}), "those of prompts.safetensors"),
    "an empty base": (signed(base={}), r"base.layers"),
    "no weights of the base": (signed(base={"layers": 4, "width": 32, "kv_heads": 4, "head_dim": 8}), "base.weights"),
    "a method that is no name": (signed(method=["VPT"]), r"\['method'\]"),
    "no safetensors": (no_safetensors, "not a safetensors file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused(tmp_path, name):
    save(tmp_path)
    damage, message = DAMAGES[name]
    damage(tmp_path)
    refused(build("ViT classifier"), tmp_path, message)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    refused(build("ViT classifier"), tmp_path / "nowhere", "cannot read .*nowhere")


# Interrupted saves


# A save flushes two files and puts two in place; each of the four may fail.
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("function, call", [("fsync", 1), ("fsync", 2), ("replace", 1), ("replace", 2)])
@pytest.mark.parametrize("before", [True, False])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, function, call, error, before):
    if before:
        want, _ = save(tmp_path, depth="a gap")
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    original, calls = getattr(os, function), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)

    model = build("ViT classifier")
    handle = attach_prompts(model)
    monkeypatch.setattr(os, function, failing)
    with pytest.raises(type(error)):
        handle.save(tmp_path)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    if before:
        loaded = build("ViT classifier")
        fastprompt.load(loaded, tmp_path)
        assert same(outputs(loaded), want)
    handle.save(tmp_path)
    fastprompt.load(build("ViT classifier"), tmp_path)
