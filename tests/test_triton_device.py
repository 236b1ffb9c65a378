# SPDX-License-Identifier: Apache-2.0
"""What a device may do wrong though the maths is right: order, unwritten memory, graphs, streams, compiling.

Values are held against the oracle in the file of each operation. What needs no GPU is interpreted where there is none.
"""

import pytest
import torch
from attention_cases import TRITON_DEVICE
from device_cases import OPERATIONS, Operation

ON_GPU = TRITON_DEVICE == "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

each_operation = pytest.mark.parametrize("name", OPERATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def same(found, want):
    assert len(found) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@each_operation
@each_dtype
def test_results_are_the_same_bits_fifty_times(name, dtype):
    operation = Operation(name, dtype)
    want = operation.step()
    for _ in range(50 if ON_GPU else 1):
        same(operation.step(), want)


@pytest.fixture
def filled():
    """PyTorch fills what nobody has written with NaN, whoever allocates it, and integers with their largest."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device=TRITON_DEVICE).isnan().all(), "memory is not filled: the test would show nothing"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@each_operation
@each_dtype
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning")
@pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled:UserWarning")
def test_every_result_is_written(name, dtype, filled):
    for x in Operation(name, dtype).step():
        assert x.numel() and (x.isfinite() if x.is_floating_point() else x < 1 << 20).all()


@each_operation
def test_compiles_to_the_same_numbers(name):
    operation = Operation(name)
    torch.compiler.reset()
    compiled = torch.compile(operation.call, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    for got, want in zip(operation.step(compiled), operation.step(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@each_operation
@each_dtype
def test_a_graph_replays_on_new_numbers(name, dtype):
    operation = Operation(name, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        operation.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = operation.step()
    for seed in (1, 2):
        other = Operation(name, dtype, seed)
        with torch.no_grad():
            for x, new in zip(operation.inputs, other.inputs, strict=True):
                x.copy_(new)
        graph.replay()
        same(found, other.step())


@pytest.mark.gpu
@each_operation
def test_two_streams_do_not_disturb_each_other(name):
    pair = [Operation(name, torch.bfloat16, seed) for seed in (0, 1)]
    want = [operation.step() for operation in pair]
    streams = [torch.cuda.Stream() for _ in pair]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found = [[], []]
    for _ in range(20):
        for stream, operation, kept in zip(streams, pair, found, strict=True):
            with torch.cuda.stream(stream):
                kept.append(operation.step())
    torch.cuda.synchronize()
    for kept, one in zip(found, want, strict=True):
        for results in kept:
            same(results, one)
