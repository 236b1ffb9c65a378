# SPDX-License-Identifier: Apache-2.0
"""CLIPClassifier against prompt learning as released: 77 tokens, one row a class, a loop over images."""

import pytest
import torch
from clip_cases import FROZEN, KINDS, RECIPES, build, labels, published, step, usual
from clip_oracles import features, published_logits, shapes, siglip_logits
from tiny_clips import (
    CLIPS,
    MIDDLE,
    NAMES,
    SMALL,
    WIDE,
    BareTokenizer,
    clip,
    clip_config,
    pixels,
    siglip,
    size,
    tokenizer,
    values,
)
from tiny_models import assert_as_good, assert_close, randomised
from torch.nn.functional import cross_entropy
from transformers import CLIPModel

from fastprompt import IVLP, CLIPClassifier, CoCoOp, CoOp, MaPLe
from fastprompt.hf import class_encoder
from fastprompt.hf.clip import TextTower

BF16 = torch.bfloat16


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_and_every_gradient_are_published(name, recipe):
    recipe = RECIPES[recipe]
    got = step(build(name, recipe, torch.float64))
    want = published(name, recipe, torch.float64)
    for key, x in want.items():
        assert x.abs().max() > 1e-4, f"{key} matters"
    assert_close(got, want)


@pytest.mark.parametrize("recipe", [MaPLe(n_ctx=3, depth=4), IVLP(n_vision=1, depth=4), MaPLe(depth=3)], ids=repr)
def test_prompts_in_every_layer_and_in_all_but_the_last(recipe):
    assert_close(step(build(WIDE, recipe, torch.float64)), published(WIDE, recipe, torch.float64))


@pytest.mark.parametrize("name, recipe, text, vision", [
    (SMALL, MaPLe(), 2, 2), (MIDDLE, MaPLe(depth=3), 2, 2), (SMALL, IVLP(), 2, 3), (MIDDLE, IVLP(), 3, 2),
])  # fmt: skip
def test_layers_that_a_tower_lacks_do_not_count(name, recipe, text, vision):
    """As released, where deeper prompts than a tower has layers are never read; and towers of unequal depth."""
    clf = CLIPClassifier(clip(name, torch.float64), tokenizer(), NAMES, recipe)
    found = {key: p.shape for key, p in clf.learner.named_parameters()}
    assert sum(key.startswith("deep_text") for key in found) == text - 1
    assert sum(key.startswith(("vision", "couple")) and not key.endswith("bias") for key in found) == vision
    tensors = values(found, torch.float64)
    clf.learner.load_state_dict(tensors)
    got = step(clf)
    logits = published_logits(
        clip(name, torch.float64), tokenizer(), NAMES, pixels(clip(name, torch.float64)), recipe, tensors
    )
    loss = cross_entropy(logits, labels(3, len(NAMES)))
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    want = {"logits": logits.detach(), "loss": loss.detach()} | dict(zip(tensors, gradients, strict=True))
    assert_close(got, want)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("recipe", KINDS)
def test_float32_is_as_good_as_published(name, recipe):
    recipe = RECIPES[recipe]
    truth = published(name, recipe, torch.float64)
    assert_as_good(step(build(name, recipe)), usual(name, recipe), truth, 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("recipe", FROZEN)
def test_zero_shot_is_published(name, recipe):
    model, recipe = clip(name, torch.float64), FROZEN[recipe]
    clf = CLIPClassifier(model, tokenizer(), NAMES, recipe)
    want = published_logits(model, tokenizer(), NAMES, pixels(model), recipe, {})
    assert_close({"": clf(pixels(model)).logits}, {"": want})
    assert not list(clf.learner.parameters())


@pytest.mark.parametrize("recipe", [*KINDS, *FROZEN])
def test_features_are_published(recipe):
    recipe = (RECIPES | FROZEN)[recipe]
    clf = build(MIDDLE, recipe, torch.float64) if recipe not in FROZEN.values() else None
    clf = clf or CLIPClassifier(clip(MIDDLE, torch.float64), tokenizer(), NAMES, recipe)
    model = clip(MIDDLE, torch.float64)
    tensors = values(shapes(model, tokenizer(), NAMES, recipe), torch.float64)
    images, texts = features(model, tokenizer(), NAMES, pixels(model), recipe, tensors)
    got = clf.image_features(pixels(clf.clip))
    assert_close({"": got}, {"": images})
    assert_close({"": clf.text_features(got) if texts.dim() == 3 else clf.text_features()}, {"": texts})


# Names


@pytest.mark.parametrize("names", [("dog",), ("dog", "dog"), (*NAMES, "cat", NAMES[2]), ("st.", ".", "x")], ids=len)
@pytest.mark.parametrize("recipe", KINDS)
def test_one_class_duplicates_and_punctuation(recipe, names):
    recipe = RECIPES[recipe]
    got, want = step(build(SMALL, recipe, torch.float64, names)), published(SMALL, recipe, torch.float64, names)
    if len(names) == 1 or len(set(names)) == 1:
        # Equal classes: the gradient is zero but for rounding, and only the logits say something.
        for key in want.keys() - {"logits", "loss"}:
            if "vision" in key or len(names) == 1 or not getattr(recipe, "csc", False):
                assert got.pop(key).abs().max() < 1e-12 > want.pop(key).abs().max()
        if len(names) == 1:
            assert abs(got.pop("loss")) < 1e-12 > abs(want.pop("loss"))
    assert_close(got, want)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("recipe", KINDS)
def test_any_batch_size(recipe, batch):
    recipe, images = RECIPES[recipe], torch.randn(batch, 3, 16, 16).double()
    got = step(build(WIDE, recipe, torch.float64), images)
    assert_close(got, published(WIDE, recipe, torch.float64, images=images))


@pytest.mark.parametrize("recipe", KINDS)
def test_a_tokenizer_needs_no_more_than_the_contract(recipe):
    recipe = RECIPES[recipe]
    got = step(build(SMALL, recipe, torch.float64, words=BareTokenizer()))
    assert_close(got, published(SMALL, recipe, torch.float64))


# How it is computed


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_chunked_is_unchunked(recipe, chunk):
    recipe = RECIPES[recipe]
    got = step(build(MIDDLE, recipe, torch.float64, class_chunk=chunk))
    assert_close(got, step(build(MIDDLE, recipe, torch.float64)))


@pytest.mark.parametrize("recipe", KINDS)
def test_chunked_float32_is_as_good_as_published(recipe):
    recipe = RECIPES[recipe]
    truth = published(MIDDLE, recipe, torch.float64)
    got = step(build(MIDDLE, recipe, class_chunk=2))
    assert_as_good(got, usual(MIDDLE, recipe), truth, 4 * torch.finfo(torch.float32).eps)


SHARES = [
    (recipe, share)
    for recipe, shares in {
        "CoOp": ("all", "none"),
        "CoOp middle": ("all", "none"),
        "CSC": ("none",),
        "CoCoOp": ("image", "none"),
        "MaPLe": ("all", "none"),
        "IVLP": ("all", "none"),
    }.items()
    for share in shares
]


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("recipe, share", SHARES)
def test_what_is_shared_changes_nothing(recipe, share, chunk):
    recipe = RECIPES[recipe]
    got = step(build(MIDDLE, recipe, torch.float64, share=share, class_chunk=chunk))
    assert_close(got, published(MIDDLE, recipe, torch.float64))


@pytest.mark.parametrize("recipe", KINDS)
def test_autocast_is_as_good_as_published(recipe):
    recipe = RECIPES[recipe]
    truth = published(WIDE, recipe, torch.float64)
    clf = build(WIDE, recipe)
    with torch.autocast("cpu", BF16):
        got, usual = step(clf), published(WIDE, recipe)
    assert all(p.dtype == torch.float32 == p.grad.dtype for p in clf.learner.parameters())
    assert_as_good(got, usual, truth, torch.finfo(BF16).eps)


@pytest.mark.parametrize("recipe", KINDS)
def test_a_bfloat16_model_has_float32_prompts_and_is_as_good_as_published(recipe):
    recipe = RECIPES[recipe]
    clf = build(WIDE, recipe, BF16)
    got = step(clf)
    assert all(p.dtype == torch.float32 == p.grad.dtype for p in clf.learner.parameters())
    exact = clip(WIDE, BF16).double().requires_grad_(False)
    tensors = values(shapes(exact, tokenizer(), NAMES, recipe))
    images = pixels(clf.clip)

    def oracle(model, cast):
        found = {key: x.detach().to(cast).requires_grad_() for key, x in tensors.items()}
        logits = published_logits(model, tokenizer(), NAMES, images.to(cast), recipe, found)
        loss = cross_entropy(logits, labels(3, len(NAMES)))
        gradients = torch.autograd.grad(loss, list(found.values()))
        return {"logits": logits.detach(), "loss": loss.detach()} | dict(zip(found, gradients, strict=True))

    usual = oracle(clip(WIDE, BF16).requires_grad_(False), BF16)
    assert_as_good(got, usual, oracle(exact, torch.float64), torch.finfo(BF16).eps)


@pytest.mark.parametrize(
    "recipe, chunk, backend", [("CoOp", 3, "eager"), ("CoCoOp", None, "aot_eager"), ("MaPLe", None, "eager")]
)
def test_compiles_as_one_graph(recipe, chunk, backend):
    clf = build(SMALL, RECIPES[recipe], torch.float64, class_chunk=chunk)
    want = step(clf)
    images = pixels(clf.clip)
    compiled = torch.compile(clf, fullgraph=True, backend=backend)
    clf.zero_grad()
    try:
        out = compiled(images, labels=labels(3, len(NAMES)))
        out.loss.backward()
    finally:
        torch._dynamo.reset()
    got = {"logits": out.logits.detach(), "loss": out.loss.detach()}
    assert_close(got | {key: p.grad for key, p in clf.learner.named_parameters()}, want)


def test_a_tower_of_one_layer_is_causal():
    """Its last row sees the same tokens either way; its first does not."""
    config = clip_config(size(16, 1, 2) | {"max_position_embeddings": 20}, size(16, 1, 2), 16)
    assert TextTower(randomised(CLIPModel(config))).causal and not TextTower(siglip()).causal


def test_inductor_gives_what_eager_does():
    """Features too, after the backward pass has run: it may write to what nobody holds, and to nothing else."""
    clf = build(SMALL, RECIPES["CoOp"])
    grad = torch.randn(len(NAMES), 16)
    want = clf.text_features()
    (gradient,) = torch.autograd.grad(want, clf.learner.context, grad)
    try:
        got = torch.compile(clf.text_features, dynamic=False)()
        (found,) = torch.autograd.grad(got, clf.learner.context, grad)
    finally:
        torch._dynamo.reset()
    assert_close({"features": got.detach(), "context": found}, {"features": want.detach(), "context": gradient})


@pytest.mark.parametrize("recipe", ["CoOp", "CSC front", "CoCoOp"])
def test_compiles_before_it_ever_ran_in_chunks_of_its_own_choice(recipe, monkeypatch):
    monkeypatch.setattr(class_encoder, "TEXT_MEMORY", 20_000)
    clf = build(SMALL, RECIPES[recipe])
    assert len(clf.texts.chunks(3 if recipe == "CoCoOp" else 1, tracked=True)) > 1
    want, clf = step(clf), build(SMALL, RECIPES[recipe])
    images = pixels(clf.clip)
    try:
        out = torch.compile(clf, fullgraph=True, backend="eager")(images, labels=labels(3, len(NAMES)))
    finally:
        torch._dynamo.reset()
    assert_close({"logits": out.logits.detach(), "loss": out.loss.detach()}, {k: want[k] for k in ("logits", "loss")})


@pytest.mark.parametrize("recipe", ["CoOp", "MaPLe", "CoCoOp"])
def test_a_training_run_follows_the_published_run(recipe):
    recipe = RECIPES[recipe]
    clf = build(SMALL, recipe, torch.float64)
    model = clip(SMALL, torch.float64)
    tensors = values(shapes(model, tokenizer(), NAMES, recipe), torch.float64)
    generator = torch.Generator().manual_seed(5)
    runs = {}
    for kind, parameters in (("fastprompt", list(clf.parameters())), ("published", list(tensors.values()))):
        generator.manual_seed(5)
        parameters = [p for p in parameters if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
        losses = []
        for _ in range(8):
            images = torch.randn(4, 3, 16, 16, generator=generator).double()
            wanted = torch.randint(len(NAMES), (4,), generator=generator)
            if kind == "fastprompt":
                loss = clf(images, labels=wanted).loss
            else:
                loss = cross_entropy(published_logits(model, tokenizer(), NAMES, images, recipe, tensors), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs[kind] = torch.tensor(losses)
    assert (runs["fastprompt"] - runs["published"]).abs().max() < 1e-9 < runs["published"].diff().abs().max()


# SigLIP


SIGLIP = {
    "CoOp": (CoOp(n_ctx=3), "x x x"),
    "MaPLe": (MaPLe(depth=2), "a photo of a"),
    "MaPLe shallow": (MaPLe(depth=1), "a photo of a"),
    "IVLP": (IVLP(n_vision=3, depth=2), "a photo of a"),
}


@pytest.mark.filterwarnings("ignore:clip. the text tower of SiglipTextModel is not causal")
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("recipe", SIGLIP)
def test_siglip_is_encoded_plainly(recipe, chunk):
    (recipe, start), words = SIGLIP[recipe], tokenizer(start=False)
    model = siglip(torch.float64)
    clf = CLIPClassifier(model, words, NAMES, recipe, class_chunk=chunk)
    tensors = values({key: p.shape for key, p in clf.learner.named_parameters()}, torch.float64)
    clf.learner.load_state_dict(tensors)
    got = step(clf)
    plain = siglip(torch.float64).requires_grad_(False)
    logits = siglip_logits(plain, words, NAMES, pixels(plain), start, tensors)
    loss = cross_entropy(logits, labels(3, len(NAMES)))
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    want = {"logits": logits.detach(), "loss": loss.detach()} | dict(zip(tensors, gradients, strict=True))
    assert_close(got, want)


@pytest.mark.filterwarnings("ignore:clip. the text tower of SiglipTextModel is not causal")
def test_siglip_zero_shot_is_transformers():
    model = siglip(torch.float64)
    clf = CLIPClassifier(model, tokenizer(start=False), NAMES, FROZEN["one template"])
    want = siglip_logits(model, tokenizer(start=False), NAMES, pixels(model), "a photo of a", {})
    assert_close({"": clf(pixels(model)).logits}, {"": want})


def test_cocoop_shares_nothing_between_images():
    """A row of the batch is the same alone."""
    clf = build(SMALL, CoCoOp(), torch.float64).eval()
    images = pixels(clf.clip, 5)
    together = clf(images).logits
    for i in range(5):
        assert_close({"": clf(images[i : i + 1]).logits[0].detach()}, {"": together[i].detach()})
