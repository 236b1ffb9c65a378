# SPDX-License-Identifier: Apache-2.0
"""MULTI-LANE on a DINOv2: logits of all tasks (``mode=all``), or a training step of the newest (``mode=step``).

Providers: `released` runs every row of every lane, tasks as one batch axis; `loop` is fastprompt, one task after the
other beside one frozen stream; `fastprompt` runs lanes in the default blocks, which keep older logits bit for bit, and
`fastprompt/batch` all of them at once; `stream` is the frozen model alone, the floor of them all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import Dinov2Config, Dinov2Model

import fastprompt
from bench.case import Case, Provider, Step

MODES = ("all", "step")


def build(
    device: str, tasks: int = 4, batch: int = 16, layers: int = 12, width: int = 384, pixels: int = 224,
    summaries: int = 20, length: int = 20, classes: int = 10, mode: str = "all",
    dtype: str = "bfloat16",
) -> Case:  # fmt: skip
    """The case; ``layers``, ``width`` and ``pixels`` make a quick version."""
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype: got {dtype!r}, expected bfloat16 (autocast) or float32")
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=width, num_attention_heads=width // 64, num_hidden_layers=layers, patch_size=14, image_size=pixels
    )
    recipe = fastprompt.MultiLane(summaries, length, layers=range(min(5, layers)))
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    models = {block: Dinov2Model(config).to(device) for block in (1, 4, None)}
    for model in models.values():
        model.load_state_dict(models[4].state_dict())
    pathways = {block: fastprompt.TaskPathways(model, recipe, block=block) for block, model in models.items()}
    for found in pathways.values():
        for _ in range(tasks):
            found.grow(classes)
    for found in pathways.values():
        found.load_state_dict(pathways[4].state_dict())

    def step(block: int | None, autocast: bool = dtype == "bfloat16", released: bool = False) -> Step:
        own = pathways[block]
        lanes = list(own.lanes) if mode == "all" else [own.lanes[-1]]

        def logits() -> Tensor:
            if released:
                features = _released(models[block], lanes, images, recipe)
                return torch.cat([lane.head(x) for lane, x in zip(lanes, features, strict=True)], dim=-1)
            return own(images, task=None if mode == "all" else -1).logits

        def run() -> list[Tensor]:
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                if mode == "all":
                    with torch.no_grad():
                        return [logits()]
                out = logits()
                loss = torch.nn.functional.cross_entropy(out.float(), labels)
            return [out.detach(), *torch.autograd.grad(loss, list(lanes[0].parameters()))]

        return run

    def stream() -> Step:
        def run() -> list[Tensor]:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                return [models[4](pixel_values=images).last_hidden_state]

        return run

    def provider(block: int | None, released: bool = False) -> Provider:
        return Provider(lambda: step(block, released=released), lambda: step(block, False, released)())

    providers = {"released": provider(4, released=True), "loop": provider(1), "fastprompt": provider(4),
                 "fastprompt/batch": provider(None), "stream": Provider(stream)}  # fmt: skip
    computed = "bfloat16 autocast" if dtype == "bfloat16" else dtype
    params = {"model": f"DINOv2 {width}", "tasks": tasks, "batch": batch, "layers": layers, "pixels": pixels,
              "summaries": summaries, "length": length, "mode": mode, "dtype": computed}  # fmt: skip
    return Case("multilane", providers, "released", lambda: step(4, False, True)(), 1e-4, params)


def _released(model: Dinov2Model, lanes: list, images: Tensor, recipe: fastprompt.MultiLane) -> Tensor:
    """Unit features ``[T,B,C]``: class token and selectors of every lane run as rows through every layer."""
    tasks, batch, heads = len(lanes), len(images), model.config.num_attention_heads
    with torch.no_grad():
        hidden = model.embeddings(images)
    selectors = torch.stack([lane.selectors for lane in lanes])
    rows = torch.cat([hidden[:, :1].expand(tasks, -1, -1, -1), selectors[:, None].expand(-1, batch, -1, -1)], dim=2)
    layers = list(recipe.layers or ())
    for i, layer in enumerate(model.encoder.layer):
        with torch.no_grad():
            x = layer.norm1(hidden)
            hidden = layer(hidden)
        normed = layer.norm1(rows)
        weights = (torch.einsum("tbsc,bnc->tbsn", normed[:, :, 1:], x) * x.shape[-1] ** -0.5).softmax(-1)
        drawn = torch.einsum("tbsn,bnc->tbsc", weights, x.to(weights.dtype))
        read = torch.cat([normed[:, :, :1], drawn.to(normed.dtype)], dim=2).flatten(0, 1)
        # Their names differ between versions of transformers, their order does not.
        *projections, project_out = (m for m in layer.attention.modules() if isinstance(m, torch.nn.Linear))
        q, k, v = (p(read).unflatten(-1, (heads, -1)).transpose(1, 2) for p in projections)
        if i in layers:
            at = layers.index(i)
            pairs = ((torch.stack([getattr(lane, name)[at] for lane in lanes]), t) for name, t in
                     (("keys", k), ("values", v)))  # fmt: skip
            k, v = (torch.cat([p.repeat_interleave(batch, dim=0).to(t.dtype), t], dim=2) for p, t in pairs)
        out = project_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out = torch.cat([out.unflatten(0, (tasks, batch))[:, :, :1], normed[:, :, 1:].to(out.dtype)], dim=2)
        rows = rows + layer.layer_scale1(out)
        rows = rows + layer.layer_scale2(layer.mlp(layer.norm2(rows)))
    return normalize(model.layernorm(rows[:, :, 0]).float(), dim=-1)
