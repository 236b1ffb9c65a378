# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel once, for ``make sanitize-gpu``; few and small, since compute-sanitizer watches every access."""

import pytest
import torch
from device_cases import OPERATIONS, Operation


@pytest.fixture(autouse=True)
def poison():
    """Instead of that of all other tests: memory that is filled would hide a read of what nobody wrote."""


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs(name, dtype):
    for x in Operation(name, dtype).step():
        assert x.isfinite().all()
