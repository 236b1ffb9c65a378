# SPDX-License-Identifier: Apache-2.0
"""Baselines: visual prompt tuning as published (prompts inserted as tokens), approximated prompt tuning as released."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastprompt.hf.attention import CHILD
from fastprompt.hf.sites import choose_tower

if TYPE_CHECKING:
    from fastprompt.hf.attach import Handle
    from fastprompt.hf.sites import Site


class InsertedPrompts:
    """VPT's own formulation on a transformers vision tower, by hooks on its layers.

    ``x <- [x_1..x_at; p_l; x_at+1..]`` before every layer l that has a prompt (replacing the rows of the
    prompt before), each prompt copied for every sample; rows are stripped behind the last layer. The same maths as
    ``attach`` with `VPT`, without identity I2. The model is frozen and otherwise untouched.

    Args:
        model: A transformers vision model, or one with ``tower="vision"``.
        prompts: For every prompted layer, its parameter ``[P,C]``.
        at: Rows in front of the prompts: 1 behind a class token (the published place), 0 where there is none.
        tower: As in ``attach``.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> import torch
        >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                            intermediate_size=64, image_size=32, patch_size=16))
        >>> prompts = {i: torch.nn.Parameter(torch.zeros(4, 32)) for i in range(2)}
        >>> with InsertedPrompts(model, prompts):
        ...     model(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape
        torch.Size([1, 5, 32])

    https://arxiv.org/abs/2203.12119
    """

    def __init__(self, model: nn.Module, prompts: Mapping[int, nn.Parameter], *, at: int = 1, tower: str | None = None):
        self.prompts, self.at = dict(sorted(prompts.items())), at
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        self._hooks = []
        layers = choose_tower(model, tower).layers
        carried = 0
        for i, layer in enumerate(layers):
            prompt = self.prompts.get(i)
            if prompt is not None:
                self._hooks.append(layer.register_forward_pre_hook(self._insert(prompt, carried), with_kwargs=True))
                carried = prompt.shape[0]
        if carried:
            self._hooks.append(layers[-1].register_forward_hook(self._strip(carried), prepend=True))

    def _insert(self, prompt: Tensor, carried: int):
        def hook(layer, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            rows = prompt.to(hidden.dtype).expand(len(hidden), -1, -1)
            hidden = torch.cat([hidden[:, : self.at], rows, hidden[:, self.at + carried :]], dim=1)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _strip(self, carried: int):
        def hook(layer, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            kept = torch.cat([hidden[:, : self.at], hidden[:, self.at + carried :]], dim=1)
            return (kept, *output[1:]) if isinstance(output, tuple) else kept

        return hook

    def parameters(self) -> Iterator[nn.Parameter]:
        """The prompts, in layer order."""
        yield from self.prompts.values()

    def detach(self) -> None:
        """Remove the hooks and restore ``requires_grad`` flags."""
        for hook in self._hooks:
            hook.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._hooks, self._flags = [], []

    def __enter__(self) -> InsertedPrompts:
        return self

    def __exit__(self, *exc) -> None:
        self.detach()


class ReadPrompts:
    """Approximated prompt tuning in the operations of its released code, by hooks on the attention of a handle's sites.

    Takes the place of the handle, which it detaches, with copies of its prompts. The same maths as `attach` with `APT`.

    Args:
        handle: ``attach(model, APT(...))`` with the options as released.

    https://arxiv.org/abs/2306.15706
    """

    def __init__(self, handle: Handle):
        placed = [(site, getattr(site.attention, CHILD)) for site in handle.sites if hasattr(site.attention, CHILD)]
        copies = [(site, {n: p.detach().clone() for n, p in child.named_parameters()}) for site, child in placed]
        handle.detach()
        for parameter in handle.model.parameters():
            parameter.requires_grad_(False)
        self.learned = [{n: nn.Parameter(p) for n, p in copy.items()} for _, copy in copies]
        for (site, _), learned in zip(copies, self.learned, strict=True):
            self._hook(site, learned)

    def _hook(self, site: Site, learned: Mapping[str, Tensor]) -> None:
        entered: list[Tensor] = []

        def enter(module, args, kwargs):
            entered.append(args[0] if args else kwargs["hidden_states"])

        def leave(module, args, base):
            prompts = learned["prompt"]
            keys = prompts + linear(linear(prompts, learned["down"]), learned["up"])
            active = torch.relu(linear(entered.pop(), keys))
            weight = active.detach().max(dim=-1, keepdim=True).values
            return learned["log_scale"].exp() * (base + weight * (active @ prompts))

        site.attention.register_forward_pre_hook(enter, with_kwargs=True)
        if site.output is not None:
            site.output.register_forward_hook(leave)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is learned, in layer order."""
        for learned in self.learned:
            yield from learned.values()
