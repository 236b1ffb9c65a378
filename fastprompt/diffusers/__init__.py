# SPDX-License-Identifier: Apache-2.0
"""Diffusers integration; the only package that imports diffusers.

Names load on first use: importing this package imports neither diffusers nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_WHERE = {
    "Acceleration": "acceleration",
    "DecoupledAttnProcessor": "processors",
    "Handle": "handle",
    "ImageProjections": "projections",
    "PromptAttnProcessor": "processors",
    "accelerate": "acceleration",
    "attach": "handle",
    "generate": "generation",
    "load_ip_adapter": "files",
    "load_pipeline": "generation",
    "restore": "handle",
}

__all__ = [
    "Acceleration", "DecoupledAttnProcessor", "Handle", "ImageProjections", "PromptAttnProcessor", "accelerate",
    "attach", "generate", "load_ip_adapter", "load_pipeline", "restore",
]  # fmt: skip

if TYPE_CHECKING:
    from fastprompt.diffusers.acceleration import Acceleration, accelerate
    from fastprompt.diffusers.files import load_ip_adapter
    from fastprompt.diffusers.generation import generate, load_pipeline
    from fastprompt.diffusers.handle import Handle, attach, restore
    from fastprompt.diffusers.processors import DecoupledAttnProcessor, PromptAttnProcessor
    from fastprompt.diffusers.projections import ImageProjections


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'fastprompt.diffusers' has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        module = importlib.import_module(f"fastprompt.diffusers.{_WHERE[name]}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("diffusers", "transformers"):
            raise
        raise ImportError(
            f"fastprompt.diffusers needs {package}, which is not installed: pip install 'fastprompt[diffusers]'"
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
