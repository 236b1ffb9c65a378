# SPDX-License-Identifier: Apache-2.0
"""Accelerated UNets against diffusers' own: noise, gradients, and how often projections run."""

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
)
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from peft import LoraConfig
from tiny_unets import IMAGE, TEXT, UNETS, adapter_state, inputs, linear_calls, noise, published, tiny_unet
from torch import nn

import fastprompt
from fastprompt.diffusers import DecoupledAttnProcessor, ImageProjections, accelerate
from fastprompt.errors import AttachError, UnsupportedModelError

RECIPE = fastprompt.IPAdapter(image_width=IMAGE, scale=0.7)
KINDS = pytest.mark.parametrize("kind", UNETS)


@KINDS
@pytest.mark.parametrize(("adapters", "images"), [(("plain",), (1,)), (("plain", "plain"), (2, 1))])
def test_an_accelerated_unet_gives_what_diffusers_gives(kind, adapters, images):
    unet = published(kind, *adapters)
    given = inputs(unet, images=images)
    before = dict(unet.attn_processors)
    names, want = list(unet.state_dict()), noise(unet, given)
    with accelerate(unet) as fast:
        assert fast.layers == sum(isinstance(p, DecoupledAttnProcessor) for p in unet.attn_processors.values())
        assert fast.layers == sum(name.endswith("attn2.processor") for name in before)
        assert list(unet.state_dict()) == names
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(noise(unet, given), want, rtol=1e-9, atol=1e-10)
    assert unet.attn_processors == before and torch.equal(noise(unet, given), want)


def test_processors_of_xformers_are_replaced_and_those_of_others_are_not():
    unet = published("sd15", "plain")
    given = inputs(unet)
    want = noise(unet, given)

    class Own(IPAdapterAttnProcessor2_0):
        pass

    for kind, stays in ((IPAdapterXFormersAttnProcessor, False), (Own, True)):
        for attn in (m for m in unet.modules() if isinstance(m, Attention) and isinstance(m.processor, nn.Module)):
            other = kind(attn.processor.hidden_size, TEXT, (4,), 1.0).double()
            other.load_state_dict(attn.processor.state_dict())
            attn.set_processor(other)
        if stays:
            with pytest.raises(UnsupportedModelError, match="got cross-attention processors Own, expected"):
                accelerate(unet)
        else:
            with accelerate(unet):
                torch.testing.assert_close(noise(unet, given), want, rtol=1e-9, atol=1e-10)


@KINDS
def test_gradients_are_those_of_diffusers(kind):
    unet = published(kind, "plain", "plus")
    given = inputs(unet, images=(1,), plus=True)
    given["added_cond_kwargs"]["image_embeds"].insert(0, torch.randn(2, 2, IMAGE).double())
    for processor in unet.attn_processors.values():
        if isinstance(processor, IPAdapterAttnProcessor2_0):
            processor.scale[:] = [0.6, 1.3]

    def grads():
        leaves = [given["sample"], given["encoder_hidden_states"], *given["added_cond_kwargs"]["image_embeds"]]
        weights = [p for n, p in unet.named_parameters() if "_ip" in n or "hid_proj" in n or "attn2.to_k" in n]
        out = noise(unet, given)
        learned = [x.requires_grad_() for x in leaves]
        return torch.autograd.grad(noise(unet, given).square().mean(), [*learned, *weights]), out

    want, out = grads()
    with accelerate(unet):
        got, again = grads()
    torch.testing.assert_close(again, out, rtol=1e-9, atol=1e-10)
    assert len(got) > 30
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@KINDS
def test_projections_run_once_for_constant_tokens(kind):
    unet = published(kind, "plus", dtype=torch.float32)
    given = inputs(unet, plus=True)
    steps = 3

    def count():
        with torch.no_grad(), linear_calls() as calls:
            for i in range(steps):
                noise(unet, given | {"timestep": torch.tensor(300 - i)})
        names = {module: name for name, module in unet.named_modules()}
        kinds: Counter = Counter()
        for module, number in calls.items():
            name = names[module]
            for which in ("attn2.to_k", "attn2.to_v", "to_k_ip", "to_v_ip", "attn2.to_q", "encoder_hid_proj"):
                kinds[which] += number * (which in name)
        return kinds

    before = count()
    layers, projection = before["attn2.to_q"] // steps, before["encoder_hid_proj"] // steps
    constant = ("attn2.to_k", "attn2.to_v", "to_k_ip", "to_v_ip")
    assert all(before[which] == steps * layers for which in constant)
    with accelerate(unet) as fast:
        after = count()
        assert after == before | dict.fromkeys(constant, layers) | {"encoder_hid_proj": projection}
        fast.clear()
        assert count() == after


def test_low_rank_adapters_may_change_their_scale_between_steps():
    """Their scale is a number that no tensor shows: projections of text are computed at every step, of images once."""
    unet = published("sd15", "plain", dtype=torch.float32)
    unet.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_k", "attn2.to_v"], init_lora_weights=False))
    given = inputs(unet)
    scaled = [given | {"cross_attention_kwargs": {"scale": s}} for s in (1.0, 0.2, 1.0)]
    with torch.no_grad():
        want = [noise(unet, x) for x in scaled]
        assert not torch.allclose(want[0], want[1], rtol=1e-3)
        with accelerate(unet), linear_calls() as calls:
            for x, expected in zip(scaled, want, strict=True):
                torch.testing.assert_close(noise(unet, x), expected, rtol=1e-4, atol=1e-5)
    assert {calls[m] for n, m in unet.named_modules() if n.endswith("to_k_ip.0")} == {1}
    assert {calls[m] for n, m in unet.named_modules() if n.endswith("attn2.to_k.base_layer")} == {3}


def test_projections_that_hold_more_than_weights_run_at_every_step():
    class Shortcut(nn.Linear):
        more = 0.0

        def forward(self, x):
            return (super().forward(x) + self.more)[:, None]

    plain, own = ImageProjection(IMAGE, TEXT, 4), Shortcut(IMAGE, TEXT)
    project, embeds = ImageProjections([plain, own]), [torch.randn(2, 1, IMAGE), torch.randn(1, 3, IMAGE)]
    with torch.no_grad():
        first = project(embeds)
        own.more = 1.0
        second = project(embeds)
    assert first[0] is second[0] and torch.equal(second[1], first[1] + 1)
    theirs = MultiIPAdapterImageProjection([plain, own])
    for got, want in zip(second, theirs(embeds), strict=True):
        torch.testing.assert_close(got, want)
    assert list(project.state_dict()) == list(theirs.state_dict())


def test_embeddings_of_the_whole_batch_are_projected_once():
    layer = ImageProjection(IMAGE, TEXT, 4)
    project, embeds = ImageProjections([layer]), torch.randn(1, 2, IMAGE)
    (want,) = project([embeds.repeat(3, 1, 1)])
    (got,) = project([embeds.expand(3, -1, -1)])
    torch.testing.assert_close(got, want)
    assert got.stride(0) == 0 and want.stride(0)


@pytest.mark.filterwarnings("ignore:You have passed a tensor as `image_embeds`:FutureWarning")
def test_embeddings_in_one_tensor_are_of_one_image():
    project, embeds = ImageProjections([ImageProjection(IMAGE, TEXT, 4)]), torch.randn(2, IMAGE)
    theirs = MultiIPAdapterImageProjection(project.image_projection_layers)
    assert torch.equal(project(embeds)[0], theirs(embeds)[0])


def test_plain_unets_are_accelerated_bit_for_bit():
    unet = tiny_unet()
    given = inputs(unet, images=())
    with torch.no_grad():
        want = noise(unet, given)
        with accelerate(unet) as fast, linear_calls() as calls:
            assert all(torch.equal(noise(unet, given), want) for _ in range(3))
            assert [calls[m] for n, m in unet.named_modules() if n.endswith("attn2.to_k")] == [1] * fast.layers
            with pytest.raises(AttachError, match="already fastprompt's"):
                accelerate(unet)
    without = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    with pytest.raises(UnsupportedModelError, match="got cross-attention processors none"):
        accelerate(UNet2DConditionModel(**UNETS["sd15"] | without))
    with pytest.raises(TypeError, match="unet: got Linear"):
        accelerate(nn.Linear(2, 2))


def test_detaching_leaves_alone_what_was_put_there_since():
    unet = published("sd15", "plain")
    fast = accelerate(unet)
    unet._load_ip_adapter_weights([adapter_state(unet, "plus")], low_cpu_mem_usage=False)
    new, projection = dict(unet.attn_processors), unet.encoder_hid_proj
    fast.detach()
    assert unet.attn_processors == new and unet.encoder_hid_proj is projection


def test_wrong_numbers_of_images_are_named():
    unet = published("sd15", "plain", dtype=torch.float32)
    given = inputs(unet, images=(1, 1))
    with accelerate(unet), pytest.raises(ValueError, match="image_embeds: got 2 entries, expected 1"):
        noise(unet, given)


def test_embeddings_of_another_encoder():
    unet = published("sd15", "plain", dtype=torch.float32)
    given = inputs(unet)
    given["added_cond_kwargs"]["image_embeds"] = [torch.randn(2, 1, IMAGE - 1)]
    with (
        accelerate(unet),
        pytest.raises(ValueError, match=r"image_embeds\[0\]: got shape \[2, 1, 19\], expected \[B,images,20\]"),
    ):
        noise(unet, given)
