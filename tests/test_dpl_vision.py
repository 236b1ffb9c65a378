# SPDX-License-Identifier: Apache-2.0
"""DPL in a vision tower of its own: any of them, saved, baked, and what it refuses."""

import pytest
import torch
from dpl_oracle import image_features
from tiny_clips import MIDDLE, NAMES, WIDE, clip, pixels, tokenizer, values
from tiny_models import assert_close
from torch import nn

import fastprompt
from fastprompt import DPL, CLIPClassifier

F64 = torch.float64
ATTACHED = {
    "exact": DPL(n_ctx=0, n_vision=3, depth=2, lam="exact"),
    "learned": DPL(n_ctx=0, n_vision=3, depth=4),
    "per head": DPL(n_ctx=0, n_vision=3, depth=2, lam="per_head"),
    "constant": DPL(n_ctx=0, depth=1, lam="constant", lam_value=0.3, branches=("xx", "xp", "px")),
}


@pytest.mark.parametrize("recipe", ATTACHED)
def test_any_vision_tower_takes_it(recipe):
    recipe, model, plain = ATTACHED[recipe], clip(WIDE, F64), clip(WIDE, F64).requires_grad_(False)
    for x in (model, plain):
        # A CLIP's own first norm is not in a tower's layers, and prompts of a handle do not pass it.
        x.vision_model.pre_layrnorm = nn.Identity()
    handle = fastprompt.attach(model, recipe, tower="vision")
    parameters = dict(handle.named_parameters())
    tensors = values({key: p.shape for key, p in parameters.items()}, F64)
    grad = torch.randn(3, 48, dtype=F64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(tensors[key])
    features = model.get_image_features(pixel_values=pixels(model)).pooler_output
    got = torch.autograd.grad(features / features.norm(dim=-1, keepdim=True), list(parameters.values()), grad)
    want = image_features(plain, pixels(plain), recipe, {named(key): x for key, x in tensors.items()})
    expected = torch.autograd.grad(want, list(tensors.values()), grad)
    assert_close({"": (features / features.norm(dim=-1, keepdim=True)).detach()}, {"": want.detach()})
    assert_close(dict(zip(tensors, got, strict=True)), dict(zip(tensors, expected, strict=True)))
    before = plain.get_image_features(pixel_values=pixels(plain)).pooler_output
    handle.detach()
    assert torch.equal(model.get_image_features(pixel_values=pixels(model)).pooler_output, before)


def named(key):
    """The oracle's name of a handle's parameter."""
    _, layer, *rest = key.split(".")
    return f"vision.{layer}" if rest == ["prompt"] else f"vision_split.{layer}.{rest[-1]}"


def test_a_handle_is_saved_baked_and_the_exact_one_is_vpt(tmp_path):
    images = pixels(clip(WIDE))
    with fastprompt.attach(clip(WIDE), ATTACHED["per head"], tower="vision") as handle:
        want = handle.model.get_image_features(pixel_values=images).pooler_output
        handle.save(tmp_path)
        found = fastprompt.load(clip(WIDE), tmp_path)
        assert found.config == handle.config
        assert torch.equal(found.model.get_image_features(pixel_values=images).pooler_output, want)
        assert torch.equal(found.bake().model.get_image_features(pixel_values=images).pooler_output, want)
        assert found.num_trainable == 0
    with (
        fastprompt.attach(clip(WIDE), fastprompt.VPT(3, layers=(0, 1)), tower="vision") as vpt,
        fastprompt.attach(clip(WIDE), ATTACHED["exact"], tower="vision") as handle,
    ):
        with torch.no_grad():
            for mine, its in zip(handle.parameters(), vpt.parameters(), strict=True):
                mine.copy_(its)
        features = [x.model.get_image_features(pixel_values=images).pooler_output for x in (handle, vpt)]
        assert torch.equal(*features)


def test_bad_towers_are_named(tmp_path):
    with pytest.raises(ValueError, match="n_ctx: got 2, but one vision tower has no text prompts; expected n_ctx=0"):
        fastprompt.attach(clip(), DPL(), tower="vision")
    with pytest.raises(ValueError, match="config: DPL is for vision towers, but this tower is text"):
        fastprompt.attach(clip(), DPL(n_ctx=0), tower="text")
    CLIPClassifier(clip(MIDDLE), tokenizer(), NAMES, DPL(n_ctx=0, depth=1)).save(tmp_path)
    with pytest.raises(fastprompt.CheckpointError, match=r"method: got 'DPL'.*CLIPClassifier.load"):
        fastprompt.load(clip(MIDDLE), tmp_path)


def test_a_mask_is_not_dropped():
    with fastprompt.attach(clip(), DPL(n_ctx=0), tower="vision") as handle:
        hidden, mask = torch.randn(1, 5, 32), torch.ones(1, 1, 5, 5, dtype=torch.bool)
        with pytest.raises(fastprompt.UnsupportedModelError, match="masks keys, which decoupled prompts do not take"):
            handle.tower.layers[0](hidden, mask)


# Language
