# SPDX-License-Identifier: Apache-2.0
"""IP-Adapters of whole UNets: training, saving and published files."""

import copy
import json
from collections import Counter

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.modeling_utils import no_init_weights
from safetensors.torch import save_file
from tiny_unets import IMAGE, TEXT, UNETS, adapter_state, inputs, noise, tiny_unet
from torch import nn

import fastprompt
from bench.cases.ipadapter import SHAPES
from fastprompt.diffusers import DecoupledAttnProcessor, ImageProjections, accelerate, attach, load_ip_adapter
from fastprompt.errors import AttachError, CheckpointError
from fastprompt.recipes.ip_adapter import CARD

RECIPE = fastprompt.IPAdapter(image_width=IMAGE, scale=0.7)
KINDS = pytest.mark.parametrize("kind", UNETS)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_training_moves_the_adapter_alone(kind, dtype, batch):
    unet = tiny_unet(kind, dtype)
    unet.conv_in.requires_grad_(False)
    given = inputs(unet, batch)
    before, flags = copy.deepcopy(unet.state_dict()), [p.requires_grad for p in unet.parameters()]
    processors = dict(unet.attn_processors)
    plain = given | {"added_cond_kwargs": {k: v for k, v in given["added_cond_kwargs"].items() if k != "image_embeds"}}
    want = noise(unet, plain)
    handle = attach(unet, RECIPE)
    names = [name for name, _ in handle.named_parameters()]
    assert len(names) == len(set(names)) == 4 + 2 * len(handle.sites)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    assert handle.num_trainable == sum(p.numel() for p in unet.parameters() if p.requires_grad)
    start = [p.detach().clone() for p in handle.parameters()]
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    for _ in range(3):
        loss = noise(unet, given).float().square().mean()
        loss.backward()
        assert loss.isfinite() and all(p.grad.abs().max() > 0 for p in handle.parameters())
        assert all(p.grad is None for n, p in unet.named_parameters() if "_ip" not in n and "encoder_hid_proj" not in n)
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(a, b) for a, b in zip(start, handle.parameters(), strict=True))
    handle.detach()
    assert "detached" in repr(handle) and unet.attn_processors == processors and unet.encoder_hid_proj is None
    after = unet.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], x) for n, x in before.items())
    assert [p.requires_grad for p in unet.parameters()] == flags and unet.config.encoder_hid_dim_type is None
    assert torch.equal(noise(unet, plain), want)
    with pytest.raises(AttachError, match="already detached"):
        handle.detach()


def test_checkpointed_layers_learn_the_same():
    unet, grads = tiny_unet(), []
    unet.train()
    given = inputs(unet)
    with attach(unet, RECIPE) as handle:
        for switch in (unet.disable_gradient_checkpointing, unet.enable_gradient_checkpointing):
            switch()
            grads.append(torch.autograd.grad(noise(unet, given).square().mean(), list(handle.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@KINDS
def test_scale_zero_is_the_unet_without_adapter(kind):
    assert CARD.identity == {"scale": 0.0}
    for dtype in (torch.float32, torch.bfloat16):
        unet = tiny_unet(kind, dtype)
        given = inputs(unet, 3)
        added = {k: v for k, v in given["added_cond_kwargs"].items() if k != "image_embeds"}
        with torch.no_grad():
            want = noise(unet, given | {"added_cond_kwargs": added})
            with attach(unet, fastprompt.IPAdapter(image_width=IMAGE, **CARD.identity)):
                assert torch.equal(noise(unet, given), want)
            with attach(unet, fastprompt.IPAdapter(image_width=IMAGE, scale=1e-3)):
                assert not torch.equal(noise(unet, given), want)


def test_a_new_adapter_starts_from_the_frozen_projections():
    unet = tiny_unet()
    with attach(unet, RECIPE) as handle:
        for site, own in zip(handle.sites, handle._processors, strict=True):
            assert torch.equal(own.to_k_ip[0].weight, site.attention.to_k.weight)
            assert torch.equal(own.to_v_ip[0].weight, site.attention.to_v.weight)
            own.to_k_ip[0].weight.data.zero_()
            assert site.attention.to_k.weight.any()


@KINDS
@pytest.mark.parametrize("tokens", [1, 4, 6])
def test_saved_adapters_come_back(kind, tokens, tmp_path):
    unet = tiny_unet(kind)
    given = inputs(unet)
    base = copy.deepcopy(unet)
    handle = attach(unet, fastprompt.IPAdapter(num_tokens=tokens, image_width=IMAGE, scale=0.3))
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.1 * torch.randn_like(p))
        want = noise(unet, given)
        handle.save(tmp_path)
        with fastprompt.load(base, tmp_path) as loaded:
            assert loaded.config == handle.config
            assert torch.equal(noise(base, given), want)
        with fastprompt.load(base.bfloat16(), tmp_path):
            pass
    with pytest.raises(CheckpointError, match=r"the key projection of layer . holds"):
        fastprompt.load(tiny_unet(kind), tmp_path)
    other = tiny_unet("sdxl" if kind == "sd15" else "sd15")
    with pytest.raises(CheckpointError, match=r"got layers .*; the prompts belong to another base model"):
        fastprompt.load(other, tmp_path)
    assert other.encoder_hid_proj is None
    with pytest.raises(CheckpointError, match="does not fit Linear"):
        fastprompt.load(nn.Linear(2, 2), tmp_path)


@KINDS
def test_an_exported_adapter_is_a_published_file(kind, tmp_path):
    unet = tiny_unet(kind)
    base, given, file = copy.deepcopy(unet), inputs(unet), tmp_path / "ip_adapter.safetensors"
    handle = attach(unet, RECIPE)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.1 * torch.randn_like(p))
        want = noise(unet, given)
        handle.export(file)
        with load_ip_adapter(base, file):
            for processor in base.attn_processors.values():
                if isinstance(processor, DecoupledAttnProcessor):
                    processor.scale[0] = RECIPE.scale
            torch.testing.assert_close(noise(base, given), want, rtol=1e-5, atol=1e-6)
    with attach(base, fastprompt.IPAdapter(num_tokens=3, image_width=IMAGE)) as other:
        with pytest.raises(ValueError, match="num_tokens: got 3, expected 4 for the public layout"):
            other.export(file)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", None])
@KINDS
def test_published_files_load(kind, suffix, tmp_path):
    unet = tiny_unet(kind)
    base, processors = copy.deepcopy(unet), dict(unet.attn_processors)
    state, file = adapter_state(unet, "plus"), tmp_path / f"adapter{suffix}"
    if suffix == ".bin":
        torch.save(state, file)
    elif suffix:
        save_file({f"{part}.{n}": x.contiguous() for part, found in state.items() for n, x in found.items()}, file)
    given = inputs(unet, plus=True)
    base._load_ip_adapter_weights([copy.deepcopy(state)], low_cpu_mem_usage=False)
    with torch.no_grad():
        with load_ip_adapter(unet, file if suffix else state):
            assert isinstance(unet.encoder_hid_proj, ImageProjections)
            torch.testing.assert_close(noise(unet, given), noise(base, given), rtol=1e-4, atol=1e-5)
    assert unet.encoder_hid_proj is None and unet.attn_processors == processors
    assert unet.config.encoder_hid_dim_type is None


def test_bad_files_are_refused_and_leave_the_unet_alone(tmp_path):
    unet, other = tiny_unet("sd15"), tiny_unet("sdxl")
    wide = UNet2DConditionModel(**UNETS["sd15"] | {"cross_attention_dim": 2 * TEXT})
    state = adapter_state(unet)
    broken, pickled, empty = (tmp_path / name for name in ("a.safetensors", "b.bin", "c.safetensors"))
    broken.write_bytes(b"\x10" * 40)
    pickled.write_bytes(b"not a pickle")
    save_file({"x": torch.zeros(1)}, empty)
    fewer = {**state, "ip_adapter": {k: v for k, v in state["ip_adapter"].items() if not k.startswith("1.")}}
    lora = {**state, "ip_adapter": state["ip_adapter"] | {"0.to_k_lora.down.weight": torch.zeros(2, 2)}}
    for base, given, match in (
        (wide, state, "adapter reads text of width 24, this UNet of width 48; it belongs to another base model"),
        (other, state, "belongs to another base model"),
        (unet, fewer, "got weights for 3 layers, expected 4, numbered 1, 3, ... 7"),
        (unet, lora, "FaceID.*pipeline.load_ip_adapter"),
        (unet, {"weights": {}}, "got weights, expected the parts image_proj and ip_adapter"),
        (unet, broken, "a.safetensors: cannot be read"),
        (unet, pickled, "b.bin: cannot be read"),
        (unet, empty, "expected the parts image_proj and ip_adapter"),
        (unet, tmp_path / "none.bin", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=match):
            load_ip_adapter(base, given)
        assert base.encoder_hid_proj is None
        assert all(type(p) is AttnProcessor2_0 for p in base.attn_processors.values())
    with pytest.raises(ValueError, match="files: got none"):
        load_ip_adapter(unet, [])
    with pytest.raises(TypeError, match="unet: got Linear"):
        load_ip_adapter(nn.Linear(2, 2), state)


def test_only_one_adapter_is_attached_at_a_time():
    unet = tiny_unet()
    state = adapter_state(unet)
    with attach(unet, RECIPE):
        for again in (lambda: attach(unet, RECIPE), lambda: load_ip_adapter(unet, state)):
            with pytest.raises(AttachError, match="already has encoder_hid_proj"):
                again()
        with pytest.raises(AttachError, match="already fastprompt's"):
            accelerate(unet)
    with accelerate(unet), pytest.raises(AttachError, match="is a module already"):
        attach(unet, RECIPE)
    with pytest.raises(TypeError, match=r"config: got APT\(length=3.*, expected a recipe for UNets"):
        attach(tiny_unet(), fastprompt.APT(length=3))
    with pytest.raises(TypeError, match="config: got <class"):
        attach(unet, fastprompt.IPAdapter)
    with pytest.raises(TypeError, match="unet: got Linear"):
        attach(nn.Linear(2, 2), RECIPE)


def test_options_of_the_recipe_are_checked(tmp_path):
    for options, match in (
        ({"num_tokens": 0}, "num_tokens: got 0"), ({"image_width": 2.5}, "image_width: got 2.5"),
        ({"scale": float("nan")}, "scale: got nan"), ({"scale": "1"}, "scale: got '1'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            fastprompt.IPAdapter(**options)
    with attach(tiny_unet(), RECIPE) as handle:
        handle.save(tmp_path)
    content = json.loads((tmp_path / "prompt_config.json").read_text())
    assert content["method"] == "IPAdapter" and content["config"]["image_width"] == IMAGE


def test_the_paper_s_count_of_parameters_and_the_layers_that_are_measured():
    """Keys and values of SD 1.5's 16 layers and the projection: the advertised 22 M; and SDXL's 70 layers."""
    xl = {
        "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
    }  # fmt: skip
    for kind, config, million in (("sd15", {}, 22), ("sdxl", xl, None)):
        blocks, _, width, _, _ = SHAPES[kind]
        # Not `torch.device("meta")`, which does not know the functions that the tests' poison puts in torch's place.
        with no_init_weights(), init_empty_weights():
            unet = UNet2DConditionModel(**config, cross_attention_dim=width)
            handle = attach(unet, fastprompt.IPAdapter())
        assert Counter(site.shape for site in handle.sites) == {
            (c, width): sum(n for n, _, other in blocks if other == c) for _, _, c in blocks
        }
        assert million is None or round(handle.num_trainable / 1e6) == million
