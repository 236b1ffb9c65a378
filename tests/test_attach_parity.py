# SPDX-License-Identifier: Apache-2.0
"""Attached prompts against the published form: prompts inserted as tokens, every row computed."""

import copy

import pytest
import torch
from tiny_models import (
    DEPTHS,
    FAMILIES,
    LENGTH,
    WIDTH,
    assert_as_good,
    assert_close,
    attach_prompts,
    build,
    inputs,
    insert_prompts,
    loss_of,
    outputs,
    prompt_values,
    step,
)

from fastprompt import VPT, attach

# Its query and key norms compute in float32 whatever the model's dtype.
FLOAT32_INSIDE = "InternVLVision, qk norm"


def by_hand(model, prompts, pixels, mask=None):
    """A ViT's layers in a loop: [class, prompt, patches] into every prompted layer, prompts cut off at the end.

    ``mask`` [B,17] tells the class token and the patches that all may see; everything sees the prompts.
    """
    hidden = model.embeddings(pixels)
    carried = 0
    for i, layer in enumerate(model.layers):
        if i in prompts:
            rows = torch.stack([prompts[i]] * len(pixels))
            hidden = torch.cat([hidden[:, :1], rows, hidden[:, 1 + carried :]], dim=1)
            carried = LENGTH
        seen = None
        if mask is not None:
            seen = torch.cat([mask[:, :1], torch.ones(len(pixels), carried), mask[:, 1:]], dim=1).bool()
            seen = seen[:, None, None].expand(-1, 1, hidden.shape[1], -1)
        hidden = layer(hidden, seen)
    hidden = model.layernorm(torch.cat([hidden[:, :1], hidden[:, 1 + carried :]], dim=1))
    return {"last_hidden_state": hidden, "pooler_output": model.pooler(hidden)}


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_published_form_is_a_loop_over_layers(depth):
    model = build("ViT", torch.float64)
    inserted = insert_prompts(model, depth)
    got = step(model, inserted.parameters())
    inserted.detach()
    prompts = {i: p.double().requires_grad_() for i, p in prompt_values(DEPTHS[depth][1]).items()}
    want = by_hand(model, prompts, inputs(model)["pixel_values"])
    gradients = torch.autograd.grad(loss_of(want), list(prompts.values()))
    assert_close(got, want | {f"gradient {i}": g for i, g in enumerate(gradients)})


def both(name, depth, dtype):
    """The attached model and the published form of one model: outputs and gradients of all that is trained."""
    family = FAMILIES[name]
    model = build(name, dtype)
    copied = copy.deepcopy(model)
    handle = attach_prompts(model, depth, tower=family.tower, train=family.train)
    inserted = insert_prompts(copied, depth, at=family.at, tower=family.tower)
    head = [p for n, p in copied.named_parameters() if n.split(".")[0] in family.train]
    for p in head:
        p.requires_grad_(True)
    assert len(list(handle.parameters())) == len(DEPTHS[depth][1]) + len(head)
    return step(model, handle.parameters()), step(copied, [*inserted.parameters(), *head])


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != FLOAT32_INSIDE])
def test_attached_is_published(name, depth):
    attached, published = both(name, depth, torch.float64)
    plain = outputs(build(name, torch.float64))
    for key, x in plain.items():
        assert attached[key].shape == x.shape
    assert any((attached[key] - x).abs().max() > 0.01 * x.abs().max() for key, x in plain.items()), "prompts matter"
    for i in range(len(DEPTHS[depth][1])):
        assert attached[f"gradient {i}"].abs().max() > 0.01
    assert_close(attached, published)


@pytest.mark.parametrize("depth", ["deep", "a gap"])
@pytest.mark.parametrize("name", FAMILIES)
def test_attached_is_as_good_as_published_in_float32(name, depth):
    attached, published = both(name, depth, torch.float32)
    _, truth = both(name, depth, torch.float64)
    assert_as_good(attached, published, truth, 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("pattern", ["layers.*", "layers.2", "layers.0.attention.k_proj.weight"])
def test_base_weights_get_the_published_gradient_too(pattern):
    model = build("ViT", torch.float64)
    copied = copy.deepcopy(model)
    handle = attach_prompts(model, "a gap", train=(pattern,))
    inserted = insert_prompts(copied, "a gap")
    names = [n.removeprefix("base.") for n, _ in handle.named_parameters() if n.startswith("base.")]
    trained = [copied.get_parameter(n).requires_grad_(True) for n in names]
    assert names and all(n.startswith(pattern.removesuffix("*")) for n in names)
    attached = step(model, handle.parameters())
    published = step(copied, [*inserted.parameters(), *trained])
    for i, name in enumerate(names, len(DEPTHS["a gap"][1])):
        # A key bias shifts the scores of a row alike: its gradient is zero up to rounding.
        if name.endswith("k_proj.bias"):
            assert attached.pop(f"gradient {i}").abs().max() < 1e-12 > published.pop(f"gradient {i}").abs().max()
    assert_close(attached, published)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("depth", ["deep", "first two"])
def test_any_batch_size_and_image_size(batch, depth):
    model = build("ViT", torch.float64)
    copied = copy.deepcopy(model)
    images = torch.randn(batch, 3, 48, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    given = {"pixel_values": images, "interpolate_pos_encoding": True}
    attached = step(model, attach_prompts(model, depth).parameters(), given)
    assert attached["last_hidden_state"].shape == (batch, 1 + 6 * 5, 32)
    assert_close(attached, step(copied, insert_prompts(copied, depth).parameters(), given))


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_mask_hides_tokens_and_never_prompts(depth):
    model = build("ViT", torch.float64)
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[1, 9:] = 0
    prompts = {i: p.double().requires_grad_() for i, p in prompt_values(DEPTHS[depth][1]).items()}
    want = by_hand(model, prompts, inputs(model)["pixel_values"], mask)
    gradients = torch.autograd.grad(loss_of(want), list(prompts.values()))
    handle = attach_prompts(model, depth)
    got = step(model, handle.parameters(), inputs(model) | {"attention_mask": mask})
    assert_close(got, {k: x.detach() for k, x in want.items()} | {f"gradient {i}": g for i, g in enumerate(gradients)})
    assert (got["last_hidden_state"][1] - outputs(model)["last_hidden_state"][1]).abs().max() > 0.01


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("queries", [1, 17])
def test_a_mask_by_name_and_of_any_kind(additive, queries):
    model = build("ViT", torch.float64)
    attach_prompts(model, "shallow")
    hidden = torch.randn(2, 17 + LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 1, queries, 17, dtype=torch.bool)
    mask[1, :, :, 9:] = False
    seen = torch.cat([torch.ones(2, 1, 1, LENGTH, dtype=torch.bool), mask[:, :, :1]], dim=-1)
    seen = seen.expand(-1, -1, 17 + LENGTH, -1)
    plain = build("ViT", torch.float64).layers[1]
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    assert_close({"": model.layers[1](hidden, attention_mask=mask)}, {"": plain(hidden, attention_mask=seen)})


def test_prompts_start_as_published():
    torch.manual_seed(0)
    handle = attach(build(), VPT(length=400))
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    for p in handle.parameters():
        assert 0.98 * bound < p.max() <= bound and -bound <= p.min() < -0.98 * bound
        assert abs(p.mean()) < 0.02 * bound
    handle.detach()
    handle = attach(build(), VPT(length=400, init="normal"))
    assert all(abs(p.std() - 0.02) < 0.001 for p in handle.parameters())
    handle.detach()
    handle = attach(build(), VPT(length=2, init="zeros"))
    assert not any(p.any() for p in handle.parameters())


def test_the_vpt_start_needs_a_patch_size():
    model = build()
    vars(model.config)["patch_size"] = None
    with pytest.raises(ValueError, match="init: 'vpt' needs the patch size"):
        attach(model, VPT(length=2))
    attach(model, VPT(length=2, init="normal"))
