# SPDX-License-Identifier: Apache-2.0
"""The build of `fastprompt._C`: there where it can be, explained where not, and right under the sanitizers."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cpp_cases import needs_cpp

import fastprompt
from fastprompt.ops.cpp import extension

ROOT = Path(__file__).parents[1]
COMPILER = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]


def test_where_there_is_a_compiler_there_are_kernels():
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    if shutil.which(COMPILER) and headers and sys.platform in ("linux", "darwin"):
        assert not extension.missing()
    else:
        assert "fastprompt was installed without its C++ kernels: " in extension.missing()


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        ({"CXX": "/none/c++"}, "no C++ compiler (/none/c++ is not on the PATH)"),
        ({"CXX": "false"}, "the build failed (CompileError)"),
    ],
)
def test_without_a_compiler_the_package_is_pure_python_and_says_why(tmp_path, break_it, reason):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "kernels", "fastprompt"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("_C*", "__pycache__", "build")
        (shutil.copytree(source, tmp_path / name, ignore=ignore) if source.is_dir() else shutil.copy(source, tmp_path))
    stale = tmp_path / "fastprompt" / "_C.abi3.so"
    stale.write_bytes(b"of another day")
    # A wheel that cannot have the kernels takes them from nobody who works in the clone.
    for where, kept in (("--build-lib=wheel", True), ("--inplace", False)):
        command = [sys.executable, "setup.py", "-q", "build_ext", where]
        built = subprocess.run(command, cwd=tmp_path, env={**os.environ, **break_it}, capture_output=True, text=True)
        assert built.returncode == 0 and stale.exists() == kept, built.stderr
        report = tmp_path / ("wheel/fastprompt" if kept else "fastprompt") / "_C.json"
        assert json.loads(report.read_text())["reason"].startswith(reason)
    code = """
import sys
sys.meta_path = [x for x in sys.meta_path if "Editable" not in repr(x)]
import torch, fastprompt
from fastprompt.ops.cpp.extension import missing
x = torch.ones(1, 1, 2, 4)
print(missing())
print(fastprompt.explain(fastprompt.ops.prompt_attention, x, x, x, x, x))
try:
    fastprompt.ops.prompt_attention(x, x, x, x, x, impl="cpp")
except fastprompt.ImplUnavailableError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"without its C++ kernels: {reason}") == 3 and "prompt_attention: cpu" in done.stdout


@needs_cpp
def test_the_extension_knows_nothing_of_unstable_torch_and_one_python():
    library = Path(fastprompt.__file__).parent / "_C.abi3.so"
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True)
    assert "torch_parallel_for" in symbols.stdout
    assert not re.findall(r" (?:c10|at|torch)::\S+", symbols.stdout)


@needs_cpp
@pytest.mark.parametrize("level", ["avx2", "avx512", "amx"])
def test_no_shared_function_is_compiled_for_one_level(level):
    """A weak function of the standard library in a level's object could replace everybody's: only own names may be."""
    objects = [f"build/plain/core/{path.stem}.o" for path in (ROOT / "csrc/core").glob(f"*{level}.cpp")]
    subprocess.run(["make", "-j2", "-C", ROOT / "csrc", *objects], check=True, capture_output=True)
    command = ["nm", "-C", *(ROOT / "csrc" / path for path in objects)]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    weak = [line.split(maxsplit=2)[2] for line in names.splitlines() if re.match(r"[0-9a-f]* *[WuV] ", line)]
    assert not [x for x in weak if f"fastprompt::{level}::" not in x and not x.startswith("DW.ref.")], weak


@needs_cpp
@pytest.mark.parametrize("target", ["test", "asan", "valgrind"])
def test_core(target):
    """The unit tests of csrc/tests, plain, under AddressSanitizer and UBSan, under valgrind."""
    if target == "valgrind" and not shutil.which("valgrind"):
        pytest.skip("valgrind is not installed")
    done = subprocess.run(["make", "-j2", "-C", ROOT / "csrc", target], capture_output=True, text=True)
    assert done.returncode == 0 and "all checks passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
