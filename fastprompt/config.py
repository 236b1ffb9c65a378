# SPDX-License-Identifier: Apache-2.0
"""What the environment decides: two variables, read once, and where files are kept; everything else is an argument."""

import os
from pathlib import Path

#: Implementation that ``impl="auto"`` means: ``auto``, ``reference``, ``triton`` or ``cpp``.
IMPL = os.environ.get("FASTPROMPT_IMPL", "auto")

#: ``1`` adds checks that cost a pass over the data or wait for the GPU: finite prompts, and index values there.
DEBUG = os.environ.get("FASTPROMPT_DEBUG", "0") == "1"


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/fastprompt``, or ``~/.cache/fastprompt`` where that variable is not set."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastprompt"
