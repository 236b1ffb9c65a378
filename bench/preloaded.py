# SPDX-License-Identifier: Apache-2.0
"""Imports every case, for the process that `bench.forks` forks; one that cannot be imported says so where it is run."""

from contextlib import suppress
from importlib import import_module

from bench.run import names

for name in names():
    with suppress(Exception):
        import_module(f"bench.cases.{name}")
