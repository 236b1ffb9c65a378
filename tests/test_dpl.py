# SPDX-License-Identifier: Apache-2.0
"""Decoupled prompt learning against the four-way split written out, and against IVLP."""

import copy

import pytest
import torch
from clip_cases import labels, step
from dpl_oracle import decoupled_logits, image_features, siglip_logits
from tiny_clips import MIDDLE, NAMES, SMALL, WIDE, clip, pixels, siglip, tokenizer, values
from tiny_models import assert_as_good, assert_close, same
from torch import nn
from torch.nn.functional import cross_entropy

from fastprompt import DPL, IVLP, CLIPClassifier, ZeroShot
from fastprompt.nn.decoupled import exact_lambda, split_attention

F64, BF16 = torch.float64, torch.bfloat16
RECIPES = {
    "learned": DPL(depth=2),
    "per head, deep": DPL(depth=4, lam="per_head"),
    "per head, shallow": DPL(n_ctx=1, n_vision=3, depth=1, lam="per_head"),
    "constant": DPL(n_ctx=4, depth=2, lam="constant", lam_value=0.3),
    "constant, no words": DPL(n_ctx=3, init=None, depth=2, lam="constant", lam_value=0.6),
    "exact, no px": DPL(depth=2, lam="exact", branches=("xx", "xp", "pp")),
    "exact, no pp": DPL(depth=1, lam="exact", branches=("xx", "xp", "px")),
    "learned, no px": DPL(depth=1, branches=("xx", "xp", "pp")),
    "learned, no pp": DPL(depth=2, branches=("xx", "xp", "px")),
    "learned, no xx": DPL(depth=2, branches=("xp", "pp", "px")),
    "conditioned": DPL(depth=2, lam="per_head", conditioned=True),
    "conditioned, exact": DPL(depth=2, lam="exact", conditioned=True),
    "conditioned, no px": DPL(depth=2, lam="exact", branches=("xx", "xp", "pp"), conditioned=True),
}
# One of each kind.
KINDS = ("learned", "per head, shallow", "constant", "exact, no px", "conditioned")


def build(recipe, name=MIDDLE, dtype=F64, names=NAMES, tensors=None, model=None, words=None, **options):
    """A classifier whose learned tensors have values of their own."""
    clf = CLIPClassifier(model or clip(name, dtype), words or tokenizer(), names, recipe, **options).train()
    shapes = {key: p.shape for key, p in clf.learner.named_parameters()}
    clf.learner.load_state_dict(tensors or values(shapes, torch.promote_types(dtype, torch.float32)))
    return clf


def tensors_of(clf):
    return {key: p.detach().clone().requires_grad_() for key, p in clf.learner.named_parameters()}


def oracle(clf, model=None, nudged=0):
    """What `step` gives, from the oracle; ``nudged`` seeds base weights that are each up to a rounding off."""
    model = (clip_of(clf) if model is None else model).requires_grad_(False)
    dtype = model.dtype
    tensors = {key: x.detach().to(dtype).requires_grad_() for key, x in tensors_of(clf).items()}
    if nudged:
        generator = torch.Generator().manual_seed(nudged)
        for p in model.parameters():
            p.mul_(1 + torch.finfo(dtype).eps * (torch.rand(p.shape, generator=generator, dtype=dtype) - 0.5))
    images = pixels(clf.clip).to(dtype)
    logits = decoupled_logits(model, tokenizer(), clf.classnames, images, clf.recipe, tensors)
    loss = cross_entropy(logits, labels(3, len(clf.classnames)))
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    return {"logits": logits.detach(), "loss": loss.detach()} | dict(zip(tensors, gradients, strict=True))


def usual(clf, truth):
    """The oracle in the classifier's dtype; the worst of four, since one form's rounding error is a draw."""

    def error(found):
        return max(float((x - truth[key]).abs().max() / truth[key].abs().max()) for key, x in found.items())

    return max((oracle(clf, nudged=seed) for seed in range(4)), key=error)


def gathered(found):
    """With all gradients of λ as one: each is a sum over all rows and images, whose terms may nearly cancel."""
    rest = {key: x for key, x in found.items() if "split" not in key}
    lams = [x.flatten() for key, x in found.items() if "split" in key]
    return rest | ({"lam": torch.cat(lams)} if lams else {})


def clip_of(clf):
    """The classifier's CLIP as it is without it."""
    width = clf.clip.config.text_config.hidden_size
    return clip({16: SMALL, 32: MIDDLE, 48: WIDE}[width], clf.clip.dtype)


# Numbers


@pytest.mark.parametrize("name", [SMALL, MIDDLE, WIDE])
@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_and_every_gradient_are_those_of_the_split_written_out(name, recipe):
    clf = build(RECIPES[recipe], name)
    want = oracle(clf)
    for key, x in want.items():
        assert x.abs().max() > 1e-5, f"{key} matters"
    assert_close(gathered(step(clf)), gathered(want))


@pytest.mark.parametrize(
    "options", [{"share": "none"}, {"class_chunk": 2}, {"class_chunk": 1, "share": "none"}], ids=str
)
@pytest.mark.parametrize("recipe", KINDS)
def test_what_is_shared_and_chunked_changes_nothing(recipe, options):
    recipe = RECIPES[recipe]
    assert_close(gathered(step(build(recipe, **options))), gathered(step(build(recipe))))


@pytest.mark.parametrize("recipe", KINDS)
@pytest.mark.parametrize("names", [("dog",), ("cat", "Golden Retriever", "cat"), ("st.", ".", "x")], ids=len)
def test_names(recipe, names):
    clf = build(RECIPES[recipe], names=names)
    with torch.no_grad():
        want = decoupled_logits(clip_of(clf), tokenizer(), names, pixels(clf.clip), clf.recipe, tensors_of(clf))
        assert_close({"": clf(pixels(clf.clip)).logits}, {"": want})


@pytest.mark.parametrize("recipe", KINDS)
def test_float32_is_as_good_as_the_split_written_out(recipe):
    clf = build(RECIPES[recipe], dtype=torch.float32)
    truth = oracle(clf, clip(MIDDLE, F64))
    assert_as_good(step(clf), usual(clf, truth), truth, 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("recipe", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_good_and_learns_in_float32(recipe, autocast):
    clf = build(RECIPES[recipe], WIDE, torch.float32 if autocast else BF16)
    truth = oracle(clf, clip_of(clf).double())
    with torch.autocast("cpu", BF16, enabled=autocast):
        got, baseline = step(clf), usual(clf, truth)
    assert all(p.dtype == torch.float32 == p.grad.dtype for p in clf.learner.parameters())
    assert_as_good(got, baseline, truth, torch.finfo(BF16).eps)


# Exact is IVLP


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"class_chunk": 2}], ids=str)
def test_exact_is_ivlp_bit_for_bit(depth, options):
    sizes = {"n_ctx": 2, "n_vision": 3, "depth": depth}
    clf = build(IVLP(**sizes), WIDE, torch.float32, **options)
    assert same(
        step(build(DPL(lam="exact", **sizes), WIDE, torch.float32, tensors=tensors_of(clf), **options)), step(clf)
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_the_exact_lambda_gives_the_joint_softmax_and_any_other_is_off_by_the_difference(is_causal, shared):
    query, own_key, own_value = torch.randn(3, 2, 4, 7, 8, dtype=F64).unbind()
    other = torch.randn(2, 1 if shared else 2, 4, 5, 8, dtype=F64).unbind()
    own, options = (own_key, own_value), {"is_causal": is_causal, "scale": 0.4}
    joint = split_attention(query, own, other, **options)
    mask = torch.ones(7, 7, dtype=torch.bool).tril() if is_causal else torch.ones(7, 7, dtype=torch.bool)
    mask = torch.cat([mask, torch.ones(7, 5, dtype=torch.bool)], dim=1)
    keys, values_ = (torch.cat([a, b.expand(2, -1, -1, -1)], dim=2) for a, b in zip(own, other, strict=True))
    want = nn.functional.scaled_dot_product_attention(query, keys, values_, mask, scale=0.4)
    lam = exact_lambda(query, own_key, other[0], **options)
    mass = (query @ keys.mT * 0.4).masked_fill(~mask, -torch.inf).softmax(-1)[..., 7:].sum(-1)
    assert_close({"lam": lam, "out": joint}, {"lam": mass, "out": want})
    assert_close({"": split_attention(query, own, other, lam, **options)}, {"": want})
    difference = split_attention(query, own, other, 1.0, **options) - split_attention(query, own, other, 0.0, **options)
    for off in (0.1, torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=F64)[:, None]):
        got = split_attention(query, own, other, off, **options)
        assert_close({"": got - joint}, {"": (off - lam)[..., None] * difference})


# λ of 0 is the frozen model


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_without_weight_images_are_those_of_the_frozen_model(depth):
    recipe = DPL(n_vision=3, depth=depth, lam="constant", lam_value=0.0)
    clf = CLIPClassifier(clip(WIDE, F64), tokenizer(), NAMES, recipe)
    want = CLIPClassifier(clip(WIDE, F64), tokenizer(), NAMES, ZeroShot()).image_features(pixels(clf.clip))
    assert_close({"": clf.image_features(pixels(clf.clip)).detach()}, {"": want})


def test_without_weight_texts_are_those_of_the_frozen_model_that_sees_no_slot():
    clf = CLIPClassifier(clip(WIDE, F64), tokenizer(), NAMES, DPL(depth=2, lam="constant", lam_value=0.0))
    model = clip(WIDE, F64).text_model
    for name, got in zip(NAMES, clf.text_features(), strict=True):
        ids = tokenizer()(f"a photo of a {name}.", return_tensors="pt")["input_ids"]
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        mask[..., 1:3] = False
        mask |= torch.eye(ids.shape[1], dtype=torch.bool)
        hidden = model.embeddings(ids)
        for layer in model.encoder.layers:
            hidden = layer(hidden, mask)
        want = clip(WIDE, F64).text_projection(model.final_layer_norm(hidden)[0, -1])
        assert_close({"": got.detach()}, {"": (want / want.norm()).detach()})


def test_the_identity_setting_of_the_card_is_zero_shot():
    from fastprompt.recipes.dpl import CARD

    clf = CLIPClassifier(clip(WIDE), tokenizer(), NAMES, DPL(**CARD.identity))
    want = CLIPClassifier(clip(WIDE), tokenizer(), NAMES, ZeroShot())
    assert torch.equal(clf.text_features(), want.text_features())
    assert_close({"": clf(pixels(clf.clip)).logits.detach()}, {"": want(pixels(want.clip)).logits})


# One tower


def test_text_alone_leaves_the_vision_tower_alone():
    clf = build(DPL(n_vision=0, depth=2), cache_images=True)
    both = build(DPL(depth=2))
    clf.learner.load_state_dict({k: x for k, x in tensors_of(both).items() if not k.startswith("vision")})
    plain = CLIPClassifier(clip(MIDDLE, F64), tokenizer(), NAMES, ZeroShot())
    assert torch.equal(clf.image_features(pixels(clf.clip)), plain.image_features(pixels(clf.clip)))
    assert torch.equal(clf.text_features(), both.text_features())


def test_vision_alone_has_hand_written_texts():
    clf = build(DPL(n_ctx=0, depth=1, init="itap of"))
    assert torch.equal(clf.text_features(), clf.zero_shot_weights("itap of {}."))
    want = image_features(clip(MIDDLE, F64), pixels(clf.clip), clf.recipe, tensors_of(clf))
    assert_close({"": clf.image_features(pixels(clf.clip)).detach()}, {"": want.detach()})
    assert all(x.abs().max() > 0 for x in step(clf).values())


def test_conditioned_prompts_change_with_the_name_of_their_class_alone():
    clf = build(DPL(depth=2, conditioned=True))
    names = (*NAMES[:-1], "one red hill")
    other = build(DPL(depth=2, conditioned=True), names=names)
    context, changed = clf.learner.text(), other.learner.text()
    assert torch.equal(context[:-1], changed[:-1]) and not torch.allclose(context[-1], changed[-1])
    assert_close({"": clf.text_features()[:-1].detach()}, {"": other.text_features()[:-1].detach()})
    assert torch.equal(clf.image_features(pixels(clf.clip)), other.image_features(pixels(clf.clip)))
    for deep, shallow in zip(clf.learner.deep(), clf.learner.deep_text, strict=True):
        # The shift of a class is one, whatever the prompt and the layer.
        assert_close({"": deep.unflatten(0, (len(NAMES), -1)) - shallow}, {"": context - clf.learner.context})


def test_conditioned_prompts_start_unconditioned():
    recipe = DPL(depth=2, conditioned=True)
    clf = CLIPClassifier(clip(MIDDLE, F64), tokenizer(), NAMES, recipe)
    plain = CLIPClassifier(clip(MIDDLE, F64), tokenizer(), NAMES, DPL(depth=2))
    found = clf.learner.state_dict()
    plain.learner.load_state_dict({k: x for k, x in found.items() if not k.startswith("generator")})
    assert not any(k.startswith("generator") for k in plain.learner.state_dict())
    assert_close({"": clf.text_features().detach()}, {"": plain.text_features().detach()})


def test_order_of_classes_is_free():
    clf = build(DPL(depth=2, conditioned=True))
    back = build(DPL(depth=2, conditioned=True), names=NAMES[::-1])
    assert_close({"": clf.text_features().flip(0).detach()}, {"": back.text_features().detach()})


# Switches


def test_switches_matter_where_prompt_rows_are_alive_and_nowhere_else():
    images = pixels(clip(WIDE, F64))
    for depth, alive in ((1, True), (3, True), (4, False)):
        options = {"depth": depth, "lam": "constant", "lam_value": 0.4}
        clf = build(DPL(**options), WIDE)
        for branches in (("xx", "xp", "px"), ("xx", "xp", "pp")):
            other = build(DPL(branches=branches, **options), WIDE, tensors=tensors_of(clf))
            assert torch.equal(clf.image_features(images), other.image_features(images)) != alive
            assert torch.equal(clf.text_features(), other.text_features()) != alive


@pytest.mark.parametrize("depth, alive", [(1, [0, 1, 2]), (2, [1, 2]), (3, [2]), (4, []), (9, [])])
def test_rows_that_nothing_reads_have_no_lambda(depth, alive):
    clf = CLIPClassifier(clip(WIDE), tokenizer(), NAMES, DPL(depth=depth, lam="per_head"))
    found = {key for key, _ in clf.learner.named_parameters() if "split" in key}
    want = {f"{tower}_split.{i}.instance" for tower in ("text", "vision") for i in range(4)}
    assert found == want | {f"{tower}_split.{i}.prompt" for tower in ("text", "vision") for i in alive}
    learned = [p for key, p in clf.learner.named_parameters() if "split" in key]
    assert all(p.shape == (2,) and torch.allclose(p.sigmoid(), torch.tensor(0.1)) for p in learned)


# Where it runs


@pytest.mark.filterwarnings("ignore:clip. the text tower of SiglipTextModel is not causal")
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("recipe", [
    DPL(depth=1, lam="per_head"), DPL(n_ctx=4, depth=1, conditioned=True), DPL(depth=2, lam="constant", lam_value=0.3),
    DPL(depth=1, lam="exact", branches=("xx", "xp", "pp")),
], ids=repr)  # fmt: skip
def test_siglip(recipe, chunk):
    words = tokenizer(start=False)
    clf = build(recipe, model=siglip(F64), words=words, class_chunk=chunk)
    got, tensors, model = step(clf), tensors_of(clf), siglip(F64).requires_grad_(False)
    logits = siglip_logits(model, words, NAMES, pixels(model), recipe, tensors)
    loss = cross_entropy(logits, labels(3, len(NAMES)))
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    want = {"logits": logits.detach(), "loss": loss.detach()} | dict(zip(tensors, gradients, strict=True))
    assert_close(gathered(got), gathered(want))


@pytest.mark.parametrize("recipe", ["learned", "conditioned"])
def test_compiles_as_one_graph(recipe):
    clf = build(RECIPES[recipe], SMALL)
    want = step(clf)
    compiled = torch.compile(clf, fullgraph=True, backend="eager")
    clf.zero_grad()
    try:
        out = compiled(pixels(clf.clip), labels=labels(3, len(NAMES)))
        out.loss.backward()
    finally:
        torch._dynamo.reset()
    got = {"logits": out.logits.detach(), "loss": out.loss.detach()}
    got |= {key: p.grad for key, p in clf.learner.named_parameters()}
    assert_close(gathered(got), gathered(want))


def test_a_copy_keeps_working_and_detach_gives_the_clip_back():
    model = clip(MIDDLE, F64)
    before = model.get_image_features(pixel_values=pixels(model)).pooler_output
    clf = build(DPL(depth=1), model=model)
    want = step(clf)
    twin = copy.deepcopy(clf)
    with torch.no_grad():
        for p in clf.learner.parameters():
            p.zero_()
    assert same(step(twin), want)
    clf.detach()
    assert torch.equal(model.get_image_features(pixel_values=pixels(model)).pooler_output, before)


@pytest.mark.parametrize("recipe", KINDS)
def test_a_saved_classifier_is_the_one_that_was_saved(recipe, tmp_path):
    clf = build(RECIPES[recipe], dtype=torch.float32)
    clf.save(tmp_path)
    found = CLIPClassifier.load(clip(MIDDLE), tokenizer(), tmp_path)
    assert found.recipe == clf.recipe
    assert same(step(found), step(clf))
    other = CLIPClassifier.load(clip(MIDDLE), tokenizer(), tmp_path, classnames=("red house", *NAMES[:2]))
    assert_close({"": other.text_features()[1:].detach()}, {"": clf.text_features()[:2].detach()})


def test_lambda_is_learned():
    clf = build(DPL(depth=2, lam="per_head"), SMALL)
    optimizer = torch.optim.SGD([p for key, p in clf.learner.named_parameters() if "split" in key], lr=0.01)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = clf(pixels(clf.clip), labels=labels(3, len(NAMES))).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("options, named", [
    ({"n_ctx": -1}, "n_ctx"), ({"n_ctx": None}, "n_ctx"), ({"n_vision": True}, "n_vision"),
    ({"n_ctx": 0, "n_vision": 0}, "n_vision"), ({"depth": 0}, "depth"), ({"init": " "}, "init"),
    ({"lam": "fixed"}, "lam"), ({"lam": 0.1}, "lam"), ({"lam_value": 1.5}, "lam_value"),
    ({"lam_value": float("nan")}, "lam_value"), ({"lam_value": "0.1"}, "lam_value"),
    ({"lam_value": 0}, "lam_value"), ({"lam": "per_head", "lam_value": 1.0}, "lam_value"),
    ({"lam": "exact", "lam_value": 0.5}, "lam_value"), ({"branches": ("xx", "pp")}, "branches"),
    ({"branches": ("xx", "xp")}, "branches"), ({"branches": ("xp", "pp", "yy")}, "branches"),
    ({"branches": None}, "branches"), ({"conditioned": 1}, "conditioned"),
    ({"conditioned": True, "n_ctx": 0}, "conditioned"),
])  # fmt: skip
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=f"^{named}: got .*expected|^{named}: got .*leave it out"):
        DPL(**options)


def test_bad_shares_are_named():
    with pytest.raises(ValueError, match=r"share: got 'all'.*one context a class.*expected 'none'"):
        CLIPClassifier(clip(), tokenizer(), NAMES, DPL(conditioned=True), share="all")
    with pytest.raises(ValueError, match="cache_images: got True, but DPL learns in the vision tower"):
        CLIPClassifier(clip(), tokenizer(), NAMES, DPL(), cache_images=True)
