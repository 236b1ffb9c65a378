# SPDX-License-Identifier: Apache-2.0
"""A vision tower that runs once, frozen, and then again for the lanes of many tasks beside what it computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from fastprompt.errors import AttachError, UnsupportedModelError
from fastprompt.hf.attention import CHILD, NAME, register
from fastprompt.hf.holds import Freeze, OwnConfigs
from fastprompt.hf.outputs import find_outputs
from fastprompt.hf.sites import Site, Tower, choose_tower, find_sites, sample_input
from fastprompt.nn.lanes import Lane, LaneAttention, LanePass, StreamEnds


class LaneTower:
    """The vision tower of a model, frozen and in eval mode, until it is let go of.

    Attributes:
        model: The model.
        tower: Its vision tower.
        sites: The tower's layers.

    Raises:
        TypeError: not a transformers model.
        AttachError: the tower already holds prompts.
        UnsupportedModelError: it has no class token, rotates keys, or hides its projections.
    """

    def __init__(self, model: PreTrainedModel):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model: got {type(model).__name__}, expected a transformers PreTrainedModel")
        self.model, self.tower = model, choose_tower(model, "vision")
        if any(hasattr(a, CHILD) for a in self.tower.attentions):
            raise AttachError("model: its vision tower already holds prompts; detach the other handle first")
        self._modes = [(m, m.training) for m in model.modules()]
        self._hooks: list = []
        self._children: list[LaneAttention] = []
        configs, freeze = OwnConfigs(model), Freeze(model.parameters())
        self._holds: tuple[OwnConfigs, Freeze] | None = (configs, freeze)
        try:
            register()
            model.eval()
            configs.switch(self.tower.module, NAME)
            self.sites: list[Site] = find_sites(self.tower)
            self._behind = _check_tower(self.tower, self.sites)
            freeze.apply()
            outputs = {x.attention: x.output for x in find_outputs(self.tower) if x.output is not None}
            for site in self.sites:
                self._install(site, outputs[site.attention], LaneAttention(last=site is self.sites[-1]).eval())
        except BaseException:
            self.release()
            raise

    def _install(self, site: Site, output: nn.Module, child: LaneAttention) -> None:
        site.attention.add_module(CHILD, child)
        self._children.append(child)
        self._hooks += [
            site.layer.register_forward_pre_hook(child.begin, with_kwargs=True),
            site.attention.register_forward_pre_hook(child.enter, with_kwargs=True),
            # Some attention modules end in front of their output projection.
            output.register_forward_hook(child.leave),
        ]

    @property
    def attached(self) -> bool:
        """Whether the model is still held."""
        return self._holds is not None

    def release(self) -> None:
        """Give the model back: outputs, modes, configs and ``requires_grad`` flags as before."""
        for hook in self._hooks:
            hook.remove()
        for module in self.tower.attentions:
            if module._modules.get(CHILD) in self._children:
                del module._modules[CHILD]
        for module, training in self._modes:
            module.training = training
        if self._holds is not None:
            configs, freeze = self._holds
            freeze.release(())
            configs.release()
        self._hooks, self._children, self._holds = [], [], None

    @contextmanager
    def stream(self, pixel_values: Tensor) -> Iterator[None]:
        """Run the frozen model on images up to its last attention; inside the context, `features` reads that."""
        for child in self._children:
            child.reads = True
        try:
            with suppress(StreamEnds), torch.no_grad():
                self.tower.module(pixel_values=pixel_values)
            for child in self._children:
                child.reads = False
            yield
        finally:
            for child in self._children:
                child.clear()

    def features(self, lanes: Sequence[Lane], prompted: Sequence[int], replace: str) -> Tensor:
        """Unit features ``[T,B,C]`` of lanes, in at least float32.

        Args:
            lanes: T tasks, one batch axis.
            prompted: The layers of their prompts.
            replace: What selects in the next layer, as in `fastprompt.MultiLane`.
        """
        entered = _hidden(self._children[0].called)
        tasks, batch, width = len(lanes), *entered[:, 0].shape
        # [T,S,C]; rows of one token: a lane is the class token of a sample in a task.
        selectors = _stack([lane.selectors for lane in lanes]).to(entered.dtype)
        keys, values = (_stack([getattr(lane, name) for lane in lanes]) for name in ("keys", "values"))
        rows = entered[:, :1].repeat(tasks, 1, 1)
        if replace == "none":
            first = LanePass(self._children[0].read(), tasks, None, None, selectors=self._norm_before(0, selectors))
            rows = torch.cat([rows, first.summaries()], dim=1)
        for i, (site, child) in enumerate(zip(self.sites, self._children, strict=True)):
            at = list(prompted).index(i) if i in prompted else None
            prompt = None if at is None else (keys[:, at], values[:, at])
            # Selectors that no later layer reads do not run through this one.
            carried = replace == "residual" and site is not self.sites[-1]
            own = None if carried or replace == "none" else self._norm_before(i, selectors)
            child.lanes = LanePass(child.read(), tasks, site.projections, prompt, own, pools=replace != "none")
            if carried:
                rows = torch.cat([rows, selectors.reshape(-1, 1, width)])
            rows = _call(site.layer, child.called, rows)
            child.lanes = None
            if carried:
                rows, selectors = rows[: tasks * batch], rows[tasks * batch :].view(tasks, -1, width)
        feature = rows[:, 0]
        for module in self._behind:
            feature = module(feature)
        feature = feature.unflatten(0, (tasks, batch))
        return normalize(feature.to(torch.promote_types(feature.dtype, torch.float32)), dim=-1)

    def _norm_before(self, layer: int, selectors: Tensor) -> Tensor:
        """Selectors as the attention of a layer would read them."""
        projections = self.sites[layer].projections
        if projections is None:
            raise RuntimeError("projections: not looked for")
        return projections.norm(selectors)


def _stack(tensors: list[Tensor]) -> Tensor:
    """One tensor of equal ones; nothing is copied for one task."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _hidden(called: tuple[tuple, dict] | None) -> Tensor:
    """What a layer was called with."""
    if called is None:
        raise RuntimeError("stream: the tower's layers did not run")
    args, kwargs = called
    return args[0] if args else kwargs["hidden_states"]


def _call(layer: nn.Module, called: tuple[tuple, dict] | None, rows: Tensor) -> Tensor:
    """Run a layer again as it was called, on other rows."""
    args, kwargs = called or ((), {})
    output = layer(rows, *args[1:], **kwargs) if args else layer(**{**kwargs, "hidden_states": rows})
    return output[0] if isinstance(output, tuple) else output


def _check_tower(tower: Tower, sites: list[Site]) -> tuple[nn.Module, ...]:
    """The norm behind the last layer, if there is one, of a tower with a class token.

    Raises:
        UnsupportedModelError: keys are rotated, images are packed, or there is no class token.
    """
    name = type(tower.module).__name__
    if any(site.packed or (site.projections is not None and site.projections.rotated) for site in sites):
        raise UnsupportedModelError(f"model: {name} packs images or rotates keys by position, and summaries have none")
    inputs = {key: torch.cat([x, -x]) for key, x in sample_input(tower).items()}
    entered: list[Tensor] = []
    left: list[Tensor] = []
    norms: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        entered.append(_hidden((args, kwargs)))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        left.append(output[0] if isinstance(output, tuple) else output)

    def follow(module: nn.Module, args: tuple, output: Any) -> None:
        read = next((x for x in args if isinstance(x, Tensor)), None)
        if left and not norms and read is not None and isinstance(output, Tensor) and output.shape == read.shape:
            if read.untyped_storage().data_ptr() == left[0].untyped_storage().data_ptr():
                norms.append(module)

    hooks = [
        tower.layers[0].register_forward_pre_hook(enter, with_kwargs=True),
        tower.layers[-1].register_forward_hook(leave),
        *(m.register_forward_hook(follow) for m in _leaves(tower)),
    ]
    try:
        with torch.no_grad():
            tower.module(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    first = entered[0][:, 0]
    if not torch.equal(first[0], first[1]):
        raise UnsupportedModelError(f"model: {name} has no class token in front, where lanes start")
    return tuple(norms)


def _leaves(tower: Tower) -> Iterator[nn.Module]:
    """Modules with weights of their own outside the layers."""
    inside = {m for layer in tower.layers for m in layer.modules()}
    for module in tower.module.modules():
        if module not in inside and any(True for _ in module.parameters(recurse=False)):
            yield module
