# SPDX-License-Identifier: Apache-2.0
"""The CLIP that ships: its tokenizer, its pretraining, its files, and what it knows of drawings that it never saw."""

import gzip
import importlib
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from fastprompt.data import ImageDataset, load_openmoji
from fastprompt.data.openmoji import Emoji, OpenMoji, drawer
from fastprompt.errors import AssetError, CheckpointError
from fastprompt.hf.clip_tokenizer import load_clip_tokenizer
from fastprompt.hf.images import image_transform
from fastprompt.hf.openmoji_clip import EMBEDDING, FOLDER, ROWS, WEIGHTS, load_openmoji_clip, save_openmoji_clip


def tiny(tokens):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = tower | {"vocab_size": tokens, "bos_token_id": tokens - 2, "eos_token_id": tokens - 1}
    vision = tower | {"image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()


@pytest.fixture(scope="module")
def shipped():
    return load_openmoji_clip()


@pytest.mark.assets
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("  A   PHOTO of\na cat ", [320, 1125, 539, 320, 2368]),
        ("diagram, dog!", [22697, 267, 1929, 256]),
        ("", []),
    ],
)
def test_tokens_are_those_of_clip(text, ids):
    tokenizer = load_clip_tokenizer()
    assert tokenizer(text).input_ids == [49406, *ids, 49407]
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77


@pytest.mark.assets
def test_texts_come_back_from_their_tokens():
    tokenizer = load_clip_tokenizer()
    for item in load_openmoji().emoji[::50]:
        ids = tokenizer(item.names[0]).input_ids
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == item.names[0].replace(" ", "")


def test_a_short_vocabulary_is_refused(tmp_path):
    file = tmp_path / "bpe.txt.gz"
    file.write_bytes(gzip.compress(b"#version\ni n\nt h\n"))
    with pytest.raises(AssetError, match=r"expected 48894 pairs"):
        load_clip_tokenizer(file)


@pytest.fixture
def example(monkeypatch):
    """The pretraining script as a module."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    return importlib.import_module("pretrain_openmoji_clip")


@pytest.fixture
def drawings(tmp_path):
    """Eight emoji without a class, so that all are pretrained on; one has a second skin tone."""
    emoji = []
    for index in range(8):
        file = tmp_path / f"{index}.svg"
        file.write_text(
            '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">'
            f'<g id="color"><rect x="{8 * index}" y="9" width="20" height="50" fill="#0{index}f"/></g></svg>'
        )
        tones = (file,) if index == 3 else ()
        emoji.append(Emoji(str(index), file, (f"bar {index}",), "Symbols", "geometric", str(index), tones))
    return OpenMoji(tmp_path, tuple(emoji))


@pytest.mark.assets
def test_pretraining_goes_on_from_ctrl_c_as_if_it_had_not_stopped(example, drawings, tmp_path, monkeypatch):
    recipe = example.Recipe(epochs=3, batch=4, width=32, layers=1, image_size=16, patch=8)
    whole = example.Pretraining(drawings, recipe, tmp_path / "whole")
    before = [p.detach().clone() for p in whole.params]
    whole.run()
    assert whole.step == 6 and not all(map(torch.equal, before, whole.params))

    stopped = example.Pretraining(drawings, recipe, tmp_path / "stopped")
    take_step = stopped._take_step

    def interrupted():
        if stopped.step == 3:
            signal.raise_signal(signal.SIGINT)
        return take_step()

    monkeypatch.setattr(stopped, "_take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert stopped.step == 4
    resumed = example.Pretraining(drawings, recipe, tmp_path / "stopped")
    resumed.resume()
    assert resumed.step == 4
    resumed.run()
    assert all(map(torch.equal, whole.params, resumed.params))
    other = example.Pretraining(drawings, example.Recipe(epochs=4, batch=4, width=32, layers=1), tmp_path / "stopped")
    with pytest.raises(CheckpointError, match=r"epochs: got 4, expected 3"):
        other.resume()


def test_images_of_one_caption_are_not_set_against_each_other(example):
    logits = torch.randn(3, 3, dtype=torch.float64)
    apart = example.contrastive_loss(logits, torch.arange(3))
    by_image, by_text = logits.log_softmax(1), logits.log_softmax(0)
    torch.testing.assert_close(apart, -(by_image.diagonal() + by_text.diagonal()).mean() / 2)
    shared = example.contrastive_loss(logits[:, :2], torch.tensor([1, 0, 1]))
    by_image = logits[:, :2].log_softmax(1)
    of_images = by_image[0, 1] + by_image[1, 0] + by_image[2, 1]
    of_texts = by_text[1, 0] + (by_text[0, 1] + by_text[2, 1]) / 2
    torch.testing.assert_close(shared, -(of_images / 3 + of_texts / 2) / 2)


def test_captions_of_a_kind_are_said_once(example, drawings):
    of_each, of_kinds, kind = example.captions(drawings.emoji)
    assert len(of_each) == 8 and all(f"bar {index}" in text for index, text in enumerate(of_each))
    assert len(of_kinds) == 1 and ("geometric" in of_kinds[0] or "symbols" in of_kinds[0])
    assert kind.tolist() == [0] * 8


def test_augmentation_keeps_white_white_and_values_in_range(example):
    assert (example.augmented(torch.ones(4, 3, 16, 16), 1.0) >= 0.6).all()
    moved = example.augmented(torch.rand(4, 3, 16, 16), 1.0)
    assert moved.shape == (4, 3, 16, 16) and 0 <= moved.min() and moved.max() <= 1


@pytest.mark.assets
def test_saved_rows_return_to_their_places(tmp_path):
    rows = torch.tensor([320, 1125, 2368, 49406, 49407])
    model = tiny(len(rows))
    loaded, tokenizer = load_openmoji_clip(save_openmoji_clip(model, rows, tmp_path / "model"))
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    ids = tokenizer(["a photo", "a cat"], padding=True, return_tensors="pt").input_ids
    few = torch.searchsorted(rows, ids)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.half().float()(input_ids=few, pixel_values=pixels).logits_per_text
        got = loaded(input_ids=ids, pixel_values=pixels).logits_per_text
    torch.testing.assert_close(got, expected)
    embedding = loaded.get_parameter(EMBEDDING)
    assert len(embedding) == 49408 and embedding.any(dim=-1).sum() == len(rows)


def test_rows_that_do_not_fit_are_refused(tmp_path):
    for rows in ([320, 49406, 49407], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match=r"rows: got \d ids that end with"):
            save_openmoji_clip(tiny(4), torch.tensor(rows), tmp_path)


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no whole model"):
        load_openmoji_clip(tmp_path)
    save_openmoji_clip(tiny(2), torch.tensor([49406, 49407]), tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="has no whole model"):
        load_openmoji_clip(tmp_path)


def test_shipped_folder_is_small_and_names_its_source():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 10_000_000
    attribution = (FOLDER / "ATTRIBUTION.md").read_text()
    assert "OpenMoji" in attribution and "CC BY-SA 4.0" in attribution
    tensors = load_file(FOLDER / WEIGHTS)
    rows = tensors[ROWS].tolist()
    assert rows == sorted(set(rows)) and len(rows) == len(tensors[EMBEDDING])
    assert {str(t.dtype) for name, t in tensors.items() if name != ROWS} == {"torch.float16"}
    assert all(t.isfinite().all() for t in tensors.values())
    assert json.loads((FOLDER / "config.json").read_text())["text_config"]["vocab_size"] == 49408


@pytest.mark.assets
def test_shipped_rows_hold_the_words_of_the_classes(shipped):
    model, tokenizer = shipped
    texts = [f"a photo of a {name}." for name in load_openmoji().classes]
    ids = {i for text in texts for i in tokenizer(text).input_ids}
    assert model.get_parameter(EMBEDDING)[sorted(ids)].any(dim=-1).all()


@pytest.mark.assets
def test_shipped_model_is_between_chance_and_ceiling(shipped):
    model, tokenizer = shipped
    data = load_openmoji()
    texts = tokenizer([f"a photo of a {name}." for name in data.classes], padding=True, return_tensors="pt")
    transform = image_transform(model)
    for style, least, most in (("colour", 0.25, 0.65), ("outline", 0.08, 0.40)):
        images = ImageDataset(data.test, data.classes, transform, read=drawer(64, style)).load_all(progress=False)
        with torch.no_grad():
            logits = model(pixel_values=images.pixel_values, **texts).logits_per_image
        assert least < (logits.argmax(dim=-1) == images.labels).float().mean().item() < most
