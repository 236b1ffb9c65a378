# SPDX-License-Identifier: Apache-2.0
"""Attach an image adapter to a diffusers UNet in place, train it, save it, and take it off without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from fastprompt.diffusers.sites import find_sites
from fastprompt.diffusers.swap import PROJECTION, Swap
from fastprompt.errors import AttachError, CheckpointError
from fastprompt.hf.checkpoint import check_tensors, compare_base, sample, write

# Public files of the base variant have this many tokens, which their readers take for granted.
PUBLIC_TOKENS = 4


def attach(unet: UNet2DConditionModel, config: Any) -> Handle:
    """Freeze a UNet and add the adapter of a recipe, in place; the UNet stays its own class.

    Text goes in as ever, image embeddings as ``added_cond_kwargs={"image_embeds": [embeds]}`` with ``embeds``
    ``[B,images,C_image]``; zeros are the unconditional image.

    Args:
        unet: ``pipeline.unet``, or any ``UNet2DConditionModel``.
        config: A recipe, e.g. ``fastprompt.IPAdapter(num_tokens=4, image_width=1024)``.

    Returns:
        A `Handle`, also a context manager that detaches.

    Raises:
        AttachError: the UNet already has image projections, or processors with weights of their own.
        UnsupportedModelError: its cross-attention layers have no plain projections.

    Example:
        >>> import torch, fastprompt
        >>> from diffusers import UNet2DConditionModel
        >>> unet = UNet2DConditionModel(
        ...     sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        ...     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=24,
        ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ... )
        >>> handle = fastprompt.diffusers.attach(unet, fastprompt.IPAdapter(image_width=16))
        >>> [name for name, _ in handle.named_parameters()][-2:]
        ['layers.3.to_k_ip.weight', 'layers.3.to_v_ip.weight']
        >>> handle.detach()
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"unet: got {type(unet).__name__}, expected a diffusers UNet2DConditionModel")
    if isinstance(config, type) or getattr(config, "kind", None) != "unet":
        raise TypeError(f"config: got {config!r}, expected a recipe for UNets, fastprompt.IPAdapter()")
    if getattr(unet, PROJECTION) is not None:
        raise AttachError(
            f"unet: it already has {PROJECTION} ({type(getattr(unet, PROJECTION)).__name__}); detach its adapter, or "
            "call pipeline.unload_ip_adapter(), before attaching another"
        )
    learned = [name for name, p in unet.attn_processors.items() if isinstance(p, nn.Module)]
    if learned:
        raise AttachError(f"unet: {learned[0]} is a module already (as are {len(learned) - 1} others); detach it first")
    return Handle(unet, config)


class Handle:
    """An adapter attached to a UNet: its parameters, saving, and the way back.

    Attributes:
        unet: The UNet.
        config: The recipe.
        attached: Whether it still is.
    """

    def __init__(self, unet: UNet2DConditionModel, config: Any):
        self.unet, self.config = unet, config
        self.sites = find_sites(unet)
        self._projections, self._processors = config.build(self.sites)
        self._flags = {p: p.requires_grad for p in unet.parameters()}
        for parameter in self._flags:
            parameter.requires_grad_(False)
        new = {site.attention: own for site, own in zip(self.sites, self._processors, strict=True)}
        self._swap = Swap(unet, new, self._projections)
        self.attached = True

    def _check_attached(self) -> None:
        if not self.attached:
            raise AttachError("handle: already detached; attach again, or load a saved adapter with fastprompt.load")

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable tensors by stable names: ``projection.*``, then ``layers.{i}.to_k_ip.weight`` and ``to_v_ip``."""
        for name, parameter in self._projections.image_projection_layers[0].named_parameters():
            yield f"projection.{name}", parameter
        for site, own in zip(self.sites, self._processors, strict=True):
            for which in ("to_k_ip", "to_v_ip"):
                yield f"layers.{site.index}.{which}.weight", getattr(own, which)[0].weight

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable leaf tensors, in the order of `named_parameters`."""
        for _, parameter in self.named_parameters():
            yield parameter

    @property
    def num_trainable(self) -> int:
        """Number of trainable scalars."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def describe_base(self) -> dict[str, Any]:
        """What identifies the UNet: the shape of its layers, and a few of its frozen weights each."""
        first = self.sites[0]
        return {
            "class": type(self.unet).__name__,
            "layers": len(self.sites),
            "width": first.shape[1],
            "kv_heads": first.attention.heads,
            "head_dim": first.shape[0] // first.attention.heads,
            "weights": {str(site.index): sample(site.attention.to_k.weight) for site in self.sites},
        }

    def save(self, directory: str | Path) -> None:
        """Write ``prompt_config.json`` and ``prompts.safetensors`` to ``directory``, each replaced atomically."""
        self._check_attached()
        content = {
            "method": type(self.config).__name__, "config": asdict(self.config), "tower": "unet", "train": [],
            "base": self.describe_base(),
        }  # fmt: skip
        write(Path(directory), content, dict(self.named_parameters()))

    def export(self, file: str | Path) -> None:
        """Write the adapter in the public layout, which ``pipeline.load_ip_adapter`` reads: one ``.safetensors``.

        Raises:
            ValueError: another number of tokens than 4, which the layout does not record and its readers assume.
        """
        self._check_attached()
        if self.config.num_tokens != PUBLIC_TOKENS:
            raise ValueError(
                f"num_tokens: got {self.config.num_tokens}, expected {PUBLIC_TOKENS} for the public layout; use save()"
            )
        tensors = {}
        for name, parameter in self.named_parameters():
            where, _, rest = name.partition(".")
            if where == "projection":
                public = "image_proj." + rest.replace("image_embeds", "proj")
            else:
                index, _, rest = rest.partition(".")
                public = f"ip_adapter.{2 * int(index) + 1}.{rest}"
            tensors[public] = parameter.detach().cpu().contiguous()
        save_file(tensors, file)

    def detach(self) -> None:
        """Restore the UNet bit for bit: processors, image projections and ``requires_grad`` flags."""
        self._check_attached()
        self._swap.undo()
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self.attached = False

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc) -> None:
        if self.attached:
            self.detach()

    def __repr__(self) -> str:
        state = f"{self.num_trainable:,} trainable" if self.attached else "detached"
        return f"Handle({type(self.unet).__name__}, {self.config!r}, {state})"


def restore(
    unet: UNet2DConditionModel, recipe: Callable[..., Any], content: dict[str, Any], tensors: dict[str, Tensor]
) -> Handle:
    """Attach what `Handle.save` wrote; on any mismatch the UNet stays as it was.

    Raises:
        CheckpointError: another base model, or other shapes.
    """
    try:
        with torch.random.fork_rng([]):  # initial weights are drawn, and then replaced
            handle = attach(unet, recipe(**content["config"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"model: the saved adapter does not fit {type(unet).__name__}: {error}") from error
    try:
        compare_base(content["base"], handle.describe_base())
        check_tensors(tensors, dict(handle.named_parameters()), type(unet).__name__)
        with torch.no_grad():
            for name, parameter in handle.named_parameters():
                parameter.copy_(tensors[name])
    except BaseException:
        handle.detach()
        raise
    return handle
