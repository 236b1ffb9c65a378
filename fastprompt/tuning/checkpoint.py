# SPDX-License-Identifier: Apache-2.0
"""A run's state in one safetensors file: written atomically, verified wholly before any of it is used."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.optim import Optimizer

from fastprompt.errors import CheckpointError

FORMAT = "fastprompt.tuning"
VERSION = "1"

# What each optimizer keeps for a parameter; "step" is a single number, the others are shaped like the parameter.
_OPTIMIZER_KEYS = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Args:
        tensors: ``param.<i>``, ``optimizer.<i>.<key>`` and ``rng.<device>``, on the CPU.
        config: everything that the trajectory depends on, as JSON values.
        progress: how far the run is, as JSON values.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    progress: dict[str, Any]

    def apply(self, params: Sequence[Tensor], optimizer: Optimizer) -> None:
        """Copy parameters and optimizer state in place; call `check_fits` first."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                place, _, key = rest.partition(".")
                state.setdefault(int(place), {})[key] = tensor.clone()
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        with torch.no_grad():
            for index, param in enumerate(params):
                param.copy_(self.tensors[f"param.{index}"])

    def rng(self) -> dict[str, Tensor]:
        """Return the states of torch's generators."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith("rng.")}


def capture(params: Sequence[Tensor], optimizer: Optimizer, rng: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU of all that a run must carry over: parameters, optimizer state, generators."""
    named = {f"param.{index}": param for index, param in enumerate(params)}
    for index, state in optimizer.state_dict()["state"].items():
        named |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in (named | rng).items()}


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; a crash at any moment leaves the file's previous content or the new one, whole."""
    state = json.dumps({"config": checkpoint.config, "progress": checkpoint.progress}, sort_keys=True)
    digest = _digest(checkpoint.tensors, state)
    metadata = {"format": FORMAT, "version": VERSION, "state": state, "sha256": digest}
    content = safetensors.torch.save(checkpoint.tensors, metadata)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify its format, version and digest.

    Raises:
        CheckpointError: the file is no checkpoint of this format and version, or it is truncated or altered.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: got {error}, expected a whole safetensors file; restore a copy, or delete it to start over."
        ) from error
    got = (metadata.get("format"), metadata.get("version"))
    if got != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path}: got format {got[0]!r} version {got[1]!r}, expected {FORMAT!r} version {VERSION!r}; "
            "resume with the fastprompt that wrote it, or use another out_dir."
        )
    digest = _digest(tensors, metadata.get("state", ""))
    if digest != metadata.get("sha256"):
        raise CheckpointError(
            f"{path}: got sha256 {digest}, expected {metadata.get('sha256')}; the file was altered after it was "
            "written: restore a copy, or delete it to start over."
        )
    state = json.loads(metadata["state"])
    return Checkpoint(tensors, state["config"], state["progress"])


def check_fits(
    path: Path, checkpoint: Checkpoint, config: dict[str, Any], params: Sequence[Tensor], rng: dict[str, Tensor]
) -> None:
    """Raise unless a run with this config, these parameters and these generators can go on from the checkpoint.

    Args:
        path: named in messages.
        checkpoint: from `read_checkpoint`.
        config: everything that the run's trajectory depends on; ``config["optimizer"]`` names the optimizer.
        params: the tensors that the run trains.
        rng: states of the run's generators, for their number and sizes.

    Raises:
        CheckpointError: a setting, the number of parameters, a shape, a type or the devices differ.
    """
    differences = [
        f"{key}: got {config.get(key)!r}, expected {checkpoint.config.get(key)!r}"
        for key in sorted(config.keys() | checkpoint.config.keys())
        if config.get(key) != checkpoint.config.get(key)
    ]
    if differences:
        raise CheckpointError(
            f"{path} belongs to a run with another config ({'; '.join(differences)}); "
            "resume with the settings expected, or use another out_dir."
        )
    expected = {f"param.{index}": (param.shape, param.dtype) for index, param in enumerate(params)}
    expected |= {name: (state.shape, state.dtype) for name, state in rng.items()}
    keys = _OPTIMIZER_KEYS[config["optimizer"]]
    # torch.optim counts steps in double precision where that is torch's default, else in single.
    scalar = (torch.Size(), torch.promote_types(torch.float32, torch.get_default_dtype()))
    for index, param in enumerate(params):
        # A parameter that no loss has reached yet has no optimizer state.
        if any(f"optimizer.{index}.{key}" in checkpoint.tensors for key in keys):
            expected |= {f"optimizer.{index}.{k}": scalar if k == "step" else (param.shape, param.dtype) for k in keys}
    got = {name: (tensor.shape, tensor.dtype) for name, tensor in checkpoint.tensors.items()}
    # Parameters first: the state of their optimizer differs only because they do.
    for name in sorted(expected.keys() | got.keys(), key=lambda name: (not name.startswith("param."), name)):
        if expected.get(name) != got.get(name):
            raise CheckpointError(
                f"{path}: {name} is {_describe(got.get(name))} in the checkpoint and {_describe(expected.get(name))} "
                f"in this run ({len(params)} parameters); resume with the same handle on the same kind of device."
            )


def _describe(signature: tuple[torch.Size, torch.dtype] | None) -> str:
    return "absent" if signature is None else f"{list(signature[0])} {signature[1]}"


def _digest(tensors: dict[str, Tensor], state: str) -> str:
    """Return the SHA-256 over the state and over every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    # The new name is durable once its folder is; Windows cannot open one and needs no such call.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
