# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs, and why not the others."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastprompt import config
from fastprompt.errors import ImplUnavailableError
from fastprompt.ops.cpp import wins
from fastprompt.ops.cuda.libraries import LIBRARIES
from fastprompt.ops.cuda.wins import Win

IMPLS = ("auto", "reference", "triton", "cpp")

#: Where the launchers of the fast implementations live; one module an operation, with ``forward`` and ``backward``, or
#: with an object that has them for every library that it can be composed of.
BACKENDS = {
    "triton": "fastprompt.kernels", "cpp": "fastprompt.ops.cpp", "cpu": "fastprompt.ops.cpu",
    **dict.fromkeys(LIBRARIES, "fastprompt.ops.cuda"),
}  # fmt: skip

#: The operations that have a Triton kernel, and the head sizes those take.
TRITON_OPS = (
    "compress_kv", "decoupled_attention", "diffuse_prompts", "key_scores", "prompt_attention",
    "prompt_attention_varlen", "summarize_tokens",
)  # fmt: skip
HEAD_SIZES = (16, 32, 64, 80, 96, 128, 256)
#: Those of diffusion models beside them: Stable Diffusion 1.5 has heads of 40, 80 and 160.
MORE_HEAD_SIZES = {"decoupled_attention": (40, 160)}

#: The operations that have C++ kernels for the CPU; `fastprompt.ops.cpp.wins` says where they win.
CPP_OPS = tuple(wins.LEAST_ISA)

#: Prompts whose scores a program of `diffuse_prompts` can hold.
MOST_PROMPTS = 512

#: Columns that a program of `summarize_tokens` can hold.
MOST_COLUMNS = 1024

#: Looked up once: every call asks, and a search of the path would cost more than a small attention.
HAS_TRITON = find_spec("triton") is not None

#: One namespace for every registered operation; schemas and fakes need torch alone.
LIBRARY = torch.library.Library("fastprompt", "DEF")


@dataclass(frozen=True)
class Choice:
    """What `explain` returns: the implementation ``auto`` picks and the reasons against the others."""

    op: str
    impl: str
    why: str
    refused: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.impl} ({self.why})"]
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.refused.items()]
        return "\n".join(lines)


def check_impl(impl: str, name: str = "impl") -> None:
    """Raise ValueError unless `impl`, which the user gave as `name`, is one of `IMPLS`."""
    if impl not in IMPLS:
        raise ValueError(f"{name}: got {impl!r}, expected one of {', '.join(map(repr, IMPLS))}")


def reasons_against(op: str, impl: str, tensors: Sequence[Tensor], by_name: bool = True) -> list[str]:
    """Why `impl` cannot run `op` on these tensors; empty if it can. ``by_name``: the user asked for it."""
    if impl == "reference":
        return []
    device = tensors[0].device.type
    if impl == "cpu":
        found = [] if device == "cpu" else [f"composed of PyTorch's CPU kernels; the tensors are on {device}"]
    elif (impl == "triton" and op in TRITON_OPS) or (impl in LIBRARIES and op == "prompt_attention"):
        found = _reasons_against_triton(tensors[0], device, by_name) + _reasons_of_size(op, tensors)
    elif impl == "cpp" and op in CPP_OPS:
        found = (
            wins.reasons_against(op, tensors, by_name)
            if device == "cpu"
            else [f"the tensors are on {device}, not on the CPU"]
        )
    else:
        return [f"no {impl} kernel for {op} in this build"]
    # Operations that register a backward alone drop tangents: a derivative would be zero, silently.
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        found.append("torch.func or forward-mode differentiation is running, for which kernels have no rule")
    return found


def _reasons_against_triton(query: Tensor, device: str, by_name: bool) -> list[str]:
    reasons = []
    if not HAS_TRITON:
        reasons.append("triton is not installed (pip install 'fastprompt[gpu]')")
    if device == "cuda":
        # ROCm has no compute capability to compare.
        if torch.version.hip is None and capability(query.device) < (8, 0):
            reasons.append("the GPU's compute capability is below 8.0")
    elif device != "cpu":
        reasons.append(f"the tensors are on {device}, not on a CUDA device")
    elif not by_name:
        reasons.append("the tensors are on the CPU, where Triton is interpreted: for tests, and only by name")
    elif not interpreting():
        reasons.append("the tensors are on the CPU (set TRITON_INTERPRET=1 before Python starts to interpret there)")
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype {query.dtype} is not float16, bfloat16 or float32")
    return reasons


def _reasons_of_size(op: str, tensors: Sequence[Tensor]) -> list[str]:
    if op == "diffuse_prompts":
        count = len(tensors[1])
        return [f"{count} prompts are more than {MOST_PROMPTS}"] if count > MOST_PROMPTS else []
    if op == "summarize_tokens":
        x = tensors[0]
        width = x.shape[-1]
        if x.dtype == torch.float32 and width > MOST_COLUMNS // 2 and _little_shared_memory(x.device):
            return [f"float32 rows of width {width} take 128 KiB of shared memory, this GPU has 99"]
        return [f"width {width} is more than {MOST_COLUMNS}"] if width > MOST_COLUMNS else []
    size, more = tensors[0].shape[-1], MORE_HEAD_SIZES.get(op, ())
    if size in HEAD_SIZES or size in more:
        return []
    return [f"head size {size} is not one of {', '.join(map(str, sorted((*HEAD_SIZES, *more))))}"]


def _little_shared_memory(device: torch.device) -> bool:
    """Compute capability 8.6, 8.9 and 12.x: 99 KiB a block, where the GPUs of data centres have 163 and more."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    major, minor = capability(device)
    return major == 12 or (major, minor) in ((8, 6), (8, 9))


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability: asked for at every call, which PyTorch answers slowly."""
    return torch.cuda.get_device_capability(device)


def interpreting() -> bool:
    """Whether Triton kernels are interpreted on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y", "t")


def choose(
    op: str, tensors: Sequence[Tensor], impl: str = "auto", composed: bool = False, win: Win | None = None
) -> Choice:
    """Resolve `impl` for `op`; an explicit impl never falls back.

    ``composed`` says that `op` has a composition of PyTorch's own CPU kernels (impl name ``"cpu"``, reached by
    ``"auto"`` only); ``win``, that a composition with a library on CUDA was measured to be faster (its impl name is the
    library's, reached likewise).

    Raises:
        ImplUnavailableError: an explicit impl cannot run; the message lists every reason.
    """
    check_impl(impl)
    if impl == "auto" and config.IMPL != "auto":
        impl = config.IMPL
        check_impl(impl, "FASTPROMPT_IMPL")
    if impl != "auto":
        reasons = reasons_against(op, impl, tensors)
        if reasons:
            raise ImplUnavailableError(
                f"impl={impl!r} cannot run {op} here: {'; '.join(reasons)}. "
                'Use impl="auto" to let fastprompt choose, or impl="reference".'
            )
        return Choice(op, impl, "asked for by name")
    if win is not None and not reasons_against(op, win.library, tensors, by_name=False):
        return Choice(op, win.library, win.why)
    refused: dict[str, list[str]] = {}
    for name in ("triton", "cpp", "cpu") if composed else ("triton", "cpp"):
        reasons = reasons_against(op, name, tensors, by_name=False)
        if not reasons:
            why = wins.why(op, tensors) if name == "cpp" else "first that can run these tensors"
            return Choice(op, name, why, refused)
        refused[name] = reasons
    return Choice(op, "reference", "plain PyTorch runs everywhere", refused)


def calls_cpp(op: str, *tensors: Tensor) -> bool:
    """Whether the C++ launcher of `op` may be called by itself, without the operation's checks and gradient, which cost
    more than a step of generation over a short cache.
    """
    query = tensors[0]
    if not query.is_cpu or any(x.dtype != query.dtype for x in tensors) or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    return choose(op, tensors).impl == "cpp"


@lru_cache
def backend(op: str, impl: str) -> Any:
    """The launchers of a fast implementation, imported when it first runs."""
    module = import_module(f"{BACKENDS[impl]}.{op}")
    if impl not in ("cpp", "cpu") and tuned_file().exists():
        import_module(f"{BACKENDS['triton']}.configs").load(tuned_file())
    return getattr(module, impl) if impl in LIBRARIES else module


def tuned_file() -> Path:
    """Where `fastprompt warmup --tune` keeps what it found for this GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    return config.default_cache_dir() / "tuned" / (re.sub(r"\W+", "-", name).lower() + ".json")


def explain(op: Callable, *args, **kwargs) -> Choice:
    """Tell which implementation ``op(*args, **kwargs)`` would use and why not the others.

    Args:
        op: An operation of `fastprompt.ops`, e.g. ``fastprompt.ops.prompt_attention``.
        *args: What the operation would be called with; nothing is computed.
        **kwargs: Likewise.

    Returns:
        A `Choice`; ``print`` it.

    Example:
        >>> import torch, fastprompt
        >>> x = torch.zeros(1, 2, 4, 8, dtype=torch.float64)
        >>> fastprompt.explain(fastprompt.ops.prompt_attention, x, x, x, x, x).impl
        'cpu'
    """
    resolve = getattr(op, "resolve", None)
    if resolve is None:
        raise TypeError(f"op: got {op!r}, expected an operation of fastprompt.ops")
    return resolve(*args, **kwargs)
