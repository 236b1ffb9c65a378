# SPDX-License-Identifier: Apache-2.0
"""Rebuild transformers' DINOv2 ViT-S/14 from the ONNX file of the ``dinov2-small`` asset.

The file is an export of an older ``Dinov2Model`` with a saliency head. Biases, norms, LayerScale, the patch convolution
and the CLS token kept their names. The linears' weights lost theirs and are stored transposed: each is found through
the bias that the Add after its MatMul adds. The position embeddings are two anonymous tensors, CLS and grid.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model

from fastprompt.data import assets
from fastprompt.errors import AssetError

_PREFIX = "backbone."
_HEAD_PREFIX = "decoder."
_POSITIONS = "embeddings.position_embeddings"
# Names in the file and in transformers 5.17, and what they are from 5.18 on.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def load_dinov2_small(
    path: str | Path | None = None, *, num_labels: int | None = None, attn_implementation: str = "sdpa"
) -> Dinov2Model | Dinov2ForImageClassification:
    """Load the real DINOv2 ViT-S/14 (22 M parameters, float32, evaluation mode).

    Args:
        path: the ONNX file; default that of the ``dinov2-small`` asset.
        num_labels: None for the bare backbone; a number of classes adds a fresh linear head on the CLS token and the
            mean patch token, drawn from torch's global generator.
        attn_implementation: a name that transformers knows.

    Returns:
        ``Dinov2Model``, or ``Dinov2ForImageClassification`` with ``num_labels``. Inputs are ``[B, 3, H, W]``,
        normalised with ImageNet's mean and standard deviation; H and W are multiples of 14.

    Raises:
        AssetError: the asset is not there, or a tensor of the file is missing, doubled, of a wrong shape or not used.
        ImportError: the ``onnx`` package is not installed.
    """
    file = assets.entry("dinov2-small") if path is None else Path(path)
    weights = _read_weights(file)
    options: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    options |= {"image_size": 518, "patch_size": 14, "attn_implementation": attn_implementation}
    # The file has no mask token; it matters in pre-training only.
    options["use_mask_token"] = False
    if num_labels is None:
        backbone = Dinov2Model(Dinov2Config(**options))
        _assign(file, backbone, weights)
        return backbone.eval()
    options["num_labels"] = num_labels
    classifier = Dinov2ForImageClassification(Dinov2Config(**options))
    _assign(file, classifier.dinov2, weights)
    return classifier.eval()


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Return every tensor of the file's backbone under its published name, in PyTorch's layout."""
    graph = _read_graph(file)
    tensors = {initializer.name: _tensor(initializer) for initializer in graph.initializer}
    linears = _linear_weights(graph, tensors)
    weights: dict[str, Tensor] = {}
    positions: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in linears:
            if linears[name] in weights:
                raise _wrong_file(file, f"two tensors for {linears[name]}, the second is {name}")
            weights[linears[name]] = tensor.T
        elif name.startswith(_PREFIX):
            weights[name.removeprefix(_PREFIX)] = tensor
        elif not name.startswith(_HEAD_PREFIX):
            positions[name] = tensor
    weights[_POSITIONS] = _join_positions(file, positions)
    return weights


def _read_graph(file: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ImportError('load_dinov2_small needs the onnx package: pip install "fastprompt[demo]"') from error
    try:
        return onnx.load(file).graph
    except (OSError, DecodeError) as error:
        raise _wrong_file(file, f"not readable as an ONNX model: {error}") from error


def _linear_weights(graph: Any, tensors: Iterable[str]) -> dict[str, str]:
    """Map each anonymous MatMul weight to its name, found through the bias that the following Add adds."""
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    names = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        biases = [name for name in node.input if name in tensors and name.startswith(_PREFIX)]
        factors = [name for value in node.input if value in products for name in products[value].input]
        for weight in (name for name in factors if name in tensors):
            for bias in biases:
                names[weight] = bias.removeprefix(_PREFIX).removesuffix("bias") + "weight"
    return names


def _join_positions(file: Path, parts: dict[str, Tensor]) -> Tensor:
    """Join the CLS position ``[1, 1, C]`` and the grid's ``[1, N, C]``, the two tensors that are left."""
    parts = dict(sorted(parts.items(), key=lambda item: item[1].numel()))
    shapes = [tuple(part.shape) for part in parts.values()]
    if len(shapes) != 2 or any(len(shape) != 3 for shape in shapes) or shapes[0] != (1, 1, shapes[1][2]):
        found = ", ".join(f"{name} {list(part.shape)}" for name, part in parts.items()) or "none"
        raise _wrong_file(file, f"position embeddings [1, 1, C] and [1, N, C] are wanted, anonymous tensors: {found}")
    return torch.cat(list(parts.values()), dim=1)


def _assign(file: Path, backbone: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy the weights into the model, each exactly once and of the right shape."""
    own = backbone.state_dict()
    weights = {_own_name(name, own): tensor for name, tensor in weights.items()}
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is not part of the model" for name in weights if name not in own]
    wrong += [
        f"{name} has shape {list(weights[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise _wrong_file(file, "; ".join(wrong[:5]) + more)
    backbone.load_state_dict(weights)


def _own_name(name: str, own: Iterable[str]) -> str:
    if name in own:
        return name
    for old, new in _RENAMED.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def _tensor(initializer: Any) -> Tensor:
    from onnx import numpy_helper

    return torch.from_numpy(np.array(numpy_helper.to_array(initializer)))


def _wrong_file(file: Path, reason: str) -> AssetError:
    return AssetError(
        f"path: {file} is not the DINOv2 ViT-S/14 file of the asset: {reason}; "
        f"get or repair it: fastprompt assets fetch dinov2-small"
    )
