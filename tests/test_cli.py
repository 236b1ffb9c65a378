# SPDX-License-Identifier: Apache-2.0
"""The command line, end to end on a tiny model and tiny images."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

import fastprompt
from fastprompt.cli import main
from fastprompt.ops.cpp import extension
from fastprompt.recipes.registry import CARDS
from fastprompt.tuning.images import head_names


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for level, name in ((40, "dark"), (210, "light")):
        (root / name).mkdir()
        for i in range(6):
            pixels = np.clip(rng.normal(level, 10, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def tune_arguments(photos, tiny_vit, out, *extra):
    return [
        "tune", "--model", str(tiny_vit), "--data", str(photos), "--shots", "4", "--image-size", "32", "--length", "3",
        "--epochs", "8", "--batch-size", "4", "--autocast", "off", "--out", str(out), *extra,
    ]  # fmt: skip


def test_tune_eval_inspect(photos, tiny_vit, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(tune_arguments(photos, tiny_vit, out)) == 0
    tuned = capsys.readouterr().out
    assert "accuracy 100.0 % on 4 images" in tuned
    names = {p.name for p in out.iterdir()}
    assert names == {"prompts.safetensors", "prompt_config.json", "checkpoint.safetensors", "log.jsonl", "curves.png",
                     "run.json"}  # fmt: skip
    assert main(["eval", str(out)]) == 0
    evaluated = capsys.readouterr().out
    assert evaluated.splitlines()[0] in tuned
    assert main(["eval", str(out), "--data", str(photos)]) == 0
    assert "on 12 images" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "VPT(length=3" in shown and "layers.1.prompt" in shown and "3x32" in shown
    assert main(tune_arguments(photos, tiny_vit, out)) == 1
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [(), ("--zero-init", "--rank", "2", "--layers", "-1")])
def test_apt(extra, photos, tiny_vit, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(tune_arguments(photos, tiny_vit, out, "--recipe", "apt", "--lr", "1e-2", *extra)) == 0
    tuned = capsys.readouterr().out
    assert "accuracy 100.0 % on 4 images" in tuned and "APT(length=3" in tuned
    assert main(["eval", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] in tuned
    content = json.loads((out / "prompt_config.json").read_text())
    assert (content["config"]["zero_init"], content["config"]["rank"]) == (bool(extra), 2 if extra else 4)
    assert main(tune_arguments(photos, tiny_vit, tmp_path / "deep", "--recipe", "apt", "--depth", "deep")) == 1
    assert "--depth: got a value with --recipe apt, but it is for --recipe vpt" in capsys.readouterr().err


def test_interrupted_run_resumes_to_the_same_bits(photos, tiny_vit, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(tune_arguments(photos, tiny_vit, whole)) == 0
    from fastprompt.tuning import loop

    taken = loop.Run._take_step

    def interrupt(self):
        if self.step == 5:
            raise KeyboardInterrupt
        return taken(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_take_step", interrupt)
        assert main(tune_arguments(photos, tiny_vit, parts)) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (parts / "prompts.safetensors").exists()
    assert main(tune_arguments(photos, tiny_vit, parts, "--resume")) == 0
    for name in ("prompts.safetensors", "prompt_config.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--data", "nowhere", "--out", "{out}"], "nowhere"),
        (["tune", "--model", "nowhere", "--data", "{photos}", "--out", "{out}"], "expected 'dinov2-small' or a local"),
        (["tune", "--length", "0", "--data", "{photos}", "--out", "{out}"], "length: got 0"),
        (["eval", "{out}"], "run.json"),
        (["inspect", "{out}"], "prompt_config.json"),
        (["assets", "fetch", "nope"], "dinov2-small"),
        (["assets", "verify"], "NAME: got none"),
    ],
)
def test_clear_errors(arguments, message, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([a.format(out=out, photos=photos) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not out.exists()


def test_too_many_shots_names_the_class(photos, tiny_vit, tmp_path, capsys):
    arguments = tune_arguments(photos, tiny_vit, tmp_path / "out")
    arguments[arguments.index("--shots") + 1] = "9"
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "dark" in error and "9" in error


def test_wrong_usage_exits_2(capsys):
    for arguments in ([], ["tune"], ["nonsense"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


@pytest.mark.parametrize("command", ["demo", "tune", "eval", "bench", "recipes", "info", "inspect", "assets"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "example:\n  fastprompt " + command in capsys.readouterr().out


def test_bench_hands_over_to_the_suite_of_a_checkout(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "prompt_attention", "--help"])
    assert stop.value.code == 0 and "usage: python -m bench.run" in capsys.readouterr().out
    monkeypatch.setattr(fastprompt, "__file__", str(tmp_path / "fastprompt" / "__init__.py"))
    assert main(["bench", "prompt_attention"]) == 1
    assert "expected a source checkout" in capsys.readouterr().err


def test_info_says_what_runs_and_why(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\n  prompt_attention: (cpp|cpu|triton) ", shown)
    assert extension.missing() in shown and extension.best_isa() in shown and "torch" in shown
    assert all(f"\n  {name}: " in shown for name in fastprompt.ops.__all__)


def test_recipes_lists_every_card(capsys):
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{recipe.__name__} " in shown for recipe in CARDS)
    assert main(["recipes", "--status", "approximation", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["recipe"] for line in lines} == {
        r.__name__ for r, card in CARDS.items() if card.status == "approximation"
    }


def test_recipes_shows_a_card_in_full(capsys):
    assert main(["recipes", "apt"]) == 0
    shown = capsys.readouterr().out
    card = CARDS[fastprompt.APT]
    assert card.title in shown and card.paper in shown and card.headline in shown and "zero_init=True" in shown
    assert "rank: Rank of the key map" in shown
    assert main(["recipes", "nothing"]) == 1
    assert "NAME: got 'nothing', expected one of" in capsys.readouterr().err


def test_assets_list(capsys):
    assert main(["assets"]) == 0
    shown = capsys.readouterr().out
    assert "dinov2-small" in shown and "Apache-2.0" in shown


def test_inspect_refuses_a_tampered_file(photos, tiny_vit, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(tune_arguments(photos, tiny_vit, out)) == 0
    config = json.loads((out / "prompt_config.json").read_text())
    config["config"]["length"] = 4
    (out / "prompt_config.json").write_text(json.dumps(config))
    assert main(["inspect", str(out)]) == 1
    assert "sha256" in capsys.readouterr().err


def test_resume_refuses_another_task(photos, tiny_vit, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(tune_arguments(photos, tiny_vit, out, "--layers", "0")) == 0
    before = (out / "prompts.safetensors").read_bytes()
    assert main(tune_arguments(photos, tiny_vit, out, "--layers", "1", "--resume")) == 1
    assert "VPT(length=3" in capsys.readouterr().err
    assert (out / "prompts.safetensors").read_bytes() == before


def test_out_below_a_file_is_a_clear_error(photos, tiny_vit, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(tune_arguments(photos, tiny_vit, file / "run")) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_damaged_run_file_is_a_clear_error(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert main(["eval", str(tmp_path)]) == 1
    assert "run.json" in capsys.readouterr().err


def test_info_reports_an_implementation_that_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr("fastprompt.config.IMPL", "cpp")
    monkeypatch.setattr("fastprompt.ops.cpp.wins.missing", lambda: "not built")
    assert main(["info"]) == 0
    assert "cannot run prompt_attention" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (ViTConfig, ViTForImageClassification),
        (SiglipVisionConfig, SiglipForImageClassification),
        (CLIPVisionConfig, CLIPForImageClassification),
    ],
    ids=["vit", "siglip", "clip"],
)
def test_only_the_head_trains_with_the_prompts(config, model):
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    whole = {SiglipVisionConfig: SiglipConfig, CLIPVisionConfig: CLIPConfig}.get(config)
    assert head_names(model(whole(vision_config=sizes) if whole else config(**sizes))) == ("classifier",)
