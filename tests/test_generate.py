# SPDX-License-Identifier: Apache-2.0
"""A whole tiny pipeline over several steps, with diffusers' processors and with ours, and the command line."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from tiny_unets import IMAGE, UNETS, adapter_state, linear_calls, tiny_pipeline
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import fastprompt
from fastprompt.cli import main
from fastprompt.diffusers import DecoupledAttnProcessor, accelerate, attach, generate, load_ip_adapter, load_pipeline
from fastprompt.errors import AttachError

STEPS = 4


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8))


def latents(pipeline, **options):
    """The latents of two pictures."""
    given = {"prompt": "a cat", "num_inference_steps": STEPS, "num_images_per_prompt": 2, "output_type": "latent"}
    return pipeline(**given | options, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module", params=UNETS)
def pipeline(request):
    torch.manual_seed(3)
    made = tiny_pipeline(request.param)
    made.unet._load_ip_adapter_weights([adapter_state(made.unet)], low_cpu_mem_usage=False)
    return made


def calls_of(pipeline, which, calls):
    return {calls[m] for n, m in pipeline.unet.named_modules() if which in n and isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_a_pipeline_gives_what_it_gave_with_constant_projections_once(pipeline, guidance):
    embeds = [torch.randn(2 if guidance > 1 else 1, 3, IMAGE)]
    options = {"guidance_scale": guidance, "ip_adapter_image_embeds": embeds}
    with linear_calls() as calls:
        want = latents(pipeline, **options)
    constant = ("attn2.to_k", "attn2.to_v", "to_k_ip", "to_v_ip", "hid_proj")
    assert all(calls_of(pipeline, which, calls) == {STEPS} for which in constant)
    other = latents(pipeline, **options | {"ip_adapter_image_embeds": [-embeds[0]]})
    assert (other - want).abs().max() > 1e-2
    with accelerate(pipeline.unet):
        for prompt, expected in (("a cat", want), ("a dog", None), ("a cat", want)):
            with linear_calls() as calls:
                got = latents(pipeline, prompt=prompt, **options)
            assert all(calls_of(pipeline, which, calls) == {1} for which in constant)
            assert calls_of(pipeline, "attn2.to_q", calls) == {STEPS}
            if expected is not None:
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
            kept = [p.constants for p in pipeline.unet.attn_processors.values() if hasattr(p, "constants")]
            assert len(kept) >= 4 and not any(map(len, kept)), "freed with the tokens of the generation"


def test_masks_scales_and_several_images_in_a_pipeline(pipeline):
    masks = [torch.zeros(1, 2, 128, 128)]
    masks[0][:, 0, :, :64] = masks[0][:, 1, :, 64:] = 1
    options = {
        "ip_adapter_image_embeds": [torch.randn(2, 2, IMAGE)],
        "cross_attention_kwargs": {"ip_adapter_masks": masks},
    }
    pipeline.set_ip_adapter_scale([[0.7, 0.2]])
    want = latents(pipeline, **options)
    with accelerate(pipeline.unet):
        torch.testing.assert_close(latents(pipeline, **options), want, rtol=1e-3, atol=1e-4)
        pipeline.set_ip_adapter_scale([[0.1, 1.2]])
        changed = latents(pipeline, **options)
        wide = options | {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 2, 64, 128)]}}
        with pytest.raises(ValueError, match=r"got 64 x 128 .* queries here, which no grid of that aspect ratio gives"):
            latents(pipeline, **wide)
    assert (changed - want).abs().max() > 1e-3
    torch.testing.assert_close(latents(pipeline, **options), changed, rtol=1e-3, atol=1e-4)
    pipeline.set_ip_adapter_scale(1.0)


def test_diffusers_unloads_what_was_accelerated():
    made = tiny_pipeline()
    want = latents(made)
    made.unet._load_ip_adapter_weights([adapter_state(made.unet)], low_cpu_mem_usage=False)
    accelerate(made.unet)
    made.unload_ip_adapter()
    assert not any(isinstance(p, DecoupledAttnProcessor) for p in made.unet.attn_processors.values())
    assert torch.equal(latents(made), want)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a pipeline, a published adapter, a trained one, and a picture."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("saved")
    made = tiny_pipeline()
    made.save_pretrained(folder / "pipeline")
    state = adapter_state(made.unet)
    tensors = {f"{part}.{n}": x for part, found in state.items() for n, x in found.items()}
    save_file(tensors, folder / "adapter.safetensors")
    with attach(made.unet, fastprompt.IPAdapter(num_tokens=3, image_width=IMAGE, scale=0.4)) as handle:
        handle.save(folder / "trained")
    picture(0).save(folder / "image.png")
    return folder


def arguments(saved, out, *extra, adapter="adapter.safetensors"):
    return [
        "generate", "a cat", "--pipeline", str(saved / "pipeline"), "--adapter", str(saved / adapter),
        "--image", str(saved / "image.png"), "--steps", "2", "--size", "64", "--out", str(out), *extra,
    ]  # fmt: skip


def test_generate_from_the_command_line(saved, tmp_path, capsys):
    first, again, other = (tmp_path / name / "a.png" for name in "123")
    assert main(arguments(saved, first)) == 0 and main(arguments(saved, again)) == 0
    assert main(arguments(saved, other, "--scale", "0.5", "--seed", "1", "--size", "64", "96")) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == [str(path) for path in (first, again, other)] and "generate" in printed.err
    pixels = [np.asarray(Image.open(path)) for path in (first, again, other)]
    assert [p.shape for p in pixels] == [(64, 64, 3), (64, 64, 3), (64, 96, 3)]
    assert (pixels[0] == pixels[1]).all() and pixels[0].std() > 0
    pipe = load_pipeline(saved / "pipeline")
    with pytest.raises(AttachError, match="its UNet has no image adapter of ours"):
        generate(pipe, "a cat", [picture(0)])
    load_ip_adapter(pipe.unet, saved / "adapter.safetensors")
    (same,) = generate(pipe, "a cat", [picture(0)], steps=2, size=(64, 64))
    assert (np.asarray(same) == pixels[0]).all()


def test_generate_with_a_trained_adapter_makes_several(saved, tmp_path):
    encoder = CLIPVisionModelWithProjection.from_pretrained(saved / "pipeline" / "image_encoder")
    encoder.save_pretrained(tmp_path / "encoder")
    extra = ["--count", "2", "--image-encoder", str(tmp_path / "encoder"), "--dtype", "bfloat16"]
    assert main(arguments(saved, tmp_path / "a.png", *extra, adapter="trained")) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"a-1.png", "a-2.png"}


def test_generate_gives_what_diffusers_gives(saved):
    plain = StableDiffusionPipeline.from_pretrained(saved / "pipeline", local_files_only=True)
    plain.load_ip_adapter(str(saved), subfolder="", weight_name="adapter.safetensors", local_files_only=True)
    plain.set_ip_adapter_scale(0.8)
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "ip_adapter_image": [[picture(1), picture(2)]]}
    want = plain("a cat", **options, generator=torch.Generator().manual_seed(0)).images[0]
    ours = load_pipeline(saved / "pipeline")
    load_ip_adapter(ours.unet, saved / "adapter.safetensors")
    (got,) = generate(ours, "a cat", [picture(1), picture(2)], scale=0.8, steps=3, size=(64, 64))
    assert np.abs(np.asarray(got).astype(int) - np.asarray(want)).max() <= 1


def test_errors_of_the_command_line(saved, tmp_path, capsys):
    wrong = tmp_path / "wrong.safetensors"
    save_file({"x": torch.zeros(1)}, wrong)
    (tmp_path / "text.png").write_text("no picture")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    narrow = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=8)
    CLIPVisionModelWithProjection(narrow).save_pretrained(tmp_path / "narrow")
    out = tmp_path / "a.png"
    for extra, match in (
        (["--steps", "0"], "--steps: got 0, expected at least 1"),
        (["--size", "63"], "--size: got 63, expected one or two positive multiples of 8"),
        (["--scale", "nan"], "--scale: got nan"),
        (["--out", str(tmp_path / "a.jpg")], "expected a name that ends with .png"),
        (["--image", str(tmp_path / "text.png")], "--image: cannot read"),
        (["--pipeline", str(tmp_path)], "expected a folder that pipeline.save_pretrained wrote"),
        (["--adapter", str(wrong)], "expected the parts image_proj and ip_adapter"),
        (["--image-encoder", str(tmp_path / "narrow")], "embeddings of width 8, but the adapter reads width 20"),
    ):
        assert main(arguments(saved, out, *extra)) == 1
        assert match in capsys.readouterr().err
    assert not out.exists()


def test_a_pipeline_without_image_encoder_says_so(saved, tmp_path):
    made = tiny_pipeline()
    made.register_modules(image_encoder=None, feature_extractor=None)
    made.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="image_encoder: the pipeline's folder holds none"):
        load_pipeline(tmp_path / "pipeline")
    pipe = load_pipeline(tmp_path / "pipeline", image_encoder=saved / "pipeline" / "image_encoder")
    assert pipe.feature_extractor.crop_size["height"] == 16
