# SPDX-License-Identifier: Apache-2.0
"""Attach prompts to a transformers model in place, and take them off without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprompt.errors import AttachError
from fastprompt.hf.attention import CHILD, NAME, dropout_fields, register
from fastprompt.hf.diffusion import install_diffused
from fastprompt.hf.holds import Freeze, OwnConfigs
from fastprompt.hf.outputs import attention_towers, find_outputs
from fastprompt.hf.sites import Tower, choose_tower, find_sites
from fastprompt.hf.tokens import install_rows, reach_checkpointed
from fastprompt.nn.diffused import DiffusedPrompt, JointKeys
from fastprompt.nn.joint_prompts import JointPrompts
from fastprompt.nn.prefix import PrefixEncoder
from fastprompt.nn.prompts import LayerPrompt


def attach(model: PreTrainedModel, config: Any, *, tower: str | None = None, train: Sequence[str] = ()) -> Handle:
    """Freeze ``model`` and add the prompts of a recipe, in place; the model stays its own class.

    The model gets its own copy of its config first, so no other model built from the same config is affected.

    Args:
        model: Any transformers model whose attention goes through the attention interface; `APT` needs no interface,
            only attention with layers of its own for queries, keys and values and a linear layer behind it.
        config: A recipe, e.g. ``fastprompt.VPT(length=50)``.
        tower: ``"vision"`` or ``"text"``; required where the model has several towers. Each may have a handle of its
            own; they are detached in any order. For `APT` also ``"joint"``: layers that read two modalities in one
            call (ViLT, LXMERT, BridgeTower, a Q-Former).
        train: Name patterns (``fnmatch``; a pattern also names everything below it) of base parameters that stay
            trainable, e.g. ``("classifier",)``. They are saved with the prompts, and put back by ``detach``.

    Returns:
        A `Handle`, also a context manager that detaches.

    Raises:
        AttachError: prompts are already attached to these modules.
        UnsupportedModelError: lists the modules that cannot hold prompts and what each is missing. A quantised base
            may lack projections that prompts can be run through; `PrefixKV` needs none.
        ValueError: ambiguous tower, attention dropout > 0, a pattern that matches nothing.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> import fastprompt
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=32, patch_size=16)
        >>> handle = fastprompt.attach(ViTModel(config), fastprompt.VPT(length=4))
        >>> [tuple(p.shape) for p in handle.parameters()]
        [(4, 32), (4, 32)]
        >>> handle.detach()
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, expected a transformers PreTrainedModel")
    if isinstance(config, type) or not callable(getattr(config, "build", None)):
        raise TypeError(f"config: got {config!r}, expected a recipe such as fastprompt.VPT(length=50)")
    patterns = _patterns(train)
    target = choose_tower(model, tower, attention_towers(model) if config.outputs else None)
    if config.kind not in (None, target.kind):
        raise ValueError(
            f"config: {type(config).__name__} is for {config.kind} towers, but this tower is {target.kind}"
        )
    attached = [a for a in target.attentions if hasattr(a, CHILD)]
    if attached:
        raise AttachError(
            f"model: {len(attached)} attention modules of this {target.kind} tower already hold prompts; detach the "
            "first handle before attaching another"
        )
    # Prompts behind attention leave its dropout alone.
    dropout = {} if config.outputs else dropout_fields(target.module.config)
    if dropout:
        raise ValueError(
            "model: attention dropout is on, which prompts inside attention do not draw; set "
            + ", ".join(f"config.{name} = 0.0 (got {value})" for name, value in dropout.items())
            + " before the model is built or loaded, which fixes it in its modules"
        )
    handle = Handle(model, config, target)
    try:
        handle._attach(patterns)
    except BaseException:
        handle._restore()
        raise
    return handle


def _patterns(train: Sequence[str]) -> tuple[str, ...]:
    patterns = (train,) if isinstance(train, str) else tuple(train) if isinstance(train, Sequence) else (None,)
    if any(not isinstance(p, str) or not p for p in patterns):
        raise ValueError(f"train: got {train!r}, expected non-empty name patterns such as ('classifier',)")
    return patterns


def _match(patterns: tuple[str, ...], base: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The base parameters that patterns name, in the model's order."""
    found = set()
    for pattern in patterns:
        names = [n for n in base if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")]
        if not names:
            tops = sorted({n.split(".")[0] for n in base})
            raise ValueError(f"train: pattern {pattern!r} matches no parameter; top-level names: {', '.join(tops)}")
        found.update(names)
    return {n: p for n, p in base.items() if n in found}


def _check_attention(module: PreTrainedModel, args: tuple) -> None:
    """A tower whose attention was switched away would run without its prompts, silently."""
    name = module.config._attn_implementation
    if name != NAME:
        raise AttachError(
            f"model: got attention {name!r} in a tower that holds prompts, expected {NAME!r}; call "
            f"set_attn_implementation({NAME!r}), or detach the handle first"
        )


class Handle:
    """Prompts attached to a model: their parameters, saving, and the way back.

    Attributes:
        model: The model, of its own class.
        config: The recipe.
        tower: The tower that holds the prompts.
    """

    def __init__(self, model: PreTrainedModel, config: Any, tower: Tower):
        self.model, self.config, self.tower = model, config, tower
        self.train: tuple[str, ...] = ()
        self.attached = False
        self._prompts: dict[int, Any] = {}
        self._trained: dict[str, nn.Parameter] = {}
        self._originals: dict[str, Tensor] = {}
        self._freeze: Freeze | None = None
        self._configs: OwnConfigs | None = None
        self._hooks: list = []

    def _attach(self, train: tuple[str, ...]) -> None:
        register()
        self.train = train
        base = {n: p for n, p in self.model.named_parameters() if CHILD not in n.split(".")}
        self._configs = OwnConfigs(self.model)
        if self.config.outputs:
            sites = find_outputs(self.tower)
        else:
            self._configs.switch(self.tower.module, NAME)
            sites = find_sites(self.tower, projects=self.config.projects, tokens=self.config.tokens)
        self._prompts = self.config.build(sites)
        matched = _match(train, base)
        self._freeze = Freeze(base.values())
        self._freeze.apply()
        taken = [n for n, p in matched.items() if p.requires_grad]
        if taken:
            raise ValueError(f"train: another handle of this model trains {', '.join(taken)}; name them once")
        self._trained = matched
        for name, parameter in self._trained.items():
            self._originals[name] = parameter.detach().clone()
            parameter.requires_grad_(True)
        for index, prompt in self._prompts.items():
            sites[index].attention.add_module(CHILD, prompt.train(sites[index].attention.training))
        self._hooks = reach_checkpointed(self.tower)
        if self.config.outputs:
            self._hooks += install_diffused(sites)
        else:
            self._hooks += install_rows(sites)
            self._hooks.append(self.tower.module.register_forward_pre_hook(_check_attention))
        self._join()
        self._hooks += [
            self.tower.module.register_forward_pre_hook(m.begin)
            for prompt in self._prompts.values()
            for m in prompt.children()
            if isinstance(m, PrefixEncoder)
        ]
        self.sites = sites
        self.attached = True

    def _join(self) -> None:
        """Let layers compute together what their prompts' small matrices give."""
        for kind, joint in ((LayerPrompt, JointPrompts), (DiffusedPrompt, JointKeys)):
            prompts: list[Any] = [p for p in self._prompts.values() if isinstance(p, kind)]
            together = joint(prompts)
            for prompt in prompts:
                prompt.joint = together
            if prompts:
                self._hooks.append(self.tower.module.register_forward_pre_hook(together.begin))
                self._hooks.append(self.tower.module.register_forward_hook(together.end, always_call=True))

    def _restore(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in self.tower.attentions:
            if module._modules.get(CHILD) is not None and module._modules[CHILD] in self._prompts.values():
                del module._modules[CHILD]
        with torch.no_grad():
            for name, parameter in self._trained.items():
                if name in self._originals:
                    parameter.copy_(self._originals[name])
                    parameter.grad = None
        if self._freeze is not None:
            self._freeze.release(self._trained.values())
        if self._configs is not None:
            self._configs.release()
        self._hooks, self._freeze, self._configs = [], None, None
        self.attached = False

    def _check_attached(self) -> None:
        if not self.attached:
            raise AttachError("handle: already detached; attach again, or load a saved prompt with fastprompt.load")

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable tensors by stable names: ``layers.{i}.prompt`` (or ``key``, ``value``), what layers share, then
        ``base.{name}``.
        """
        found = [(i, n, p) for i in sorted(self._prompts) for n, p in self._prompts[i].named_parameters()]
        for index, name, parameter in sorted(found, key=lambda entry: "." in entry[1]):
            yield f"layers.{self.sites[index].name}.{name}", parameter
        for name, parameter in self._trained.items():
            yield f"base.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable leaf tensors: prompts in layer order (VPT: one ``[P,C]`` a layer; PrefixKV: keys and values
        ``[Hkv,P,D]``), then what layers share, then those of ``train``.
        """
        for _, parameter in self.named_parameters():
            yield parameter

    @property
    def num_trainable(self) -> int:
        """Number of trainable scalars."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def save(self, directory: str | Path) -> None:
        """Write ``prompt_config.json`` and ``prompts.safetensors`` to ``directory``, each replaced atomically."""
        from fastprompt.hf.checkpoint import save

        self._check_attached()
        save(self, Path(directory))

    def bake(self) -> Handle:
        """Freeze the prompts and keep their keys and values, for inference; returns the handle.

        A reparameterised prefix becomes plain keys and values, in ``config`` too, and is saved as such.
        """
        self._check_attached()
        for prompt in self._prompts.values():
            prompt.bake()
        self.config = self.config.baked()
        return self

    def detach(self) -> None:
        """Restore the model bit for bit: outputs, values, configs and ``requires_grad`` flags."""
        self._check_attached()
        self._restore()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc) -> None:
        if self.attached:
            self.detach()

    def __repr__(self) -> str:
        state = f"{self.num_trainable:,} trainable" if self.attached else "detached"
        return f"Handle({type(self.model).__name__}, {self.config!r}, tower={self.tower.kind!r}, {state})"
