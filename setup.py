# SPDX-License-Identifier: Apache-2.0
"""Builds `fastprompt._C` where a compiler and torch's headers are at hand; elsewhere the package is pure Python.

What happened is written to ``fastprompt/_C.json``; ``fastprompt info`` shows it. Everything else is in pyproject.toml.
"""

import json
import os
import platform
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
REPORT = ROOT / "fastprompt" / "_C.json"

# The oldest torch whose stable ABI has parallel_for: what is built with any torch runs with every later one.
TORCH_TARGET = "0x020a000000000000"
PYTHON_TARGET = "0x030a0000"

#: Also those of the sanitizer builds (csrc/Makefile).
FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Wpedantic",
    "-Wshadow", "-Werror",
]  # fmt: skip


def why_not() -> str | None:
    """Why the extension cannot be built here; None if it can."""
    if sys.platform not in ("linux", "darwin"):
        return f"no C++ build on {sys.platform} yet: GCC or Clang is needed"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded Python has no stable ABI"
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    if not shutil.which(compiler):
        return f"no C++ compiler ({compiler} is not on the PATH); install one, e.g. Debian's package g++, and reinstall"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return (
            "torch cannot be imported while building; install torch first, then fastprompt with "
            "pip install --no-build-isolation"
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python.h is missing; install Python's development files, e.g. Debian's package python3-dev"
    return None


def extension() -> Extension:
    """``fastprompt._C``; only its bindings see torch, and of torch only the stable ABI."""
    from torch.utils.cpp_extension import include_paths, library_paths

    return Extension(
        "fastprompt._C",
        sources=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").glob("core/*.cpp"))] + ["csrc/bindings.cpp"],
        depends=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").glob("core/*.h"))],
        include_dirs=["csrc/core"],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET), ("TORCH_STABLE_ONLY", None), ("Py_LIMITED_API", PYTHON_TARGET),
        ],
        extra_compile_args=[*FLAGS, *(f"-isystem{path}" for path in include_paths())],
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        language="c++",
        py_limited_api=True,
    )  # fmt: skip


class Build(build_ext):
    """Compiles the files side by side; a failure leaves a pure Python package and says so."""

    def run(self) -> None:
        """Build, and report."""
        reason, inplace = why_not(), self.inplace
        if reason is None:
            try:
                super().run()
            except Exception as error:  # the compiler's own message is on the terminal
                reason = f"the build failed ({type(error).__name__}); see it with `python setup.py build_ext --inplace`"
                self.inplace = inplace
        place = REPORT.parent if self.inplace else Path(self.build_lib) / "fastprompt"
        if reason is not None:
            self.extensions.clear()
            for stale in place.glob("_C.*.so"):
                stale.unlink()
        found = {"built": reason is None, "python": platform.python_version()}
        if reason is None:
            import torch

            found |= {"torch": torch.__version__}
        else:
            found |= {"reason": reason}
            print(f"fastprompt: pure Python, without the C++ kernels: {reason}", file=sys.stderr)
        place.mkdir(parents=True, exist_ok=True)
        (place / REPORT.name).write_text(json.dumps(found, indent=1) + "\n")

    def get_outputs(self) -> list[str]:
        """The report is installed with the extension."""
        built = super().get_outputs()
        return built if self.inplace else [*built, str(Path(self.build_lib) / "fastprompt" / REPORT.name)]

    def build_extensions(self) -> None:
        """One compiler a file, as many at once as there are cores."""
        compile_one = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(chain(*pool.map(lambda source: compile_one([source], **options), sources)))

        self.compiler.compile = compile_all
        super().build_extensions()


reason = why_not()
setup(
    ext_modules=[extension()] if reason is None else [Extension("fastprompt._C", sources=[])],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if reason is None else {},
)
