# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings run, and everything public has a docstring."""

import doctest
import importlib
import inspect
import pkgutil
from importlib.util import find_spec

import pytest

import fastprompt

FOUND = [m.name for m in pkgutil.walk_packages(fastprompt.__path__, "fastprompt.")]
# Importing a __main__ runs the command line; an extra that is not there is left out, as in conftest.py.
LEFT_OUT = ("fastprompt.__main__", *["fastprompt.diffusers"] * (not find_spec("diffusers")))
MODULES = ["fastprompt", *(name for name in FOUND if not name.startswith(LEFT_OUT))]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples():
    """Every docstring of the package that holds an example."""
    for module in map(importlib.import_module, MODULES):
        for test in doctest.DocTestFinder(exclude_empty=True).find(module):
            if test.examples:
                yield pytest.param(test, id=test.name)


def public(owner, module):
    """Public functions, classes and methods that ``module`` defines, with their names."""
    for name, x in vars(owner).items():
        x = x.__func__ if isinstance(x, (classmethod, staticmethod)) else x.fget if isinstance(x, property) else x
        if name.startswith("_") or getattr(x, "__module__", None) != module or not callable(x):
            continue
        if inspect.isclass(x) or inspect.isfunction(x):
            yield f"{owner.__name__}.{name}", x
        if inspect.isclass(x):
            yield from public(x, module)


@pytest.mark.parametrize("test", list(examples()))
def test_example(test, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=report.append)
    assert result.attempted
    assert not result.failed, "".join(report)


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_docstring(module):
    module = importlib.import_module(module)
    assert module.__doc__, module.__name__
    assert not [name for name, x in public(module, module.__name__) if not x.__doc__]
