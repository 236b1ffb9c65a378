# SPDX-License-Identifier: Apache-2.0
"""What a recipe learns for the two towers of a CLIP: a text context, deeper text prompts, vision prompts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class DualPrompt(nn.Module):
    """The learned tensors of a CLIP recipe and how they become prompts; parts that a recipe lacks hold nothing.

    With M context tokens, text width W, vision width Wv, feature width D, C classes and prompts in J layers: the
    context takes M slots of every class's text at the embeddings, `deep_text` replaces what the slots hold before text
    layers 1 to J-1, and layer l of the vision tower reads `vision_rows(l)`.

    Args:
        context: ``[M,W]``, or ``[C,M,W]`` with one context a class.
        deep_text: J-1 tensors ``[M,W]``.
        meta: Maps a unit image feature ``[B,D]`` to a shift ``[B,W]`` of every context token (CoCoOp).
        vision: J tensors ``[Mv,Wv]`` (IVLP).
        couple: J modules that map the text prompt of a layer ``[M,W]`` to its vision prompt ``[M,Wv]`` (MaPLe).
        text_split: How the rows of every text layer read prompts (DPL's `Split`); none: in one softmax with the rest.
        vision_split: Likewise of every vision layer.

    Example:
        >>> import torch
        >>> prompt = DualPrompt(torch.zeros(4, 16), meta=nn.Linear(8, 16))
        >>> prompt.text(torch.randn(3, 8)).shape
        torch.Size([3, 4, 16])
    """

    def __init__(
        self,
        context: Tensor | None = None,
        deep_text: Iterable[Tensor] = (),
        *,
        meta: nn.Module | None = None,
        vision: Iterable[Tensor] = (),
        couple: Iterable[nn.Module] = (),
        text_split: Iterable[nn.Module] = (),
        vision_split: Iterable[nn.Module] = (),
    ):
        super().__init__()
        self.context = None if context is None else nn.Parameter(context)
        self.deep_text = nn.ParameterList(nn.Parameter(x) for x in deep_text)
        self.meta = meta
        self.vision = nn.ParameterList(nn.Parameter(x) for x in vision)
        self.couple = nn.ModuleList(couple)
        self.text_split, self.vision_split = nn.ModuleList(text_split), nn.ModuleList(vision_split)

    @property
    def length(self) -> int:
        """Context tokens M of a text."""
        return 0 if self.context is None else self.context.shape[-2]

    @property
    def vision_depth(self) -> int:
        """Vision layers, from the first, that get a prompt."""
        return len(self.vision) or len(self.couple)

    @property
    def vision_length(self) -> int:
        """Prompts of a vision layer."""
        return self.vision[0].shape[0] if len(self.vision) else self.length

    def text(self, image: Tensor | None = None) -> Tensor | None:
        """The context ``[M,W]``, ``[C,M,W]``, or ``[B,M,W]`` where it depends on unit image features ``[B,D]``."""
        if self.meta is None or self.context is None:
            return self.context
        if image is None:
            raise ValueError(
                "image_features: got None, expected unit image features [B,D]: this context depends on the image"
            )
        return self.context + self.meta(image.to(self.context.dtype)).unsqueeze(1)

    def deep(self) -> list[Tensor]:
        """What the slots hold before text layers 1, 2, ...: ``[slots,W]`` each."""
        return list(self.deep_text)

    def vision_rows(self, layer: int) -> Tensor:
        """The vision prompt ``[Mv,Wv]`` of a layer below `vision_depth`."""
        if len(self.vision):
            return self.vision[layer]
        text = self.deep_text[layer - 1] if layer else self.context
        return self.couple[layer](text)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        shape = None if self.context is None else list(self.context.shape)
        return f"context={shape}, vision_depth={self.vision_depth}"


def normal_prompt(*shape: int) -> Tensor:
    """N(0, 0.02²), where CLIP prompts start that no words are given for (Zhou et al., 2022)."""
    return 0.02 * torch.randn(*shape)
