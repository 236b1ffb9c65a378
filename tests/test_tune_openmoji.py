# SPDX-License-Identifier: Apache-2.0
"""The protocol on OpenMoji: what a run measures, going on from a torn file, table and plot."""

import json
from concurrent.futures import Future

import pytest
import tiny_clips
import torch

import fastprompt
from bench import tune_openmoji
from fastprompt.data import DecodedImages
from fastprompt.hf.clip_vision import prompted_layers
from fastprompt.hf.sites import choose_tower
from fastprompt.tuning import evaluate

CLASSES = ("cat", "golden retriever", "st.", "big dog")


def images(count, seed):
    """``count`` random images of each class, class after class."""
    pixels = torch.randn(4 * count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return DecodedImages(pixels, torch.arange(4).repeat_interleave(count), CLASSES)


@pytest.fixture
def tiny(monkeypatch):
    """The protocol on a tiny CLIP, noise, two seeds and one or two shots."""
    clip = tiny_clips.clip()
    monkeypatch.setattr(tune_openmoji, "loaded", lambda: (clip, tiny_clips.tokenizer(), None))
    monkeypatch.setattr(tune_openmoji, "training", lambda seed, style: images(2, seed + len(style)))
    monkeypatch.setattr(tune_openmoji, "testing", lambda style: images(3, 10 + len(style)))
    monkeypatch.setattr(tune_openmoji, "model_digest", lambda: "tiny")
    monkeypatch.setattr(tune_openmoji, "SEEDS", (1, 2))
    monkeypatch.setattr(tune_openmoji, "SHOTS", (1, 2))
    for name in ("CoOp", "CoCoOp", "MaPLe"):
        recipe = tune_openmoji.RECIPES[name]
        settings = recipe.published(2) | {"epochs": 1, "warmup": 0.0}
        monkeypatch.setattr(type(recipe), "published", lambda self, shots, settings=settings: settings)
    return clip


def test_every_run_is_named_once():
    keys = tune_openmoji.keys()
    assert len(keys) == len(set(keys)) == 2 * (3 * 3 * (5 + 1) + 2)
    assert keys[0][3] == 16 and [key for key in keys if key[0] == "zero-shot"] == [
        ("zero-shot", "colour", "all", 0, 0),
        ("zero-shot", "colour", "base", 0, 0),
        ("zero-shot", "outline", "all", 0, 0),
        ("zero-shot", "outline", "base", 0, 0),
    ]


def test_a_part_of_the_classes_is_labelled_anew_and_shots_are_taken_from_the_front():
    whole = images(3, 0)
    new = tune_openmoji.chosen(whole, "new", 2)
    assert new.classes == ("golden retriever", "big dog") and new.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(new.pixel_values, whole.pixel_values[[3, 4, 9, 10]])
    assert len(tune_openmoji.chosen(whole, "base")) == 6


@pytest.mark.parametrize("method", ["CoOp", "CoCoOp", "MaPLe"])
def test_a_run_measures_base_and_new_with_the_same_prompt(tiny, method):
    row = tune_openmoji.measure((method, "outline", "base", 2, 1))
    assert set(row["accuracy"]) == {"base", "new"} and row["evaluation_images"] == 6
    assert row["steps"] == -(-4 // row["batch_size"]) and row["trainable"] > 0
    assert prompted_layers(choose_tower(tiny, "vision").attentions) == 0
    assert tune_openmoji.measure((method, "outline", "base", 2, 1))["accuracy"] == row["accuracy"]


@pytest.mark.parametrize("trained", ["colour", "outline"])
def test_zero_shot_is_that_of_the_templates(tiny, trained):
    row = tune_openmoji.measure(("zero-shot", trained, "all", 0, 0))
    clf = fastprompt.CLIPClassifier(tiny, tiny_clips.tokenizer(), CLASSES, fastprompt.ZeroShot())
    for style in ("colour", "outline"):
        expected = evaluate(clf, tune_openmoji.testing(style), batch_size=4, progress=False).accuracy
        assert row["accuracy"][style] == expected
    assert (row["trainable"], row["shots"]) == (0, 0)


class Here:
    """An executor of this process."""

    def __init__(self, *options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, key):
        future = Future()
        future.set_result(function(key))
        return future


def test_the_protocol_goes_on_from_a_torn_file(tiny, tmp_path, monkeypatch, capsys):
    file, png, ran = tmp_path / "runs" / "results.jsonl", tmp_path / "results.png", []
    measure = tune_openmoji.measure
    monkeypatch.setattr(tune_openmoji, "measure", lambda key: (ran.append(key), measure(key))[1])
    monkeypatch.setattr(tune_openmoji, "ProcessPoolExecutor", Here)
    monkeypatch.setattr("sys.argv", ["tune_openmoji", "--json", str(file), "--png", str(png)])
    assert tune_openmoji.run() == 0
    assert sorted(ran) == sorted(tune_openmoji.keys()) and len(ran) == 2 * (2 * 3 * 3 + 2)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    whole, shown = tune_openmoji.read(file), capsys.readouterr().out
    assert "| CoCoOp |" in shown and "| colour: shots a class | 0 | 1 | 2 |" in shown
    lines = file.read_text().splitlines()
    other = json.dumps(json.loads(lines[1]) | {"model": "another"})
    file.write_text("\n".join([lines[0], other, *lines[3:], lines[2][:40]]))
    ran.clear()
    assert tune_openmoji.run() == 0
    assert len(ran) == 2
    again = tune_openmoji.read(file)
    assert again.keys() == whole.keys()
    assert all(again[key]["accuracy"] == row["accuracy"] for key, row in whole.items())


def test_table(tmp_path):
    file, rows = tmp_path / "results.jsonl", []
    for method, style, part, shots, seed in tune_openmoji.keys():
        whole = {style: 0.4 + 0.01 * seed, tune_openmoji.STYLES[style]: 0.2 if style == "colour" else 0.5}
        about = {"method": method, "style": style, "part": part, "shots": shots, "seed": seed, "batch_size": 32}
        about |= {"accuracy": {"base": 0.6, "new": 0.3} if part == "base" else whole}
        rows.append(about | {"trainable": 7, "classes": 31, "evaluation_images": 394})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = tune_openmoji.table(file).splitlines()
    assert lines.count("| zero-shot | 40.0 |  |  |  |  |  |") == 2
    assert lines.count("| CoOp |  | 42.0 ± 1.0 | 42.0 ± 1.0 | 42.0 ± 1.0 | 42.0 ± 1.0 | 42.0 ± 1.0 |") == 2
    assert "| MaPLe | 60.0 ± 0.0 | 30.0 ± 0.0 | 40.0 ± 0.0 | 42.0 ± 1.0 | 20.0 ± 0.0 |" in lines
    assert "| MaPLe | 60.0 ± 0.0 | 30.0 ± 0.0 | 40.0 ± 0.0 | 42.0 ± 1.0 | 50.0 ± 0.0 |" in lines
    assert "on 394 drawings of 31 classes" in lines[0] and "over 3 seeds" in lines[0]
    assert "CoOp 7 and 32, CoCoOp 7 and 32" in lines[0]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert "| outline:" not in tune_openmoji.table(file) and "| colour:" in tune_openmoji.table(file)
