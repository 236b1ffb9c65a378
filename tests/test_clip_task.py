# SPDX-License-Identifier: Apache-2.0
"""A CLIP on images with class names: the command line for every recipe, classes that are new, names from files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_clips
import torch
from PIL import Image

import fastprompt
from fastprompt import cli, cli_tune
from fastprompt.cli import main
from fastprompt.data import load_openmoji
from fastprompt.data.openmoji import class_part
from fastprompt.errors import CheckpointError, DataError
from fastprompt.tuning import TuneConfig, evaluate, learning_rate
from fastprompt.tuning.clips import ClipTask

COLOURS = {"big_dog": (200, 40, 40), "cat": (40, 200, 40), "hill": (40, 40, 200), "red_house": (200, 200, 40)}
NAMES = [name.replace("_", " ") for name in COLOURS]
TRAINED = ("coop", "cocoop", "maple", "ivlp", "dpl")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model folder, and a folder of eight noisy images of each colour."""
    root = tmp_path_factory.mktemp("clip")
    tiny_clips.clip().save_pretrained(root / "model")
    tiny_clips.tokenizer().save_pretrained(root / "model")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / "photos" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.clip(rng.normal(colour, 25, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "photos" / name / f"{i}.png")
    return SimpleNamespace(model=root / "model", data=root / "photos", root=root)


def arguments(files, out, recipe, *extra):
    """A short run; training options only where there is training."""
    short = ["--epochs", "3", "--batch-size", "4"] if recipe in TRAINED else []
    return [
        "tune", "--recipe", recipe, "--model", str(files.model), "--data", str(files.data), "--shots", "4",
        "--autocast", "off", "--device", "cpu", *short, "--out", str(out), *extra,
    ]  # fmt: skip


def run_of(out):
    return json.loads((out / "run.json").read_text())


@pytest.mark.parametrize("recipe", TRAINED)
def test_tune_eval_inspect(files, tmp_path, capsys, recipe):
    out = tmp_path / "run"
    extra = ["--lr", "0.02", "--optimizer", "adamw", "--epochs", "6"] + ([] if recipe == "cocoop" else ["--n-ctx", "2"])
    assert main(arguments(files, out, recipe, *extra)) == 0
    tuned = capsys.readouterr().out
    run = run_of(out)
    assert (run["kind"], run["classes"], run["steps"], run["after"]["n"]) == ("clip", NAMES, 24, 16)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in log if record["event"] == "step"]
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    names = {"prompts.safetensors", "prompt_config.json", "checkpoint.safetensors", "log.jsonl", "curves.png"}
    assert {p.name for p in out.iterdir()} == names | {"run.json"}
    assert "zero-shot: accuracy" in tuned and "on 16 images" in tuned
    assert main(["eval", str(out), "--device", "cpu"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("accuracy") and first in tuned
    assert second.startswith("zero-shot: accuracy") and second in tuned
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{type(_recipe(recipe)).__name__}(" in shown and "learned for 4 classes" in shown


def _recipe(name):
    return {"coop": fastprompt.CoOp(), "cocoop": fastprompt.CoCoOp(), "maple": fastprompt.MaPLe(),
            "ivlp": fastprompt.IVLP(), "dpl": fastprompt.DPL()}[name]  # fmt: skip


@pytest.mark.parametrize("recipe", TRAINED)
def test_interrupted_run_resumes_to_the_same_bits(files, tmp_path, monkeypatch, recipe):
    from fastprompt.tuning import loop

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(arguments(files, whole, recipe)) == 0
    taken = loop.Run._take_step

    def interrupt(self):
        if self.step == 5:
            raise KeyboardInterrupt
        return taken(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_take_step", interrupt)
        assert main(arguments(files, parts, recipe)) == 130
    assert main(arguments(files, parts, recipe, "--resume")) == 0
    for name in ("prompts.safetensors", "prompt_config.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_resume_refuses_other_classes(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(files, out, "coop", "--classes", "base")) == 0
    assert main(arguments(files, out, "coop", "--classes", "new", "--resume")) == 1
    assert "part: got 'new', expected 'base'" in capsys.readouterr().err


def test_zero_shot_is_evaluated_and_saved_without_training(files, tmp_path, capsys):
    out, templates = tmp_path / "run", tmp_path / "templates.txt"
    templates.write_text("a photo of a {}.\n\none drawing of {} on hill.\n")
    assert main(arguments(files, out, "zeroshot", "--templates", str(templates))) == 0
    capsys.readouterr()
    assert {p.name for p in out.iterdir()} == {"prompts.safetensors", "prompt_config.json", "log.jsonl", "run.json"}
    run = run_of(out)
    assert (run["trainable"], run["steps"]) == (0, 0) and run["before"] == run["after"]
    model = tiny_clips.clip()
    task = ClipTask(str(files.model), str(files.data), shots=4)
    texts = ["a photo of a {}.", "one drawing of {} on hill."]
    clf = fastprompt.CLIPClassifier(model, tiny_clips.tokenizer(), NAMES, fastprompt.ZeroShot(texts))
    expected = evaluate(clf, task.evaluation(task.images(), model), batch_size=8, progress=False)
    assert run["after"]["accuracy"] == expected.accuracy
    assert main(["eval", str(out), "--device", "cpu"]) == 0
    assert f"accuracy {100 * expected.accuracy:.1f} % on 16 images" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    assert "ZeroShot(templates=" in capsys.readouterr().out


def test_zero_shot_does_not_take_the_place_of_a_trained_run(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(files, out, "coop")) == 0
    before = (out / "prompts.safetensors").read_bytes()
    assert main(arguments(files, out, "zeroshot")) == 1
    assert "expected another folder" in capsys.readouterr().err
    assert (out / "prompts.safetensors").read_bytes() == before


def test_base_to_new(files, tmp_path, capsys):
    """A prompt of the base classes classifies the new ones, by a classifier with their names and its tensors."""
    out = tmp_path / "run"
    assert main(arguments(files, out, "coop", "--classes", "base", "--lr", "0.1")) == 0
    assert run_of(out)["classes"] == ["big dog", "hill"] and run_of(out)["after"]["n"] == 8
    capsys.readouterr()
    assert main(["eval", str(out), "--classes", "new", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    model = tiny_clips.clip()
    task = ClipTask(str(files.model), str(files.data), shots=4, part="new")
    new = task.evaluation(task.images(), model)
    assert new.classes == ("cat", "red house") and len(new) == 8
    clf = fastprompt.CLIPClassifier(model, tiny_clips.tokenizer(), new.classes, fastprompt.CoOp())
    trained = fastprompt.CLIPClassifier.load(tiny_clips.clip(), tiny_clips.tokenizer(), out)
    clf.learner.load_state_dict(trained.learner.state_dict())
    result = evaluate(clf, new, batch_size=8, progress=False)
    assert f"accuracy {100 * result.accuracy:.1f} % on 8 images (loss {result.loss:.4f})" in shown
    assert "zero-shot: accuracy" in shown and "  red house " in shown


def test_a_context_for_each_class_cannot_meet_new_classes(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(files, out, "coop", "--classes", "base", "--csc")) == 0
    assert main(["eval", str(out), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["eval", str(out), "--classes", "new", "--device", "cpu"]) == 1
    assert "classnames: got others than the 2 classes that each have a context" in capsys.readouterr().err


def test_eval_on_another_folder_with_other_names(files, tmp_path, capsys):
    out, names = tmp_path / "run", tmp_path / "names.txt"
    assert main(arguments(files, out, "coop", "--classes", "new")) == 0
    (tmp_path / "photos").mkdir()
    for index, name in enumerate(("sea", "hill")):
        (tmp_path / "photos" / name).symlink_to(files.data / sorted(COLOURS)[index])
    capsys.readouterr()
    assert main(["eval", str(out), "--data", str(tmp_path / "photos"), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "on 16 images" in shown and "\n  sea " in shown
    names.write_text("sea=old sea\n")
    command = ["eval", str(out), "--data", str(tmp_path / "photos"), "--class-names", str(names), "--device", "cpu"]
    assert main(command) == 0
    assert "\n  old sea " in capsys.readouterr().out


def test_class_names_in_order_or_by_folder():
    folders = ("a", "big_dog", "c")
    assert ClipTask().names(folders) == ("a", "big dog", "c")
    assert ClipTask(class_names=["x", "y", "z"]).names(folders) == ("x", "y", "z")
    assert ClipTask(class_names=["c=z"]).names(folders) == ("a", "big dog", "z")
    for given, message in (
        (["x", "y"], "got 2 names, expected 3, one for each class in order"),
        (["a=x", "y"], "got 'y', expected folder=name in every line"),
        (["d=x"], "got 'd', expected folder=name"),
    ):
        with pytest.raises(DataError, match=message):
            ClipTask(class_names=given).names(folders)


@pytest.mark.parametrize(
    ("recipe", "extra", "message"),
    [
        ("maple", ["--csc"], "--csc: got a value with --recipe maple, but it is for --recipe coop"),
        (
            "coop",
            ["--length", "3"],
            "--length: got a value with --recipe coop, but it is for --recipe vpt, apt, prefix",
        ),
        ("coop", ["--task", "image"], "--recipe: got coop with --task image, expected one of vpt"),
        ("zeroshot", ["--epochs", "3"], "--epochs: got a value with --recipe zeroshot"),
        ("ivlp", ["--lam", "exact"], "--lam: got a value with --recipe ivlp, but it is for --recipe dpl"),
        ("dpl", ["--lam", "exact", "--lam-value", "0.2"], "lam_value: got 0.2 with lam='exact'"),
        ("dpl", ["--branches", "xx", "pp"], "branches: got ['xx', 'pp'], expected some of 'xx'"),
        ("coop", ["--n-ctx", "0"], "n_ctx: got 0"),
        ("coop", ["--n-ctx", "90"], "90"),
        ("maple", ["--depth", "deep"], "depth: got 'deep'"),
        ("coop", ["--model", "nowhere"], "expected 'openmoji-clip' or a local folder"),
        ("coop", ["--data", "nowhere"], "nowhere is not a folder"),
        ("coop", ["--data", "openmoji", "--eval-size", "9"], "eval_size: got 9 with data='openmoji'"),
        ("coop", ["--class-names", "nowhere.txt"], "--class-names: got nowhere.txt, which is no file"),
        ("coop", ["--class-names", "{short}"], "class_names: got 1 names, expected 4"),
        ("coop", ["--class-names", "{empty}"], "--class-names: got {empty}, which is empty"),
        ("coop", ["--templates", "{short}"], "templates: got 'just one', expected texts with one {{}}"),
        ("coop", ["--shots", "8"], "has 8 images, expected 9"),
    ],
)
def test_clear_errors(files, tmp_path, capsys, recipe, extra, message):
    paths = {name: tmp_path / f"{name}.txt" for name in ("short", "empty")}
    paths["short"].write_text("just one\n")
    paths["empty"].write_text("\n")
    out = tmp_path / "out"
    assert main(arguments(files, out, recipe, *(x.format(**paths) for x in extra))) == 1
    error = capsys.readouterr().err
    assert message.format(**paths) in error and "Traceback" not in error
    assert not out.exists()


def test_unknown_recipes_and_options_of_other_runs_are_refused(files, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", "--recipe", "coup", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "'coop'" in capsys.readouterr().err
    out = tmp_path / "run"
    assert main(arguments(files, out, "zeroshot")) == 0
    assert main([*arguments(files, tmp_path / "other", "zeroshot"), "--style", "outline"]) == 1
    assert "only openmoji is drawn in styles" in capsys.readouterr().err
    assert main(["eval", str(out), "--style", "outline", "--device", "cpu"]) == 1
    assert "only openmoji is drawn in styles" in capsys.readouterr().err
    run = run_of(out)
    image = {"kind": "image", "task": {"data": str(files.data)}}
    (out / "run.json").write_text(json.dumps(run | image))
    assert main(["eval", str(out), "--classes", "new"]) == 1
    assert "--classes: got a value, but the run is of --task image" in capsys.readouterr().err
    (out / "run.json").write_text(json.dumps(run | {"task": {"colour": 3}}))
    assert main(["eval", str(out)]) == 1
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "shots", "published"),
    [
        ("coop", 1, (2e-3, 32, 50)), ("coop", 4, (2e-3, 32, 100)), ("coop", 16, (2e-3, 32, 200)),
        ("cocoop", 16, (2e-3, 1, 10)), ("maple", 16, (3.5e-3, 4, 5)), ("ivlp", 1, (3.5e-3, 4, 5)),
        ("dpl", 1, (3.5e-3, 4, 5)),
    ],
)  # fmt: skip
def test_what_is_left_out_is_as_published(recipe, shots, published):
    job = _job(["--recipe", recipe, "--shots", str(shots)])
    config = TuneConfig(**job.settings(job.args))
    assert (config.lr, config.batch_size, config.epochs) == published
    lr, _, epochs = published
    assert (config.optimizer, config.weight_decay, config.clip_norm) == ("sgd", 5e-4, None)
    rates = [learning_rate(config, step, 7 * epochs) for step in range(7 * epochs)]
    assert rates[:7] == [1e-5] * 7 and rates[7] == lr and rates[-1] < 4e-3 * lr
    assert np.diff(rates[7:]).max() < 0


def test_what_is_given_replaces_what_is_published():
    job = _job(["--recipe", "coop", "--epochs", "5", "--optimizer", "adamw", "--csc"])
    config = TuneConfig(**job.settings(job.args))
    assert (config.epochs, config.warmup, config.optimizer, config.lr) == (5, 0.2, "adamw", 2e-3)
    assert job.recipe == fastprompt.CoOp(csc=True)
    options = "--n-vision 3 --lam constant --lam-value 0.2 --branches xx px xp --conditioned --init none".split()
    want = fastprompt.DPL(
        n_vision=3, init=None, lam="constant", lam_value=0.2, branches=("xx", "xp", "px"), conditioned=True
    )
    assert _job(["--recipe", "dpl", *options]).recipe == want


def _job(options):
    """A job that has read its options, and no data."""
    args = cli._parser().parse_args(["tune", "--out", "x", *options])
    kind = cli_tune.fill_in(args)
    job = kind.__new__(kind)
    job.args, job.recipe = args, kind.name_recipe(args, ("{}",))
    return job


def test_frozen_image_features_are_computed_once_unless_told_otherwise(files, tmp_path, monkeypatch):
    from fastprompt.recipes import clip_classifier

    seen = []
    compute = clip_classifier.image_features
    monkeypatch.setattr(clip_classifier, "image_features", lambda m, x: (seen.append(len(x)), compute(m, x))[1])
    assert main(arguments(files, tmp_path / "cached", "coop")) == 0
    # Evaluation images for the zero-shot accuracy, then every image once.
    assert sum(seen) == 16 + 32
    seen.clear()
    assert main(arguments(files, tmp_path / "not", "coop", "--no-image-cache")) == 0
    assert sum(seen) == 16 + 3 * 16 + 16
    cached, not_cached = (fastprompt.CLIPClassifier.load(tiny_clips.clip(), tiny_clips.tokenizer(), tmp_path / name)
                          for name in ("cached", "not"))  # fmt: skip
    torch.testing.assert_close(cached.learner.context, not_cached.learner.context, rtol=0, atol=1e-5)


def test_a_prompt_of_another_clip_is_refused(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(files, out, "coop")) == 0
    tiny_clips.clip(seed=1).save_pretrained(tmp_path / "model")
    tiny_clips.tokenizer().save_pretrained(tmp_path / "model")
    run = run_of(out)
    run["task"]["model"] = str(tmp_path / "model")
    (out / "run.json").write_text(json.dumps(run))
    assert main(["eval", str(out), "--device", "cpu"]) == 1
    assert "weights" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        fastprompt.CLIPClassifier.load(tiny_clips.clip(seed=1), tiny_clips.tokenizer(), out, classnames=["cat"])


@pytest.mark.assets
def test_openmoji_task_has_parts_and_styles():
    data, model = load_openmoji(), SimpleNamespace(config=tiny_clips.clip().config, name_or_path="")
    task = ClipTask(shots=1, part="base", image_size=16)
    base = class_part(data.classes, "base")
    train = task.training(data, model)
    assert train.classes == tuple(data.classes[i] for i in base) and len(train) == len(base)
    assert train.pixel_values.shape[1:] == (3, 16, 16)
    colour = task.evaluation(data, model)
    outlines = ClipTask(shots=1, part="base", image_size=16, style="outline", train_style="outline")
    assert not torch.equal(outlines.training(data, model).pixel_values, train.pixel_values)
    drawn = outlines.evaluation(data, model)
    assert torch.equal(colour.labels, drawn.labels) and not torch.equal(colour.pixel_values, drawn.pixel_values)
    assert task.assets == ("clip-bpe", "openmoji", "emoji-names")


@pytest.mark.assets
def test_missing_assets_are_fetched(files, tmp_path, monkeypatch):
    from fastprompt.data import assets

    class FetchedError(Exception):
        pass

    def fetch(name, cache_dir):
        raise FetchedError(name, cache_dir)

    monkeypatch.setattr(assets, "fetch", fetch)
    command = arguments(files, tmp_path / "out", "coop", "--data", "openmoji", "--cache-dir", str(tmp_path / "empty"))
    with pytest.raises(FetchedError, match="openmoji"):
        main(command)
