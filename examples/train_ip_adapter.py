# SPDX-License-Identifier: Apache-2.0
"""Train an IP-Adapter in a plain loop: a tiny diffusion model of coloured pictures learns to follow an image prompt.

Everything is built here, so that it runs on a CPU in less than a minute. With a real model, load ``pipeline.unet``,
and take text and image embeddings from its encoders.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import mse_loss

import fastprompt

SIDE, TEXT, BATCH = 8, 32, 16


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, cross_attention_dim=TEXT, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def pictures(count: int) -> Tensor:
    """Two colours, left and right, ``[B,3,H,W]`` in -1..1."""
    sides = (2 * torch.rand(count, 3, 1, 2) - 1).repeat_interleave(SIDE // 2, dim=3)
    return sides.expand(-1, -1, SIDE, -1).contiguous()


def embed(images: Tensor) -> Tensor:
    """What an image encoder would say of each picture: one embedding ``[B,1,6]`` of one image."""
    return images[:, :, 0, :: SIDE // 2].flatten(1)[:, None]


def loss_of(unet: UNet2DConditionModel, noises: DDPMScheduler, images: Tensor, text: Tensor, prompts: Tensor) -> Tensor:
    """How far off the pictures are that the model finds behind much noise."""
    steps = torch.randint(600, 1000, (len(images),))
    noisy = noises.add_noise(images, torch.randn_like(images), steps)
    texts, added = text.expand(len(images), -1, -1), {"image_embeds": [prompts]}
    return mse_loss(unet(noisy, steps, texts, added_cond_kwargs=added).sample, images)


def train(parameters, lr: float, steps: int, what: str, loss) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for step in range(1, steps + 1):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 50 == 0:
            print(f"{what} step {step:4d}  loss {value.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120, help="[%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("runs/ip-adapter"), help="[%(default)s]")
    args = parser.parse_args()
    torch.manual_seed(0)
    unet, noises, text = build_unet(), DDPMScheduler(prediction_type="sample"), torch.randn(1, 4, TEXT)
    nothing = torch.zeros(BATCH, 1, 6)

    # A base model that knows pictures, and nothing of image prompts (its layers ignore what it has no adapter for).
    train(
        unet.parameters(), 2e-3, args.steps // 3, "base", lambda: loss_of(unet, noises, pictures(BATCH), text, nothing)
    )

    handle = fastprompt.diffusers.attach(unet, fastprompt.IPAdapter(num_tokens=4, image_width=6))
    print(f"{handle.num_trainable:,} parameters learn")

    def adapter_loss() -> Tensor:
        images = pictures(BATCH)
        prompts = embed(images)
        prompts[torch.rand(BATCH) < 0.05] = 0  # the unconditional image, for guidance
        return loss_of(unet, noises, images, text, prompts)

    train(handle.parameters(), 1e-2, args.steps, "adapter", adapter_loss)

    with torch.no_grad():
        images = pictures(8 * BATCH)
        for name, prompts in (("its own picture", embed(images)), ("another picture", embed(images.roll(1, 0)))):
            torch.manual_seed(1)
            print(f"loss with {name}: {loss_of(unet, noises, images, text, prompts).item():.3f}")
    handle.save(args.out)
    handle.export(args.out / "ip_adapter.safetensors")
    print(f"{args.out}: for fastprompt.load, and ip_adapter.safetensors for pipeline.load_ip_adapter")


if __name__ == "__main__":
    main()
