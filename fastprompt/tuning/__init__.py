# SPDX-License-Identifier: Apache-2.0
"""Training loops with progress, logs, checkpoints and bit-identical resume."""
