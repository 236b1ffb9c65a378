# SPDX-License-Identifier: Apache-2.0
"""What a CLIPClassifier keeps: text features at inference, image features on demand, and when it lets go."""

import pytest
import torch
from clip_cases import FROZEN, RECIPES, build, labels, step
from tiny_clips import (
    NAMES,
    SMALL,
    TEMPLATES,
    clip,
    pixels,
    tokenizer,
)
from tiny_models import assert_close, same

from fastprompt import CLIPClassifier, MaPLe


def calls_of(module) -> list:
    """Grows by one a call of the module."""
    calls: list = []
    module.register_forward_hook(lambda *args: calls.append(args))
    return calls


def nudge(clf) -> None:
    """One optimiser step."""
    optimizer = torch.optim.SGD(clf.learner.parameters(), lr=0.1)
    step(clf)
    optimizer.step()


@pytest.mark.parametrize("recipe", ["CoOp", "CoCoOp", "CSC front"])
def test_image_features_are_computed_once(recipe):
    clf = build(SMALL, RECIPES[recipe], torch.float64, cache_images=True)
    images = pixels(clf.clip, 4)
    plain = step(build(SMALL, RECIPES[recipe], torch.float64), images)
    calls = calls_of(clf.clip.vision_model)
    assert_close(step(clf, images), plain)
    assert len(calls) == 1
    assert_close(step(clf, images), plain)
    assert_close(step(clf, images.flip(0)[1:]), step(build(SMALL, RECIPES[recipe], torch.float64), images.flip(0)[1:]))
    assert len(calls) == 1
    # Of a batch with one new image, that image alone.
    clf(torch.cat([images[:2], torch.zeros_like(images[:1])]))
    assert len(calls) == 2 and sum(len(call[2].pooler_output) for call in calls) == 5


@pytest.mark.parametrize("recipe", ["MaPLe", "IVLP"])
def test_images_are_not_cached_where_their_side_learns(recipe):
    with pytest.raises(ValueError, match="cache_images"):
        build(SMALL, RECIPES[recipe], cache_images=True)


@pytest.mark.parametrize("recipe", ["CoOp", "CSC front", "MaPLe", "IVLP"])
def test_text_features_are_cached_at_inference_and_refreshed_by_a_step(recipe):
    clf = build(SMALL, RECIPES[recipe], torch.float64).eval()
    calls = calls_of(clf.clip.text_projection)
    with torch.no_grad():
        first = clf(pixels(clf.clip)).logits
        once = len(calls)
        assert torch.equal(clf(pixels(clf.clip)).logits, first)
        assert len(calls) == once > 0
    nudge(clf.train())
    clf.eval()
    with torch.no_grad():
        after = clf(pixels(clf.clip)).logits
    assert (after - first).abs().max() > 1e-6
    fresh = build(SMALL, RECIPES[recipe], torch.float64).eval()
    fresh.learner.load_state_dict(clf.learner.state_dict())
    assert_close({"": after}, {"": fresh(pixels(clf.clip)).logits.detach()})
    # A cache filled without gradients is not used where they are wanted.
    clf(pixels(clf.clip), labels=labels(3, len(NAMES))).loss.backward()
    assert all(p.grad is not None for p in clf.learner.parameters())


@pytest.mark.parametrize("recipe", ["CoOp", "CoCoOp", "MaPLe", "templates"])
def test_what_is_kept_serves_no_other_mode(recipe):
    """Features kept under autocast or in inference mode are of no use outside."""
    recipe = (RECIPES | FROZEN)[recipe]

    def fresh():
        model = clip(SMALL)
        found = build(SMALL, recipe, cache_images=not isinstance(recipe, MaPLe)) if recipe in RECIPES.values() else None
        return (found or CLIPClassifier(model, tokenizer(), NAMES, recipe, cache_images=True)).eval()

    want, images = fresh()(pixels(clip())).logits.detach(), pixels(clip())
    clf = fresh()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = clf(images).logits
    with torch.inference_mode():
        assert torch.equal(clf(images).logits, want)
    with torch.no_grad():
        assert torch.equal(clf(images).logits, want)
    assert (rounded - want).abs().max() > 1e-3
    if list(clf.learner.parameters()):
        assert same(step(clf), step(fresh()))


def test_image_features_follow_the_weights():
    """Kept ones are those of the weights as they were; a cache under autocast or in inference mode stays."""
    clf, images = build(SMALL, RECIPES["CoOp"], cache_images=True), pixels(clip())
    first = clf.image_features(images)
    calls = calls_of(clf.clip.vision_model)
    with torch.inference_mode():
        assert torch.equal(clf.image_features(images), first)
    assert not calls
    with torch.no_grad():
        for p in clf.clip.vision_model.parameters():
            p.mul_(1.3)
    changed = clf.image_features(images)
    assert len(calls) == 1 and (changed - first).abs().max() > 1e-3
    clf.double()
    assert clf.image_features(images).dtype == torch.float64


@pytest.mark.parametrize("recipe", ["CoOp", "templates"])
def test_what_is_returned_may_be_written_to(recipe):
    clf = CLIPClassifier(clip(), tokenizer(), NAMES, (RECIPES | FROZEN)[recipe]).eval()
    with torch.no_grad():
        want = clf(pixels(clf.clip)).logits
        for found in (clf.text_features(), clf.export(), clf.zero_shot_weights(TEMPLATES)):
            found.zero_()
        assert torch.equal(clf(pixels(clf.clip)).logits, want)


@pytest.mark.parametrize("recipe", ["CoOp", "CoCoOp", "templates"])
def test_a_model_made_in_inference_mode(recipe):
    """Its tensors count no versions, so nothing that is computed of them is kept."""
    recipe = (RECIPES | FROZEN)[recipe]

    def logits(model):
        torch.manual_seed(0)
        return CLIPClassifier(model, tokenizer(), NAMES, recipe, cache_images=True)(pixels(clip())).logits

    with torch.inference_mode():
        found = logits(clip())
    assert torch.equal(found, logits(clip()).detach())


def test_loading_a_state_refreshes_the_cache():
    clf = build(SMALL, RECIPES["CoOp"]).eval()
    with torch.no_grad():
        first = clf(pixels(clf.clip)).logits
        clf.load_state_dict({key: 2 * x for key, x in clf.state_dict().items()})
        assert (clf(pixels(clf.clip)).logits - first).abs().max() > 1e-4
