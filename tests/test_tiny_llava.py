# SPDX-License-Identifier: Apache-2.0
"""The small LLaVA: its processor, questions about pictures, its training, what ships, and ``compress-eval`` on it."""

import importlib
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastprompt
from fastprompt.cli import main
from fastprompt.cli_compress import Run, measure_pictures, overfull, table
from fastprompt.data import load_openmoji
from fastprompt.data.pictures import (
    KINDS,
    PictureQuestions,
    context_text,
    held_out_drawings,
    kind_of,
    picture_questions,
    question_text,
    training_drawings,
)
from fastprompt.errors import AssetError, CheckpointError, DataError
from fastprompt.hf import tiny_llava
from fastprompt.hf.tiny_llava import FOLDER, WEIGHTS, TinyLlavaProcessor, join_towers, load_tiny_llava, save_tiny_llava
from fastprompt.tuning.pictures import answer_pictures, kind_token

ALL_POLICIES = (
    fastprompt.LookM(recent=0.1, important=0.2), fastprompt.H2O(recent=0.1, important=0.2), fastprompt.SnapKV(keep=0.3),
    fastprompt.TOVA(keep=0.3), fastprompt.StreamingLLM(keep=0.3), fastprompt.KeyDiff(keep=0.3),
)  # fmt: skip
VOCABULARY = ["<pad>", "<image_patch>", "\n", ":", "Picture", " 1", " 2", " 3", " circle", " square", " of", " one"]


def tokenizer():
    """One token a word with the space before it, and one a line end."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\n|:"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<pad>")


def build(dtype=torch.float32):
    """Two tiny towers, with weights large enough that pictures matter; four patches a picture."""
    vision = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, use_mask_token=False)
    )
    language = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    intermediate_size=64, vocab_size=len(VOCABULARY), pad_token_id=0, tie_word_embeddings=True)
    )  # fmt: skip
    for tower in (vision, language):
        for p in tower.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    model = join_towers(vision, language, image_token=1)
    return model.to(dtype), TinyLlavaProcessor(tokenizer(), 1, image_tokens=4, image_size=28)


@pytest.fixture
def drawings(tmp_path):
    """Two emoji of each kind; one has a second skin tone."""
    shapes = {"circle": '<circle cx="36" cy="36" r="{size}"', "square": '<rect x="9" y="9" width="{size}" height="40"'}
    found = {}
    for kind, shape in shapes.items():
        found[kind] = []
        for size in (20, 30):
            file = tmp_path / f"{kind}{size}.svg"
            shown = shape.format(size=size)
            picture = f'{shown} fill="#0{size}"/>'
            file.write_text(f'<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">{picture}</svg>')
            found[kind].append((file, file) if size == 20 else (file,))
    return found


@pytest.fixture
def tasks(drawings):
    flat = {kind: [file for tones in emoji for file in tones] for kind, emoji in drawings.items()}
    return [picture_questions(flat, 3, seed) for seed in range(4)]


# Questions


def test_kinds_are_found_by_name_and_by_beginning():
    assert [kind_of(x) for x in ("animal-bug", "person", "person-role", "personal", "time", "sport")] == [
        "animal", "person", "person", None, "clock", None,
    ]  # fmt: skip


def test_questions_are_drawn_from_the_seed(drawings):
    flat = {kind: [tones[0] for tones in emoji] for kind, emoji in drawings.items()}
    first = picture_questions(flat, 3, 0)
    assert first == picture_questions(flat, 3, 0) != picture_questions(flat, 3, 1)
    assert sorted(first.order) == [0, 1, 2]
    assert all(file.name.startswith(kind) for file, kind in zip(first.files, first.answers, strict=True))
    many = [kind for seed in range(200) for kind in picture_questions(flat, 3, seed).answers]
    assert 250 < many.count("circle") < 350
    with pytest.raises(DataError, match="drawings: got none of square"):
        picture_questions(flat | {"square": []}, 3, 0)
    with pytest.raises(ValueError, match="pictures"):
        picture_questions(flat, 0, 0)


@pytest.mark.assets
def test_test_drawings_are_of_families_that_training_never_sees():
    data = load_openmoji()
    family = {item.file: item.family for item in data.emoji}
    trained = {family[tones[0]] for emoji in training_drawings(data).values() for tones in emoji}
    tested = {kind: {family[file] for file in files} for kind, files in held_out_drawings(data).items()}
    assert set(tested) == set(KINDS) and all(tested.values())
    assert not trained & set().union(*tested.values())
    assert min(map(len, training_drawings(data).values())) >= 16


# The model and its processor


def test_processor_puts_patches_where_pictures_are():
    from PIL import Image

    _, processor = build()
    pictures = [Image.new("RGB", (40, 30), "white"), Image.new("RGB", (28, 28), "black")]
    inputs = processor(["Picture 1: <image>\n", "<image>"], pictures)
    assert inputs.input_ids.tolist() == [[4, 5, 3, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert inputs.attention_mask.sum(dim=1).tolist() == [9, 4]
    mean, std = (torch.tensor(x) for x in tiny_llava.IMAGENET)
    torch.testing.assert_close(inputs.pixel_values[0, :, 3, 5], (1 - mean) / std)
    torch.testing.assert_close(inputs.pixel_values[1, :, 27, 27], -mean / std)
    assert "pixel_values" not in processor("Picture 1:")
    with pytest.raises(ValueError, match=r"images: got 1, expected 2, as many as the text has <image>"):
        processor("<image><image>", pictures[:1])


def test_towers_are_frozen_and_run_as_they_do_alone():
    model, processor = build()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.multi_modal_projector.linear_{i}.{x}" for i in (1, 2) for x in ("weight", "bias")}
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    ids = torch.tensor([processor.ids("Picture 1: one\n")])
    alone = LlamaForCausalLM(model.config.text_config).eval()
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, alone(input_ids=ids).logits)


def test_saved_projector_comes_back(tmp_path, monkeypatch):
    model, _ = build()
    folder = save_tiny_llava(model, tmp_path / "model")
    torch.manual_seed(1)
    monkeypatch.setattr(tiny_llava, "build_tiny_llava", lambda **options: build())
    loaded, _ = load_tiny_llava(folder, dtype=torch.bfloat16)
    want = model.model.multi_modal_projector.half().to(torch.bfloat16).state_dict()
    got = loaded.model.multi_modal_projector.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
    for broken in (folder, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="is no whole projector"):
            load_tiny_llava(broken)


def test_missing_assets_say_how_to_get_them(tmp_path):
    with pytest.raises(AssetError, match="fastprompt assets fetch dinov2-small"):
        load_tiny_llava(cache_dir=tmp_path)


# Answers through a cache


def recomputed(model, processor, task):
    """Answers without any cache: the whole text again for every question."""
    images = [fastprompt.data.openmoji.draw(file, size=28) for file in task.files]
    pixels = torch.stack([processor.pixels(image) for image in images])
    ids, right = processor.ids(task.text), []
    for place in task.order:
        ids += processor.ids(question_text(place))
        answer = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1].argmax().item()
        right.append(answer == kind_token(processor, task.answers[place]))
        ids += [answer, *processor.ids("\n")]
    return right


def words_alone(model):
    """Let the head say kinds alone, so that answers are right now and then."""
    model.lm_head = torch.nn.Linear(32, len(VOCABULARY))
    with torch.no_grad():
        model.lm_head.bias.fill_(-1e4)[[VOCABULARY.index(" circle"), VOCABULARY.index(" square")]] = 0.0
    return model.to(model.dtype)


def test_answers_are_those_without_a_cache(tasks):
    model, processor = build(torch.float64)
    words_alone(model)
    with torch.no_grad():
        want = torch.tensor([recomputed(model, processor, task) for task in tasks])
    assert 0 < want.sum() < want.numel()
    plain = answer_pictures(model, processor, tasks)
    assert torch.equal(plain.right, want) and plain.kept == 1.0
    whole = answer_pictures(model, processor, tasks, fastprompt.LookM(recent=0.5, important=0.5))
    assert torch.equal(whole.right, want) and whole.kept == 1.0
    one_by_one = [answer_pictures(model, processor, [task]).right for task in tasks]
    assert torch.equal(torch.cat(one_by_one), want)


@pytest.mark.parametrize("policy", ALL_POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_compressed_cache_is_asked(tasks, policy):
    model, processor = build()
    length = len(processor.ids(context_text(3)))
    text = 3 * 5
    right, kept = answer_pictures(model, processor, tasks, policy)
    assert right.shape == (4, 3)
    assert length == text + 3 * 4
    if isinstance(policy, fastprompt.LookM):
        # All text, which the last key is, and the patch before it.
        assert kept == pytest.approx((text + 1) / length)
    else:
        assert int(0.3 * length) - 1 <= kept * length <= 0.3 * length
    # The model's attention is put back.
    assert torch.equal(answer_pictures(model, processor, tasks).right, answer_pictures(model, processor, tasks).right)


def test_what_cannot_be_asked(tasks):
    model, processor = build()
    fewer = PictureQuestions(tasks[0].files[:2], tasks[0].answers[:2], (0, 1))
    with pytest.raises(ValueError, match=r"tasks: got contexts of \[3, 2\] pictures, expected one number"):
        answer_pictures(model, processor, [tasks[0], fewer])
    with pytest.raises(ValueError, match="kind: got 'circle of one', which is 3 tokens"):
        kind_token(processor, "circle of one")


# Training


@pytest.fixture
def example(monkeypatch):
    """The training script as a module."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    return importlib.import_module("train_tiny_llava")


@pytest.fixture
def training(example, drawings, tmp_path):
    def make(name, **options):
        torch.manual_seed(0)
        recipe = example.Recipe(**{"align_steps": 3, "steps": 5, "images": 6, "views": 4, "pictures": 3} | options)
        return example.Training(*build(), drawings, recipe, tmp_path / name)

    return make


def test_the_loss_is_that_of_the_model_from_pixels(example, training, monkeypatch):
    """Kept features, put between the words, against the model that sees the pictures."""
    run = training("run")
    pixels, kinds = torch.randn(6, 3, 28, 28), torch.tensor([0, 1, 1, 0, 1, 0])
    with torch.no_grad():
        features = run.features(pixels)
    monkeypatch.setattr(run, "draw", lambda count: (features, kinds))
    torch.manual_seed(5)
    loss, right = run.answer_loss(3)
    torch.manual_seed(5)
    order = torch.stack([torch.randperm(3) for _ in range(2)])
    ids, _ = run.tokens(order, kinds.view(2, 3))
    with torch.no_grad():
        logits = run.model(input_ids=ids, pixel_values=pixels).logits
    want, hits = 0.0, 0
    for row in range(2):
        for nth, place in enumerate(order[row].tolist()):
            # A context of three times nine tokens; a question of three, its answer and a line end.
            at = 27 + 5 * nth + 2
            assert ids[row, at - 2 : at + 1].tolist() == run.processor.ids(question_text(place))
            word = run.kind_tokens[kinds[3 * row + place]]
            want += cross_entropy(logits[row, at], word).item() / 6
            hits += int(logits[row, at].argmax() == word)
    assert loss.item() == pytest.approx(want, rel=1e-5) and right.item() == pytest.approx(hits / 6)


def test_training_changes_the_projector_alone_and_learns(training):
    run = training("run", align_steps=20, align_lr=1e-2, steps=20, lr=1e-2)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    far = sum(run.align_loss().item() for _ in range(5))
    for _ in range(20):
        run._take_step()
    assert sum(run.align_loss().item() for _ in range(5)) < 0.7 * far
    lost = sum(run.answer_loss(1)[0].item() for _ in range(5))
    for _ in range(20):
        run._take_step()
    assert sum(run.answer_loss(1)[0].item() for _ in range(5)) < 0.7 * lost
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("model.multi_modal_projector."), name


def test_training_goes_on_from_ctrl_c_as_if_it_had_not_stopped(training, monkeypatch):
    whole = training("whole")
    whole.run()
    assert whole.step == 8
    stopped = training("stopped")
    take_step = stopped._take_step

    def interrupted():
        if stopped.step == 4:
            signal.raise_signal(signal.SIGINT)
        return take_step()

    monkeypatch.setattr(stopped, "_take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert stopped.step == 5
    resumed = training("stopped")
    resumed.resume()
    resumed.run()
    assert all(map(torch.equal, whole.params, resumed.params))
    logs = [[json.loads(line) for line in run.log.read_text().splitlines()] for run in (whole, resumed)]
    assert logs[0] == logs[1] and [row["step"] for row in logs[0]] == list(range(8))
    other = training("stopped", lr=1e-2)
    with pytest.raises(CheckpointError, match=r"lr: got 0.01, expected 0.001"):
        other.resume()


def test_augmentation_keeps_white_near_white_and_values_in_range(example):
    assert (example.augmented(torch.ones(4, 3, 28, 28)) >= 0.8).all()
    moved = example.augmented(torch.rand(4, 3, 28, 28))
    assert moved.shape == (4, 3, 28, 28) and 0 <= moved.min() and moved.max() <= 1


# What ships


def test_shipped_folder_is_small_and_names_its_source():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 10_000_000
    attribution = (FOLDER / "ATTRIBUTION.md").read_text()
    assert "OpenMoji" in attribution and "CC BY-SA 4.0" in attribution
    tensors = load_file(FOLDER / WEIGHTS)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"linear_1.weight": (576, 384), "linear_1.bias": (576,), "linear_2.weight": (576, 576),
                      "linear_2.bias": (576,)}  # fmt: skip
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in tensors.values())


@pytest.fixture(scope="module")
def shipped():
    return load_tiny_llava(dtype=torch.bfloat16)


@pytest.mark.assets
def test_shipped_model_answers_about_drawings_that_it_never_saw(shipped):
    flat = held_out_drawings(load_openmoji())
    right = answer_pictures(*shipped, [picture_questions(flat, 4, 10_000 + seed) for seed in range(6)]).right
    # Chance is a twelfth: two of 24.
    assert right.sum() >= 10


@pytest.mark.assets
def test_shipped_model_generates(shipped):
    model, processor = shipped
    flag = held_out_drawings(load_openmoji())["flag"][0]
    inputs = processor("Picture 1: <image>\nPicture 1:", [fastprompt.data.openmoji.draw(flag, size=150)])
    with fastprompt.compress(model, fastprompt.LookM(recent=0.1, important=0.4)):
        found = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert processor.tokenizer.decode(found[0, -1]) == " flag"


# The command line


@pytest.mark.assets
def test_command(shipped, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tiny_llava, "load_tiny_llava", lambda **options: shipped)
    monkeypatch.setattr("fastprompt.cli_compress.CONTEXTS", 2)
    out = tmp_path / "out"
    arguments = ["compress-eval", "--model", "tiny-llava", "--policy", "lookm", "streamingllm", "--ratio", "0.9"]
    assert main([*arguments, "--seeds", "1", "--device", "cpu", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "| pictures: right answers, % (4 pictures) | 90% dropped |" in shown and "| plain cache: " in shown
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["policy"], row["length"]) for row in rows] == [("none", 4), ("lookm", 4), ("streamingllm", 4)]
    assert rows[0]["kept"] == 1 and rows[2]["kept"] <= 0.1 < rows[1]["kept"]
    assert f"lookm kept {rows[1]['kept']:.1%} of the keys where 90% should go" in shown
    assert (out / "results.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny-llava", "--task", "loss"], "--task: got loss, expected pictures with --model tiny-llava"),
        (["--task", "pictures"], "--task: got pictures, expected passkey or loss with --model smollm2-135m"),
    ],
)
def test_a_task_that_the_model_cannot_do(tmp_path, capsys, arguments, message):
    assert main(["compress-eval", *arguments, "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_table_of_pictures():
    rows = {Run("pictures", "none", 0.0, 4, 0.0, 0): 0.5, Run("pictures", "lookm", 0.8, 4, 0.0, 0): 0.25}
    assert table(rows).splitlines() == [
        "| pictures: right answers, % (4 pictures) | 80% dropped |",
        "|---|---|",
        "| lookm | 25 |",
        "| plain cache: 50 |  |",
    ]
    assert overfull([{"policy": "lookm", "ratio": 0.8, "kept": 0.2}, {"policy": "none", "ratio": 0.0, "kept": 1}]) == ""


def test_runs_ask_about_other_pictures(drawings, monkeypatch):
    flat = {kind: [tones[0] for tones in emoji] for kind, emoji in drawings.items()}
    asked = []

    def answer(model, processor, tasks, policy):
        asked.extend(tasks)
        return torch.tensor([[True, False]]), 0.2

    monkeypatch.setattr("fastprompt.tuning.pictures.answer_pictures", answer)
    for seed in (0, 1):
        measured = measure_pictures(Run("pictures", "tova", 0.8, 2, 0.0, seed), None, (None, flat))
        assert measured == {"value": 0.5, "kept": 0.2}
    assert len(asked) == 20 and asked == [picture_questions(flat, 2, seed) for seed in range(20)]
