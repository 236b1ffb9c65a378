# SPDX-License-Identifier: Apache-2.0
"""The configurations that are tried for every kernel: by the compile gate, and on a GPU by `fastprompt warmup --tune`.

At most eight a kernel, element size and head size, so that tuning takes a minute. What stays in registers while the
other side of the product streams by is the row side of some kernels and the key side of others; their lists mirror each
other. Float32 is multiplied by ordinary arithmetic units, in smaller tiles.
"""

from __future__ import annotations

from .configs import Config

#: Two accumulators less than the backward kernels have: larger tiles fit.
FORWARD = (
    Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(128, 64, 4, 3), Config(128, 32, 8, 2),
    Config(64, 64, 4, 3), Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 4, 2),
)  # fmt: skip
BACKWARD = (
    Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 64, 4, 3), Config(64, 64, 8, 2),
    Config(64, 32, 4, 2), Config(64, 32, 8, 1), Config(32, 64, 4, 2), Config(32, 32, 4, 1),
)  # fmt: skip
#: Heads of 256.
WIDE = (
    Config(128, 32, 8, 1), Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 1),
    Config(32, 64, 8, 1), Config(32, 32, 8, 2), Config(32, 32, 8, 1), Config(32, 32, 4, 1),
)  # fmt: skip
FLOAT = (
    Config(64, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 4, 2), Config(32, 32, 8, 1), Config(32, 16, 8, 1),
    Config(16, 16, 8, 1),
)  # fmt: skip
#: Of a kernel that goes over the keys of every branch twice: larger tiles compile longer than a first call may take.
TWICE_FLOAT = (Config(32, 16, 8, 1), Config(16, 16, 8, 1))
WIDE_FLOAT = (
    Config(32, 32, 8, 1), Config(32, 16, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 4, 1),
)  # fmt: skip

#: Kernels that hold rows while keys stream by, and those that hold keys.
HOLD_ROWS = ("forward", "query", "branches", "branches_query", "nearest")
HOLD_KEYS = ("key_value", "prompt", "branch", "scores")
#: Of these, the ones with the accumulators of a forward.
LIGHT = ("forward", "branches", "nearest", "scores")

#: The others, by bytes of an element.
OTHERS: dict[tuple[str, int], tuple[Config, ...]] = {
    # Few pairs go to a survivor: four, where a fifth of the keys survives.
    ("merge", 2): (Config(8, 0, 1, 1), Config(16, 0, 1, 1), Config(16, 0, 2, 1), Config(16, 0, 4, 1)),
    ("merge", 4): (Config(8, 0, 1, 1), Config(16, 0, 1, 1), Config(16, 0, 2, 1), Config(16, 0, 4, 1)),
    ("diffuse", 2): (
        Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 8, 3), Config(64, 64, 4, 2),
        Config(64, 32, 8, 3), Config(64, 32, 8, 2), Config(32, 64, 8, 2), Config(16, 32, 8, 2),
    ),
    ("diffuse", 4): (
        Config(64, 32, 8, 1), Config(32, 32, 8, 2), Config(32, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1),
    ),
    ("diffuse_rows", 2): (
        Config(128, 32, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(64, 64, 4, 2),
        Config(32, 64, 8, 2), Config(32, 32, 8, 2), Config(16, 64, 8, 2), Config(16, 32, 8, 2),
    ),
    ("diffuse_rows", 4): (
        Config(32, 32, 8, 1), Config(32, 16, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 4, 1),
    ),
    ("diffuse_prompt", 2): (
        Config(128, 128, 8, 2), Config(64, 128, 8, 3), Config(64, 128, 4, 3), Config(32, 128, 4, 3),
        Config(64, 64, 4, 3), Config(32, 64, 4, 3),
    ),
    ("diffuse_prompt", 4): (
        Config(64, 64, 8, 1), Config(32, 64, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 4, 2),
    ),
    ("summarize", 2): (
        Config(64, 32, 8, 2), Config(32, 64, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 4, 2),
        Config(16, 64, 8, 2), Config(16, 32, 8, 2), Config(16, 32, 4, 2),
    ),
    ("summarize", 4): (Config(32, 16, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 4, 1)),
    ("summarize_slopes", 2): (
        Config(64, 128, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 8, 3), Config(64, 64, 4, 3), Config(32, 64, 4, 3),
    ),
    ("summarize_slopes", 4): (Config(64, 32, 8, 1), Config(32, 32, 8, 2), Config(32, 32, 4, 2), Config(16, 32, 4, 2)),
    ("summarize_tokens", 2): (
        Config(64, 128, 8, 3), Config(32, 128, 8, 3), Config(64, 64, 4, 3), Config(32, 64, 4, 3),
    ),
    ("summarize_tokens", 4): (Config(32, 64, 8, 1), Config(32, 32, 4, 2), Config(16, 32, 4, 2)),
}  # fmt: skip


def candidates(kernel: str, itemsize: int, size: int) -> tuple[Config, ...]:
    """What may serve the entry of a kernel for elements of ``itemsize`` bytes and problems of up to ``size``."""
    if kernel not in HOLD_ROWS + HOLD_KEYS:
        return OTHERS[kernel, itemsize]
    found: tuple[Config, ...]
    if itemsize == 4:
        found = WIDE_FLOAT if size > 128 else TWICE_FLOAT if kernel == "branches_query" else FLOAT
    else:
        found = WIDE if size > 128 else FORWARD if kernel in LIGHT else BACKWARD
    return found if kernel in HOLD_ROWS else tuple(x._replace(rows=x.keys, keys=x.rows) for x in found)
