# SPDX-License-Identifier: Apache-2.0
"""Tiny transformers models, random enough that every prompt matters, and what tests compare of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.utils import ModelOutput

import fastprompt
from fastprompt.hf.attach import Handle
from fastprompt.hf.published import InsertedPrompts

WIDTH, LAYERS, HEADS, LENGTH = 32, 4, 4, 5
SIZE = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "image_size": 32}
SIZE |= {"patch_size": 8}
VISION = SIZE | {"intermediate_size": 64}
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT |= {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49}


@dataclass(frozen=True)
class Family:
    """A model class; ``at`` is where published prompts go: behind the class token, or 0 where there is none."""

    build: Callable[[], PreTrainedModel]
    at: int = 1
    tower: str | None = None
    train: tuple[str, ...] = ()


FAMILIES = {
    "ViT": Family(lambda: ViTModel(ViTConfig(**VISION))),
    "DeiT": Family(lambda: DeiTModel(DeiTConfig(**VISION))),
    "Dinov2": Family(lambda: Dinov2Model(Dinov2Config(**SIZE))),
    "Dinov2WithRegisters": Family(lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZE))),
    "DINOv3ViT": Family(lambda: DINOv3ViTModel(DINOv3ViTConfig(**VISION, num_register_tokens=2))),
    "SiglipVision": Family(lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)), at=0),
    "CLIPVision": Family(lambda: CLIPVisionModel(CLIPVisionConfig(**VISION))),
    "Blip2Vision, fused qkv": Family(lambda: Blip2VisionModel(Blip2VisionConfig(**VISION))),
    "InternVLVision, qk norm": Family(lambda: InternVLVisionModel(InternVLVisionConfig(**VISION, use_qk_norm=True))),
    "ViT classifier": Family(lambda: ViTForImageClassification(ViTConfig(**VISION)), train=("classifier",)),
    "Dinov2 classifier": Family(lambda: Dinov2ForImageClassification(Dinov2Config(**SIZE)), train=("classifier",)),
    "CLIP classifier": Family(lambda: CLIPForImageClassification(clip_config()), train=("classifier",)),
    "CLIP": Family(lambda: CLIPModel(clip_config()), tower="vision"),
    "Siglip": Family(
        lambda: SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": WIDTH}, vision_config=VISION)),
        at=0,
        tower="vision",
    ),
}

DEPTHS = {
    "deep": ({}, (0, 1, 2, 3)),
    "shallow": ({"depth": "shallow"}, (0,)),
    "first two": ({"layers": (0, 1)}, (0, 1)),
    "a gap": ({"layers": (1, 3)}, (1, 3)),
    "one in the middle": ({"layers": [2]}, (2,)),
    "from the end": ({"layers": (-2, -4)}, (0, 2)),
}


def clip_config() -> CLIPConfig:
    return CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16, num_labels=3)


def build(name: str = "ViT", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in evaluation mode, with weights that make attention peaked and every bias count."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(FAMILIES[name].build()).to(dtype)


def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Gives every parameter a value of its own; with transformers' small initial weights attention is flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1.5 * noise * p.shape[-1] ** -0.5 if p.dim() > 1 else p + 0.2 * noise)
    return model.eval()


def inputs(model: PreTrainedModel, batch: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """What the model's forward takes."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    found = {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator).to(dtype)}
    if model.main_input_name == "input_ids":
        found["input_ids"] = torch.tensor([[48, 3, 9, 4, 49], [48, 11, 7, 30, 49]])
    return found


def outputs(model: PreTrainedModel, batch: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every tensor that the model returns, by name."""
    return dict(_flat(model(**(inputs(model) if batch is None else batch))))


def _flat(output: ModelOutput, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in output.items():
        if isinstance(value, ModelOutput):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield prefix + name, value


def loss_of(found: Mapping[str, Tensor]) -> Tensor:
    """A loss that every output element takes part in, each with its own weight."""
    generator = torch.Generator().manual_seed(2)
    return sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in found.values())


def step(model: PreTrainedModel, parameters: Iterable[nn.Parameter], batch=None) -> dict[str, Tensor]:
    """Outputs, and gradients of ``parameters`` in order."""
    parameters = list(parameters)
    for p in parameters:
        p.grad = None
    found = outputs(model, batch)
    loss_of(found).backward()
    return {k: x.detach() for k, x in found.items()} | {f"gradient {i}": p.grad for i, p in enumerate(parameters)}


def prompt_values(layers: Iterable[int], length: int = LENGTH) -> dict[int, Tensor]:
    """A prompt ``[length, WIDTH]`` a layer, large enough to matter."""
    generator = torch.Generator().manual_seed(3)
    return {i: torch.randn(length, WIDTH, generator=generator) for i in sorted(layers)}


def attach_prompts(model: PreTrainedModel, depth: str = "deep", **kwargs) -> Handle:
    """Attaches VPT with the values of `prompt_values`."""
    options, layers = DEPTHS[depth]
    handle = fastprompt.attach(model, fastprompt.VPT(length=LENGTH, **options), **kwargs)
    with torch.no_grad():
        for p, value in zip(handle.parameters(), prompt_values(layers).values(), strict=False):
            p.copy_(value)
    return handle


def insert_prompts(model: PreTrainedModel, depth: str = "deep", *, at: int = 1, tower=None) -> InsertedPrompts:
    """The published form with the same prompts; they are float64 only for a float64 model."""
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    values = prompt_values(DEPTHS[depth][1])
    return InsertedPrompts(model, {i: nn.Parameter(p.to(dtype)) for i, p in values.items()}, at=at, tower=tower)


def mixed(model: PreTrainedModel) -> PreTrainedModel:
    """Freezes some parameters and puts some modules in training mode."""
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    return model


def checkpointing(model: PreTrainedModel, reentrant: bool = False) -> None:
    """Switch gradient checkpointing on; transformers 5.23 renamed the method."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], operations: int = 2048) -> None:
    """Differences of the rounding of ``operations`` sums: four layers of about eight products of up to 64 terms."""
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].shape == x.shape and got[name].dtype == x.dtype, name
        limit = operations * torch.finfo(x.dtype).eps * x.abs().max().item()
        assert (got[name] - x).abs().max().item() <= limit, name


def assert_as_good(
    got: Mapping[str, Tensor], baseline: Mapping[str, Tensor], truth: Mapping[str, Tensor], eps: float
) -> None:
    """Relative error against the float64 truth: at most twice the worst of the baseline, plus ``eps``."""
    assert got.keys() == baseline.keys() == truth.keys()

    def error(found: Mapping[str, Tensor], name: str) -> float:
        return ((found[name].double() - truth[name]).abs().max() / truth[name].abs().max()).item()

    usual = max(error(baseline, name) for name in truth)
    for name in truth:
        assert error(got, name) <= 2 * usual + eps, (name, error(got, name), usual)


def same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> bool:
    """Equal bit for bit."""
    return got.keys() == want.keys() and all(torch.equal(got[k], x) for k, x in want.items())


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fails unless everything about the model is afterwards as it was before: bits, flags, modes, configs, hooks."""
    before = _state(model)
    yield
    after = _state(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, after[key]) and value.dtype == after[key].dtype, key
        elif key[1] == "config":
            assert value[0] is after[key][0] and value[1:] == after[key][1:], key
        else:
            assert value == after[key], key


def _state(model: nn.Module) -> dict:
    state = {}
    for name, module in model.named_modules():
        state[name, "training"] = module.training
        state[name, "hooks"] = [len(v) for k, v in sorted(vars(module).items()) if k.endswith("_hooks")]
        config = vars(module).get("config")
        state[name, "config"] = (config, *((config.to_dict(), config._attn_implementation) if config else ()))
    for name, p in model.named_parameters():
        state[name, "flag"] = (p.requires_grad, id(p))
    return state | {(name, "value"): x.clone() for name, x in model.state_dict().items()}
