# SPDX-License-Identifier: Apache-2.0
"""What handles hold of a model: configs of modules and flags of parameters, put back when the last handle lets go.

A model may carry a handle a tower, and compressing caches. Whichever is detached first, the model stays frozen and
switched for the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig


@dataclass
class _Hold:
    """What a module, parameter or config had before the first handle, and how many handles hold it."""

    original: Any
    handles: int = 1


# Modules, parameters and configs alike; keys compare by identity and do not keep a model alive.
_holds = WeakIdKeyDictionary()


def _hold(thing: Any, original: Any) -> bool:
    """Count a handle; True for the first."""
    if thing in _holds:
        _holds[thing].handles += 1
        return False
    _holds[thing] = _Hold(original)
    return True


def _release(thing: Any) -> _Hold | None:
    """Drop a handle; what the thing had before if it was the last."""
    hold = _holds[thing]
    hold.handles -= 1
    if hold.handles:
        return None
    del _holds[thing]
    return hold


class Freeze:
    """One handle's hold on the base parameters of a model, all of which it freezes."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._parameters = list(parameters)
        self._new = [_hold(p, p.requires_grad) for p in self._parameters]

    def apply(self) -> None:
        """Freeze; what another handle trains goes on learning."""
        for parameter, new in zip(self._parameters, self._new, strict=True):
            if new:
                parameter.requires_grad_(False)

    def release(self, trained: Iterable[nn.Parameter]) -> None:
        """Put flags back; what this handle ``trained`` is frozen again where another handle still holds the model."""
        for parameter in trained:
            parameter.requires_grad_(False)
        for parameter in self._parameters:
            hold = _release(parameter)
            if hold is not None:
                parameter.requires_grad_(hold.original)
        self._parameters = []


class OwnConfigs:
    """A hold on the configs of a model: the model's own copies, so that no other model is affected."""

    def __init__(self, model: nn.Module):
        self._modules: list[nn.Module] = []
        self._switched: list[PreTrainedConfig] = []
        configs = [(m, vars(m).get("config")) for m in model.modules()]
        found = [(m, c) for m, c in configs if isinstance(c, PreTrainedConfig)]
        # A config that holds another one finds the copy that a module below already has.
        memo: dict[int, Any] = {id(_holds[m].original): c for m, c in found if m in _holds}
        for module, config in found:
            self._modules.append(module)
            if _hold(module, config):
                module.config = copy.deepcopy(config, memo)  # type: ignore[assignment]

    def switch(self, tower: nn.Module, implementation: str) -> None:
        """Give a tower this attention."""
        configs = (vars(module).get("config") for module in tower.modules())
        self._switched = list({id(c): c for c in configs if isinstance(c, PreTrainedConfig)}.values())
        # All are held before one is set: a config passes its attention on to those below it.
        for config in self._switched:
            _hold(config, config._attn_implementation)
        for config in self._switched:
            config._attn_implementation = implementation

    def release(self) -> None:
        """Put the configs back, or at least the tower's attention where another handle still holds the model."""
        for config in self._switched:
            hold = _release(config)
            if hold is not None:
                config._attn_implementation = hold.original
        for module in self._modules:
            hold = _release(module)
            if hold is not None:
                module.config = hold.original
        self._modules, self._switched = [], []
