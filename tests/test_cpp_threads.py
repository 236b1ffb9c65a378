# SPDX-License-Identifier: Apache-2.0
"""C++ kernels and threads: any number of OpenMP threads, several Python threads at once, a fork after use."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_cases import grads_of, make, run
from cpp_cases import isa, needs_cpp  # noqa: F401
from test_prompt_attention_cpp import cpp, same

pytestmark = needs_cpp
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def threads():
    """Set how many threads PyTorch has; one again afterwards."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_1_to_64_threads_give_the_same_bits(dtype, isa, threads):  # noqa: F811
    """Prompt gradients too: the order of their sum is one of shapes."""
    cases = [
        (make(dtype, 5, 6, 3, 130, 150, prompts=20, dim=64), {}),
        (make(dtype, 1, 4, 2, 1, 900, dim=64), {}),
        (make(dtype, 1, 2, 1, 300, 1500, prompts=3, bank=2), {"is_causal": True, "prompt_index": torch.tensor([1])}),
    ]
    for inputs, kwargs in cases:
        want = cpp(inputs, **kwargs)
        for count in (2, 3, 8, 64):
            threads(count)
            assert same(cpp(inputs, **kwargs), want), f"{count} threads"
        threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_concurrent_calls(dtype, isa, threads):  # noqa: F811
    """Python threads call at once, every one with inputs and sizes of its own."""
    threads(2)
    cases = [make(dtype, 2, 4, 2, 20 + 13 * i, 30 + 17 * i, dim=16 * (1 + i % 4)) for i in range(8)]
    grads = [grads_of(x) for x in cases]

    def once(i):
        return run(cases[i], *grads[i], impl="cpp")

    want = [once(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert all(map(same, pool.map(once, range(8)), want))


def test_fork_after_use():
    """As a data loader's worker does: a child of a process that has used the kernels uses them with one thread."""
    code = """
import os, torch
from fastprompt.ops import prompt_attention
torch.set_num_threads(2)
inputs = [torch.randn(2, 4, 40, 64).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
prompt = torch.randn(4, 3, 64)
run = lambda: [prompt_attention(x, x, x, prompt.to(x.dtype), prompt.to(x.dtype), impl="cpp") for x in inputs]
want = run()
child = os.fork()
if not child:
    torch.set_num_threads(1)
    os._exit(0 if all(map(torch.equal, run(), want)) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert all(map(torch.equal, run(), want))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_tiles_of_others_are_left_alone(threads):
    """PyTorch's own bfloat16 products, which keep tile state of their own, before, between and after ours."""
    a = torch.randn(200, 200).bfloat16()
    inputs = make(torch.bfloat16, 2, 4, 2, 70, 90, dim=64)
    want, ours = a @ a, cpp(inputs)
    for count in (1, 2):
        threads(count)
        for _ in range(3):
            assert torch.equal(a @ a, want) and same(cpp(inputs), ours)
