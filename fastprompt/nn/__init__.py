# SPDX-License-Identifier: Apache-2.0
"""Modules that hold prompt parameters."""
