# SPDX-License-Identifier: Apache-2.0
"""Finds where prompts can go, by what modules do and not by what they are called.

A tower is a stack of layers with one self-attention each. One recorded forward shows, for every layer, which modules
lead from its input to its attention (the norm), which of their outputs become keys and values, and whether a norm or a
rotation follows; the projections found are then run on the recorded rows and must give the recorded keys and values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastprompt.errors import UnsupportedModelError
from fastprompt.hf.attention import CHILD, observe
from fastprompt.hf.recording import KEY_NAMES, Missing, Projections, Recorder
from fastprompt.nn.joint_prompts import Plain

KINDS = {"pixel_values": "vision", "input_ids": "text"}
TOWERS = ("vision", "text", "joint")
JOINT = "prompts behind attention that reads both"


@dataclass
class Tower:
    """A stack of transformer layers with its prompt places."""

    name: str
    kind: str
    module: nn.Module
    layers: list[nn.Module]
    attentions: list[nn.Module]


@dataclass(eq=False)
class Site:
    """One layer's attention that can hold a prompt.

    ``index`` numbers layers, on from stack to stack; ``part`` is not 0 for further attention of the same layer.
    """

    index: int
    layer: nn.Module
    attention: nn.Module
    width: int
    heads: int
    head_dim: int
    projections: Projections | None = None
    output: nn.Module | None = None
    packed: bool = False
    recorded: tuple[Tensor, Tensor] | None = None
    patch_values: int | None = None
    part: int = 0

    @property
    def name(self) -> str:
        """The stable name of its prompts: the layer's number, and which attention of the layer if not its first."""
        return f"{self.index}.{self.part}" if self.part else str(self.index)

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

    def plain(self) -> Plain | None:
        """The projections as tensors, where frozen tensors are all there is to them."""
        return None if self.projections is None else self.projections.plain()

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[Hkv,P,D]`` of rows ``[P,C]`` at the layer's input."""
        if self.projections is None:
            raise RuntimeError("projections: not looked for; a recipe that projects rows sets `projects = True`")
        return self.projections(rows)

    def fingerprint(self) -> Tensor | None:
        """A plain weight that tells this layer from those of other models; None where all are packed or quantised."""
        module = self.attention if self.projections is None else self.projections.key.linear
        weights = [
            (n.split("."), p)
            for n, p in module.named_parameters()
            if type(p) is nn.Parameter and p.is_floating_point() and p.dim() > 1 and CHILD not in n.split(".")
        ]
        keys = [p for n, p in weights if n[-2:-1] and n[-2] in (*KEY_NAMES, "qkv")]
        return next(iter([*keys, *(p for _, p in weights)]), None)


def find_towers(model: nn.Module) -> list[Tower]:
    """Every stack of layers with one self-attention a layer, in module order."""
    names = {module: name for name, module in model.named_modules()}
    towers = []
    for prefix, stack in stacks_of(model, lambda m: hasattr(m, "is_causal") and hasattr(m, "config")).items():
        owner, kind = owner_of(model, prefix)
        whole = len(stack) == len(cast(nn.ModuleList, model.get_submodule(prefix)))
        if kind and whole and all(len(found) == 1 for _, found in stack):
            read = layers_read(model, len(stack)) if kind == "vision" else len(stack)
            layers = [layer for layer, _ in stack[:read]]
            towers.append(Tower(names[owner], kind, owner, layers, [found[0] for _, found in stack[:read]]))
    return towers


def stacks_of(
    model: nn.Module, wanted: Callable[[nn.Module], object]
) -> dict[str, list[tuple[nn.Module, list[nn.Module]]]]:
    """Lists of layers that hold modules that are ``wanted``, by path: every such layer and what it holds."""
    stacks: dict[str, dict[int, list[nn.Module]]] = {}
    for name, module in model.named_modules():
        if not wanted(module):
            continue
        parts = name.split(".")
        for i, part in enumerate(parts):
            prefix = ".".join(parts[:i])
            if part.isdigit() and isinstance(model.get_submodule(prefix), nn.ModuleList):
                stacks.setdefault(prefix, {}).setdefault(int(part), []).append(module)
                break
    return {
        prefix: [(cast(nn.ModuleList, model.get_submodule(prefix))[i], found) for i, found in by_layer.items()]
        for prefix, by_layer in stacks.items()
    }


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The nearest module above ``path`` that can be called with a model input of its own, and its modality."""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        inputs = inspect.signature(module.forward).parameters
        name = getattr(module, "main_input_name", "")
        if name in inputs:
            return module, KINDS.get(name, "")
        if "grid_thw" in inputs or ("pixel_values" in inputs and "input_ids" not in inputs):
            return module, "vision"
    return model, ""


def layers_read(model: nn.Module, count: int) -> int:
    """How many of a vision tower's layers a multimodal model reads: LLaVA's config may take an earlier hidden state."""
    layers = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    if layers is None:
        return count
    chosen = [layers] if isinstance(layers, int) else list(layers)
    # Hidden state 0 is the input of the first layer.
    return max(i if i >= 0 else count + 1 + i for i in chosen)


def choose_tower(model: nn.Module, tower: str | None, towers: list[Tower] | None = None) -> Tower:
    """The tower asked for, of ``towers`` or those of `find_towers`; the only one if none is.

    Raises:
        ValueError: ``tower`` is unknown, absent, or needed because the model has several.
        UnsupportedModelError: the model has no stack of layers that transformers' attention interface reaches.
    """
    if tower not in (None, *TOWERS):
        raise ValueError(f"tower: got {tower!r}, expected 'vision', 'text' or None ('joint' for {JOINT})")
    lacks = "attention that has layers of its own for queries, keys and values"
    if towers is None:
        towers = find_towers(model)
        lacks = (
            "one self-attention each that goes through transformers' attention interface (attributes `is_causal` and "
            "`config`)"
        )
    if not towers:
        candidates = [name for name, m in model.named_modules() if "attention" in type(m).__name__.lower()]
        raise UnsupportedModelError(
            f"model: {type(model).__name__} has no stack of layers with {lacks}. Attention-like modules: "
            f"{', '.join(candidates[:5]) or 'none'}"
        )
    found = [t for t in towers if tower is None or t.kind == tower]
    if len(found) == 1:
        return found[0]
    kinds = ", ".join(f"{t.kind} ({t.name or type(t.module).__name__})" for t in towers)
    if not found:
        raise ValueError(f"tower: got {tower!r}, but {type(model).__name__} has {kinds}")
    named = " or ".join(f"tower={kind!r}" for kind in TOWERS if any(t.kind == kind for t in found))
    fix = f"pass {named}" if tower is None and " or " in named else "attach to the submodule instead"
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

    def finish(index: int, recorder: Recorder) -> None:
        try:
            sites.append(_site(index, recorder, projects, keep=tokens is not None))
        except Missing as missing:
            problems.append(f"layer {index} ({type(recorder.attention).__name__}): {missing}")

    recorders = []
    try:
        for index, (layer, module) in enumerate(zip(tower.layers, tower.attentions, strict=True)):
            recorder = Recorder(layer, module)
            recorders.append(recorder)
            hooks += recorder.hooks(lambda i=index, r=recorder: finish(i, r), projects)
        by_attention = {r.attention: r for r in recorders}

        def observer(module, query, key, value):
            if module in by_attention:
                by_attention[module].attended(query, key, value)

        with evaluated(tower.module), observe(observer):
            tower.module(**sample_input(tower, tokens))
    finally:
        for hook in hooks:
            hook.remove()
    if len(sites) + len(problems) < len(tower.layers):
        problems.append("its layers did not all run in one forward of the tower")
    if problems:
        raise UnsupportedModelError(
            f"model: {type(tower.module).__name__} cannot hold prompts; missing:\n  " + "\n  ".join(problems)
        )
    values = patch_values(tower.module.config) if tower.kind == "vision" else None
    for site in sites:
        site.patch_values = values
    return sites


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients and autocast; modes are put back."""
    modes = {m: m.training for m in module.modules()}
    try:
        module.eval()
        with torch.no_grad(), torch.autocast(_device(module).type, enabled=False):
            yield
    finally:
        for m, training in modes.items():
            m.training = training


def _site(index: int, recorder: Recorder, projects: bool, keep: bool) -> Site:
    """One layer as the recording shows it."""
    entered, key, value = recorder.attended_to()
    return Site(
        index, recorder.layer, recorder.attention, entered.shape[-1], key.shape[1], key.shape[3],
        projections=recorder.projections() if projects else None,
        packed=entered.dim() == 2,
        recorded=(key[0].clone(), value[0].clone()) if keep else None,
    )  # fmt: skip


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def sample_input(tower: Tower, tokens: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The smallest input that runs a tower of one modality: an image, or eight tokens if none are given."""
    config, weight = tower.module.config, next(p for p in tower.module.parameters() if p.is_floating_point())
    if tower.kind == "text":
        limit = getattr(config, "vocab_size", None)
        if tokens and limit is not None and max(tokens) >= limit:
            raise ValueError(f"init: got token id {max(tokens)}, expected ids below {limit}, the model's vocabulary")
        return {"input_ids": sample_tokens(weight.device, tokens)}
    if tokens is not None:
        raise ValueError("init: token ids need a text tower, but this one is vision; use init='normal'")
    if "grid_thw" in inspect.signature(tower.module.forward).parameters:
        # Patches of images packed in one sequence: one patch of the merger's output.
        merge, values = getattr(config, "spatial_merge_size", 1), patch_values(config)
        if values is None:
            raise UnsupportedModelError(f"model: the config of {type(tower.module).__name__} has no `patch_size`")
        patches = torch.randn(merge**2, values, generator=torch.Generator().manual_seed(0))
        grid = torch.tensor([[1, merge, merge]], device=weight.device)
        return {"hidden_states": patches.to(weight.device, weight.dtype), "grid_thw": grid}
    return {"pixel_values": sample_image(config, weight)}


def sample_tokens(device: torch.device, tokens: Sequence[int] | None = None) -> Tensor:
    """Token ids of one text."""
    return torch.tensor([tuple(tokens or range(1, 9))], device=device)


def sample_image(config: object, weight: Tensor) -> Tensor:
    """One image of the config's size, of the device and dtype of ``weight``."""
    config = config if getattr(config, "image_size", None) else getattr(config, "vision_config", config)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if size is None:
        raise UnsupportedModelError(f"model: its {type(config).__name__} has no `image_size`")
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    pixels = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    return pixels.to(weight.device, weight.dtype)


def patch_values(config: object) -> int | None:
    """Numbers in one image patch."""
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return None
    height, width = (patch, patch) if isinstance(patch, int) else tuple(patch)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", 3)
    return height * width * channels * getattr(config, "temporal_patch_size", 1)
