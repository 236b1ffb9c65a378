# SPDX-License-Identifier: Apache-2.0
"""Where ``impl="auto"`` leaves the instance keys to one of PyTorch's CUDA kernels: the one table, with the files of the
measurements behind it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastprompt.ops.cuda.libraries import LIBRARIES


class Win(NamedTuple):
    """Calls for which a library was measured to be faster than one kernel over all keys.

    Attributes:
        library: Its name in `LIBRARIES`.
        capability: The major compute capability of the GPU.
        dtypes: Those of the query,
        head_sizes: and its head sizes.
        tokens: The least number of queries and of instance keys.
        training: Whether with a backward; otherwise without one.
        measured: The file of results.
    """

    library: str
    capability: int
    dtypes: tuple[torch.dtype, ...]
    head_sizes: tuple[int, ...]
    tokens: int
    training: bool
    measured: str

    @property
    def why(self) -> str:
        """For `explain`."""
        return f"measured to win from {self.tokens} tokens on, compute capability {self.capability}.x ({self.measured})"


#: None was measured yet.
WINS: tuple[Win, ...] = ()


def find(tensors: tuple[Tensor, ...], attn_mask: Tensor | None, is_causal: bool, scale: float) -> Win | None:
    """The first entry that holds for this call of `prompt_attention` and whose library can run it."""
    if not WINS:
        return None
    query, key = tensors[:2]
    training = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    # The libraries' backward gives other bits every time, or is slower than what was measured.
    if training and torch.are_deterministic_algorithms_enabled():
        return None
    major, tokens = _capability(query.device), min(query.shape[2], key.shape[2])
    for win in WINS:
        here = win.capability == major and win.training == training and tokens >= win.tokens
        if here and query.dtype in win.dtypes and query.shape[3] in win.head_sizes:
            if not LIBRARIES[win.library].reasons_against(query, key, attn_mask, is_causal, scale):
                return win
    return None


def _capability(device: torch.device) -> int | None:
    """Of an NVIDIA GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and not torch.version.hip else None
