# SPDX-License-Identifier: Apache-2.0
"""What importing fastprompt does and does not do, and which module may import which."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastprompt
from fastprompt.ops.cpp import extension

ROOT = Path(fastprompt.__file__).parent
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
ATTEND = """
import torch
from fastprompt.ops import prompt_attention
torch.manual_seed(0)
x, prompt = torch.randn(1, 2, 4, 8), torch.randn(2, 3, 8, requires_grad=True)
"""


def fresh(code, **environment):
    """Run ``code`` in a new process and return what it prints; the process must succeed."""
    done = start(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def start(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "FASTPROMPT_IMPL": "auto", **environment},
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("module", ["fastprompt", "fastprompt.ops"])
def test_import_loads_torch_alone_and_changes_nothing(module):
    code = f"""
import random, sys, torch
from concurrent.futures import ThreadPoolExecutor  # torch imports it late
def settings():
    return (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), random.getstate(),
            torch.get_rng_state().tolist(), torch.is_autocast_enabled("cpu"), torch.cuda.is_initialized(),
            torch.nn.functional.scaled_dot_product_attention)
before, loaded = settings(), set(sys.modules)
import {module}
assert settings() == before, "a global setting changed"
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - loaded}} - set(sys.stdlib_module_names)))
"""
    heavy = {"transformers", "triton", "PIL", "matplotlib", "diffusers", "safetensors", "numpy", "tqdm", "onnx"}
    loaded = set(fresh(code))
    assert "fastprompt" in loaded
    assert not loaded & heavy


def test_import_registers_no_attention():
    code = """
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
import fastprompt, fastprompt.ops, fastprompt.nn, fastprompt.recipes
fastprompt.VPT, fastprompt.attach, fastprompt.load
print(*AttentionInterface().valid_keys(), *AttentionMaskInterface().valid_keys())
"""
    names = fresh(code)
    assert "sdpa" in names
    assert not any("fastprompt" in name for name in names)


def test_the_public_face_is_listed_and_resolves():
    code = """
import fastprompt
listed = dir(fastprompt)
assert listed == sorted(set(listed))
for name in fastprompt.__all__:
    assert name in listed, name
    assert getattr(fastprompt, name) is not None, name
from fastprompt import *
print(*fastprompt.__all__)
"""
    names = fresh(code)
    assert {"attach", "load", "explain", "check_finite", "ops", "nn", "recipes", "VPT", "AttachError"} <= set(names)
    with pytest.raises(AttributeError, match=r"module 'fastprompt' has no attribute 'atach'; it has .*attach"):
        fastprompt.atach  # noqa: B018


def test_the_environment_chooses_what_auto_means():
    code = ATTEND + "import fastprompt\nprint(fastprompt.explain(prompt_attention, x, x, x, prompt, prompt).impl)"
    assert fresh(code) == ["cpu" if extension.missing() else "cpp"]
    assert fresh(code, FASTPROMPT_IMPL="reference") == ["reference"]
    failed = start(code, FASTPROMPT_IMPL="fastest").stderr
    assert "ValueError: FASTPROMPT_IMPL: got 'fastest', expected one of 'auto', 'reference', 'triton', 'cpp'" in failed


def test_the_first_call_of_a_process_may_be_compiled():
    code = (
        ATTEND
        + """
compiled = torch.compile(prompt_attention, fullgraph=True, backend="aot_eager")
out = compiled(x, x, x, prompt, prompt)
out.sum().backward()
assert torch.equal(out, prompt_attention(x, x, x, prompt, prompt)) and prompt.grad.isfinite().all()
print("same")
"""
    )
    assert fresh(code) == ["same"]


def test_the_reference_runs_where_triton_cannot_be_imported():
    blocked = "import sys\nsys.modules['triton'] = None\n"
    assert fresh(blocked + ATTEND + "print(prompt_attention(x, x, x, prompt, prompt, impl='reference').numel())") == [
        "64"
    ]


def imports(path, everywhere=True, root=None, name="fastprompt"):
    """Modules that a file imports, relative ones made absolute; ``everywhere=False``: those that run on its import.

    ``root`` is the folder of the package ``name`` (default: of fastprompt).
    """

    def visit(node):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = [*name.split("."), *path.relative_to(root or ROOT).parent.parts]
            base = (
                ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            # `from package import module` imports the module as well.
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if everywhere or not deferred:
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    return set(visit(ast.parse(path.read_text())))


def belongs(name, *packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def forbidden(folder, *packages, everywhere=True):
    """``{file: imports}`` of files in ``folder`` that import one of ``packages``; the folder must exist."""
    files = {name: path for name, path in FILES.items() if name.startswith(folder)}
    assert files, f"no files in {folder}"
    found = {name: {i for i in imports(path, everywhere) if belongs(i, *packages)} for name, path in files.items()}
    return {name: bad for name, bad in found.items() if bad}


@pytest.mark.parametrize(
    ("folder", "packages"),
    [
        ("ops/", ("nn", "hf", "recipes", "tuning", "data", "cache", "cli")),
        ("ops/cpu/", ("ops.reference",)),
        ("ops/reference", ("ops.cpu", "kernels", "_C")),
        ("nn/", ("hf", "cache", "recipes", "tuning", "data", "cli")),
        ("cache/", ("nn", "hf", "recipes", "tuning", "data", "cli")),
        ("hf/", ("recipes", "tuning", "cli", "diffusers")),
        ("diffusers/", ("recipes", "tuning", "data", "cli")),
        ("tuning/", ("recipes", "cli")),
        ("data/", ("ops", "nn", "hf", "recipes", "tuning", "cli")),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_arrows_point_down(folder, packages):
    assert not forbidden(folder, *(f"fastprompt.{package}" for package in packages))


def test_only_hf_imports_transformers_on_import():
    found = forbidden("", "transformers", everywhere=False)
    assert found, "the check found no import at all"
    assert {name.split("/")[0] for name in found} == {"hf"}


def test_only_our_diffusers_imports_diffusers():
    found = forbidden("", "diffusers")
    assert found, "the check found no import at all"
    assert {name.split("/")[0] for name in found} == {"diffusers"}


def test_without_diffusers_everything_else_works_and_the_error_says_what_to_install():
    blocked = """
import sys
sys.modules["diffusers"] = None
import fastprompt, fastprompt.diffusers
from fastprompt import *
from fastprompt.recipes.ip_adapter import CARD
print(fastprompt.IPAdapter(image_width=8).image_width)
for name in ("attach", "accelerate", "load_ip_adapter"):
    try:
        getattr(fastprompt.diffusers, name)
    except ImportError as error:
        print("pip install 'fastprompt[diffusers]'" in str(error))
"""
    assert fresh(blocked) == ["8", "True", "True", "True"]


def test_the_layer_check_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "ops" / "x.py"
    path.parent.mkdir()
    path.write_text("import a.b\nfrom c import d\nfrom ..nn import e\nfrom . import f\ndef g():\n    import h\n")
    assert {"a.b", "c.d", "fastprompt.nn", "fastprompt.nn.e", "fastprompt.ops.f", "h"} <= imports(path)
    assert "h" not in imports(path, everywhere=False)


def test_kernels_import_nothing_of_fastprompt():
    folder, package = ROOT.parent / "kernels" / "triton", "fastprompt.kernels"
    found = {path.name: imports(path, root=folder, name=package) for path in sorted(folder.glob("*.py"))}
    assert "fastprompt.kernels.tiles" in found["prompt_attention_forward.py"]
    for name, modules in found.items():
        assert not [i for i in modules if belongs(i, "fastprompt") and not belongs(i, package)], name
    assert not (folder.parent / "__init__.py").exists()


def test_uninitialised_memory_is_poisoned_in_tests():
    for code in ("torch.empty(3)", "torch.empty_like(torch.ones(3))", "torch.ones(3).new_empty(3)"):
        assert eval(code, {"torch": torch, "__name__": "fastprompt.ops.probe"}).isnan().all()
    assert not torch.empty(3, dtype=torch.int64).is_floating_point()
