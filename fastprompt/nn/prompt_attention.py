# SPDX-License-Identifier: Apache-2.0
"""Self-attention with a learned prompt, for models that do not come from transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.nn.prompts import vpt_uniform
from fastprompt.ops import prompt_attention


class PromptAttention(nn.Module):
    """Multi-head self-attention whose queries also see the keys and values of a learned prompt (deep prompts, I2).

    ``out = W_o softmax(q [K_p; K]^T / sqrt(D)) [V_p; V]`` with ``q, K, V = W_qkv x`` and ``K_p, V_p = W_kv prompt``:
    exactly what P more rows at the layer's input would give to the others, if their own outputs are dropped. The
    prompt's keys and values are computed once for the whole batch.

    The parameters are ``prompt [P,C]``, ``qkv`` (``C -> (Hq + 2 Hkv) D``, queries first) and ``proj`` (``C -> C``): the
    names and the layout of timm's attention, and the layout of ``nn.MultiheadAttention.in_proj_weight``. All of them
    train, as in any module; `from_multihead` and `from_fused_qkv` take over the parameters of a layer, frozen or not,
    so to learn the prompts alone, freeze the model and then replace its attention::

        model.requires_grad_(False)
        for block in model.blocks:
            block.attn = PromptAttention.from_fused_qkv(block.attn, length=10)

    Args:
        embed_dim: Width C.
        num_heads: Query heads Hq; ``C = Hq D``.
        length: Number of prompts P; 0 is plain attention.
        num_kv_heads: Key heads Hkv, a divisor of Hq (grouped-query attention); None means Hq.
        bias: Give ``qkv`` and ``proj`` a bias.
        device: Of the parameters.
        dtype: Of the weights; the prompt is float32, or float64 beside float64.

    Raises:
        TypeError: sizes that are not integers.
        ValueError: sizes that do not fit.

    Example:
        >>> import torch, fastprompt
        >>> layer = fastprompt.nn.PromptAttention(embed_dim=64, num_heads=4, length=10)
        >>> layer(torch.randn(2, 17, 64)).shape
        torch.Size([2, 17, 64])

    Deep visual prompts: https://arxiv.org/abs/2203.12119.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        length: int,
        num_kv_heads: int | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "length": length, "num_kv_heads": num_kv_heads}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name}: got {size!r}, expected an int")
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: got {embed_dim} for {num_heads} heads, expected a multiple of num_heads")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: got {num_kv_heads}, expected a divisor of num_heads = {num_heads}")
        if length < 0:
            raise ValueError(f"length: got {length}, expected 0 prompts or more")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads
        width = (num_heads + 2 * num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(embed_dim, width, bias=bias, device=device, dtype=dtype)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.prompt = _prompt(length, self.qkv.weight)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return f"embed_dim={self.embed_dim}, {heads}, length={len(self.prompt)}"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over the prompt and ``x``.

        Args:
            x: ``[B,T,C]``.
            attn_mask: bool (True = may attend, as in ``scaled_dot_product_attention`` and unlike
                ``nn.MultiheadAttention``) or additive float, broadcastable to ``[B,Hq,T,T]``. It has no column for the
                prompt, which every row sees.
            is_causal: Row i sees the rows ``j <= i``, and the prompt.

        Returns:
            ``[B,T,C]``.

        Raises:
            ValueError: ``x`` or ``attn_mask`` of another shape.
        """
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x: got shape {list(x.shape)}, expected [B,T,C] with C = {self.embed_dim}")
        query, key, value = self._heads(self.qkv(x))
        # Through the module and not a slice of its weight, so that a wrapped projection (LoRA, say) is seen whole.
        _, prompt_key, prompt_value = self._heads(self.qkv(self.prompt.to(x.dtype)))
        query, key, prompt_key = self.q_norm(query), self.k_norm(key), self.k_norm(prompt_key)
        keys = (key, value, prompt_key, prompt_value)
        out: Any = prompt_attention(query, *keys, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values ``[...,H,T,D]`` of ``[...,T,(Hq+2Hkv)D]``."""
        heads = x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
        return heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=-3)

    @classmethod
    def from_multihead(cls, attention: nn.MultiheadAttention, length: int) -> PromptAttention:
        """The self-attention of an ``nn.MultiheadAttention`` with a prompt, on the same parameters (not copies).

        The block that owns it calls ``attn(x)`` instead of ``attn(x, x, x, need_weights=False)[0]``.

        Args:
            attention: ``batch_first``, without dropout, with keys and values of its own width.
            length: Number of prompts P.

        Raises:
            TypeError: no ``nn.MultiheadAttention``.
            ValueError: it does what this layer cannot; the message says what.

        Example:
            >>> plain = nn.MultiheadAttention(64, 4, batch_first=True)
            >>> layer = PromptAttention.from_multihead(plain, length=10)
            >>> layer.qkv.weight is plain.in_proj_weight
            True
        """
        if not isinstance(attention, nn.MultiheadAttention):
            raise TypeError(f"attention: got {type(attention).__name__}, expected an nn.MultiheadAttention")
        reasons = []
        if not attention.batch_first:
            reasons.append("batch_first=False (set it, and give the model [B,T,C])")
        if attention.in_proj_weight is None:
            reasons.append(f"kdim={attention.kdim} and vdim={attention.vdim} beside embed_dim={attention.embed_dim}")
        if attention.bias_k is not None:
            reasons.append("add_bias_kv=True")
        if attention.add_zero_attn:
            reasons.append("add_zero_attn=True")
        if attention.dropout > 0:
            reasons.append(f"dropout={attention.dropout} (set attention.dropout = 0.0)")
        _refuse(reasons)
        layer = cls(attention.embed_dim, attention.num_heads, length, device="meta")
        layer.qkv.weight, layer.qkv.bias = attention.in_proj_weight, attention.in_proj_bias
        return layer._take_over(attention, proj=attention.out_proj)

    @classmethod
    def from_fused_qkv(cls, attention: nn.Module, length: int) -> PromptAttention:
        """A timm-style attention with a prompt, on the same parameters (not copies).

        Args:
            attention: A module with ``qkv``, ``proj`` (``nn.Linear``), ``num_heads`` and maybe ``q_norm``, ``k_norm``,
                called on ``[B,T,C]``. All else that it holds must do nothing (``nn.Identity``, dropout of 0).
            length: Number of prompts P.

        Raises:
            TypeError: ``qkv``, ``proj`` or ``num_heads`` is missing or of another type.
            ValueError: it does what this layer cannot; the message says what.

        Example:
            >>> class Attention(nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.num_heads, self.qkv, self.proj = 4, nn.Linear(64, 192), nn.Linear(64, 64)
            >>> PromptAttention.from_fused_qkv(Attention(), length=10)(torch.randn(2, 17, 64)).shape
            torch.Size([2, 17, 64])
        """
        found: dict[str, Any] = {}
        for name, kind in (("qkv", nn.Linear), ("proj", nn.Linear), ("num_heads", int)):
            found[name] = getattr(attention, name, None)
            if not isinstance(found[name], kind):
                raise TypeError(f"attention.{name}: got {type(found[name]).__name__}, expected {kind.__name__}")
        qkv, proj, heads = found.values()
        dim = qkv.in_features
        reasons = [f"parameter {name}" for name, _ in attention.named_parameters(recurse=False)]
        reasons += [f"buffer {name}" for name, _ in attention.named_buffers(recurse=False)]
        for name, child in attention.named_children():
            idle = isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and child.p == 0)
            if name not in ("qkv", "proj", "q_norm", "k_norm") and not idle:
                reasons.append(f"{name}: {child}")
        if qkv.out_features != 3 * dim or (proj.in_features, proj.out_features) != (dim, dim):
            reasons.append(f"qkv {dim} -> {qkv.out_features}, proj {proj.in_features} -> {proj.out_features}")
        expected = {"scale": (dim / heads) ** -0.5, "head_dim": dim / heads, "num_kv_heads": heads}
        for name, value in expected.items():
            given = getattr(attention, name, None)
            if given is not None and not math.isclose(float(given), value, rel_tol=1e-6):
                reasons.append(f"{name}={given}, expected {value:g}")
        if getattr(attention, "rope", None) is not None:
            reasons.append("rope")
        _refuse(reasons)
        norms = {name: x for name in ("q_norm", "k_norm") if (x := getattr(attention, name, None)) is not None}
        return cls(dim, heads, length, device="meta")._take_over(attention, qkv=qkv, proj=proj, **norms)

    def _take_over(self, attention: nn.Module, **modules: nn.Module) -> PromptAttention:
        """Hold these modules of ``attention`` in place of one's own, and a prompt that fits them."""
        for name, module in modules.items():
            setattr(self, name, module)
        self.prompt = _prompt(len(self.prompt), self.qkv.weight)
        return self.train(attention.training)


def _prompt(length: int, weight: Tensor) -> nn.Parameter:
    """A prompt for a layer with this weight, as VPT initialises it for patches of C values (ViT-B/16: 768)."""
    width, dtype = weight.shape[1], torch.promote_types(weight.dtype, torch.float32)
    return nn.Parameter(vpt_uniform(length, width, width).to(weight.device, dtype))


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise ValueError(f"attention: got {'; '.join(reasons)}, which PromptAttention cannot carry over")
