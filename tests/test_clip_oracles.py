# SPDX-License-Identifier: Apache-2.0
"""The oracles of CLIP prompt learning against transformers' own CLIP and against each other."""

from dataclasses import dataclass

import pytest
import tiny_clips
import torch
from clip_oracles import (
    encode_image,
    encode_text,
    maple_vision_prompts,
    published_logits,
    shapes,
    siglip_logits,
    tokenise,
    unit,
)
from tiny_clips import CLIPS, NAMES, SMALL, TEMPLATES, clip, pixels, tokenizer, values
from tiny_models import assert_close


@dataclass(frozen=True)
class ZeroShot:
    templates: tuple[str, ...] = TEMPLATES[:1]


@dataclass(frozen=True)
class CoOp:
    n_ctx: int = 4
    init: str | None = None
    csc: bool = False
    position: str = "end"


@dataclass(frozen=True)
class CoCoOp:
    n_ctx: int | None = None
    init: str | None = "a photo of a"


@dataclass(frozen=True)
class MaPLe:
    n_ctx: int = 2
    depth: int = 2
    init: str | None = "a photo of a"


@dataclass(frozen=True)
class IVLP:
    n_ctx: int = 2
    n_vision: int = 2
    depth: int = 2
    init: str | None = "a photo of a"


def logits(model, recipe, tensors, names=NAMES):
    return published_logits(model, tokenizer(), names, pixels(model), recipe, tensors)


def hf_logits(model, template=TEMPLATES[0]):
    """With the padding, masks and pooling of transformers."""
    batch = tokenizer()([template.format(name) for name in NAMES], padding=True, return_tensors="pt")
    return model(input_ids=batch["input_ids"], pixel_values=pixels(model)).logits_per_image


@pytest.mark.parametrize("name", CLIPS)
def test_zero_shot_is_transformers(name):
    model = clip(name, torch.float64)
    for template in TEMPLATES:
        assert_close({"": logits(model, ZeroShot((template,)), {})}, {"": hf_logits(model, template)})
    found = logits(model, ZeroShot(), {})
    assert found.std(dim=1).min() > 0.01 < found.std(dim=0).min(), "classes and images matter"


def test_an_ensemble_is_the_unit_mean_of_unit_features():
    model = clip(dtype=torch.float64)
    every = [logits(model, ZeroShot((t,)), {}) for t in TEMPLATES]
    together = logits(model, ZeroShot(TEMPLATES), {})
    # Cosines of the mean are the mean of cosines, up to one length a class.
    ratio = sum(every) / len(every) / together
    assert_close({"": ratio}, {"": ratio[:1].expand_as(ratio)}, operations=2**16)
    assert (ratio < 1).all()


@pytest.mark.parametrize("name", CLIPS)
def test_a_context_of_the_words_is_zero_shot(name):
    model = clip(name, torch.float64)
    want = {"": logits(model, ZeroShot(), {})}
    words = tokenizer()("a photo of a", add_special_tokens=False)["input_ids"]
    context = model.text_model.embeddings.token_embedding.weight[words].detach()
    assert_close({"": logits(model, CoOp(), {"context": context})}, want)
    assert_close({"": logits(model, CoOp(csc=True), {"context": context.expand(len(NAMES), -1, -1)})}, want)
    still = {"context": context} | {k: torch.zeros(s).double() for k, s in network(model).items()}
    assert_close({"": logits(model, CoCoOp(), still)}, want)


def network(model):
    found = shapes(model, tokenizer(), NAMES, CoCoOp())
    del found["context"]
    return found


@pytest.mark.parametrize("template, position", [("{} itap of the.", "front"), ("itap of {} on the hill.", "middle")])
def test_positions_are_where_the_words_stand(template, position):
    model = clip(dtype=torch.float64)
    # Not "st.": its tokens depend on what follows.
    names = [name for name in NAMES if name != "st."]
    words = template.format("").removesuffix(".")
    ids = tokenizer()(words, add_special_tokens=False)["input_ids"]
    context = model.text_model.embeddings.token_embedding.weight[ids].detach()
    got = logits(model, CoOp(len(ids), position=position), {"context": context}, names)
    assert_close({"": got}, {"": logits(model, ZeroShot((template,)), {}, names)})


@pytest.mark.parametrize("name", CLIPS)
def test_depth_one_is_plain_concatenation(name):
    model = clip(name, torch.float64)
    recipe = MaPLe(depth=1)
    tensors = values(shapes(model, tokenizer(), NAMES, recipe), torch.float64)
    ids, end = tokenise(model, tokenizer(), [f"a photo of a {name}." for name in NAMES])
    embedded = model.text_model.embeddings.token_embedding(ids)
    embedded = torch.cat([embedded[:, :1], tensors["context"].expand(len(ids), -1, -1), embedded[:, 3:]], dim=1)
    hidden = model.text_model.embeddings(inputs_embeds=embedded)
    hidden = model.text_model.encoder(hidden, None, is_causal=True).last_hidden_state
    texts = unit(model.text_projection(model.text_model.final_layer_norm(hidden)[torch.arange(len(ids)), end]))
    (prompt,) = maple_vision_prompts(tensors)
    patches = model.vision_model.embeddings(pixels(model))
    hidden = model.vision_model.pre_layrnorm(torch.cat([patches, prompt.expand(len(patches), -1, -1)], dim=1))
    hidden = model.vision_model.encoder(hidden).last_hidden_state[:, 0]
    images = unit(model.visual_projection(model.vision_model.post_layernorm(hidden)))
    assert_close({"": logits(model, recipe, tensors)}, {"": model.logit_scale.exp() * images @ texts.T})


@pytest.mark.parametrize("name", CLIPS)
def test_coupled_prompts_are_independent_prompts_of_those_values(name):
    model = clip(name, torch.float64)
    tensors = values(shapes(model, tokenizer(), NAMES, MaPLe()), torch.float64)
    vision = {f"vision.{i}": x for i, x in enumerate(maple_vision_prompts(tensors))}
    text = {k: x for k, x in tensors.items() if not k.startswith("couple")}
    assert_close({"": logits(model, MaPLe(), tensors)}, {"": logits(model, IVLP(), text | vision)})


RECIPES = [CoOp(), CoOp(csc=True), CoOp(3, position="middle"), CoOp(position="front"), CoCoOp(), MaPLe(), IVLP()]


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_every_learned_tensor_matters(name, recipe):
    model = clip(name, torch.float64)
    tensors = values(shapes(model, tokenizer(), NAMES, recipe), torch.float64)
    loss = torch.nn.functional.cross_entropy(logits(model, recipe, tensors), torch.tensor([0, 3, 4]))
    for key, gradient in zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True):
        assert gradient.abs().max() > 1e-4, key


def test_what_follows_the_end_of_text_is_never_read():
    model = clip(SMALL, torch.float64)
    ids, end = tokenise(model, tokenizer(), [f"a photo of a {name}." for name in NAMES])
    embedded = model.text_model.embeddings.token_embedding(ids)
    behind = torch.arange(embedded.shape[1]) > end[:, None]
    other = torch.where(behind[..., None], torch.randn_like(embedded), embedded)
    assert_close({"": encode_text(model, other, end)}, {"": encode_text(model, embedded, end)})


def test_images_without_prompts_are_transformers():
    model = clip(dtype=torch.float64)
    want = unit(model.get_image_features(pixels(model)).pooler_output)
    assert_close({"": encode_image(model, pixels(model))}, {"": want})


def test_siglip_is_transformers():
    model, words = tiny_clips.siglip(torch.float64), tokenizer(start=False)
    texts = [f"a photo of a {name}." for name in NAMES]
    ids = words(texts, padding="max_length", max_length=24, return_tensors="pt")["input_ids"]
    want = model(input_ids=ids, pixel_values=pixels(model)).logits_per_image
    assert_close({"": siglip_logits(model, words, NAMES, pixels(model), "a photo of a", {})}, {"": want})
    four = words("a photo of a", add_special_tokens=False)["input_ids"]
    context = model.text_model.embeddings.token_embedding.weight[four]
    assert_close({"": siglip_logits(model, words, NAMES, pixels(model), "x x x x", {"context": context})}, {"": want})
