# SPDX-License-Identifier: Apache-2.0
"""Public IP-Adapter files: ``image_proj`` and ``ip_adapter`` weights, as ``.safetensors`` or ``.bin``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastprompt.diffusers.acceleration import accelerate
from fastprompt.diffusers.sites import find_sites
from fastprompt.diffusers.swap import PROJECTION
from fastprompt.errors import AttachError, CheckpointError

PARTS = "image_proj", "ip_adapter"
State = Mapping[str, Mapping[str, Tensor]]


def load_ip_adapter(unet: UNet2DConditionModel, files: str | Path | State | Sequence[str | Path | State]) -> Loaded:
    """Load published IP-Adapters into a UNet, with processors that compute constant keys once.

    Their weights are converted by diffusers itself: base, Plus and full-face variants. ``pipeline.load_ip_adapter`` and
    then `accelerate` is the same, and downloads; it is also the way for FaceID files, whose low-rank part needs peft.

    Args:
        unet: ``pipeline.unet``, without adapters.
        files: A file of each adapter (``ip-adapter_sd15.safetensors``, ``.bin``), or its contents
            ``{"image_proj": {...}, "ip_adapter": {"1.to_k_ip.weight": ...}}``.

    Returns:
        A `Loaded`, also a context manager that takes the adapters out again.

    Raises:
        CheckpointError: a file is missing, damaged, or not an IP-Adapter of this base model.
        AttachError: the UNet already has image projections.
    """
    given = [files] if isinstance(files, (str, Path, Mapping)) else list(files)
    if not given:
        raise ValueError("files: got none, expected at least one IP-Adapter")
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"unet: got {type(unet).__name__}, expected a diffusers UNet2DConditionModel")
    if getattr(unet, PROJECTION) is not None:
        raise AttachError(f"unet: it already has {PROJECTION}; detach its adapters, or give all files in one call")
    states = [read(item) for item in given]
    for item, state in zip(given, states, strict=True):
        _check(item if isinstance(item, (str, Path)) else "files", state, unet)
    return Loaded(unet, states)


class Loaded:
    """Published adapters in a UNet, until `detach`."""

    def __init__(self, unet: UNet2DConditionModel, states: list[dict[str, dict[str, Tensor]]]):
        self._unet, self._kind = unet, unet.config.encoder_hid_dim_type
        self._processors = dict(unet.attn_processors)
        try:
            unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
            self._fast = accelerate(unet)
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        delattr(self._unet, PROJECTION)
        setattr(self._unet, PROJECTION, None)
        self._unet.config.encoder_hid_dim_type = self._kind
        self._unet.set_attn_processor(self._processors)

    def clear(self) -> None:
        """Forget kept keys and values; see `Acceleration.clear`."""
        self._fast.clear()

    def detach(self) -> None:
        """Take the adapters out: the UNet is as it was."""
        self._restore()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *exc) -> None:
        self.detach()


def read(item: str | Path | State) -> dict[str, dict[str, Tensor]]:
    """An adapter's weights, by part.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    if isinstance(item, Mapping):
        parts: Any = item
    else:
        path = Path(item)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file, expected an IP-Adapter (.safetensors or .bin)")
        try:
            if path.suffix == ".safetensors":
                parts = {part: {} for part in PARTS}
                for name, tensor in load_file(path).items():
                    part, _, rest = name.partition(".")
                    parts.setdefault(part, {})[rest] = tensor
            else:
                parts = torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}), expected a whole IP-Adapter file") from error
    where = "files" if isinstance(item, Mapping) else str(item)
    found = parts if isinstance(parts, Mapping) else {}
    if not all(isinstance(found.get(part), Mapping) and found[part] for part in PARTS):
        got = ", ".join(map(str, list(found)[:4])) or type(parts).__name__
        raise CheckpointError(f"{where}: got {got}, expected the parts image_proj and ip_adapter of an IP-Adapter")
    return {part: dict(found[part]) for part in PARTS}


def _check(name: Any, state: dict[str, dict[str, Tensor]], unet: UNet2DConditionModel) -> None:
    """Every layer of the UNet finds weights of its shape, and none is left over."""
    weights = state["ip_adapter"]
    if any("lora" in key for key in weights):
        raise CheckpointError(
            f"{name}: got a FaceID adapter with low-rank weights, which go through peft; use "
            "pipeline.load_ip_adapter(...) and then fastprompt.diffusers.accelerate(pipeline.unet)"
        )
    sites = find_sites(unet)
    expected = {f"{2 * s.index + 1}.{which}.weight": s for s in sites for which in ("to_k_ip", "to_v_ip")}
    for key, site in expected.items():
        if key in weights and tuple(weights[key].shape) != site.shape:
            raise CheckpointError(
                f"{name}: {key} has shape {list(weights[key].shape)}, expected {list(site.shape)} for {site.name}: the "
                f"adapter reads text of width {weights[key].shape[1]}, this UNet of width {site.shape[1]}; it belongs "
                "to another base model"
            )
    if weights.keys() != expected.keys():
        raise CheckpointError(
            f"{name}: got weights for {len(weights) // 2} layers, expected {len(sites)}, numbered 1, 3, ... "
            f"{2 * len(sites) - 1}; the adapter belongs to another base model"
        )
