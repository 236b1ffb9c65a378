# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention` on CPU: PyTorch's flash forward; its flash backward in float32, tiled matrix products in half.

Measured on 2 cores with AMX (`bench/results/README.md`). The flash forward keeps float32 scores and is the best forward
there is. Its backward is the best in float32. In half precision it is slower than the same maths as batched matrix
products over tiles that stay in the cache, and it would round the gradient of a shared prompt once a sample; and where
nothing but prompts needs a gradient, the products visit the prompt columns alone.

In half precision the scores of a tile are rounded once, by the matrix product that writes them. Softmax is
shift-invariant, so each row is centred first, inside the product, by an extra column: c = lse - 2/3 log(keys) keeps the
scores that carry weight near zero, whether attention is flat or peaked, and the rounding error near that of float32
scores (without centring it grows with the size of the logits).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastprompt.ops.layouts import dense_rows

# Scores of one tile (elements): close to the caches, and large enough that a step is not all thread barriers.
TILE = 1 << 22
# Prompt columns kept for the reduction over the batch (elements): bounds the workspace of the backward.
WORKSPACE = 1 << 24

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _mask(query: Tensor, tk: int, prompts: int, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Additive mask ``[B|1,Hq|1,Tq|1,P+Tk]``, float32 or wider where its values matter, zero over prompts."""
    tq = query.shape[2]
    mask = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            mask = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        else:
            mask = attn_mask.to(torch.promote_types(query.dtype, torch.float32))
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask.expand(*mask.shape[:3], tk)
    if is_causal:
        hidden = torch.ones(tq, tk, dtype=torch.bool).triu_(tk - tq + 1)
        base = torch.zeros(1, 1, tq, tk, dtype=query.dtype) if mask is None else mask
        mask = base.masked_fill(hidden, -torch.inf)
    return None if mask is None else pad(mask, (prompts, 0))


def _join(prompt: Tensor, prompt_index: Tensor | None, instance: Tensor) -> Tensor:
    """Keys (or values) of prompts and instances: ``[B,Hkv,P+Tk,D]``."""
    if not prompt.shape[-2]:
        return instance
    prompt = prompt.to(instance.dtype)
    prompt = prompt[prompt_index] if prompt_index is not None else prompt.expand(len(instance), -1, -1, -1)
    return torch.cat([prompt, instance], dim=2)


class _Groups:
    """How grouped queries become the equal heads that PyTorch's flash kernels want.

    The query heads of a key head are more rows of one head, unless that would copy more numbers of a mask than
    repeating the keys copies: then keys are repeated.
    """

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None):
        batch, heads, self.tq, dim = query.shape
        self.heads_kv = key.shape[1]
        self.count = heads // self.heads_kv
        per_row = mask is not None and (mask.shape[1] > 1 or mask.shape[2] > 1)
        fits = not per_row or mask is None or len(mask) * self.count * self.tq <= batch * heads * dim
        self.fold = self.count > 1 and fits

    def rows(self, x: Tensor) -> Tensor:
        """``[B,Hq,Tq,...]`` as flash takes it."""
        return x.unflatten(1, (self.heads_kv, self.count)).flatten(2, 3) if self.fold else x

    def keys(self, x: Tensor) -> Tensor:
        """``[B,Hkv,K,D]`` as flash takes it."""
        return x if self.fold or self.count == 1 else x.repeat_interleave(self.count, dim=1)

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """``[B|1,Hq|1,Tq|1,K]`` as flash takes it."""
        if mask is None or not self.fold or mask.shape[1] == mask.shape[2] == 1:
            return mask
        per_head = mask.expand(-1, self.heads_kv * self.count if mask.shape[1] > 1 else self.count, self.tq, -1)
        return per_head.unflatten(1, (-1, self.count)).flatten(2, 3)

    def of_rows(self, x: Tensor) -> Tensor:
        """The reverse of `rows`."""
        return x.unflatten(2, (self.count, self.tq)).flatten(1, 2) if self.fold else x

    def of_keys(self, x: Tensor) -> Tensor:
        """Gradients of what `keys` gave, summed for every key head."""
        return x if self.fold or self.count == 1 else x.unflatten(1, (self.heads_kv, self.count)).sum(2)


def forward(
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
    """Output ``[B,Hq,Tq,D]`` (memory order B,T,H,D) and lse ``[B,Hq,Tq]``."""
    batch, heads, tq, dim = query.shape
    prompts, tk = prompt_key.shape[-2], key.shape[2]
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    if batch * heads * tq * dim == 0 or prompts + tk == 0:
        out = query.new_zeros(batch, tq, heads, dim).transpose(1, 2)
        return out, torch.full((batch, heads, tq), -torch.inf, dtype=lse_dtype)
    if is_causal and attn_mask is None and not prompts and tq == tk and scale:
        # Plain causal attention: what a mask would only hide is skipped, and no mask of tq * tk is made. (With a scale
        # of 0 PyTorch's kernel would multiply its own -inf by it.)
        keys = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
        out, lse = _flash(*map(dense_rows, (query, *keys)), is_causal=True, scale=scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse.to(lse_dtype).contiguous()
    mask = _mask(query, tk, prompts, attn_mask, is_causal)
    groups = _Groups(query, key, mask)
    joined = (_join(p, prompt_index, x) for p, x in ((prompt_key, key), (prompt_value, value)))
    operands = (groups.rows(query), *map(groups.keys, joined))
    out, lse = map(groups.of_rows, _flash(*map(dense_rows, operands), attn_mask=groups.mask(mask), scale=scale))
    if mask is not None and not prompts:
        dead = (mask == -torch.inf).all(dim=-1).expand(batch, heads, tq)
        out = out.masked_fill(dead.unsqueeze(-1), 0.0)
        lse = lse.masked_fill(dead, -torch.inf)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.to(lse_dtype).contiguous()


def _prompt_groups(prompt_index: Tensor | None, count: int, batch: int) -> Iterator[tuple[int, slice | Tensor]]:
    """For every prompt of the bank that is used: its number and the samples that read it, in order."""
    if prompt_index is None and count == 1:
        yield 0, slice(None)
    elif prompt_index is None:
        yield from ((b, slice(b, b + 1)) for b in range(batch))
    else:
        for g in prompt_index.unique(sorted=True).tolist():
            yield g, torch.nonzero(prompt_index == g).flatten()


def backward(
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
    """Gradients of the inputs flagged in ``needs`` (query, key, value, prompt_key, prompt_value), in that order."""
    inputs = (query, key, value, prompt_key, prompt_value)
    if query.dtype == torch.float16:
        # Scores may pass the largest float16, 65,504, and CPUs have no fast float16 products to lose.
        query, key, value, prompt_key, prompt_value = (x.float() for x in inputs)
        found = backward(
            grad_out.float(), grad_lse, query, key, value, prompt_key, prompt_value, prompt_index, attn_mask,
            out.float(), lse, is_causal, scale, needs,
        )  # fmt: skip
        kept = [x for x, need in zip(inputs, needs, strict=True) if need]
        return [torch.empty_like(x).copy_(grad) for x, grad in zip(kept, found, strict=True)]
    prompts, tk, heads_kv = prompt_key.shape[-2], key.shape[2], key.shape[1]
    if not query.numel() or not prompts + tk:
        return [torch.zeros_like(x) for x, need in zip(inputs, needs, strict=True) if need]
    # Every element of dq, dk, dv is written; a prompt that no sample reads keeps its zeros.
    grads = [torch.empty_like(x) if need else None for x, need in zip(inputs, needs, strict=True)]
    for grad in grads[3:]:
        if grad is not None:
            grad.zero_()
    mask = _mask(query, tk, prompts, attn_mask, is_causal)
    if query.dtype.itemsize >= 4 and any(needs[:3]) and grad_lse is None:
        _by_flash(grad_out, inputs, prompt_index, mask, out, lse, scale, grads)
    else:
        rows = query.shape[0] * query.shape[1] // heads_kv * query.shape[2]
        step = max(1, min(heads_kv, WORKSPACE // max(1, rows * prompts)))
        mask, level = _level(mask, lse, query.dtype)
        for h in range(0, heads_kv, step):
            heads = slice(h, h + step)
            _Heads(heads, grad_out, grad_lse, inputs, prompt_index, mask, out, lse, level, scale, grads).run()
    return [g for g in grads if g is not None]


def _level(mask: Tensor | None, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """The mask less each row's maximum, in ``dtype``, and the lse that belongs to it.

    Softmax does not see the shift, and a half-precision sum of scores and mask would not survive a mask of -300.
    """
    if mask is None:
        return None, lse
    peak = mask.amax(dim=-1, keepdim=True).to(lse.dtype)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    return (mask - peak).to(dtype), lse - peak.squeeze(-1)


def _by_flash(grad_out, inputs, prompt_index, mask, out, lse, scale, grads) -> None:
    """Write the gradients by PyTorch's flash backward over joined keys; summed over samples in float32."""
    query, key, value, prompt_key, prompt_value = inputs
    batch, prompts = len(query), prompt_key.shape[-2]
    groups = _Groups(query, key, mask)
    joined = [groups.keys(_join(p, prompt_index, x)) for p, x in ((prompt_key, key), (prompt_value, value))]
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # exp(score - inf) = 0 for a row that sees nothing
    rows = map(dense_rows, (groups.rows(grad_out), groups.rows(query), *joined))
    state = (groups.rows(out), groups.rows(lse))
    dq, *both = _flash_backward(*rows, *state, 0.0, False, attn_mask=groups.mask(mask), scale=scale)
    if grads[0] is not None:
        dq = groups.of_rows(dq)
        grads[0] = dq if dq.stride() == grads[0].stride() else grads[0].copy_(dq)
    for grad, prompt_grad, found in zip(grads[1:3], grads[3:5], map(groups.of_keys, both), strict=True):
        if grad is not None:
            grad.copy_(found[:, :, prompts:])
        if prompt_grad is not None:
            for g, samples in _prompt_groups(prompt_index, len(prompt_grad), batch):
                prompt_grad[g] = found[samples, :, :prompts].sum(0)


def _accumulate(total: Tensor | None, part: Tensor) -> Tensor:
    """Sum over row blocks, in float32 from the second block on."""
    return part if total is None else total.to(torch.promote_types(part.dtype, torch.float32)) + part


class _Heads:
    """The backward of a slice of KV heads: tiles of samples or of query rows, then one reduction a prompt."""

    def __init__(self, heads, grad_out, grad_lse, inputs, prompt_index, mask, out, lse, level, scale, grads):
        query, key, value, prompt_key, prompt_value = inputs
        self.hkv, self.groups = key[:, heads].shape[1], query.shape[1] // key.shape[1]
        q_heads = slice(heads.start * self.groups, heads.stop * self.groups)

        def by_group(x: Tensor) -> Tensor:  # [B,Hq,T,...] -> [B,Hkv,G,T,...]
            return x[:, q_heads].unflatten(1, (self.hkv, self.groups))

        self.query, self.grad_out, self.out = map(by_group, (query, grad_out, out))
        self.lse, self.level = by_group(lse), by_group(level)
        self.grad_lse = None if grad_lse is None else by_group(grad_lse)
        self.key, self.value = key[:, heads], value[:, heads]
        self.prompt_key, self.prompt_value = (p[:, heads].to(query.dtype) for p in (prompt_key, prompt_value))
        self.prompt_index, self.scale = prompt_index, scale
        self.mask = None
        if mask is not None:
            shared = mask.shape[1] == 1
            self.mask = mask.unsqueeze(1) if shared else by_group(mask)
        dq, dk, dv, dpk, dpv = grads
        self.dq = None if dq is None else dq[:, q_heads].unflatten(1, (self.hkv, self.groups))
        self.dk, self.dv, self.dpk, self.dpv = (None if g is None else g[:, heads] for g in (dk, dv, dpk, dpv))
        self.batch, _, _, self.tq, self.dim = self.query.shape
        self.prompts, self.tk = self.prompt_key.shape[2], self.key.shape[2]
        # Below the first prompted layer nothing but the prompts needs a gradient: only their columns are computed.
        self.instance = any(g is not None for g in (dq, dk, dv))
        self.columns = self.prompts + (self.tk if self.instance else 0)

    def run(self) -> None:
        """Write every gradient that was asked for into its slice of the output."""
        rows = self.groups * self.tq
        kept = (self.hkv, self.batch, self.groups, self.tq, self.prompts)  # heads first: the reduction copies nothing
        p_kept = self.query.new_empty(kept) if self.dpv is not None else None
        ds_kept = self.query.new_empty(kept) if self.dpk is not None else None
        count = max(1, min(self.batch, TILE // max(1, self.hkv * rows * self.columns)))
        block = max(1, min(self.tq, TILE // max(1, self.hkv * self.groups * self.columns)))
        keys = self.query.new_empty(count, self.hkv, self.columns, self.dim + 1)
        keys[..., -1] = 1.0
        values = self.query.new_empty(count, self.hkv, self.columns, self.dim)
        # Scores become P, and dP becomes dS, in place.
        tiles = self.query.new_empty(2, count * self.hkv * self.groups * block * self.columns)
        for first in range(0, self.batch, count):
            b = slice(first, min(first + count, self.batch))
            k, v = self._load(b, keys, values)
            dk = dv = None
            for start in range(0, self.tq, block):
                t = slice(start, min(start + block, self.tq))
                q, do, p, ds = self._tile(b, t, k, v, tiles)
                for store, tile in ((p_kept, p), (ds_kept, ds)):
                    if store is not None:
                        store[:, b, :, t] = self._rows(tile, b, t)[..., : self.prompts].transpose(0, 1)
                if self.dq is not None:
                    self.dq[b, :, :, t] = self._rows(self._product(ds, k, self.scale), b, t)[..., :-1]
                if self.dk is not None:
                    dk = _accumulate(dk, self._product(ds.transpose(1, 2), q, self.scale))
                if self.dv is not None:
                    dv = _accumulate(dv, self._product(p.transpose(1, 2), do))
            for grad, total in ((self.dk, dk), (self.dv, dv)):
                if grad is not None and total is not None:
                    grad[b] = total.view(-1, self.hkv, *total.shape[1:])[:, :, self.prompts :, : self.dim]
        self._reduce(self.dpv, p_kept, self.grad_out)
        self._reduce(self.dpk, ds_kept, self.query, self.scale)

    def _rows(self, tile: Tensor, b: slice, t: slice) -> Tensor:
        """``[S*Hkv, G*rows, X]`` of a tile as ``[S,Hkv,G,rows,X]``."""
        return tile.view(b.stop - b.start, self.hkv, self.groups, t.stop - t.start, -1)

    def _flat(self, x: Tensor, b: slice, t: slice) -> Tensor:
        """Rows ``[S,Hkv,G,rows,...]`` of a tile as ``[S*Hkv, G*rows, ...]``."""
        return x[b, :, :, t].flatten(2, 3).flatten(0, 1)

    @staticmethod
    def _product(left: Tensor, right: Tensor, factor: float = 1.0, out: Tensor | None = None) -> Tensor:
        """``factor * left @ right``, scaled before the one rounding."""
        if out is not None:
            out = out[: len(left) * left.shape[1] * right.shape[2]].view(len(left), left.shape[1], right.shape[2])
        if not factor:
            # With alpha = 0 PyTorch's half-precision products leave what uninitialised memory held.
            left, factor = torch.zeros_like(left), 1.0
        return torch.baddbmm(left.new_zeros(()), left, right, beta=0, alpha=factor, out=out)

    def _load(self, b: slice, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (with a column of ones for the centring) and values of a tile; a shared prompt is copied once."""
        count = b.stop - b.start
        if len(self.prompt_key) > 1 or b.start == 0:
            g = slice(None) if len(self.prompt_key) == 1 else b if self.prompt_index is None else self.prompt_index[b]
            keys[:count, :, : self.prompts, :-1] = self.prompt_key[g]
            values[:count, :, : self.prompts] = self.prompt_value[g]
        if self.instance:
            keys[:count, :, self.prompts :, :-1], values[:count, :, self.prompts :] = self.key[b], self.value[b]
        return keys[:count].flatten(0, 1), values[:count].flatten(0, 1)

    def _tile(
        self, b: slice, t: slice, keys: Tensor, values: Tensor, tiles: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query rows, dO, P and dS of one tile, each ``[S*Hkv, G*rows, ...]``."""
        q, do = self._flat(self.query, b, t), self._flat(self.grad_out, b, t)
        dp = self._product(do, values.transpose(1, 2), out=tiles[1])
        if self.instance:
            q = torch.cat([q, self._centring(b, t)], dim=-1)
            scores = self._product(q, keys.transpose(1, 2), self.scale, tiles[0])
            return q, do, *self._softmax_backward(b, t, scores, dp)
        return q, do, *self._prompt_backward(b, t, q, do, keys[..., :-1], dp)

    def _centring(self, b: slice, t: slice) -> Tensor:
        """The column of the query that subtracts c from a row's scaled scores, where the keys' column is 1."""
        lse = self._flat(self.level, b, t).unsqueeze(-1)
        centre = lse.masked_fill(lse == -torch.inf, 0.0) - 2 / 3 * math.log(self.prompts + self.tk)
        # A tiny scale must not overflow: any finite centre gives the same softmax.
        limit = torch.finfo(self.query.dtype).max / 2
        column = centre.clamp(-limit, limit) * (-1 / self.scale if self.scale else 0.0)
        return column.clamp(-limit, limit).to(self.query.dtype)

    def _prompt_backward(
        self, b: slice, t: slice, q: Tensor, do: Tensor, keys: Tensor, dp: Tensor
    ) -> tuple[Tensor, Tensor]:
        """P and dS of a tile that holds the prompt columns alone: no softmax to rescale them, so scores are float32."""
        lse = self._flat(self.lse, b, t).unsqueeze(-1)
        delta = (do.to(lse.dtype) * self._flat(self.out, b, t)).sum(-1, keepdim=True)
        if self.grad_lse is not None:
            delta = delta - self._flat(self.grad_lse, b, t).unsqueeze(-1)
        scores = self._product(q.to(lse.dtype), keys.to(lse.dtype).transpose(1, 2), self.scale)
        p = scores.sub_(lse).exp_()
        ds = dp.to(lse.dtype).sub_(delta).mul_(p)
        return p.to(q.dtype), ds.to(q.dtype)

    def _softmax_backward(self, b: slice, t: slice, scores: Tensor, dp: Tensor) -> tuple[Tensor, Tensor]:
        """P and dS of a tile that holds every column of its rows."""
        if self.mask is not None:
            mask = self.mask[b] if len(self.mask) > 1 else self.mask
            self._rows(scores, b, t).add_(mask[:, :, :, t] if mask.shape[3] > 1 else mask)
        p = torch.softmax(scores, dim=-1, out=scores)
        if self.mask is not None and not self.prompts:
            p.masked_fill_(self._flat(self.lse, b, t).unsqueeze(-1) == -torch.inf, 0.0)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=dp)
        if self.grad_lse is not None:
            ds.addcmul_(p, self._flat(self.grad_lse, b, t).unsqueeze(-1).to(p.dtype))
        return p, ds

    def _reduce(self, grad: Tensor | None, kept: Tensor | None, rows: Tensor, factor: float = 1.0) -> None:
        """Sum over samples and rows in one matrix product a prompt: float32 accumulation, one rounding to its dtype."""
        if grad is None or kept is None:
            return
        for g, samples in _prompt_groups(self.prompt_index, len(grad), self.batch):
            left, right = (x[:, samples].flatten(1, 3).to(grad.dtype) for x in (kept, rows.transpose(0, 1)))
            grad[g] = self._product(left.transpose(1, 2), right, factor)
