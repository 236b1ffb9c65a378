# SPDX-License-Identifier: Apache-2.0
"""Class-incremental learning on a tiny ViT with stripes: accuracy, forgetting, logs, and resuming bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from fastprompt import MultiLane, TaskPathways
from fastprompt.cli import main
from fastprompt.data import load_openmoji
from fastprompt.errors import CheckpointError, DataError
from fastprompt.tuning import ContinualResult, TuneConfig, continual, split_classes
from fastprompt.tuning.class_tasks import ClassTasks

CONFIG = TuneConfig(epochs=4, batch_size=8, lr=0.03, weight_decay=0.0)
CLASSES = ("rising", "falling", "standing", "lying")


class Stripes:
    """Noisy stripes in four directions, in order; ``stop`` raises KeyboardInterrupt at an example of that number."""

    def __init__(self, each, seed=0, stop=None):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(len(CLASSES)).repeat(each)
        slopes = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0], [0.0, 1.0]])[self.labels]
        at = torch.arange(32.0)
        phase = 6.3 * torch.rand(len(self.labels), 1, 1, generator=generator)
        waves = torch.sin(0.8 * (slopes[:, 0, None, None] * at + slopes[:, 1, None, None] * at[:, None]) + phase)
        noise = torch.randn(len(self.labels), 3, 32, 32, generator=generator)
        self.pixels = waves[:, None].expand(-1, 3, -1, -1) + 0.1 * noise
        self.stop, self.read = stop, 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.read += 1
        if self.read == self.stop:
            raise KeyboardInterrupt
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def pathways():
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32,
                       patch_size=8)  # fmt: skip
    vit = ViTModel(config)
    with torch.no_grad():
        for p in vit.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return TaskPathways(vit, MultiLane(summaries=4, length=4, layers=(0, 1)))


def tasks(each=8, count=2, **options):
    return split_classes(Stripes(each, **options), Stripes(8, seed=1), CLASSES, count)


def run(model=None, split=None, config=CONFIG, **options):
    model = pathways() if model is None else model
    return model, continual(model, tasks() if split is None else split, config=config, progress=False, **options)


def test_learns_task_after_task():
    model, result = run(split=tasks(each=16), config=replace(CONFIG, epochs=20))
    assert len(result.accuracy) == 2 and [len(row) for row in result.accuracy] == [1, 2]
    # Chance is 1/2 in the first task, and 1/4 at the end.
    assert result.accuracy[0][0] > 0.8 and result.seen[-1] > 0.7
    assert set(model.classnames) == set(CLASSES)
    assert not any(p.grad is not None for p in model.model.parameters())


def test_each_row_is_the_accuracy_over_all_classes_seen():
    split = tasks()
    model, result = run(split=split)
    first = 0
    for task, want in zip(split, result.accuracy[-1], strict=True):
        images = torch.stack([task.test[i]["pixel_values"] for i in range(len(task.test))])
        labels = torch.stack([task.test[i]["labels"] for i in range(len(task.test))]) + first
        with torch.no_grad():
            assert (model(images).logits.argmax(-1) == labels).float().mean().item() == pytest.approx(want)
        first += len(task.classes)
    assert result.seen[-1] == pytest.approx(sum(result.accuracy[-1]) / 2)


def test_measures():
    result = ContinualResult(((0.9,), (0.5, 0.8), (0.6, 0.6, 1.0)), (0.9, 0.65, 0.7))
    assert result.average == pytest.approx(2.2 / 3)
    assert result.incremental == pytest.approx(0.75)
    assert result.forgetting == pytest.approx((0.3 + 0.2) / 2)
    assert ContinualResult(((0.9,),), (0.9,)).forgetting == 0.0


def test_splits_classes():
    split = tasks(count=3)
    assert [len(task.classes) for task in split] == [2, 1, 1]
    assert sorted(sum((task.classes for task in split), ())) == sorted(CLASSES)
    for task in split:
        for examples in (task.train, task.test):
            for i in range(len(examples)):
                name = CLASSES[int(examples.examples[examples.indices[i]]["labels"])]
                assert task.classes[int(examples[i]["labels"])] == name
    with pytest.raises(ValueError, match="tasks: got 5, expected 1 to 4"):
        tasks(count=5)
    only = [Stripes(1)[i] for i in range(1, 4)]
    with pytest.raises(DataError, match="train: got no example of rising"):
        split_classes(only, Stripes(1), CLASSES, 4)


@pytest.mark.parametrize("stop", [3, 40, 90])
def test_resumes_bit_for_bit(tmp_path, stop):
    """Stopped in the first task or in the second, and resumed; logs hold every line once."""
    config = TuneConfig(epochs=3, batch_size=8, lr=0.03, save_every=2)
    whole, want = run(config=config, out_dir=tmp_path / "whole")
    split = tasks()
    examples = split[0].train.examples
    examples.stop, examples.read = stop, 0
    with pytest.raises(KeyboardInterrupt):
        run(split=split, config=config, out_dir=tmp_path / "cut")
    resumed, got = run(config=config, out_dir=tmp_path / "cut", resume=True)
    assert got == want
    for name, p in whole.named_parameters():
        assert torch.equal(p, dict(resumed.named_parameters())[name]), name
    lines = [[json.loads(line) for line in (tmp_path / f / "log.jsonl").read_text().splitlines()]
             for f in ("whole", "cut")]  # fmt: skip
    assert lines[0] == lines[1] and [line["task"] for line in lines[0]] == [0, 1]


def test_a_finished_run_resumes_to_its_result(tmp_path):
    config = TuneConfig(epochs=1, batch_size=8)
    _, want = run(config=config, out_dir=tmp_path)
    model, got = run(config=config, out_dir=tmp_path, resume=True)
    assert got == want
    with pytest.raises(FileExistsError, match="resume=True"):
        run(config=config, out_dir=tmp_path)
    with pytest.raises(CheckpointError, match="lr"):
        run(config=TuneConfig(epochs=1, batch_size=8, lr=0.5), out_dir=tmp_path, resume=True)
    x = Stripes(1).pixels
    before = model(x).logits
    model.detach()
    loaded = TaskPathways.load(model.model, tmp_path)
    assert torch.equal(loaded(x).logits, before)


def test_errors():
    with pytest.raises(ValueError, match="expected a model without classes"):
        run(split=[])
    model = pathways()
    model.grow(2)
    with pytest.raises(ValueError, match="got 2 classes and 2 tasks"):
        run(model)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four classes of grey levels."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for level, name in ((30, "black"), (90, "dark"), (160, "light"), (230, "white")):
        (root / name).mkdir()
        for i in range(6):
            pixels = (level + 8 * torch.randn(32, 32, 3, generator=generator)).clamp(0, 255).byte()
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return root


def arguments(photos, tmp_path, *extra):
    if not (tmp_path / "vit").exists():
        torch.manual_seed(0)
        pathways().model.save_pretrained(tmp_path / "vit")
    return ["continual", "--model", str(tmp_path / "vit"), "--data", str(photos), "--tasks", "2", "--shots", "4",
            "--image-size", "32", "--summaries", "3", "--length", "2", "--layers", "0", "--epochs", "4", "--lr", "0.05",
            "--batch-size", "4", "--autocast", "off", "--out", str(tmp_path / "run"), *extra]  # fmt: skip


def test_the_command(photos, tmp_path, capsys):
    assert main(arguments(photos, tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "2 training" not in printed and "(8 training, 4 test images)" in printed
    assert "after task |     0     1 |   all" in printed and "forgetting" in printed
    found = json.loads((tmp_path / "run" / "continual.json").read_text())
    assert [len(row) for row in found["accuracy"]] == [1, 2] and 0 <= found["forgetting"] <= 1
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"continual.json", "log.jsonl", "prompts.safetensors", "prompt_config.json", "task-0", "task-1"}
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "MultiLane(" in capsys.readouterr().out
    assert main(arguments(photos, tmp_path, "--resume")) == 0
    assert json.loads((tmp_path / "run" / "continual.json").read_text()) == found


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((), "pass resume=True"),
        (("--tasks", "9", "--out", "{out}"), "tasks: got 9, expected 1 to 4"),
        (("--data", "nowhere", "--out", "{out}"), "nowhere"),
        (("--summaries", "0", "--out", "{out}"), "summaries: got 0"),
        (("--data", "openmoji", "--eval-size", "5", "--out", "{out}"), "whose test drawings are fixed"),
        (("--layers", "7", "--out", "{out}"), "layers: got [7]"),
    ],
)
def test_errors_of_the_command(photos, tmp_path, capsys, extra, message):
    if not extra:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "log.jsonl").write_text("")
    assert main(arguments(photos, tmp_path, *(x.format(out=tmp_path / "other") for x in extra))) == 1
    assert message in capsys.readouterr().err


@pytest.mark.assets
def test_openmoji_comes_in_tasks_of_subcategories():
    images = ClassTasks(data="openmoji", tasks=4, shots=2, image_size=32)
    split = images.split(pathways().model, progress=False)
    names = [name for task in split for name in task.classes]
    assert sorted(names) == sorted(load_openmoji().classes) and len(set(names)) == len(names)
    for task in split:
        assert [int(task.train[i]["labels"]) for i in range(len(task.train))].count(0) == 2
        assert task.test[0]["pixel_values"].shape == (3, 32, 32)
    again = replace(images, seed=1).split(pathways().model, progress=False)
    assert [task.classes for task in again] != [task.classes for task in split]
