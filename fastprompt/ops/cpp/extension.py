# SPDX-License-Identifier: Apache-2.0
"""`fastprompt._C`: whether it is here, why not, and the instruction sets its kernels run at."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

#: The levels of the kernels, in the order of ``csrc/core/isa.h``; a processor with one has those before it.
ISAS = ("scalar", "avx2", "avx512", "amx")

_REPORT = Path(__file__).parents[2] / "_C.json"


@lru_cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension module and no reason, or None and why it is not there."""
    try:
        return import_module("fastprompt._C"), ""
    except ModuleNotFoundError:
        told = json.loads(_REPORT.read_text()).get("reason") if _REPORT.exists() else None
        return None, f"fastprompt was installed without its C++ kernels: {told or 'the build left no reason'}"
    except ImportError as error:
        return None, f"fastprompt._C does not load: {error}"


def missing() -> str:
    """Why there are no C++ kernels in this process; empty if there are."""
    return _load()[1]


def best_isa() -> str:
    """The highest level of this processor; empty where there are no C++ kernels."""
    module = _load()[0]
    return "" if module is None else module.isa


# What torch.compiler.assume_constant_result sets; calling it would import all of dynamo with fastprompt.
for _constant in (missing, best_isa):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def compiler() -> str:
    """What compiled the kernels; empty where there are none."""
    module = _load()[0]
    return "" if module is None else module.compiler


def operations() -> Any:
    """``torch.ops.fastprompt_cpp``, once the extension is loaded."""
    if missing():
        raise ImportError(missing())
    return torch.ops.fastprompt_cpp


def isa_number(isa: str | None) -> int:
    """What the kernels call a level; the best of this processor for None."""
    if isa is None:
        isa = best_isa()
    if isa not in ISAS:
        raise ValueError(f"isa: got {isa!r}, expected one of {', '.join(map(repr, ISAS))}")
    if ISAS.index(isa) > ISAS.index(best_isa()):
        raise ValueError(f"isa: got {isa!r}, but the best of this processor is {best_isa()!r}")
    return ISAS.index(isa)
