# SPDX-License-Identifier: Apache-2.0
"""Transformers integration; the only package that imports transformers."""
