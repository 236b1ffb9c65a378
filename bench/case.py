# SPDX-License-Identifier: Apache-2.0
"""What a case is: named ways (providers) to do the same work, checked against each other before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Case:
    """A benchmark case.

    Args:
        name: The name of its file.
        providers: Each builds its state and returns the function that does the work once.
        baseline: The provider that ratios are against.
        check: Raises unless the providers compute the same; returns the differences it measured.
        params: Shapes, dtypes and counts, for the record.
    """

    name: str
    providers: dict[str, Callable[[], Callable[[], Any]]]
    baseline: str
    check: Callable[[], dict[str, float]]
    params: dict[str, Any] = field(default_factory=dict)
