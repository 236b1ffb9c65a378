# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention` on CUDA: one of PyTorch's attention kernels for the instance keys, ours for the prompt.

The forward merges the prompt into the library's output and lse in one pass over the rows. The backward hands the
merged output and lse to the library's backward, which then gives the instance part of every gradient: no gradient
passes through the weights of the merge. Our kernels add the prompt's part of dq, and sum dK_p and dV_p as ever.

What is saved is what the kernels over all keys save. They run the backward where the library's would not do: for a
gradient of lse, which no library takes, and where the prompts alone need gradients.

A library adds up dq (flash) or more (cuDNN, efficient) in the order in which its programs finish, unless
`torch.use_deterministic_algorithms` is on: such gradients are not the same bits every time. Output, lse and the
gradients of prompts are.
"""

from __future__ import annotations

from torch import Tensor

from fastprompt.errors import ImplUnavailableError
from fastprompt.kernels import prompt_attention as fused
from fastprompt.kernels import prompt_part
from fastprompt.ops.cuda.libraries import LIBRARIES, Library
from fastprompt.ops.layouts import like, plain_strides


class Composition:
    """The launchers, with the instance keys left to one library."""

    def __init__(self, library: Library):
        self.library = library

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        prompt_index: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Output ``[B,Hq,Tq,D]`` (memory order B,T,H,D) and lse ``[B,Hq,Tq]`` float32.

        Raises:
            ImplUnavailableError: the library takes no instance keys like these.
        """
        reasons = self.library.reasons_against(query, key, attn_mask, is_causal, scale)
        if reasons:
            raise ImplUnavailableError(f"impl={self.library.name!r} cannot run prompt_attention: {'; '.join(reasons)}")
        part, part_lse = self.library.forward(*map(plain_strides, (query, key, value)), is_causal, scale)
        if not prompt_key.shape[2]:
            return part.transpose(1, 2).contiguous().transpose(1, 2), part_lse.contiguous()
        return prompt_part.forward(query, key, value, prompt_key, prompt_value, prompt_index, part, part_lse, scale)

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        prompt_index: Tensor | None,
        attn_mask: Tensor | None,
        out: Tensor,
        lse: Tensor,
        is_causal: bool,
        scale: float,
        needs: list[bool],
    ) -> list[Tensor]:
        """Gradients of those of the five tensors that ``needs`` names, in their order."""
        inputs = (query, key, value, prompt_key, prompt_value)
        if grad_lse is not None or not any(needs[:3]):
            return fused.backward(
                grad_out, grad_lse, *inputs, prompt_index, attn_mask, out, lse, is_causal, scale, needs
            )
        operands = map(plain_strides, (query, key, value))
        found = self.library.backward(grad_out, *operands, out, lse, is_causal, scale)
        grads = [like(x, grad) if need else None for x, grad, need in zip(inputs, found, needs, strict=False)]
        grads += prompt_part.backward(grad_out, *inputs, prompt_index, out, lse, grads[0], scale, needs[3:])
        return [x for x in grads if x is not None]


cudnn, flash, efficient = (Composition(LIBRARIES[name]) for name in ("cudnn", "flash", "efficient"))
