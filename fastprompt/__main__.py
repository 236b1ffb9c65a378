# SPDX-License-Identifier: Apache-2.0
"""``python -m fastprompt``."""

import sys

from fastprompt.cli import main

sys.exit(main())
