# SPDX-License-Identifier: Apache-2.0
"""What a case is: named ways (providers) to do the same work, checked against a reference before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fastprompt.ops import dispatch

#: Does the work once and returns its results: the output, then the gradients.
Step = Callable[[], list[Tensor]]


class CannotRun(Exception):
    """A provider cannot run here; the message says why and becomes its row."""


class IsWrong(Exception):
    """A provider computes something else; its row says how far off, and the run fails."""


@dataclass(frozen=True)
class Work:
    """The least there is to do.

    Args:
        flops: Floating-point operations of the matrix products.
        bytes: Each input read once a pass and each result written once.
    """

    flops: int
    bytes: int


def attention_work(queries: int, keys: int, pairs: int, dim: int, itemsize: int, backward: bool) -> Work:
    """Of attention over ``queries`` and ``keys`` rows of all heads and samples, ``pairs`` of which see each other."""
    forward = (2 * queries + 2 * keys) * dim * itemsize + 4 * queries  # q, k, v, out; lse in float32
    again = (4 * queries + 4 * keys) * dim * itemsize + 4 * queries  # and grad, dq, dk, dv
    return Work((14 if backward else 4) * pairs * dim, forward + (again if backward else 0))


@dataclass(frozen=True)
class Provider:
    """One way to do the work of a case.

    Args:
        build: Builds its state and returns the step that is timed; may raise `CannotRun`.
        check: Returns what is compared with the case's reference; None is not compared (it does other work).
        why_not: Why it cannot run here, if that is known beforehand.
        work: Counted operations and bytes; None where nobody counts them.
        tokens: Token rows that a layer computes; None where nobody counts them.
    """

    build: Callable[[], Step]
    check: Callable[[], list[Tensor]] | None = None
    why_not: str | None = None
    work: Work | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Case:
    """A benchmark case.

    Args:
        name: The name of its file.
        providers: In the order of the table.
        baseline: The provider that ratios are against.
        reference: The results every checked provider must give, in the order of its own.
        tolerance: Bound on ``|got - want| / |want|`` of each result.
        params: Shapes, dtypes and counts, for the record.
        device_time: On a GPU, time the device alone (single operations), not the host that feeds it (whole steps).
    """

    name: str
    providers: dict[str, Provider]
    baseline: str
    reference: Callable[[], list[Tensor]]
    tolerance: float
    params: dict[str, Any] = field(default_factory=dict)
    device_time: bool = False


def composed(device: str, providers: dict[str, Provider], name: str = "fastprompt") -> dict[str, Provider]:
    """On a CPU, ``name/composed``: a provider once more on the composition of PyTorch's CPU kernels, which it takes
    where there are no C++ kernels; the best that could be done with PyTorch's calls.
    """
    given = providers[name]

    def without_cpp(make: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with patch.object(dispatch, "CPP_OPS", ()):
                return make()

        return run

    def build() -> Step:
        return without_cpp(without_cpp(given.build)())

    check = None if given.check is None else without_cpp(given.check)
    return {f"{name}/composed": replace(given, build=build, check=check)} if device == "cpu" else {}


def tolerance(dtype: torch.dtype) -> float:
    """Relative error of a few roundings to ``dtype``, in float32 also of sums over thousands of rows; TF32 fails it."""
    return torch.finfo(dtype).eps * (64 if dtype == torch.float32 else 8)


def difference(case: Case, name: str, want: list[Tensor]) -> float | None:
    """The largest relative error of a provider's results; None if it is not compared.

    Raises:
        IsWrong: it is above the tolerance.
    """
    check = case.providers[name].check
    if check is None:
        return None
    worst = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(check(), want, strict=True))
    if not worst <= case.tolerance:
        raise IsWrong(f"off by {worst:.3g}, expected at most {case.tolerance:.3g}")
    return worst
