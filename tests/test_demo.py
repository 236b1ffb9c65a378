# SPDX-License-Identifier: Apache-2.0
"""The demo's parts: the two prompt forms are the same maths on real weights and images; table and plot."""

import json

import pytest
import torch
from PIL import Image

from fastprompt import demo
from fastprompt.tuning.images import ImageTask


@pytest.fixture(scope="module")
def real_images():
    task = ImageTask(shots=3, eval_size=3)
    return task, task.split(task.build_model(3), progress=False)[0]


@pytest.mark.assets
def test_published_and_fastprompt_agree_on_real_images(real_images):
    task, images = real_images
    found = demo.difference(task, images)
    # float32 keeps 24 bits; twelve layers of sums of a few hundred terms leave about 2**-17.
    assert max(found.values()) < 2**-17


@pytest.mark.assets
def test_every_method_trains_what_it_says(real_images):
    task, images = real_images
    sizes = {}
    for method in demo.LR:
        trained = demo.build(method, task, 3)
        demo.step(trained, images, autocast=None)()
        sizes[method] = sum(p.numel() for p in trained.parameters())
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.parameters())
        assert sum(p.requires_grad for p in trained.model.parameters()) <= len(trained.trainable)
    head, prompts = 3 * 768 + 3, len(demo.RECIPE.layers) * demo.RECIPE.length * 384
    read = len(demo.APT.layers) * ((demo.APT.length + 2 * demo.APT.rank) * 384 + 1)
    assert sizes == {
        demo.HEAD: head, demo.PUBLISHED: head + prompts, demo.OURS: head + prompts, demo.READ: head + read
    }  # fmt: skip


def results(folder):
    rows = [
        {"method": demo.HEAD, "accuracy": [0.5, 0.6], "trainable": 10, "step_s": 0.5, "step_ratio": 0.4},
        {"method": demo.PUBLISHED, "accuracy": [0.7, 0.8], "trainable": 20, "step_s": 1.25, "step_ratio": 1.0},
        {"method": demo.OURS, "accuracy": [0.7, 0.9], "trainable": 20, "step_s": 0.75, "step_ratio": 0.6},
        {"method": demo.READ, "accuracy": [0.8, 0.8], "trainable": 30, "step_s": 0.5, "step_ratio": 0.4},
    ]
    extra = {"peak_bytes": 3 << 20, "model": "m", "data": "d", "recipe": "r"}
    file = folder / "results.jsonl"
    file.write_text("".join(json.dumps({**row, **extra}) + "\n" for row in rows))
    return file


def test_table(tmp_path):
    *_, ours, read = demo.table(results(tmp_path)).splitlines()
    assert ours == "| VPT, fastprompt | 80.0 ± 14.1 % | 20 | 0.75 | 0.60x | 3 MiB |"
    assert read == "| APT, fastprompt | 80.0 ± 0.0 % | 30 | 0.50 | 0.40x | 3 MiB |"


def test_plot(tmp_path):
    png = tmp_path / "results.png"
    demo.plot(results(tmp_path), png)
    with Image.open(png) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 50
