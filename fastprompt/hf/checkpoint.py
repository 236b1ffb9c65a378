# SPDX-License-Identifier: Apache-2.0
"""Saved prompts: ``prompt_config.json`` and ``prompts.safetensors``, each bound to the other by sha256; never pickle.

Names are our own and stable (``layers.{i}.prompt``, ``base.{parameter}``), so a file outlives renamed model classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fastprompt.errors import CheckpointError

if TYPE_CHECKING:
    from fastprompt.hf.attach import Handle
    from fastprompt.hf.lanes import LaneTower
    from fastprompt.hf.sites import Site

FORMAT = 1
CONFIG, TENSORS = "prompt_config.json", "prompts.safetensors"
# Weights of the base model that identify a layer.
SAMPLES = 4
# Weights of a base model are compared after rounding to bfloat16 or float16, so that a cast model still matches:
# relative, and the spacing of float16 near zero.
WEIGHT_TOLERANCE = 2**-7
WEIGHT_SPACING = 2**-24


def save(handle: Handle, directory: Path) -> None:
    """Write both files of a handle."""
    content = {
        "method": type(handle.config).__name__,
        "config": asdict(handle.config),
        "tower": handle.tower.kind,
        "train": list(handle.train),
        "base": describe_base(handle),
    }
    write(directory, content, dict(handle.named_parameters()))


def write(directory: Path, content: dict[str, Any], parameters: Mapping[str, Tensor]) -> None:
    """Write both files; each appears whole or not at all, and the old pair stays until both are on disk."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
    data = save_tensors(tensors)
    content = {
        "format": FORMAT,
        **content,
        "tensors": {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in tensors.items()},
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    content["sha256"] = _digest(content)
    text = json.dumps(content, indent=2, allow_nan=False).encode()
    directory.mkdir(parents=True, exist_ok=True)
    _put(directory, {TENSORS: data, CONFIG: text})


def _put(directory: Path, files: dict[str, bytes]) -> None:
    """Replace files together: flushed to disk beside them first; what was there comes back if anything fails."""
    staged = {name: directory / f".saving-{secrets.token_hex(8)}" for name in files}
    before: dict[str, bytes | None] = {}
    try:
        for name, data in files.items():
            _write(staged[name], data)
        for name, path in staged.items():
            final = directory / name
            before[name] = final.read_bytes() if final.exists() else None
            os.replace(path, final)
    except BaseException:
        for name, old in before.items():
            if old is None:
                (directory / name).unlink(missing_ok=True)
            else:
                _write(staged[name], old)
                os.replace(staged[name], directory / name)
        raise
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    """Write and flush to disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps({k: v for k, v in content.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files, verified.

    Raises:
        CheckpointError: a file is missing, unreadable, truncated or changed, or written by a newer format.
    """
    files = {}
    for name in (CONFIG, TENSORS):
        try:
            files[name] = (directory / name).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"directory: cannot read {directory / name} ({error.strerror}), expected {CONFIG} and {TENSORS} as "
                "written by handle.save(directory)"
            ) from error
    try:
        content = json.loads(files[CONFIG])
    except ValueError as error:
        raise CheckpointError(f"{directory / CONFIG}: not valid JSON ({error}); the file is damaged") from error
    if not isinstance(content, dict) or "sha256" not in content:
        raise CheckpointError(f"{directory / CONFIG}: got no 'sha256' entry, expected a file written by handle.save")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory / CONFIG}: got format {content.get('format')!r}, expected {FORMAT}; "
            "it was written by another version of fastprompt"
        )
    for what, got, expected in (
        (CONFIG, _digest(content), content["sha256"]),
        (TENSORS, hashlib.sha256(files[TENSORS]).hexdigest(), content.get("tensors_sha256")),
    ):
        if got != expected:
            raise CheckpointError(
                f"{directory / what}: got sha256 {got}, expected {expected}; the file was truncated or changed"
            )
    try:
        tensors = load_tensors(files[TENSORS])
    except SafetensorError as error:
        raise CheckpointError(f"{directory / TENSORS}: not a safetensors file ({error})") from error
    _check_entries(directory / CONFIG, content, tensors)
    return content, tensors


def _check_entries(file: Path, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Every entry has its type, and the tensors are those that the JSON declares: a valid digest proves neither."""
    kinds = {"method": str, "config": dict, "tower": str, "train": list, "base": dict, "tensors": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    base = content["base"] if "base" not in wrong else {}
    numbers = ("layers", "width", "kv_heads", "head_dim")
    wrong += [f"base.{name}" for name in numbers if not isinstance(base.get(name), int)]
    weights = base.get("weights")
    if not isinstance(weights, dict) or any(not isinstance(w, list) or len(w) != SAMPLES for w in weights.values()):
        wrong.append("base.weights")
    if wrong:
        raise CheckpointError(f"{file}: got missing or malformed entries {wrong}, expected what handle.save writes")
    held = {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in tensors.items()}
    if content["tensors"] != held:
        raise CheckpointError(f"{file}: got tensors {content['tensors']}, expected {held}, those of {TENSORS}")


def describe_base(handle: Handle | LaneTower) -> dict[str, Any]:
    """What identifies the base model: the shape of its tower, and a few of its frozen weights a layer."""
    site = handle.sites[0]
    return {
        "class": type(handle.tower.module).__name__,
        "layers": len(handle.sites),
        "width": site.width,
        "kv_heads": site.heads,
        "head_dim": site.head_dim,
        "weights": {s.name: sample(weight) for s, weight in _frozen(handle)},
    }


def _frozen(handle: Handle | LaneTower) -> Iterator[tuple[Site, Tensor]]:
    """The layers that have a frozen weight to know them by."""
    for site in handle.sites:
        weight = site.fingerprint()
        if weight is not None and not weight.requires_grad:
            yield site, weight


def sample(weight: Tensor) -> list[float]:
    """A few elements of a weight."""
    weight = weight.detach().flatten()
    places = torch.linspace(0, weight.numel() - 1, SAMPLES, device=weight.device).long()
    return [float(x) for x in weight[places]]


def check_base(content: dict[str, Any], handle: Handle | LaneTower) -> None:
    """Raise CheckpointError unless the handle's base model is the one the prompts were trained on."""
    compare_base(content["base"], describe_base(handle))


def compare_base(saved: dict[str, Any], got: dict[str, Any]) -> None:
    """Raise CheckpointError unless two descriptions are of one base model, in whatever float dtype."""
    for key in ("layers", "width", "kv_heads", "head_dim"):
        if saved[key] != got[key]:
            raise CheckpointError(
                f"model: got {key} {got[key]} ({got['class']}), expected {saved[key]} ({saved['class']}); "
                "the prompts belong to another base model"
            )
    for layer in saved["weights"].keys() & got["weights"].keys():
        for a, b in zip(saved["weights"][layer], got["weights"][layer], strict=True):
            if not abs(a - b) <= max(WEIGHT_TOLERANCE * max(abs(a), abs(b)), WEIGHT_SPACING):
                raise CheckpointError(
                    f"model: the key projection of layer {layer} holds {b:.6g} where the prompts' base model held "
                    f"{a:.6g}; load the weights that the prompts were trained on ({saved['class']})"
                )


def check_tensors(tensors: dict[str, Tensor], expected: Mapping[str, Tensor], owner: str) -> None:
    """Raise CheckpointError unless names and shapes are those of the expected parameters."""
    if tensors.keys() != expected.keys():
        raise CheckpointError(
            f"tensors: got {sorted(tensors.keys() - expected.keys())} too many and "
            f"{sorted(expected.keys() - tensors.keys())} missing for {owner}; "
            "load into the model class that was saved, with the same head"
        )
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(
                f"{name}: got shape {list(tensors[name].shape)}, expected {list(parameter.shape)} in this model"
            )
