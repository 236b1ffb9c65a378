# SPDX-License-Identifier: Apache-2.0
"""Finds where prompts can go, by what modules do and not by what they are called.

A tower is a stack of layers with one self-attention each. One recorded forward shows, for every layer, which modules
lead from its input to its attention (the norm), which of their outputs become keys and values, and whether a norm or a
rotation follows; the projections found are then run on the recorded rows and must give the recorded keys and values.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastprompt.errors import UnsupportedModelError
from fastprompt.hf.attention import CHILD, observe

KEY_NAMES = ("k_proj", "key", "to_k", "k")
KINDS = {"pixel_values": "vision", "input_ids": "text"}


@dataclass
class Tower:
    """A stack of transformer layers with its prompt places."""

    name: str
    kind: str
    module: nn.Module
    layers: list[nn.Module]
    attentions: list[nn.Module]


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
            x = x[..., self.columns.to(x.device)]
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
        for module in self.before:
            rows = module(rows)
        if self.key.linear is self.value.linear:
            both = self.key.linear(rows)
            return self.key.split(both), self.value.split(both)
        return self.key(rows), self.value(rows)

    def weights(self) -> tuple[Tensor, ...]:
        """The tensors that a call reads."""
        modules = (*self.before, self.key.linear, self.key.norm, self.value.linear, self.value.norm)
        return tuple(p for m in modules if m is not None for p in m.parameters())


@dataclass(eq=False)
class Site:
    """One layer that can hold a prompt."""

    index: int
    layer: nn.Module
    attention: nn.Module
    width: int
    heads: int
    head_dim: int
    projections: Projections | None = None
    recorded: tuple[Tensor, Tensor] | None = None
    patch_values: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of rows at the layer's input, outside autocast."""
        return next(p.dtype for p in self.layer.parameters() if p.is_floating_point())

    @property
    def checkpointed(self) -> bool:
        """The layer computes its forward again in the backward pass."""
        return self.layer.training and bool(getattr(self.layer, "gradient_checkpointing", False))

    def weights(self) -> tuple[Tensor, ...]:
        """The tensors that `project` reads."""
        return () if self.projections is None else self.projections.weights()

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[Hkv,P,D]`` of rows ``[P,C]`` at the layer's input."""
        if self.projections is None:
            raise RuntimeError("projections: not looked for; a recipe that projects rows sets `projects = True`")
        return self.projections(rows)

    def fingerprint(self) -> Tensor | None:
        """A frozen weight that tells this layer from those of other models; None where all are packed."""
        if self.projections is not None:
            return next(self.projections.key.linear.parameters())
        own = [(n.split("."), p) for n, p in self.attention.named_parameters()]
        weights = [(n, p) for n, p in own if CHILD not in n and p.is_floating_point() and p.dim() > 1]
        keys = [p for n, p in weights if n[-2:-1] and n[-2] in (*KEY_NAMES, "qkv")]
        return next(iter([*keys, *(p for _, p in weights)]), None)


def find_towers(model: nn.Module) -> list[Tower]:
    """Every stack of layers with one self-attention a layer, in module order."""
    names = {module: name for name, module in model.named_modules()}
    stacks: dict[str, dict[int, list[nn.Module]]] = {}
    for module, name in names.items():
        if not hasattr(module, "is_causal") or not hasattr(module, "config"):
            continue
        parts = name.split(".")
        for i, part in enumerate(parts):
            prefix = ".".join(parts[:i])
            if part.isdigit() and isinstance(model.get_submodule(prefix), nn.ModuleList):
                stacks.setdefault(prefix, {}).setdefault(int(part), []).append(module)
                break
    towers = []
    for prefix, by_layer in stacks.items():
        stack = list(cast(nn.ModuleList, model.get_submodule(prefix)))
        owner = _owner(model, prefix)
        kind = KINDS.get(getattr(owner, "main_input_name", ""), "")
        if kind and len(by_layer) == len(stack) and all(len(found) == 1 for found in by_layer.values()):
            attentions = [by_layer[i][0] for i in range(len(stack))]
            towers.append(Tower(names[owner], kind, owner, stack, attentions))
    return towers


def _owner(model: nn.Module, path: str) -> nn.Module:
    """The nearest module above ``path`` that can be called with a model input of its own."""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if getattr(module, "main_input_name", None) in inspect.signature(module.forward).parameters:
            return module
    return model


def choose_tower(model: nn.Module, tower: str | None) -> Tower:
    """The tower asked for; the only one if none is.

    Raises:
        ValueError: ``tower`` is unknown, absent, or needed because the model has several.
        UnsupportedModelError: the model has no stack of layers that transformers' attention interface reaches.
    """
    if tower not in (None, "vision", "text"):
        raise ValueError(f"tower: got {tower!r}, expected 'vision', 'text' or None")
    towers = find_towers(model)
    if not towers:
        candidates = [name for name, m in model.named_modules() if "attention" in type(m).__name__.lower()]
        raise UnsupportedModelError(
            f"model: {type(model).__name__} has no stack of layers with one self-attention each that goes through "
            f"transformers' attention interface (attributes `is_causal` and `config`). Attention-like modules: "
            f"{', '.join(candidates[:5]) or 'none'}"
        )
    found = [t for t in towers if tower is None or t.kind == tower]
    if len(found) == 1:
        return found[0]
    kinds = ", ".join(f"{t.kind} ({t.name or type(t.module).__name__})" for t in towers)
    if not found:
        raise ValueError(f"tower: got {tower!r}, but {type(model).__name__} has {kinds}")
    fix = "pass tower='vision' or tower='text'" if tower is None else "attach to the submodule instead"
    raise ValueError(f"tower: got {tower!r}, ambiguous for {type(model).__name__}, which has {kinds}; {fix}")


def find_sites(tower: Tower, *, projects: bool = True, tokens: Sequence[int] | None = None) -> list[Site]:
    """Run the tower once on a small input and find every layer's attention.

    Args:
        tower: The tower.
        projects: Also find every layer's projections.
        tokens: Run a text tower on these, and keep the keys and values ``[Hkv,P,D]`` of every layer.

    Raises:
        UnsupportedModelError: lists every layer whose keys and values could not be found, and what is missing.
    """
    sites: list[Site] = []
    problems: list[str] = []
    hooks = []

    def finish(index: int, recorder: _Recorder) -> None:
        try:
            sites.append(recorder.site(index, projects, tokens is not None))
        except _Missing as missing:
            problems.append(f"layer {index} ({type(recorder.attention).__name__}): {missing}")

    modes = {m: m.training for m in tower.module.modules()}
    try:
        tower.module.eval()
        recorders = []
        for index, (layer, module) in enumerate(zip(tower.layers, tower.attentions, strict=True)):
            recorder = _Recorder(layer, module)
            recorders.append(recorder)
            hooks += recorder.hooks(lambda i=index, r=recorder: finish(i, r))
        by_attention = {r.attention: r for r in recorders}

        def observer(module, query, key, value):
            if module in by_attention:
                by_attention[module].attended(query, key, value)

        with torch.no_grad(), observe(observer), torch.autocast(_device(tower.module).type, enabled=False):
            tower.module(**_sample_input(tower, tokens))
    finally:
        for hook in hooks:
            hook.remove()
        for m, training in modes.items():
            m.training = training
    if len(sites) + len(problems) < len(tower.layers):
        problems.append("its layers did not all run in one forward of the tower")
    if problems:
        raise UnsupportedModelError(
            f"model: {type(tower.module).__name__} cannot hold prompts; missing:\n  " + "\n  ".join(problems)
        )
    values = _patch_values(tower.module.config) if tower.kind == "vision" else None
    for site in sites:
        site.patch_values = values
    return sites


class _Missing(Exception):
    """What a layer lacks."""


class _Recorder:
    """The tensors of one layer during the recorded forward; kept only until the layer returns."""

    def __init__(self, layer: nn.Module, attention: nn.Module):
        self.layer, self.attention = layer, attention
        self.calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        self.input: Tensor | None = None
        self.qkv: tuple[Tensor, Tensor, Tensor] | None = None

    def hooks(self, done) -> list:
        """Hooks on the layer and everything inside it."""

        def enter(module, args, kwargs):
            self.input = _first_tensor(args, kwargs)

        def leave(module, args, output):
            done()
            self.calls.clear()
            self.input = self.qkv = None

        def called(module, args, kwargs, output):
            x, y = _first_tensor(args, kwargs), _first_tensor(output if isinstance(output, tuple) else (output,), {})
            if x is not None and y is not None and x is not y:
                self.calls.append((module, x, y))

        inner = [m.register_forward_hook(called, with_kwargs=True) for m in self.layer.modules() if m is not self.layer]
        return [
            self.layer.register_forward_pre_hook(enter, with_kwargs=True),
            *inner,
            self.layer.register_forward_hook(leave),
        ]

    def attended(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """The attention function was called."""
        self.qkv = (query, key, value)

    def site(self, index: int, projects: bool, keep: bool) -> Site:
        """What the recording shows, verified on the recorded rows."""
        if self.qkv is None or self.input is None:
            raise _Missing("its attention never reached the attention interface")
        _, key, value = self.qkv
        if key.shape != value.shape:
            raise _Missing(f"its keys {list(key.shape)} and values {list(value.shape)} differ in shape")
        site = Site(index, self.layer, self.attention, self.input.shape[-1], key.shape[1], key.shape[3])
        if projects:
            site.projections = self._projections(key, value)
            self._verify(site.projections, key, value)
        if keep:
            site.recorded = (key[0].clone(), value[0].clone())
        return site

    def _projections(self, key: Tensor, value: Tensor) -> Projections:
        value_found = self._source(value)
        if value_found is None:
            raise _Missing("no module's output is the value passed to attention")
        key_found = self._source(key)
        rotated = key_found is None
        if key_found is None:
            key_found = self._rotated_source(value_found[0], key)
        key_projection, rows = key_found
        return Projections(self._path(rows), key_projection, value_found[0], rotated)

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
                return None
            linear, rows = found
            flat = x.dim() == 3
            return Projection(linear, None, target.shape[1], norm=module, norm_before_split=flat), rows
        return None

    def _linear_behind(self, position: int) -> tuple[nn.Module, Tensor] | None:
        """The call before ``position`` whose output memory that call's input views."""
        _, x, _ = self.calls[position]
        for module, rows, y in reversed(self.calls[:position]):
            if _same_memory(y, x):
                return module, rows
        return None

    def _rotated_source(self, value: Projection, key: Tensor) -> tuple[Projection, Tensor]:
        """The key projection where a rotation hides it: a sibling of the value's that is named for keys."""
        siblings: dict[nn.Module, str] = {m: n for n, m in self.attention.named_modules() if isinstance(m, nn.Linear)}
        for module, x, y in self.calls:
            name = siblings.get(module, "").rpartition(".")[2]
            if name in KEY_NAMES and y.shape[-1] == key.shape[1] * key.shape[3]:
                projection = Projection(module, None, key.shape[1])
                for norm, a, b in self.calls:
                    if _same_memory(a, y) and norm is not module and a.shape[-1] == b.shape[-1]:
                        projection.norm, projection.norm_before_split = norm, a.dim() == 3
                return projection, x
        linears = ", ".join(siblings.values()) or "none"
        raise _Missing(f"keys are rotated and no projection is named k_proj, key, to_k or k (linear layers: {linears})")

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
                raise _Missing("something that is no module stands between the layer's input and its attention")
        return path

    def _verify(self, projections: Projections, key: Tensor, value: Tensor) -> None:
        """The projections give the recorded keys (up to rotation, which keeps norms) and values."""
        if self.input is None:
            raise _Missing("its input was not recorded")
        found_key, found_value = projections(self.input[0])
        pairs = [("values", found_value, value[0])]
        pairs.append(
            ("key norms", found_key.norm(dim=-1), key[0].norm(dim=-1))
            if projections.rotated
            else ("keys", found_key, key[0])
        )
        for what, found, recorded in pairs:
            scale = recorded.float().abs().max().item() or 1.0
            eps = torch.finfo(recorded.dtype).eps
            error = (found.float() - recorded.float()).abs().max().item() if found.shape == recorded.shape else None
            if error is None or error > 64 * eps * scale:
                raise _Missing(f"projections found give other {what} than the layer (difference {error})")


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


def _first_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    values = (*args, kwargs["hidden_states"]) if "hidden_states" in kwargs else (*args, *kwargs.values())
    return next((x for x in values if isinstance(x, Tensor)), None)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _sample_input(tower: Tower, tokens: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The smallest input that runs the tower: one image of the config's size, or eight tokens if none are given."""
    config, weight = tower.module.config, next(tower.module.parameters())
    if tower.kind == "text":
        return {"input_ids": torch.tensor([tokens or range(1, 9)], device=weight.device)}
    if tokens is not None:
        raise ValueError("init: token ids need a text tower, but this one is vision; use init='normal'")
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if size is None:
        raise UnsupportedModelError(f"model: the config of {type(tower.module).__name__} has no `image_size`")
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, channels, height, width, generator=generator)
    return {"pixel_values": pixels.to(weight.device, weight.dtype)}


def _patch_values(config: object) -> int | None:
    """Numbers in one image patch."""
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return None
    height, width = (patch, patch) if isinstance(patch, int) else tuple(patch)
    return height * width * getattr(config, "num_channels", 3)
