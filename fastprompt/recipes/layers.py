# SPDX-License-Identifier: Apache-2.0
"""The layers that a recipe chooses, and what recipes check of numbers."""

from __future__ import annotations

from collections.abc import Sequence


def is_count(value: object) -> bool:
    """An integer >= 1, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def checked_layers(layers: object) -> tuple[int, ...] | None:
    """Layer numbers as a tuple, or None."""
    if layers is None:
        return None
    found = tuple(layers) if isinstance(layers, Sequence) else ()
    if not found or any(not isinstance(i, int) or isinstance(i, bool) for i in found):
        raise ValueError(f"layers: got {layers!r}, expected a non-empty sequence of layer numbers or None")
    return found


def choose_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    """The layers chosen, ascending, in a tower of ``count`` layers; negative numbers count from the end."""
    if layers is None:
        return list(range(count))
    bad = [i for i in layers if not -count <= i < count]
    chosen = sorted({i % count for i in layers if i not in bad})
    if bad or len(chosen) != len(layers):
        raise ValueError(f"layers: got {list(layers)}, expected distinct numbers in [-{count}, {count - 1}]")
    return chosen
