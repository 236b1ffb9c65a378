# SPDX-License-Identifier: Apache-2.0
"""The two environment variables, read once: everything else is an argument."""

import os

#: Implementation that ``impl="auto"`` means: ``auto``, ``reference``, ``triton`` or ``cpp``.
IMPL = os.environ.get("FASTPROMPT_IMPL", "auto")

#: ``1`` adds checks that cost a pass over the data or wait for the GPU: finite prompts, and index values there.
DEBUG = os.environ.get("FASTPROMPT_DEBUG", "0") == "1"
