# SPDX-License-Identifier: Apache-2.0
"""Bad input to CLIPClassifier: the message names the argument, what was got, what was expected, and the fix."""

import pytest
import torch
from clip_cases import RECIPES, build
from tiny_clips import LONG, NAMES, SMALL, VOCABULARY, WIDE, BareTokenizer, clip, pixels, siglip, tokenizer
from tiny_models import build as vision_model
from tiny_models import untouched

from fastprompt import IVLP, VPT, CLIPClassifier, CoCoOp, CoOp, MaPLe, ZeroShot


def refused(message, error=ValueError, *, name=SMALL, model=None, words=None, names=NAMES, recipe=None, **options):
    """The error, with nothing about the model changed."""
    model = model or clip(name)
    with untouched(model), pytest.raises(error, match=message):
        CLIPClassifier(model, words or tokenizer(), names, recipe or CoOp(n_ctx=4), **options)


class Broken(BareTokenizer):
    """Ids changed by a function."""

    def __init__(self, change):
        self.change = change

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": self.change(super().__call__(text, add_special_tokens)["input_ids"])}


# Class names


@pytest.mark.parametrize("names", [(), []])
def test_no_classes(names):
    refused(r"classnames: got .*(empty|no |\[\]|\(\)|0).*expected at least one", names=names)


@pytest.mark.parametrize("names", ["cat", 3, None])
def test_classnames_of_a_wrong_type(names):
    refused(r"classnames: got .*expected a (list|sequence)", TypeError, names=names)


@pytest.mark.parametrize("names", [("cat", 3), ("cat", None), ("cat", b"dog")])
def test_a_class_name_of_a_wrong_type(names):
    refused(r"classnames.*got .*(3|None|dog|int|bytes)", TypeError, names=names)


@pytest.mark.parametrize("name", ["", "   ", "\n"])
def test_a_name_of_no_tokens(name):
    refused(r"classnames\[1\]: got .*expected a name", names=("cat", name))


def test_a_name_that_the_tokenizer_drops():
    words = Broken(lambda ids: [i for i in ids if VOCABULARY[i] not in ("dog", ".")])
    refused(r"classnames: got 'dog', which the tokenizer turns into no token", words=words, names=("cat", "dog"))
    refused(r"classnames: got 'dog', which.*no token", words=words, names=("cat", "dog"), recipe=ZeroShot())


@pytest.mark.parametrize(
    "recipe", [CoOp(n_ctx=6), CoCoOp(n_ctx=6, init=None), ZeroShot(("a a a a a a {}.",))], ids=repr
)
def test_a_name_that_does_not_fit_is_named(recipe):
    refused(
        rf"classnames: got '{LONG}', which needs 21 tokens.*expected at most 20",
        name=WIDE,
        names=("cat", LONG, "dog"),
        recipe=recipe,
    )


def test_a_context_that_fits_no_name():
    refused(
        r"classnames: got 'cat', .*20 context tokens, expected at most 20.*fewer context", name=WIDE, recipe=CoOp(20)
    )


# Tokenizers


def test_a_tokenizer_of_another_model():
    other = Broken(lambda ids: [i + 1000 for i in ids])
    refused(r"tokenizer: got id 1008 for 'cat', expected ids from 0 to 34.*belongs to the model", words=other)


def test_an_end_token_outside_the_vocabulary():
    other = BareTokenizer()
    other.eos_token_id = 49407
    refused(r"tokenizer: got id 49407 .*expected ids from 0 to 34", words=other)


def test_no_end_token():
    other = BareTokenizer()
    other.eos_token_id = None
    refused(r"tokenizer.*eos_token_id", words=other)


def test_no_start_token_in_a_causal_tower():
    other = BareTokenizer()
    other.bos_token_id = None
    refused(r"tokenizer.*bos_token_id", words=other)


@pytest.mark.parametrize("words", [None, "cat", 3])
def test_a_tokenizer_of_a_wrong_type(words):
    with pytest.raises(TypeError, match="tokenizer: got"):
        CLIPClassifier(clip(), words, NAMES, CoOp(n_ctx=4))


# Recipes


@pytest.mark.parametrize("recipe", [VPT(length=2), "coop", CoOp, None])
def test_a_recipe_of_a_wrong_type(recipe):
    with pytest.raises(TypeError, match=r"recipe: got .*CoOp"):
        CLIPClassifier(clip(), tokenizer(), NAMES, recipe)


@pytest.mark.parametrize(
    "make, argument",
    [
        (lambda: CoOp(n_ctx=0), "n_ctx"),
        (lambda: CoOp(n_ctx=-2), "n_ctx"),
        (lambda: CoOp(n_ctx=2.5), "n_ctx"),
        (lambda: CoOp(n_ctx=True), "n_ctx"),
        (lambda: CoOp(position="start"), "position"),
        (lambda: CoOp(init=3), "init"),
        (lambda: CoCoOp(n_ctx=0), "n_ctx"),
        (lambda: MaPLe(n_ctx=0), "n_ctx"),
        (lambda: MaPLe(n_ctx=None), "n_ctx"),
        (lambda: IVLP(n_ctx=None), "n_ctx"),
        (lambda: MaPLe(depth=0), "depth"),
        (lambda: MaPLe(depth="deep"), "depth"),
        (lambda: IVLP(n_vision=0), "n_vision"),
        (lambda: ZeroShot(()), "templates"),
        (lambda: ZeroShot(("a photo",)), "templates"),
        (lambda: ZeroShot("a photo"), "templates"),
        (lambda: ZeroShot(("a {} of a {}.",)), "templates"),
        (lambda: ZeroShot((3,)), "templates"),
    ],
)
def test_bad_recipe_fields(make, argument):
    with pytest.raises((ValueError, TypeError), match=rf"{argument}.*got.*expected"):
        make()


def test_an_init_of_another_length():
    refused(r"n_ctx: got 3.*4", recipe=CoOp(n_ctx=3, init="a photo of a"))


def test_an_init_of_no_tokens():
    with pytest.raises(ValueError, match=r"init: got ' ', expected words"):
        CoOp(init=" ")
    words = Broken(lambda ids: [i for i in ids if VOCABULARY[i] != "itap"])
    refused(r"init: got 'itap'.*no token", words=words, recipe=CoOp(init="itap"))


# Options


@pytest.mark.parametrize("share", ["image", "some", True, 1])
def test_what_coop_cannot_share(share):
    refused(r"share: got .*expected", (ValueError, TypeError), share=share)


@pytest.mark.parametrize("recipe", [CoOp(n_ctx=4, csc=True), CoCoOp()], ids=repr)
def test_contexts_that_differ_are_not_shared_by_all(recipe):
    refused(r"share: got 'all'", recipe=recipe, share="all")


@pytest.mark.parametrize("share", ["all", "image"])
def test_sharing_in_a_tower_that_is_not_causal(share):
    recipe = CoOp(n_ctx=4) if share == "all" else CoCoOp()
    refused(r"share: got .*causal", model=siglip(), words=tokenizer(start=False), recipe=recipe, share=share)


@pytest.mark.parametrize("chunk", [0, -1, 2.0, "2", True])
def test_class_chunk(chunk):
    refused(r"class_chunk: got .*expected", (ValueError, TypeError), class_chunk=chunk)


@pytest.mark.parametrize("recipe", [MaPLe(depth=2), IVLP(depth=2)], ids=repr)
def test_caching_images_that_learn(recipe):
    refused(r"cache_images: got True.*", recipe=recipe, cache_images=True)


# Models


def test_a_model_without_text():
    model = vision_model("ViT")
    with untouched(model), pytest.raises((ValueError, TypeError), match=r"clip: got.*ViTModel.*expected"):
        CLIPClassifier(model, tokenizer(), NAMES, CoOp(n_ctx=4))
    with pytest.raises(TypeError, match="clip: got"):
        CLIPClassifier(None, tokenizer(), NAMES, CoOp(n_ctx=4))


# Batches


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("bad", [-1, len(NAMES), 10**6])
def test_labels_out_of_range(bad, chunk):
    clf = build(SMALL, RECIPES["CoOp"], class_chunk=chunk)
    with pytest.raises(ValueError, match=rf"labels: got {bad}, expected class numbers from 0 to {len(NAMES) - 1}"):
        clf(pixels(clf.clip), labels=torch.tensor([0, bad, 1]))


@pytest.mark.parametrize("bad", [torch.zeros(2, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long)])
def test_labels_of_another_shape(bad):
    clf = build(SMALL, RECIPES["CoOp"])
    with pytest.raises(ValueError, match="labels: got"):
        clf(pixels(clf.clip), labels=bad)


def test_labels_of_another_type():
    clf = build(SMALL, RECIPES["CoOp"])
    with pytest.raises((ValueError, TypeError), match=r"labels: got.*expected"):
        clf(pixels(clf.clip), labels=torch.rand(3))


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 16, 16), torch.zeros(2, 3, 16), torch.zeros(0, 3, 16, 16), "image", None]
)
def test_pixel_values_of_another_shape(bad):
    clf = build(SMALL, RECIPES["CoOp"])
    with pytest.raises((ValueError, TypeError), match=r"pixel_values: got .*expected"):
        clf(bad)


def test_templates_of_zero_shot_weights():
    clf = build(SMALL, RECIPES["CoOp"])
    for bad in ("a photo", (), ("a photo",), 3):
        with pytest.raises((ValueError, TypeError), match=r"templates.*got"):
            clf.zero_shot_weights(templates=bad)


def test_image_features_are_needed_for_image_conditioned_text():
    clf = build(SMALL, RECIPES["CoCoOp"])
    with pytest.raises(ValueError, match="image_features: got None"):
        clf.text_features()
