# SPDX-License-Identifier: Apache-2.0
"""Where in the picture an adapter's image counts: masks of pictures as weights of queries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from torch import Tensor


def mask_list(
    masks: Tensor | Sequence[Tensor | None] | None, images: Sequence[Tensor]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """A mask ``[1 or B,images,height,width]`` or None for every adapter, and the tensor that the caller holds.

    Args:
        masks: None; a list; or one tensor ``[adapters,1,height,width]``.
        images: The tokens of every adapter.
    """
    if masks is None:
        return [(None, None)] * len(images)
    if isinstance(masks, Tensor):
        return [(mask, masks) for mask in masks.unsqueeze(1)]
    for i, mask in enumerate(masks):
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
            got = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"ip_adapter_masks[{i}]: got {got}, expected a tensor [1,images,height,width]; "
                "IPAdapterMaskProcessor().preprocess(...) makes masks of pictures"
            )
    return [(mask, mask) for mask in masks]


def query_weights(mask: Tensor, query: Tensor, name: str) -> list[Tensor]:
    """A weight ``[1 or B,1,Tq]`` for every image: its mask, resized to the grid of queries as diffusers does (bicubic).

    Raises:
        ValueError: the mask's aspect ratio is not that of any grid with as many queries.
    """
    rows = query.shape[2]
    if mask.shape[0] not in (1, len(query)):
        raise ValueError(f"{name}: got shape {list(mask.shape)}, expected [1 or {len(query)},images,height,width]")
    _check_ratio(mask, rows, name)
    found = []
    for i in range(mask.shape[1]):
        area = IPAdapterMaskProcessor.downsample(mask[:, i], len(mask), rows, 1)
        area = area.to(query.device, query.dtype).to(torch.promote_types(query.dtype, torch.float32))
        found.append(area.transpose(1, 2))
    return found


def _check_ratio(mask: Tensor, rows: int, name: str) -> None:
    """A grid of ``rows`` queries has the mask's aspect ratio, to within a row or a column."""
    height, width = mask.shape[-2:]
    tall, wide = math.sqrt(rows * height / width), math.sqrt(rows * width / height)
    grids = [(h, rows // h) for h in range(1, rows + 1) if rows % h == 0]
    if not any(abs(h - tall) < 1 or abs(w - wide) < 1 for h, w in grids):
        closest = min(grids, key=lambda grid: abs(math.log(grid[0] / tall)))
        raise ValueError(
            f"{name}: got {height} x {width} (height x width), but the picture has {rows} queries here, which no grid "
            f"of that aspect ratio gives (the closest is {closest[0]} x {closest[1]}); give masks of the picture's "
            "aspect ratio"
        )
