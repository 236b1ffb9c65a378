# SPDX-License-Identifier: Apache-2.0
import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy_classifier import CLASSES, CONFIG, FEATURES, Blobs, Toy, ToyHandle, timeless

from fastprompt.errors import DataError
from fastprompt.tuning import TuneConfig, evaluate, learning_rate, plot_log, tune
from fastprompt.tuning.randomness import epoch_order


def run(model=None, **kwargs):
    model = Toy() if model is None else model
    arguments = {"train_set": Blobs(), "eval_set": Blobs(9, seed=5), "config": CONFIG, "progress": False} | kwargs
    return model, tune(model, ToyHandle(model), **arguments)


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_learns_separable_data(optimizer, autocast):
    config = replace(CONFIG, epochs=15, optimizer=optimizer, autocast=autocast, lr=0.1)
    before = evaluate(Toy(noise=0), Blobs(30, seed=5), batch_size=8, progress=False)
    _, result = run(Toy(noise=0), config=config, eval_set=Blobs(30, seed=5))
    assert before.accuracy == pytest.approx(1 / 3)
    assert result.evaluation.accuracy == 1.0
    assert result.evaluation.loss < 0.5 * before.loss
    assert (result.steps, result.epochs) == (60, 15)
    assert result.trainable_parameters == FEATURES + FEATURES * CLASSES + CLASSES
    assert 0 < result.seconds_per_step < 1


def test_trains_a_plain_module_as_handle():
    model = Toy(noise=0)
    result = tune(model, model.head, Blobs(), Blobs(9, seed=5), config=replace(CONFIG, epochs=15), progress=False)
    assert result.evaluation.accuracy == 1.0
    assert not model.prompt.any()


def test_same_arguments_same_bits_whatever_the_callers_generator():
    torch.manual_seed(1)
    first, one = run()
    torch.manual_seed(2)
    second, two = run()
    other, _ = run(config=replace(CONFIG, seed=1))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert timeless(one) == timeless(two)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_evaluating_more_often_changes_no_parameter():
    often, _ = run()
    once, _ = run(config=replace(CONFIG, eval_every=0))
    assert torch.equal(often.head.weight, once.head.weight)


def test_only_the_handles_parameters_change_and_all_flags_come_back():
    model = Toy()
    model.train()
    model.head.eval()
    seen = []
    model.register_forward_pre_hook(lambda m, _: seen.append((m.training, m.backbone.requires_grad)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.get_rng_state()
    run(model)
    assert set(seen) == {(False, False)}
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"prompt", "head.weight", "head.bias"}
    assert model.training and not model.head.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize(("warmup", "total"), [(0.0, 10), (0.25, 12), (0.3, 7), (0.99, 3)])
def test_schedule_is_warm_up_then_half_cosine(warmup, total):
    config = TuneConfig(lr=0.5, warmup=warmup)
    rising = round(warmup * total)
    for step in range(total):
        angle = math.pi * (step - rising) / max(1, total - rising)
        expected = 0.5 * (step + 1) / rising if step < rising else 0.25 * (1 + math.cos(angle))
        assert learning_rate(config, step, total) == pytest.approx(expected, rel=1e-12)
    if rising < total:
        assert learning_rate(config, total, total) == pytest.approx(0, abs=1e-15)


def test_warm_up_at_a_constant_rate():
    config = TuneConfig(lr=0.5, warmup=0.25, warmup_lr=1e-3)
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates[:3] == [1e-3] * 3 and rates[3] == 0.5
    assert rates[3:] == [learning_rate(replace(config, warmup_lr=None), step, 12) for step in range(3, 12)]


def test_evaluations_may_have_a_batch_size_of_their_own():
    model, sizes = Toy(), []
    model.register_forward_pre_hook(lambda m, a, k: sizes.append(len(k["labels"])), with_kwargs=True)
    run(model, config=replace(CONFIG, epochs=1, eval_batch_size=5))
    assert sizes == [4, 4, 4, 2, 5, 4]


def test_log_has_a_line_a_step_and_an_evaluation(tmp_path):
    _, result = run(out_dir=tmp_path)
    steps = [record for record in records(tmp_path) if record["event"] == "step"]
    evals = [record for record in records(tmp_path) if record["event"] == "eval"]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert [record["epoch"] for record in steps] == [1] * 4 + [2] * 4 + [3] * 4
    assert [record["lr"] for record in steps] == [learning_rate(CONFIG, step, 12) for step in range(12)]
    names = {"event", "step", "epoch", "loss", "accuracy", "lr", "grad_norm", "seconds"}
    assert all(set(record) == names for record in steps)
    assert [(record["step"], record["epoch"], record["n"]) for record in evals] == [(4, 1, 9), (8, 2, 9), (12, 3, 9)]
    assert steps[-1]["loss"] == result.train_loss
    assert (evals[-1]["loss"], evals[-1]["accuracy"]) == (result.evaluation.loss, result.evaluation.accuracy)
    assert (tmp_path / "saved").exists()


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own():
    orders = [epoch_order(20, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert epoch_order(20, 1, 2).tolist() == orders[-1]


def test_gradient_is_clipped_to_the_norm(tmp_path):
    config = TuneConfig(
        epochs=1, batch_size=14, lr=1.0, weight_decay=0, optimizer="sgd", warmup=0, clip_norm=0.01, eval_every=0
    )
    start = [p.detach().clone() for p in ToyHandle(Toy()).parameters()]
    model, _ = run(config=config, out_dir=tmp_path / "clipped")
    moved = torch.cat([(p - q).flatten() for p, q in zip(ToyHandle(model).parameters(), start, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)
    model, _ = run(config=replace(config, clip_norm=None), out_dir=tmp_path / "free")
    moved = torch.cat([(p - q).flatten() for p, q in zip(ToyHandle(model).parameters(), start, strict=True)])
    (clipped, *_), (free, *_) = records(tmp_path / "clipped"), records(tmp_path / "free")
    assert moved.norm().item() == pytest.approx(free["grad_norm"], rel=1e-4)
    assert clipped["grad_norm"] == free["grad_norm"] > 0.1


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_non_finite_stops_before_the_step_and_names_it(tmp_path, poison):
    class Poisoned(Toy):
        calls = 0

        def forward(self, pixel_values, labels):
            output = super().forward(pixel_values, labels)
            if torch.is_grad_enabled():
                self.calls += 1
                if self.calls == 6 and poison == "loss":
                    output.loss = output.loss * math.nan
                elif self.calls == 6:
                    # The root of zero is finite, its slope is not.
                    output.loss = output.loss + (output.loss - output.loss.detach()).abs().sqrt()
            return output

    model = Poisoned()
    with pytest.raises(FloatingPointError, match=r"step 6 at lr 0\.0\d+: got .*nan"):
        run(model, config=replace(CONFIG, save_every=5), out_dir=tmp_path)
    healthy, _ = run(out_dir=tmp_path, config=replace(CONFIG, save_every=5), resume=True)
    straight, _ = run()
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(healthy.head.weight, straight.head.weight)


def test_evaluate_counts_by_hand():
    class Fixed(nn.Module):
        def forward(self, pixel_values, labels):
            return SimpleNamespace(loss=nn.functional.cross_entropy(pixel_values, labels), logits=pixel_values)

    logits = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [2, 0, 0], [0, 2, 0]])
    labels = torch.tensor([0, 0, 1, 0, 1])
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(logits, labels, strict=True)]
    result = evaluate(Fixed(), rows, batch_size=2, progress=False)
    assert (result.n, result.class_correct, result.class_count) == (5, (2, 2, 0), (3, 2, 0))
    assert result.accuracy == 0.8
    assert result.class_accuracy[:2] == (2 / 3, 1.0) and math.isnan(result.class_accuracy[2])
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 2.5),
        ("batch_size", True),
        ("lr", 0.0),
        ("lr", math.inf),
        ("weight_decay", -1),
        ("optimizer", "adam"),
        ("warmup", 1.0),
        ("warmup_lr", 0),
        ("eval_batch_size", 0),
        ("clip_norm", 0),
        ("autocast", "float16"),
        ("seed", 2**32),
        ("save_every", -1),
        ("eval_every", None),
    ],
)
def test_config_names_a_bad_value(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: got .* expected"):
        TuneConfig(**{name: value})


def test_arguments_are_checked(tmp_path):
    model = Toy()
    with pytest.raises(ValueError, match="resume: got True with out_dir=None"):
        run(resume=True)
    with pytest.raises(ValueError, match="save_every: got 2 with out_dir=None"):
        run(config=replace(CONFIG, save_every=2))
    with pytest.raises(DataError, match="train_set: got an empty data set"):
        run(train_set=[])
    with pytest.raises(DataError, match=r"eval_set\[0\]: got \['pixel_values'\]"):
        run(eval_set=[{"pixel_values": torch.zeros(1)}])
    with pytest.raises(ValueError, match="got no tensor"):
        tune(model, SimpleNamespace(parameters=list), Blobs(), config=CONFIG)
    twice = SimpleNamespace(parameters=lambda: [model.prompt, model.prompt])
    with pytest.raises(ValueError, match="got a tensor twice"):
        tune(model, twice, Blobs(), config=CONFIG)
    with pytest.raises(ValueError, match="the loss does not depend on"):
        tune(model, nn.Linear(2, 2), Blobs(), config=CONFIG, progress=False)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        evaluate(model, Blobs(), batch_size=0)
    run(out_dir=tmp_path)
    with pytest.raises(FileExistsError, match="pass resume=True"):
        run(out_dir=tmp_path)


def test_a_model_without_loss_is_named():
    class Bare(Toy):
        def forward(self, pixel_values, labels):
            return SimpleNamespace(logits=pixel_values, loss=None)

    with pytest.raises(TypeError, match="loss NoneType and logits Tensor"):
        run(Bare())


def test_bar_shows_loss_accuracy_rate_and_pace(capsys):
    run(progress=True)
    shown = capsys.readouterr().err
    assert "12/12 steps" in shown
    for name in ("loss=", "acc=", "lr=", "s/step="):
        assert name in shown


def test_plot_is_a_png_and_a_bad_log_is_named(tmp_path, monkeypatch):
    run(out_dir=tmp_path)
    plot_log(tmp_path / "log.jsonl", tmp_path / "log.png")
    assert (tmp_path / "log.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (tmp_path / "bad.jsonl").write_text('{"event": "step"}\n')
    with pytest.raises(ValueError, match="line 1 of"):
        plot_log(tmp_path / "bad.jsonl", tmp_path / "bad.png")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no training step"):
        plot_log(tmp_path / "empty.jsonl", tmp_path / "bad.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"fastprompt\[demo\]"):
        plot_log(tmp_path / "log.jsonl", tmp_path / "log.png")


def test_import_brings_neither_transformers_nor_matplotlib():
    code = "import sys, fastprompt.tuning; print({'transformers', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
