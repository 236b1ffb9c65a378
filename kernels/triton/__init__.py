# SPDX-License-Identifier: Apache-2.0
"""Triton kernels and their launchers, one file an operation; packaged as ``fastprompt.kernels``."""
