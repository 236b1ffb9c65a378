# SPDX-License-Identifier: Apache-2.0
"""What users do with a CLIPClassifier: train, save, load, export, copy."""

import copy
import hashlib
import json
import math
import warnings

import pytest
import safetensors.torch
import tiny_clips
import torch
from clip_cases import FROZEN, KINDS, RECIPES, build, labels, step
from clip_oracles import zero_shot_features
from tiny_clips import (
    CLIPS,
    LONG,
    MIDDLE,
    NAMES,
    SMALL,
    TEMPLATES,
    VOCABULARY,
    WIDE,
    clip,
    pixels,
    siglip,
    tokenizer,
)
from tiny_models import assert_close, mixed, same, untouched
from transformers import Trainer, TrainingArguments

from fastprompt import AttachError, CheckpointError, CLIPClassifier, CoCoOp, CoOp, MaPLe, ZeroShot

CONFIG, TENSORS = "prompt_config.json", "prompts.safetensors"


def nudge(clf) -> None:
    """One optimiser step."""
    optimizer = torch.optim.SGD(clf.learner.parameters(), lr=0.1)
    step(clf)
    optimizer.step()


# What learns


@pytest.mark.parametrize("recipe", RECIPES)
def test_exactly_the_recipes_tensors_learn(recipe):
    clf = build(SMALL, RECIPES[recipe])
    before = {key: x.clone() for key, x in clf.clip.state_dict().items()}
    learned = {id(p) for p in clf.learner.parameters()}
    assert {id(p) for p in clf.parameters() if p.requires_grad} == learned
    assert not any(p.requires_grad for p in clf.clip.parameters())
    step(clf)
    assert all(p.grad is None for p in clf.clip.parameters())
    nudge(clf)
    assert same(clf.clip.state_dict(), before)


@pytest.mark.parametrize("recipe", KINDS)
def test_the_state_is_the_learner_alone(recipe):
    clf = build(SMALL, RECIPES[recipe])
    learned = dict(clf.learner.named_parameters())
    state = clf.state_dict()
    assert {key.removeprefix("learner.") for key in state} == learned.keys()
    other = build(SMALL, RECIPES[recipe])
    with torch.no_grad():
        for p in other.learner.parameters():
            p.zero_()
    other.load_state_dict(state)
    assert same(dict(other.learner.named_parameters()), learned)


# How prompts start


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("recipe", [CoOp(init="a photo of a"), CoOp(init="a photo of a", csc=True)], ids=repr)
def test_a_context_of_the_words_is_zero_shot(name, recipe):
    model = clip(name, torch.float64)
    clf = CLIPClassifier(model, tokenizer(), NAMES, recipe)
    want = CLIPClassifier(model, tokenizer(), NAMES, ZeroShot())(pixels(model)).logits
    assert_close({"": clf(pixels(model)).logits.detach()}, {"": want})


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_the_published_start(position):
    context = CLIPClassifier(clip(MIDDLE), tokenizer(), NAMES, CoOp(position=position)).learner.context
    assert context.shape == (16, 32) and context.dtype == torch.float32
    assert abs(context.std() - 0.02) < 0.003 and abs(context.mean()) < 0.003
    context = CLIPClassifier(clip(MIDDLE), tokenizer(), NAMES, CoOp(csc=True)).learner.context
    assert context.shape == (len(NAMES), 16, 32) and not torch.equal(context[0], context[1])


def test_maple_starts_from_the_first_words():
    model = clip(MIDDLE)
    learner = CLIPClassifier(model, tokenizer(), NAMES, MaPLe(depth=2)).learner
    words = model.text_model.embeddings.token_embedding.weight[[VOCABULARY.index("a"), VOCABULARY.index("photo")]]
    assert torch.equal(learner.context, words)
    assert 0.01 < learner.get_parameter("deep_text.0").std() < 0.03
    assert learner.get_parameter("couple.1.weight").abs().max() <= 32**-0.5


def test_a_seed_fixes_the_start():
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        found.append(CLIPClassifier(clip(MIDDLE), tokenizer(), NAMES, MaPLe(depth=2)).learner.state_dict())
    assert same(*found)


# Classes


def test_names_of_very_different_lengths_one_at_the_context_limit():
    limit = 20
    ctx = limit - 2 - 13  # LONG and its full stop are 13 tokens
    model = clip(WIDE, torch.float64)
    clf = CLIPClassifier(model, tokenizer(), ("x", LONG), CoOp(n_ctx=ctx))
    assert clf(pixels(model)).logits.isfinite().all()
    with pytest.raises(ValueError, match=LONG):
        CLIPClassifier(model, tokenizer(), ("x", LONG), CoOp(n_ctx=ctx + 1))


def test_duplicate_names_have_equal_logits():
    clf = build(MIDDLE, RECIPES["CoOp"], torch.float64, ("dog", "cat", "dog"))
    logits = clf(pixels(clf.clip)).logits.detach()
    assert_close({"": logits[:, 0]}, {"": logits[:, 2]})
    assert (logits[:, 0] - logits[:, 1]).abs().min() > 1e-4


def test_one_class_has_no_loss():
    clf = build(MIDDLE, RECIPES["CoOp"], names=("dog",))
    out = clf(pixels(clf.clip), labels=torch.zeros(3, dtype=torch.long))
    assert out.logits.shape == (3, 1) and out.loss == 0


# Save and load


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_saved_is_what_is_loaded(tmp_path, recipe):
    clf = build(SMALL, RECIPES[recipe]).eval()
    clf.save(tmp_path)
    loaded = CLIPClassifier.load(clip(SMALL), tokenizer(), tmp_path).eval()
    assert same(loaded.learner.state_dict(), clf.learner.state_dict())
    assert torch.equal(loaded(pixels(clf.clip)).logits, clf(pixels(clf.clip)).logits)
    assert tuple(loaded.classnames) == NAMES
    assert same(step(loaded), step(clf))


def test_zero_shot_is_saved_too(tmp_path):
    clf = CLIPClassifier(clip(), tokenizer(), NAMES, FROZEN["templates"])
    clf.save(tmp_path)
    loaded = CLIPClassifier.load(clip(), tokenizer(), tmp_path)
    assert torch.equal(loaded(pixels(clf.clip)).logits, clf(pixels(clf.clip)).logits)


def test_the_files_are_small_and_hold_the_learner_alone(tmp_path):
    clf = build(SMALL, RECIPES["MaPLe"])
    clf.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [CONFIG, TENSORS]
    tensors = safetensors.torch.load_file(tmp_path / "new" / "folder" / TENSORS)
    assert same(tensors, dict(clf.learner.state_dict()))


@pytest.fixture
def saved(tmp_path):
    build(SMALL, RECIPES["MaPLe"]).save(tmp_path)
    return tmp_path


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "no folder": lambda folder: [path.unlink() for path in folder.iterdir()] and folder.rmdir(),
    "no tensors": lambda folder: (folder / TENSORS).unlink(),
    "a bit of the tensors": lambda folder: flip(folder / TENSORS, -3),
    "a bit of the config": lambda folder: flip(folder / CONFIG, 40),
    "truncated": lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-8]),
    "a name": lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('"cat"', '"dog"')),
    "not JSON": lambda folder: (folder / CONFIG).write_text("{"),
    "nothing in it": lambda folder: (folder / CONFIG).write_text("{}"),
    "a list": lambda folder: (folder / CONFIG).write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(saved, damage):
    DAMAGE[damage](saved)
    model = clip(SMALL)
    with untouched(model), pytest.raises(CheckpointError):
        CLIPClassifier.load(model, tokenizer(), saved)


@pytest.mark.parametrize("other", [lambda: clip(MIDDLE), lambda: clip(SMALL, seed=1)], ids=["size", "weights"])
def test_a_checkpoint_of_another_model_is_refused(saved, other):
    model = other()
    with untouched(model), pytest.raises(CheckpointError):
        CLIPClassifier.load(model, tokenizer(), saved)


def test_a_checkpoint_loads_into_a_cast_model(saved):
    loaded = CLIPClassifier.load(clip(SMALL, torch.bfloat16), tokenizer(), saved)
    assert all(p.dtype == torch.float32 for p in loaded.learner.parameters())


def sign(folder, change):
    """Changes the config file, with a valid sha256 of its own."""
    content = json.loads((folder / CONFIG).read_text())
    change(content)
    rest = json.dumps({key: x for key, x in content.items() if key != "sha256"}, sort_keys=True)
    content["sha256"] = hashlib.sha256(rest.encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(content))


CHANGES = {
    "another length": lambda content: content["config"].update(n_ctx=3),
    "another depth": lambda content: content["config"].update(depth=1),
    "an unknown field": lambda content: content["config"].update(colour="red"),
    "an unknown recipe": lambda content: content.update(method="CoOpoc"),
    "another recipe": lambda content: content.update(method="IVLP"),
    "no class names": lambda content: content.update(classnames=[]),
    "class names that are none": lambda content: content.update(classnames=[3]),
    "a class name that is too long": lambda content: content.update(classnames=["cat " * 80]),
    "no config": lambda content: content.pop("config"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_do_not_fit_together_are_refused(saved, change):
    sign(saved, CHANGES[change])
    model = mixed(clip(SMALL))
    with untouched(model), pytest.raises(CheckpointError):
        CLIPClassifier.load(model, tokenizer(), saved)


def test_a_vpt_checkpoint_is_refused(tmp_path):
    import fastprompt

    fastprompt.attach(clip(SMALL), fastprompt.VPT(length=2), tower="vision").save(tmp_path)
    with pytest.raises(CheckpointError, match="VPT"):
        CLIPClassifier.load(clip(SMALL), tokenizer(), tmp_path)


# Class weights


@pytest.mark.parametrize("recipe", ["CoOp", "CSC front", "MaPLe", "IVLP"])
def test_exported_weights_reproduce_the_logits(recipe):
    clf = build(MIDDLE, RECIPES[recipe], torch.float64).eval()
    weights = clf.export()
    assert weights.shape == (len(NAMES), 20) and not weights.requires_grad
    assert_close({"": weights.norm(dim=-1)}, {"": torch.ones(len(NAMES)).double()})
    images = clf.image_features(pixels(clf.clip)).detach()
    logits = clf.clip.logit_scale.exp() * images @ weights.T
    assert_close({"": logits}, {"": clf(pixels(clf.clip)).logits.detach()})


def test_image_conditioned_prompts_have_no_class_weights():
    with pytest.raises(ValueError, match="CoCoOp"):
        build(MIDDLE, CoCoOp()).export()


@pytest.mark.parametrize("templates", [TEMPLATES[:1], TEMPLATES], ids=len)
def test_zero_shot_weights_are_published_whatever_the_recipe(templates):
    clf = build(MIDDLE, RECIPES["CoOp"], torch.float64)
    got = clf.zero_shot_weights(templates=templates)
    assert not got.requires_grad
    assert_close({"": got}, {"": zero_shot_features(clf.clip, tokenizer(), NAMES, templates)})


def test_zero_shot_weights_default_to_the_plain_template():
    clf = build(MIDDLE, RECIPES["MaPLe"], torch.float64)
    assert torch.equal(clf.zero_shot_weights(), clf.zero_shot_weights(templates=("a photo of a {}.",)))


# With other tools


@pytest.mark.parametrize("recipe", ["CoOp", "CoCoOp", "MaPLe"])
def test_the_trainer_of_transformers_trains_it(tmp_path, recipe):
    clf = build(SMALL, RECIPES[recipe])
    before = {key: x.clone() for key, x in clf.learner.state_dict().items()}
    images = pixels(clf.clip, 8)
    data = [{"pixel_values": image, "labels": i % len(NAMES)} for i, image in enumerate(images)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, per_device_eval_batch_size=3, learning_rate=0.01,
        save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(clf, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert all((x - before[key]).abs().max() > 0 for key, x in clf.learner.state_dict().items())
    measured = trainer.evaluate()
    want = clf.eval()(images, labels=torch.arange(8) % len(NAMES)).loss.item()
    assert math.isclose(measured["eval_loss"], want, rel_tol=1e-4)
    assert trainer.predict(data).predictions.shape == (8, len(NAMES))
    weights = tmp_path / "checkpoint-2" / "model.safetensors"
    assert safetensors.torch.load_file(weights).keys() == {f"learner.{key}" for key in before}
    assert weights.stat().st_size < sum(p.nbytes for p in clf.learner.parameters()) + 2000
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("recipe", KINDS)
def test_a_copy_is_independent_and_equal(recipe):
    clf = build(SMALL, RECIPES[recipe], torch.float64)
    copied = copy.deepcopy(clf)
    want = step(clf)
    assert same(step(copied), want)
    nudge(copied)
    assert same(step(clf), want)
    assert not any(same({"": a}, {"": b}) for a, b in zip(clf.parameters(), copied.learner.parameters(), strict=False))


def test_a_copy_of_a_used_classifier_works():
    clf = build(SMALL, RECIPES["CoOp"], cache_images=True).eval()
    with torch.no_grad():
        want = clf(pixels(clf.clip)).logits
        assert torch.equal(copy.deepcopy(clf)(pixels(clf.clip)).logits, want)


@pytest.mark.parametrize("recipe", ["CoOp", "MaPLe"])
def test_it_moves_between_dtypes(recipe):
    clf = build(SMALL, RECIPES[recipe]).double()
    clf.clip.double()
    assert_close(step(clf), step(build(SMALL, RECIPES[recipe], torch.float64)), operations=2**42)


@pytest.mark.parametrize("name", ["clip", "model", "learner"])
@pytest.mark.parametrize("recipe", ["CoOp", "MaPLe"])
def test_it_is_a_part_of_a_larger_module(recipe, name):
    whole = torch.nn.ModuleDict({name: build(SMALL, RECIPES[recipe])})
    state = {key: x.clone() for key, x in whole.state_dict().items()}
    assert state.keys() == {f"{name}.learner.{key}" for key, _ in whole[name].learner.named_parameters()}
    nudge(whole[name])
    whole.load_state_dict(state)
    assert same(whole.state_dict(), state)
    del state[f"{name}.learner.context"]
    with pytest.raises(RuntimeError, match="context"):
        whole.load_state_dict(state)


@pytest.mark.parametrize("recipe", ["CoOp", "MaPLe", "IVLP"])
def test_a_clip_is_given_back_as_it_was(recipe):
    model = mixed(clip(SMALL))
    with untouched(model):
        clf = CLIPClassifier(model, tokenizer(), NAMES, RECIPES[recipe])
        nudge(clf.train())
        clf.detach()
    with pytest.raises(AttachError):
        clf.detach()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_attention_of_the_model(attention, dtype):
    model = clip(MIDDLE, dtype)
    model.set_attn_implementation(attention)
    clf = CLIPClassifier(model, tokenizer(), NAMES, MaPLe(depth=2))
    clf.learner.load_state_dict(build(MIDDLE, MaPLe(depth=2), dtype).learner.state_dict())
    want = build(MIDDLE, MaPLe(depth=2), torch.float64)
    # transformers' eager attention takes its softmax in float32.
    assert (clf(pixels(model)).logits - want(pixels(want.clip)).logits).abs().max() < 1e-3


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("recipe", ["CoOp", "CoCoOp", "MaPLe"])
def test_a_loss_of_ones_own(recipe, chunk):
    clf = build(SMALL, RECIPES[recipe], torch.float64, class_chunk=chunk)
    want = step(build(SMALL, RECIPES[recipe], torch.float64))
    loss = torch.nn.functional.cross_entropy(clf(pixels(clf.clip)).logits, labels(3, len(NAMES)))
    loss.backward()
    assert_close(
        {"loss": loss.detach()} | {key: p.grad for key, p in clf.learner.named_parameters()},
        {key: x for key, x in want.items() if key != "logits"},
    )


def test_without_labels_there_is_no_loss():
    clf = build(SMALL, RECIPES["CoOp"])
    out = clf(pixels(clf.clip))
    assert out.loss is None and out.logits.shape == (3, len(NAMES)) and out["logits"] is out.logits


def test_logits_are_repeatable():
    clf = build(SMALL, RECIPES["CoCoOp"])
    assert same(step(clf), step(clf))


# SigLIP


def test_siglip_is_reported_once():
    model, words = siglip(), tokenizer(start=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        clf = CLIPClassifier(model, words, NAMES, CoOp(n_ctx=3))
        clf(pixels(model), labels=labels(3, len(NAMES))).loss.backward()
        clf.eval()(pixels(model))
    (said,) = found
    assert "SiglipTextModel is not causal" in str(said.message) and said.filename == __file__


def test_clip_is_not_reported(recwarn):
    build(SMALL, RECIPES["CoOp"])(tiny_clips.pixels(clip()))
    assert not recwarn.list


def test_siglip_is_saved(tmp_path):
    model, words = siglip(), tokenizer(start=False)
    clf = CLIPClassifier(model, words, NAMES, CoOp(n_ctx=3))
    clf.save(tmp_path)
    loaded = CLIPClassifier.load(siglip(), words, tmp_path)
    assert torch.equal(loaded(pixels(model)).logits, clf(pixels(model)).logits)
    assert json.loads((tmp_path / CONFIG).read_text())["method"] == "CoOp"
