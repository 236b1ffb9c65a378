# SPDX-License-Identifier: Apache-2.0
"""Finds a layer's key and value projections in one recorded forward, and proves them on the recorded rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastprompt.nn.joint_prompts import Linear, Plain

KEY_NAMES = ("k_proj", "key", "to_k", "k")


@dataclass
class Projection:
    """Rows ``[P,C]`` to heads ``[H,P,D]``: columns of a linear layer's output, then an optional per-head norm."""

    linear: nn.Module
    columns: Tensor | None
    heads: int
    norm: nn.Module | None = None
    norm_before_split: bool = False

    def __call__(self, rows: Tensor) -> Tensor:
        """Heads ``[H,P,D]`` of rows ``[P,C]``."""
        return self.split(self.linear(rows))

    def split(self, x: Tensor) -> Tensor:
        """Heads ``[H,P,D]`` of the linear layer's output."""
        if self.columns is not None:
            # Moved once: a copy to a GPU waits for it.
            self.columns = self.columns.to(x.device)
            x = x[..., self.columns]
        if self.norm is not None and self.norm_before_split:
            x = self.norm(x)
        x = x.unflatten(-1, (self.heads, -1))
        if self.norm is not None and not self.norm_before_split:
            x = self.norm(x)
        return x.transpose(-2, -3)


@dataclass
class Projections:
    """The modules of a layer that turn rows at its input into keys and values."""

    before: list[nn.Module]
    key: Projection
    value: Projection
    rotated: bool

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[Hkv,P,D]`` of rows ``[P,C]`` at the layer's input, as the layer computes them.

        Keys are not rotated: prompts have no position, like the class and register tokens of a vision tower.
        """
        return self.heads(self.norm(rows))

    def norm(self, rows: Tensor) -> Tensor:
        """Rows at the layer's input as its attention reads them."""
        for module in self.before:
            rows = module(rows)
        return rows

    def heads(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[...,Hkv,P,D]`` of rows ``[...,P,C]`` at the attention's input."""
        if self.key.linear is self.value.linear:
            both = self.key.linear(rows)
            return self.key.split(both), self.value.split(both)
        return self.key(rows), self.value(rows)

    def plain(self) -> Plain | None:
        """The same as tensors; None where a module is more than its frozen tensors say: of another class, trained,
        hooked, wrapped, or spread over devices.
        """
        norm, key, value = next(iter(self.before), None), self.key, self.value
        linears = (key.linear, value.linear)
        modules = [*self.before, *linears]
        if len(self.before) > 1 or key.norm is not None or value.norm is not None or key.heads != value.heads:
            return None
        if not (norm is None or type(norm) is nn.LayerNorm) or any(type(x) is not nn.Linear for x in linears):
            return None
        if any(not _is_plain(module) for module in modules):
            return None
        found = [cast(nn.Linear, x) for x in linears]
        pair = [Linear(x.weight, x.bias, part.columns) for x, part in zip(found, (key, value), strict=True)]
        return Plain(pair[0], pair[1], key.heads, None if norm is None else (norm.weight, norm.bias, norm.eps))

    def weights(self) -> tuple[Tensor, ...]:
        """The tensors that a call reads."""
        modules = (*self.before, self.key.linear, self.key.norm, self.value.linear, self.value.norm)
        return tuple(p for m in modules if m is not None for p in m.parameters())


def _is_plain(module: nn.Module) -> bool:
    """Whether a module does what its class says, with frozen weights that are there."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module)
    shape = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else module.normalized_shape
    # Anything but a plain tensor is quantised, sharded or offloaded; of a sharded one, what is there has another shape.
    there = all(
        x is None or (type(x) is nn.Parameter and x.is_floating_point() and not (x.requires_grad or x.is_meta))
        for x in (module.weight, module.bias)
    )
    return there and not hooked and (module.weight is None or module.weight.shape == shape)


class Missing(Exception):
    """What a layer lacks."""


class Recorder:
    """The tensors of one layer during the recorded forward; kept only until the layer returns."""

    def __init__(self, layer: nn.Module, attention: nn.Module):
        self.layer, self.attention = layer, attention
        self.calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        self.input: Tensor | None = None
        self.qkv: tuple[Tensor, Tensor, Tensor] | None = None

    def hooks(self, done, inside: bool) -> list:
        """Hooks on the layer, and on everything inside it where projections are asked for."""

        def enter(module, args, kwargs):
            self.input = first_tensor(args, kwargs)

        def leave(module, args, output):
            done()
            self.calls.clear()
            self.input = self.qkv = None

        def called(module, args, kwargs, output):
            x, y = first_tensor(args, kwargs), first_tensor(output if isinstance(output, tuple) else (output,), {})
            if x is not None and y is not None and x is not y:
                self.calls.append((module, x, y))

        inner = [
            m.register_forward_hook(called, with_kwargs=True)
            for m in self.layer.modules()
            if inside and m is not self.layer
        ]
        return [
            self.layer.register_forward_pre_hook(enter, with_kwargs=True),
            *inner,
            self.layer.register_forward_hook(leave),
        ]

    def attended(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """The attention function was called."""
        self.qkv = (query, key, value)

    def attended_to(self) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's input, and the keys and values ``[1,Hkv,T,D]`` that its attention was called with."""
        if self.qkv is None or self.input is None:
            raise Missing("its attention never reached the attention interface")
        _, key, value = self.qkv
        if key.shape != value.shape:
            raise Missing(f"its keys {list(key.shape)} and values {list(value.shape)} differ in shape")
        return self.input, key, value

    def projections(self) -> Projections:
        """The projections that the recording shows, verified on the recorded rows."""
        entered, key, value = self.attended_to()
        value_found = self._source(value)
        if value_found is None:
            raise Missing("no module's output is the value passed to attention")
        key_found = self._source(key)
        rotated = key_found is None
        if key_found is None:
            key_found = self._rotated_source(value_found[0], key)
        key_projection, source = key_found
        projections = Projections(self._path(source), key_projection, value_found[0], rotated)
        rows = _rows(entered)
        _verify_prompts(projections, rows[:2])
        _verify(projections, rows, key, value)
        return projections

    def _source(self, target: Tensor) -> tuple[Projection, Tensor] | None:
        """The projection whose output memory ``target [B,H,T,D]`` views, and the rows it read."""
        for position in range(len(self.calls) - 1, -1, -1):
            module, x, y = self.calls[position]
            if not _same_memory(y, target) or isinstance(module, type(self.attention)):
                continue
            if isinstance(module, nn.Linear) or y.shape[-1] != x.shape[-1]:
                return Projection(module, _columns(target, y), target.shape[1]), x
            found = self._linear_behind(position)
            if found is None:
                return Projection(module, _columns(target, y), target.shape[1]), x
            linear, rows = found
            flat = x.dim() == 3
            return Projection(linear, None, target.shape[1], norm=module, norm_before_split=flat), rows
        return None

    def _linear_behind(self, position: int) -> tuple[nn.Module, Tensor] | None:
        """The call of the attention's own before ``position`` whose output memory that call's input views."""
        _, x, _ = self.calls[position]
        own = set(self.attention.modules())
        for module, rows, y in reversed(self.calls[:position]):
            if _same_memory(y, x) and module in own:
                return module, rows
        return None

    def _rotated_source(self, value: Projection, key: Tensor) -> tuple[Projection, Tensor]:
        """The key projection where a rotation hides it: one named for keys, or a part of the values' own."""
        names = {m: n for n, m in self.attention.named_modules()}
        for module, x, y in self.calls:
            if names.get(module, "").rpartition(".")[2] in KEY_NAMES and y.shape[-1] == key.shape[1] * key.shape[3]:
                projection = Projection(module, None, key.shape[1])
                for norm, a, b in self.calls:
                    if _same_memory(a, y) and norm is not module and a.shape[-1] == b.shape[-1]:
                        projection.norm, projection.norm_before_split = norm, a.dim() == 3
                return projection, x
        if value.columns is not None:
            # A fused projection, [q; k; v] as a whole or a head: keys stand before values, and rotation keeps norms.
            x, y = next((x, y) for module, x, y in reversed(self.calls) if module is value.linear)
            for shift in (value.heads * key.shape[3], key.shape[3]):
                projection = Projection(value.linear, value.columns - shift, key.shape[1])
                found = projection.split(_rows(y)).norm(dim=-1)
                if _near(found, key[0].norm(dim=-1), rotated=True):
                    return projection, x
        linears = ", ".join(n for m, n in names.items() if isinstance(m, nn.Linear)) or "none"
        raise Missing(f"keys are rotated and no projection is named k_proj, key, to_k or k (linear layers: {linears})")

    def _path(self, rows: Tensor) -> list[nn.Module]:
        """The modules from the layer's input to ``rows``, in order."""
        path: list[nn.Module] = []
        while rows is not self.input:
            for module, x, y in reversed(self.calls):
                if y is rows and module not in path:
                    path.insert(0, module)
                    rows = x
                    break
            else:
                raise Missing("something that is no module stands between the layer's input and its attention")
        return path


def _verify(projections: Projections, rows: Tensor, key: Tensor, value: Tensor) -> None:
    """The projections give the recorded keys (up to rotation, which keeps norms) and values."""
    found_key, found_value = projections(rows)
    pairs = [("values", found_value, value[0])]
    pairs.append(
        ("key norms", found_key.norm(dim=-1), key[0].norm(dim=-1))
        if projections.rotated
        else ("keys", found_key, key[0])
    )
    for what, found, recorded in pairs:
        if not _near(found, recorded, what == "key norms"):
            difference = (
                (found.float() - recorded.float()).abs().max().item() if found.shape == recorded.shape else None
            )
            raise Missing(f"projections found give other {what} than the layer (difference {difference})")


def _verify_prompts(projections: Projections, rows: Tensor) -> None:
    """Rows by themselves give keys and values of their own, with gradients, as prompts need; packed weights may not."""
    fix = "on a quantised base use PrefixKV, which needs no projection, or weights that are not quantised"
    rows = rows.clone().requires_grad_()
    try:
        with torch.enable_grad():
            found = projections(rows)
            # Operations without a derivative may claim one, and then pass none on.
            passed = [x.requires_grad and _gradient(x, rows) is not None for x in found]
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise Missing(f"its projections cannot be called on rows [P,C] ({what}); {fix}") from error
    for what, x, reached in zip(("key", "value"), found, passed, strict=True):
        if x.shape[-2] != len(rows):
            raise Missing(f"its {what} projection gives {x.shape[-2]} rows for {len(rows)}; {fix}")
        if not reached:
            raise Missing(f"its {what} projection passes no gradient to its input; {fix}")


def _gradient(x: Tensor, rows: Tensor) -> Tensor | None:
    return torch.autograd.grad(x.sum(), rows, retain_graph=True, allow_unused=True)[0]


def _near(found: Tensor, recorded: Tensor, rotated: bool = False) -> bool:
    """Equal up to the rounding of a projection, and of a rotation, which models compute in float32."""
    if found.shape != recorded.shape:
        return False
    eps = max(torch.finfo(recorded.dtype).eps, torch.finfo(torch.float32).eps if rotated else 0.0)
    limit = 64 * eps * (recorded.float().abs().max().item() or 1.0)
    return (found.float() - recorded.float()).abs().max().item() <= limit


def _rows(x: Tensor) -> Tensor:
    """The rows of the one sample: ``[T,C]`` of ``[1,T,C]``, or of ``[T,C]`` where samples are packed."""
    return x[0] if x.dim() == 3 else x


def _columns(target: Tensor, source: Tensor) -> Tensor | None:
    """The columns of ``source [B,T,X]`` that are the heads of ``target [B,H,T,D]``; None if all, in order."""
    heads, dim = target.shape[1], target.shape[3]
    first = int(target.storage_offset()) - int(source.storage_offset())
    columns = first + torch.arange(heads)[:, None] * target.stride(1) + torch.arange(dim)[None] * target.stride(3)
    columns = columns.flatten()
    if source.shape[-1] == heads * dim and torch.equal(columns, torch.arange(heads * dim)):
        return None
    return columns


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def first_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    """The hidden states that a module is called with: those by name, or the first tensor."""
    values = (*args, kwargs["hidden_states"]) if "hidden_states" in kwargs else (*args, *kwargs.values())
    return next((x for x in values if isinstance(x, Tensor)), None)
