# SPDX-License-Identifier: Apache-2.0
"""`compress_kv` on the C++ kernels (``csrc/core/compress_kv.h``): all that follows the selection, in one call."""

from __future__ import annotations

from torch import Tensor

from fastprompt.ops.cpp.extension import isa_number, operations
from fastprompt.ops.layouts import dense_rows

#: In the order of ``Merge`` in ``csrc/core/compress_kv.h``.
_MERGES = ("drop", "average", "pivot", "weighted")


def merge_kv(
    key: Tensor,
    value: Tensor,
    index: Tensor,
    valid: Tensor | None,
    merge: str,
    merge_keys: bool,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Kept keys and values with what is evicted merged into them; ``isa`` forces a level of the kernels, for tests."""
    kept = [x.new_empty(*index.shape, x.shape[-1]) for x in (key, value)]
    operations().compress_kv(
        dense_rows(key), dense_rows(value), index.contiguous(), None if valid is None else valid.contiguous(),
        _MERGES.index(merge), merge_keys, isa_number(isa), *kept,
    )  # fmt: skip
    return kept[0], kept[1]
