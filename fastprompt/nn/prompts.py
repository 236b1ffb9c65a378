# SPDX-License-Identifier: Apache-2.0
"""Modules that hold learned prompts and give attention their keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastprompt.nn.decoupled import Split
    from fastprompt.nn.joint_prompts import JointPrompts, Plain


class Site(Protocol):
    """What a prompt needs to know of a layer: how its own weights turn rows into keys and values."""

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[Hkv,P,D]`` of rows ``[P,C]`` at the layer's input."""

    def weights(self) -> tuple[Tensor, ...]:
        """The tensors that `project` reads."""

    def plain(self) -> Plain | None:
        """The same as tensors, where frozen tensors are all there is to it."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of rows at the layer's input, outside autocast."""


class LayerPrompt(nn.Module):
    """A prompt of one layer, seen as keys and values through the layer's own norm and projections (I2).

    ``K_p = k_norm(W_k norm(p))``, ``V_p = W_v norm(p)``: what the prompt's rows would contribute as tokens,
    computed once for the whole batch. Where neither needs a gradient, both are kept until the prompt or a weight
    changes (a write through ``.data`` goes unseen, as it does by autograd). Subclasses give the rows.

    Args:
        length: Rows P.
        site: The layer.
        inserted: The prompt's rows live on in the next layer, so they run as tokens there and here; attention then sees
            them among the instance keys and `key_value` gives None.
        split: How rows read each other (DPL's `Split`); None: in one softmax. Whoever gives it registers it.
    """

    def __init__(self, length: int, site: Site, inserted: bool = False, split: Split | None = None):
        super().__init__()
        self.length, self.site, self.inserted = length, site, inserted
        # In a tuple it is not a submodule.
        self._split = () if split is None else (split,)
        self.joint: JointPrompts | None = None
        self._kept: tuple[tuple, tuple[Tensor, Tensor]] | None = None
        self._baked = False

    @property
    def split(self) -> Split | None:
        """How rows read each other, where not in one softmax."""
        return next(iter(self._split), None)

    def learned(self) -> Tensor:
        """The prompt's rows ``[P,C]``."""
        raise NotImplementedError

    def rows(self) -> Tensor:
        """The prompt's rows ``[P,C]`` in the dtype of the layer's input."""
        return self.learned().to(self.site.dtype)

    def own(self) -> tuple[Tensor, ...]:
        """The learned tensors that `rows` reads."""
        raise NotImplementedError

    def drops(self) -> bool:
        """Whether elements are dropped at random."""
        return False

    def key_value(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[Hkv,P,D]`` of this step, or None where the rows run as tokens."""
        if self.inserted:
            return None
        if torch.compiler.is_compiling():
            return self.site.project(self.rows())
        found = None if self.joint is None else self.joint.share(self)
        if found is not None:
            return found
        if self.tracked() or self.drops():
            return self.site.project(self.rows())
        stamp = stamp_of(self._tensors())
        if self._kept is None or self._kept[0] != stamp:
            with torch.no_grad():
                self._kept = (stamp, self.site.project(self.rows()))
        return self._kept[1]

    def tracked(self) -> bool:
        """Whether autograd follows what keys and values are computed of."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self._tensors())

    def _tensors(self) -> tuple[Tensor, ...]:
        return (*self.own(), *self.site.weights())

    def bake(self) -> None:
        """Freeze the prompt; if the layer is frozen too, keys and values are computed once, even in training mode."""
        for parameter in (*self.own(), *(p for split in self._split for p in split.parameters())):
            parameter.requires_grad_(False)
        self._baked = True


def stamp_of(tensors: Iterable[Tensor]) -> tuple:
    """Changes whenever what is computed of ``tensors`` would: an in-place update, a replaced tensor, another device or
    autocast dtype. A write through ``.data`` goes unseen.
    """
    tensors = tuple(tensors)
    device = tensors[0].device.type if tensors else "cpu"
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # Tensors made in inference mode cannot be saved for a backward pass outside.
    state = (autocast, torch.is_inference_mode_enabled())
    return (*state, *versions_of(tensors))


def versions_of(tensors: Iterable[Tensor]) -> tuple:
    """Changes whenever one of ``tensors`` does; a write through ``.data`` goes unseen."""
    # Tensors made in inference mode count no versions: they are never taken for unchanged.
    return tuple((x.data_ptr(), object() if x.is_inference() else x._version, x.dtype) for x in tensors)


class ProjectedPrompt(LayerPrompt):
    """A learned prompt of one layer.

    Args:
        prompt: Initial value ``[P, C]``; the parameter is float32 (float64 for a float64 model).
        site: The layer.
        inserted: As in `LayerPrompt`.
        projection: Maps the prompt ``[P, d]`` to rows ``[P, C]``; None where d = C.
        owner: The projection is shared by all layers; one of them registers it.
        dropout: Probability of dropping an element of the rows in training mode. One draw serves the whole batch: one a
            sample would make keys and values per sample.
        split: As in `LayerPrompt`.

    Example:
        >>> import torch
        >>> class Identity:
        ...     dtype = torch.float32
        ...     def project(self, rows): return rows.unsqueeze(0), rows.unsqueeze(0)
        ...     def weights(self): return ()
        >>> keys, values = ProjectedPrompt(torch.zeros(5, 8), Identity()).key_value()
        >>> keys.shape
        torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        prompt: Tensor,
        site: Site,
        inserted: bool = False,
        *,
        projection: nn.Module | None = None,
        owner: bool = True,
        dropout: float = 0.0,
        split: Split | None = None,
    ):
        super().__init__(prompt.shape[0], site, inserted, split)
        self.prompt = nn.Parameter(prompt)
        self.dropout = dropout
        if owner:
            self.projection = projection
        # In a list it is not a submodule, so that a model's state dict holds a shared projection once.
        self._projection = [] if projection is None else [projection]

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        length, width = self.prompt.shape
        return f"length={length}, width={width}, dropout={self.dropout}, inserted={self.inserted}, baked={self._baked}"

    def learned(self) -> Tensor:
        """The prompt's rows ``[P,C]``, as they are or projected, with some dropped."""
        rows: Tensor = self.prompt
        for projection in self._projection:
            rows = projection(rows)
        return nn.functional.dropout(rows, self.dropout) if self.drops() else rows

    def drops(self) -> bool:
        """Whether elements are dropped at random."""
        return self.dropout > 0 and self.training and not self._baked

    def own(self) -> tuple[Tensor, ...]:
        """The prompt, and the projection's weights."""
        return (self.prompt, *(p for m in self._projection for p in m.parameters()))


class ComputedPrompt(LayerPrompt):
    """A prompt whose rows another module computes, such as MaPLe's vision prompts of its text prompts.

    Args:
        function: Gives the rows ``[P, C]``; the module that it belongs to holds the parameters.
        length: Rows P.
        sources: Gives the tensors that ``function`` reads.
        site: The layer.
        inserted: As in `LayerPrompt`.
        split: As in `LayerPrompt`.
    """

    def __init__(
        self,
        function: Callable[[], Tensor],
        length: int,
        sources: Callable[[], Iterable[Tensor]],
        site: Site,
        inserted: bool = False,
        split: Split | None = None,
    ):
        super().__init__(length, site, inserted, split)
        self._function, self._sources = function, sources

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"length={self.length}, inserted={self.inserted}"

    def learned(self) -> Tensor:
        """The computed rows ``[P,C]``."""
        return self._function()

    def own(self) -> tuple[Tensor, ...]:
        """The tensors that the rows are computed of."""
        return tuple(self._sources())


class CarriedPrompt(nn.Module):
    """The prompt of an earlier layer, whose rows run on as tokens here, read as ``split`` says.

    Args:
        length: Rows P.
        split: How rows read each other; whoever gives it registers it.
    """

    inserted = False

    def __init__(self, length: int, split: Split):
        super().__init__()
        self.length, self._split = length, (split,)

    @property
    def split(self) -> Split:
        """How rows read each other."""
        return self._split[0]

    def key_value(self) -> None:
        """Its keys and values are among the instance's."""

    def bake(self) -> None:
        """Freeze what weighs the rows."""
        self.split.requires_grad_(False)


def vpt_uniform(length: int, width: int, patch_values: int) -> Tensor:
    """VPT's initialisation: uniform in ``±sqrt(6 / (patch_values + width))``, Glorot's bound of a patch embedding.

    Args:
        length: Number of prompts P.
        width: Model width C.
        patch_values: Numbers in one patch, ``channels * patch_height * patch_width``.

    Returns:
        float32 ``[length, width]``.

    Example:
        >>> bound = vpt_uniform(1000, 768, 3 * 16 * 16).abs().max()
        >>> bool(bound < 0.0625)
        True

    https://arxiv.org/abs/2203.12119
    """
    bound = math.sqrt(6.0 / (patch_values + width))
    return torch.empty(length, width).uniform_(-bound, bound)
