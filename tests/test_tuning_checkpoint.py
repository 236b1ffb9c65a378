# SPDX-License-Identifier: Apache-2.0
import json
import os
import signal
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from toy_classifier import CONFIG, Blobs, Toy, ToyHandle, timeless

from fastprompt.errors import CheckpointError
from fastprompt.tuning import tune
from fastprompt.tuning.checkpoint import Checkpoint, read_checkpoint, write_checkpoint

FILE = "checkpoint.safetensors"


def start(folder, *, model=None, before=lambda read: None, config=CONFIG, resume=False):
    model = Toy() if model is None else model
    train, evaluation = Blobs(before=before), Blobs(9, seed=5)
    result = tune(
        model, ToyHandle(model), train, evaluation, config=config, out_dir=folder, resume=resume, progress=False
    )
    return model, result


def timeless_log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(folder, outcome, other_folder, other_outcome):
    (model, result), (other, other_result) = outcome, other_outcome
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert timeless(result) == timeless(other_result)
    assert timeless_log(folder) == timeless_log(other_folder)


def stop_at(read, error):
    def before(count):
        if count == read:
            raise error

    return before


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
# One example is read to check the data set, 14 an epoch: at 0 steps, within both epochs, and right after the first.
@pytest.mark.parametrize("read", [1, 3, 12, 15, 20, 28])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("disk gone")])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, optimizer, read, error):
    config = replace(CONFIG, optimizer=optimizer, save_every=3)
    straight = start(tmp_path / "straight", config=config)
    with pytest.raises(type(error)):
        start(tmp_path / "stopped", config=config, before=stop_at(read, error))
    resumed = start(tmp_path / "stopped", config=config, resume=True)
    assert_same_run(tmp_path / "straight", straight, tmp_path / "stopped", resumed)


def test_an_interrupt_loses_no_step(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, before=stop_at(1 + 4 * 2 + 1, KeyboardInterrupt()))
    read = []
    start(tmp_path, before=read.append, resume=True)
    assert len(read) == 1 + 3 * 14 - 8


def test_stopping_again_and_again_changes_nothing(tmp_path):
    straight = start(tmp_path / "straight")
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "stopped", before=stop_at(10, KeyboardInterrupt()), resume=True)
    resumed = start(tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "straight", straight, tmp_path / "stopped", resumed)


class Interrupted(Toy):
    """Raises at one call with or without gradients, after its random numbers are drawn."""

    def __init__(self, call: int, training: bool) -> None:
        super().__init__()
        self.left, self.interrupted_in_training = call, training

    def forward(self, pixel_values, labels):
        output = super().forward(pixel_values, labels)
        self.left -= torch.is_grad_enabled() == self.interrupted_in_training
        if self.left == 0:
            raise KeyboardInterrupt
        return output


# Three batches an evaluation, three evaluations.
@pytest.mark.parametrize(("call", "training"), [(1, False), (2, False), (6, False), (9, False), (1, True), (7, True)])
def test_an_interrupted_call_of_the_model_is_repeated(tmp_path, call, training):
    straight = start(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "stopped", model=Interrupted(call, training))
    resumed = start(tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "straight", straight, tmp_path / "stopped", resumed)


def test_an_evaluation_after_its_checkpoint_is_cut_off_and_repeated(tmp_path):
    straight = start(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "stopped", model=Interrupted(2, training=False))
    with pytest.raises(RuntimeError):
        start(tmp_path / "stopped", before=stop_at(1, RuntimeError()), resume=True)
    assert timeless_log(tmp_path / "stopped")[-1]["event"] == "eval"
    resumed = start(tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "straight", straight, tmp_path / "stopped", resumed)


def test_a_repeated_last_evaluation_is_saved(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, model=Interrupted(8, training=False))
    _, result = start(tmp_path, resume=True)
    model, again = start(tmp_path, model=Interrupted(99, training=False), resume=True)
    assert timeless(again) == timeless(result) and result.evaluation is not None
    assert model.left == 99


def test_ctrl_c_within_the_optimizer_step_waits_for_its_end(tmp_path, monkeypatch):
    straight = start(tmp_path / "straight")
    with monkeypatch.context() as patch:
        step, calls = torch.optim.AdamW.step, []

        def interrupted_step(self):
            calls.append(self)
            if len(calls) == 6:
                signal.raise_signal(signal.SIGINT)
            return step(self)

        patch.setattr(torch.optim.AdamW, "step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "stopped")
    assert [line["step"] for line in timeless_log(tmp_path / "stopped") if line["event"] == "step"][-1] == 6
    resumed = start(tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "straight", straight, tmp_path / "stopped", resumed)


def test_a_finished_run_is_returned_not_repeated(tmp_path):
    straight = start(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    log = timeless_log(tmp_path)
    read = []
    model, result = start(tmp_path, before=read.append, resume=True)
    assert len(read) == 1
    assert timeless(result) == timeless(straight[1])
    assert torch.equal(model.head.weight, straight[0].head.weight)
    assert (tmp_path / FILE).read_bytes() == content and timeless_log(tmp_path) == log


def test_resume_without_a_checkpoint_starts(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "step", "step": 99}\n')
    outcome = start(tmp_path, resume=True)
    assert_same_run(tmp_path, outcome, tmp_path / "other", start(tmp_path / "other"))


def test_a_torn_log_line_is_cut_off(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "stopped", before=stop_at(20, KeyboardInterrupt()))
    with open(tmp_path / "stopped" / "log.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    resumed = start(tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "stopped", resumed, tmp_path / "straight", start(tmp_path / "straight"))


@pytest.fixture
def stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, before=stop_at(20, KeyboardInterrupt()))
    return tmp_path


def assert_refused(folder, match, **kwargs):
    model = kwargs.pop("model", None) or Toy()
    parameters = [p.detach().clone() for p in model.parameters()]
    generator, log = torch.get_rng_state(), (folder / "log.jsonl").read_bytes()
    content = (folder / FILE).read_bytes()
    with pytest.raises(CheckpointError, match=match):
        start(folder, model=model, resume=True, **kwargs)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    assert (folder / "log.jsonl").read_bytes() == log and (folder / FILE).read_bytes() == content


@pytest.mark.parametrize("kept", [0, 4, 200, 0.5, 0.999])
def test_a_truncated_file_is_refused(stopped, kept):
    content = (stopped / FILE).read_bytes()
    (stopped / FILE).write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert_refused(stopped, "expected a whole safetensors file")


def test_an_altered_tensor_or_setting_is_refused(stopped):
    content = (stopped / FILE).read_bytes()
    flipped = bytearray(content)
    flipped[-10] ^= 1
    (stopped / FILE).write_bytes(flipped)
    assert_refused(stopped, "was altered")
    # JSON within JSON: the quotes are escaped.
    assert content.count(rb"\"step\": 5") == 1
    (stopped / FILE).write_bytes(content.replace(rb"\"step\": 5", rb"\"step\": 4"))
    assert_refused(stopped, "was altered")
    (stopped / FILE).write_bytes(content)
    start(stopped, resume=True)


def test_a_foreign_file_and_another_version_are_refused(stopped):
    content = (stopped / FILE).read_bytes()
    safetensors.torch.save_file({"weight": torch.zeros(3)}, stopped / FILE)
    assert_refused(stopped, "got format None version None, expected 'fastprompt.tuning' version '1'")
    (stopped / FILE).write_bytes(content.replace(b'"version":"1"', b'"version":"2"'))
    assert_refused(stopped, "version '2'")


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 4},
        {"batch_size": 5},
        {"lr": 0.051},
        {"weight_decay": 0.0},
        {"optimizer": "sgd"},
        {"warmup": 0.0},
        {"clip_norm": None},
        {"autocast": "bfloat16"},
        {"seed": 1},
    ],
)
def test_another_config_is_refused_by_name(stopped, change):
    ((name, value),) = change.items()
    expected = getattr(CONFIG, name)
    assert_refused(stopped, rf"\({name}: got {value!r}, expected {expected!r}\)", config=replace(CONFIG, **change))


def test_how_often_a_run_saves_and_measures_is_free(stopped):
    model, _ = start(stopped, config=replace(CONFIG, save_every=2, eval_every=0), resume=True)
    assert torch.equal(model.head.weight, start(stopped / "straight")[0].head.weight)


def test_other_parameters_are_refused(stopped):
    class Wide(Toy):
        def __init__(self):
            super().__init__()
            self.prompt = torch.nn.Parameter(torch.zeros(1, self.prompt.numel()))

    assert_refused(stopped, r"param\.0 is \[8\] torch.float32 in the checkpoint and \[1, 8\]", model=Wide())
    assert_refused(stopped, r"param\.0 is \[8\] torch.float32 .* and \[8\] torch.float64", model=Toy().double())

    model = Toy()
    with pytest.raises(CheckpointError, match=r"param\.2 is \[3\] .* and absent in this run \(2 parameters\)"):
        handle = ToyHandle(model)
        handle.parameters = lambda: [model.prompt, model.head.weight]
        tune(model, handle, Blobs(), config=CONFIG, out_dir=stopped, resume=True, progress=False)
    with pytest.raises(CheckpointError, match="train_examples: got 13, expected 14"):
        tune(model, ToyHandle(model), Blobs(13), config=CONFIG, out_dir=stopped, resume=True, progress=False)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_crash_while_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch, call):
    config = replace(CONFIG, save_every=3)
    real, written = getattr(os, call), []

    def failing(*arguments):
        # A checkpoint takes one replace, and three fsyncs: of log, file and folder.
        written.append(arguments)
        if len(written) == {"replace": 2, "fsync": 5}[call]:
            raise OSError("no space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(OSError, match="no space left"):
            start(tmp_path / "stopped", config=config)
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == [FILE, "log.jsonl"]
    state = safetensors.safe_open(tmp_path / "stopped" / FILE, "pt").metadata()["state"]
    assert json.loads(state)["progress"]["step"] == 3
    resumed = start(tmp_path / "stopped", config=config, resume=True)
    assert_same_run(tmp_path / "stopped", resumed, tmp_path / "straight", start(tmp_path / "straight", config=config))


def test_a_half_written_file_of_a_killed_run_is_ignored(stopped):
    (stopped / f"{FILE}.partial").write_bytes(b"half")
    model, _ = start(stopped, resume=True)
    assert torch.equal(model.head.weight, start(stopped / "straight")[0].head.weight)
    assert not (stopped / f"{FILE}.partial").exists()


def test_a_checkpoint_from_before_a_setting_existed_goes_on_with_its_default(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, before=stop_at(15, KeyboardInterrupt()))
    old = read_checkpoint(tmp_path / FILE)
    config = {name: value for name, value in old.config.items() if name != "warmup_lr"}
    assert len(config) < len(old.config)
    write_checkpoint(tmp_path / FILE, Checkpoint(old.tensors, config, old.progress))
    with pytest.raises(CheckpointError, match=r"warmup_lr: got 0\.01, expected None"):
        start(tmp_path, config=replace(CONFIG, warmup_lr=0.01), resume=True)
    start(tmp_path, resume=True)
