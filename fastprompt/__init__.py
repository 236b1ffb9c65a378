# SPDX-License-Identifier: Apache-2.0
"""fastprompt: prompts for frozen transformers, computed exactly and without the wasted work.

Names load on first use: ``import fastprompt`` needs torch alone and changes nothing global.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_WHERE = {
    "APT": "recipes.apt",
    "DPL": "recipes.dpl",
    "H2O": "cache.policies",
    "TOVA": "cache.policies",
    "AdaKV": "cache.adakv",
    "AssetError": "errors",
    "AttachError": "errors",
    "CLIPClassifier": "recipes.clip_classifier",
    "CheckpointError": "errors",
    "CoCoOp": "recipes.cocoop",
    "CoOp": "recipes.coop",
    "DataError": "errors",
    "Decoding": "cache.policy",
    "IPAdapter": "recipes.ip_adapter",
    "IVLP": "recipes.ivlp",
    "ImplUnavailableError": "errors",
    "KeyDiff": "cache.policies",
    "LookM": "cache.policies",
    "MaPLe": "recipes.maple",
    "MultiLane": "recipes.multi_lane",
    "PrefixKV": "recipes.prefix_kv",
    "PromptCache": "hf.cache",
    "Random": "cache.policies",
    "SnapKV": "cache.policies",
    "StreamingLLM": "cache.policies",
    "TaskPathways": "recipes.task_pathways",
    "UnsupportedModelError": "errors",
    "VPT": "recipes.vpt",
    "ZeroShot": "recipes.zero_shot",
    "attach": "hf.attach",
    "check_finite": "ops.checks",
    "compress": "hf.compress",
    "diffusers": "",
    "explain": "ops.dispatch",
    "load": "recipes.registry",
    "nn": "",
    "ops": "",
    "recipes": "",
}

__all__ = [
    "APT", "DPL", "H2O", "IVLP", "TOVA", "VPT", "AdaKV", "AssetError", "AttachError", "CLIPClassifier",
    "CheckpointError", "CoCoOp", "CoOp", "DataError", "Decoding", "IPAdapter", "ImplUnavailableError", "KeyDiff",
    "LookM", "MaPLe", "MultiLane", "PrefixKV", "PromptCache", "Random", "SnapKV", "StreamingLLM", "TaskPathways",
    "UnsupportedModelError", "ZeroShot", "__version__", "attach", "check_finite", "compress", "diffusers", "explain",
    "load", "nn", "ops", "recipes",
]  # fmt: skip

if TYPE_CHECKING:
    from fastprompt import diffusers, nn, ops, recipes
    from fastprompt.cache.adakv import AdaKV
    from fastprompt.cache.policies import H2O, TOVA, KeyDiff, LookM, Random, SnapKV, StreamingLLM
    from fastprompt.cache.policy import Decoding
    from fastprompt.errors import (
        AssetError,
        AttachError,
        CheckpointError,
        DataError,
        ImplUnavailableError,
        UnsupportedModelError,
    )
    from fastprompt.hf.attach import attach
    from fastprompt.hf.cache import PromptCache
    from fastprompt.hf.compress import compress
    from fastprompt.ops.checks import check_finite
    from fastprompt.ops.dispatch import explain
    from fastprompt.recipes.apt import APT
    from fastprompt.recipes.clip_classifier import CLIPClassifier
    from fastprompt.recipes.cocoop import CoCoOp
    from fastprompt.recipes.coop import CoOp
    from fastprompt.recipes.dpl import DPL
    from fastprompt.recipes.ip_adapter import IPAdapter
    from fastprompt.recipes.ivlp import IVLP
    from fastprompt.recipes.maple import MaPLe
    from fastprompt.recipes.multi_lane import MultiLane
    from fastprompt.recipes.prefix_kv import PrefixKV
    from fastprompt.recipes.registry import load
    from fastprompt.recipes.task_pathways import TaskPathways
    from fastprompt.recipes.vpt import VPT
    from fastprompt.recipes.zero_shot import ZeroShot


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'fastprompt' has no attribute {name!r}; it has {', '.join(sorted(_WHERE))}")
    where = _WHERE[name]
    if not where:
        return importlib.import_module(f"fastprompt.{name}")
    value = getattr(importlib.import_module(f"fastprompt.{where}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
