# SPDX-License-Identifier: Apache-2.0
"""Cross-attention processors for diffusers: an image branch beside the text, and prompts among its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastprompt.diffusers.constants import Constants
from fastprompt.diffusers.masks import mask_list, query_weights
from fastprompt.ops import decoupled_attention, prompt_attention


class DecoupledAttnProcessor(IPAdapterAttnProcessor2_0):
    """A drop-in for ``IPAdapterAttnProcessor2_0``: every branch in one `decoupled_attention`, constant keys once.

    ``softmax(s q k_text^T) v_text + sum_i scale_i mask_i softmax(s q k_i^T) v_i``: the images of an adapter are one
    branch, or a branch each where it has masks. Arguments, state dict (``to_k_ip.{i}.weight``, ``to_v_ip.{i}.weight``)
    and numbers are those of diffusers. Without gradients, keys and values of text and image tokens are computed once
    for as long as `Constants` finds the tokens unchanged, not at every denoising step. Image tokens with batch 1, or
    expanded over the batch, are shared and never copied for a sample. An adapter whose scale is the number 0 is left
    out: with none left, the layer is bit-equal to diffusers' own without adapters.

    Args:
        hidden_size: Width C of the attention layer.
        cross_attention_dim: Width Cc of text and image tokens.
        num_tokens: Tokens an image, one number for every adapter.
        scale: One for all adapters, or a list with one for each: a number, a tensor, or a list with one an image
            (which needs masks). ``pipeline.set_ip_adapter_scale`` sets it as well.

    Example:
        >>> import torch
        >>> from diffusers.models.attention_processor import Attention
        >>> from fastprompt.diffusers import DecoupledAttnProcessor
        >>> processor = DecoupledAttnProcessor(32, 24, num_tokens=(4,), scale=0.6)
        >>> layer = Attention(32, cross_attention_dim=24, heads=4, dim_head=8, processor=processor)
        >>> text, image = torch.randn(2, 7, 24), torch.randn(2, 1, 4, 24)
        >>> layer(torch.randn(2, 9, 32), encoder_hidden_states=(text, [image])).shape
        torch.Size([2, 9, 32])

    https://arxiv.org/abs/2308.06721
    """

    def __init__(
        self,
        hidden_size: int,
        cross_attention_dim: int | None = None,
        num_tokens: int | Sequence[int] = (4,),
        scale: float | list = 1.0,
    ):
        super().__init__(hidden_size, cross_attention_dim, num_tokens, scale)
        self.constants = Constants()

    @classmethod
    def sharing(cls, processor: nn.Module) -> DecoupledAttnProcessor:
        """One with the weights and the list of scales of a diffusers processor, both shared with it."""
        own = cls.__new__(cls)
        nn.Module.__init__(own)
        for name in ("hidden_size", "cross_attention_dim", "num_tokens", "scale", "to_k_ip", "to_v_ip"):
            setattr(own, name, getattr(processor, name))
        own.constants = Constants()
        return own

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Tensor | list[Tensor | None] | None = None,
    ) -> Tensor:
        """The layer's output, from text tokens ``[B,T,Cc]`` and image tokens ``[B or 1,images,M,Cc]`` an adapter.

        Args:
            attn: The layer.
            hidden_states: ``[B,N,C]`` or ``[B,C,height,width]``.
            encoder_hidden_states: ``(text, [image tokens an adapter])``, or text and image tokens in one tensor.
            attention_mask: Of text tokens, additive.
            temb: For layers with a spatial norm.
            scale: Not used, as in diffusers.
            ip_adapter_masks: One ``[1 or B,images,height,width]`` or None an adapter; see ``IPAdapterMaskProcessor``.
        """
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states: got None, expected (text tokens, [image tokens an adapter])")
        x = _enter(attn, hidden_states, temb)
        query = _heads(attn, attn.to_q(x))
        source = encoder_hidden_states
        if isinstance(source, tuple):
            text, images = source
            sources = [text, *images]
        else:
            end = source.shape[1] - self.num_tokens[0]
            text, images, sources = source[:, :end], [source[:, end:]], [source, source]
        masks = mask_list(ip_adapter_masks, images)
        self._check(images, masks, query)
        key, value = _text(self.constants, attn, text, sources[0])
        branches: list[tuple[Tensor, Tensor, Any]] = [(key, value, 1.0)]
        for i, tokens in enumerate(images):
            branches += self._image(i, attn, tokens, sources[1 + i], masks[i], query)
        keys, values, weights = zip(*branches, strict=True)
        mask = _mask(attn, attention_mask, text)
        if len(keys) == 1:
            out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            out = decoupled_attention(query, keys, values, weights, attn_masks=[mask, *[None] * (len(keys) - 1)])
        return _leave(attn, out, hidden_states)

    def _check(self, images: Sequence[Tensor], masks: list, query: Tensor) -> None:
        """Raise unless there is one scale, one set of tokens and one mask an adapter, and images and masks agree."""
        count = len(self.to_k_ip)
        for name, got in (("scale", len(self.scale)), ("images", len(images)), ("ip_adapter_masks", len(masks))):
            if got != count:
                raise ValueError(f"{name}: got {got} entries, expected {count}, one for every adapter of this layer")
        for i, (tokens, scale, (mask, _)) in enumerate(zip(images, self.scale, masks, strict=True)):
            width = self.to_k_ip[i].weight.shape[1]
            if tokens.dim() not in (3, 4) or tokens.shape[0] not in (1, len(query)) or tokens.shape[-1] != width:
                raise ValueError(
                    f"images[{i}]: got shape {list(tokens.shape)}, expected [{len(query)} or 1,images,tokens,{width}]"
                )
            count = tokens.shape[1] if tokens.dim() == 4 else 1
            if mask is not None and (mask.shape[1] != count or tokens.dim() != 4):
                raise ValueError(
                    f"ip_adapter_masks[{i}]: got {mask.shape[1]} masks for image tokens {list(tokens.shape)}, expected "
                    "one an image: [1,images,height,width]"
                )
            if isinstance(scale, list) and mask is None and not _is_zero(scale):
                raise ValueError(
                    f"scale[{i}]: got a list, one scale an image, but no mask; images without masks share one softmax "
                    "and one scale; give a number, or masks of ones"
                )
            if isinstance(scale, list) and mask is not None and len(scale) != count:
                raise ValueError(f"scale[{i}]: got {len(scale)} scales, expected {count}, one for every image")

    def _image(
        self, i: int, attn: Attention, tokens: Tensor, source: Tensor, mask: tuple[Tensor | None, Any], query: Tensor
    ) -> list[tuple[Tensor, Tensor, Any]]:
        """Keys, values and weight of an adapter: one branch, or one an image where it has masks."""
        scale = self.scale[i]
        if _is_zero(scale):
            return []
        layers = [self.to_k_ip[i], self.to_v_ip[i]]

        def project() -> list[Tensor]:
            own = tokens[:1] if tokens.stride(0) == 0 else tokens
            rows = own.flatten(1, -2)
            # Weights that learn may be float32 beside a half-precision model.
            return [_heads(attn, layer(rows.to(layer.weight.dtype)).to(query.dtype)) for layer in layers]

        key, value = self.constants.get("image", source, layers, (tokens.shape, attn.heads, query.dtype), project)
        grid, given = mask
        if grid is None:
            return [(key, value, scale)]
        count, rows = grid.shape[1], query.shape[2]
        name, options = ("mask", i, rows), (len(query), query.dtype, query.device)
        areas = self.constants.get(
            name, given, [], options, lambda: query_weights(grid, query, f"ip_adapter_masks[{i}]")
        )
        scales = scale if isinstance(scale, list) else [scale] * count
        weights = [0.0 if _is_zero(s) else s * area for s, area in zip(scales, areas, strict=True)]
        return list(zip(key.chunk(count, 2), value.chunk(count, 2), weights, strict=True))


class PromptAttnProcessor(nn.Module):
    """Plain attention of diffusers with P learned prompts among the tokens it reads, in one softmax.

    ``softmax(s q [K_p; K]^T + [0; mask]) [V_p; V]`` with ``K_p, V_p = to_k(prompt), to_v(prompt)``: the same as prompts
    concatenated to every sample's tokens, without the copies (prompts pass no norm before ``to_k``). Without gradients,
    keys and values of prompts, and of text tokens that do not change, are computed once (see `Constants`). Without
    prompts it is ``AttnProcessor2_0``, bit for bit.

    Args:
        width: Width of the tokens that the layer reads: Cc in cross-attention, C in self-attention.
        length: Number of prompts P; they start as N(0, 0.02²).

    Example:
        >>> import torch
        >>> from diffusers.models.attention_processor import Attention
        >>> from fastprompt.diffusers import PromptAttnProcessor
        >>> layer = Attention(32, cross_attention_dim=24, heads=4, dim_head=8, processor=PromptAttnProcessor(24, 5))
        >>> layer(torch.randn(2, 9, 32), encoder_hidden_states=torch.randn(2, 7, 24)).shape
        torch.Size([2, 9, 32])
    """

    def __init__(self, width: int = 0, length: int = 0):
        super().__init__()
        if length and width < 1:
            raise ValueError(f"width: got {width}, expected the width of the tokens that {length} prompts join")
        self.prompt = nn.Parameter(0.02 * torch.randn(length, width)) if length else None
        self.constants = Constants()

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return "length=0" if self.prompt is None else "width={1}, length={0}".format(*self.prompt.shape)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The layer's output ``[B,N,C]`` (or ``[B,C,height,width]``) from tokens ``[B,T,Cc]``; None is itself."""
        x = _enter(attn, hidden_states, temb)
        query = _heads(attn, attn.to_q(x))
        text = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is None:
            key, value = _heads(attn, attn.to_k(x)), _heads(attn, attn.to_v(x))
        else:
            key, value = _text(self.constants, attn, text, text)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        mask = _mask(attn, attention_mask, text)
        out: Any
        if self.prompt is None:
            out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            out = prompt_attention(query, key, value, *self._prompts(attn, text.dtype), attn_mask=mask)
        return _leave(attn, out, hidden_states)

    def _prompts(self, attn: Attention, dtype: torch.dtype) -> list[Tensor]:
        """Keys and values ``[H,P,D]`` of the prompts."""
        prompt: Any = self.prompt

        def project() -> list[Tensor]:
            key, value = (_heads(attn, to(prompt.to(dtype)[None]))[0] for to in (attn.to_k, attn.to_v))
            return [key if attn.norm_k is None else attn.norm_k(key), value]

        modules = [attn.to_k, attn.to_v, *([] if attn.norm_k is None else [attn.norm_k])]
        return self.constants.get("prompt", prompt, modules, (attn.heads, dtype), project)


def _is_zero(scale: Any) -> bool:
    """The number 0, or a list of such; a tensor that is 0 may learn."""
    return all(map(_is_zero, scale)) if isinstance(scale, list) else isinstance(scale, (int, float)) and scale == 0


def _enter(attn: Attention, hidden_states: Tensor, temb: Tensor | None) -> Tensor:
    """What the layer's queries are made of, ``[B,N,C]``."""
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if hidden_states.dim() == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    return hidden_states


def _heads(attn: Attention, x: Tensor) -> Tensor:
    """``[B,T,C]`` as ``[B,H,T,D]``."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _text(constants: Constants, attn: Attention, text: Tensor, source: Tensor) -> list[Tensor]:
    """Keys and values of text tokens, which are (a part of) ``source``."""
    norm = attn.norm_cross if isinstance(attn.norm_cross, nn.Module) else None

    def project() -> list[Tensor]:
        tokens = text if norm is None else attn.norm_encoder_hidden_states(text)
        return [_heads(attn, to(tokens)) for to in (attn.to_k, attn.to_v)]

    modules = [attn.to_k, attn.to_v, *([] if norm is None else [norm])]
    return constants.get("text", source, modules, (text.shape, attn.heads), project)


def _mask(attn: Attention, attention_mask: Tensor | None, text: Tensor) -> Tensor | None:
    """The additive mask of text tokens, ``[B,H,1 or N,T]``."""
    if attention_mask is None:
        return None
    batch, length, _ = text.shape
    mask = attn.prepare_attention_mask(attention_mask, length, batch)
    return mask.view(batch, attn.heads, -1, mask.shape[-1])


def _leave(attn: Attention, out: Tensor, hidden_states: Tensor) -> Tensor:
    """The layer's output, in the shape of its input."""
    out = out.transpose(1, 2).flatten(2)
    out = attn.to_out[1](attn.to_out[0](out))
    if hidden_states.dim() == 4:
        out = out.transpose(-1, -2).reshape(hidden_states.shape)
    if attn.residual_connection:
        out = out + hidden_states
    return out / attn.rescale_output_factor
