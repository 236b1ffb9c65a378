# SPDX-License-Identifier: Apache-2.0
"""The levels at which C++ kernels are tested: all that this processor has, each forced."""

import pytest

from fastprompt.ops.cpp import extension

LEVELS = extension.ISAS[: extension.ISAS.index(extension.best_isa()) + 1] if extension.best_isa() else ()

#: Of a file whose every test needs the kernels. Without a compiler there are none; test_build.py checks that excuse.
needs_cpp = pytest.mark.skipif(bool(extension.missing()), reason=extension.missing() or "built")


@pytest.fixture(params=LEVELS)
def isa(request, monkeypatch):
    """The level that the kernels of a test run at."""
    monkeypatch.setattr(extension, "best_isa", lambda: request.param)
    return request.param
