# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention` with the instance keys left to PyTorch's CUDA kernels, against the float64 oracle.

Without a GPU the kernels have stand-ins, and the prompt's part is interpreted; with one, these tests run there.
"""

import pytest
import torch
from attention_cases import LAYOUTS, PROMPTS_ONLY, TRITON_DEVICE, check, grads_of, leaves, make, run, to_device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from library_cases import stand_ins
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fastprompt
from bench.peers import by_library
from fastprompt.errors import ImplUnavailableError
from fastprompt.ops import dispatch, prompt_attention
from fastprompt.ops.cuda import libraries, wins
from fastprompt.ops.cuda.libraries import LIBRARIES
from fastprompt.ops.cuda.wins import Win

HALF = torch.bfloat16, torch.float16
PAIRS = [(name, dtype) for name in LIBRARIES for dtype in LIBRARIES[name].dtypes]

each_library = pytest.mark.parametrize("name", LIBRARIES)
each_pair = pytest.mark.parametrize(("name", "dtype"), PAIRS, ids=lambda x: str(x).removeprefix("torch."))


@pytest.fixture(autouse=True)
def called(monkeypatch):
    """Libraries may be named; those that are called, in order (of stand-ins)."""
    monkeypatch.setattr(dispatch, "IMPLS", (*dispatch.IMPLS, *LIBRARIES))
    seen = []
    if TRITON_DEVICE == "cuda":
        yield seen
    else:
        with stand_ins(seen):
            yield seen


def names(launched):
    """Of the kernels that ran."""
    return [x.kernel.__name__.removesuffix("_kernel") for x in launched]


def heads(name):
    """Grouped, where the library takes them."""
    return {"heads": 4, "heads_kv": 2 if LIBRARIES[name].grouped else 4}


def without_lse(inputs):
    return grads_of(inputs, with_lse=False)


@each_pair
@pytest.mark.parametrize(("prompts", "is_causal"), [(0, True), (1, False), (40, True)])
def test_matches_the_oracle(name, dtype, prompts, is_causal, called, launched):
    inputs = make(dtype, tq=37, tk=37, prompts=prompts, **heads(name))
    check(inputs, *without_lse(inputs), impl=name, is_causal=is_causal)
    if TRITON_DEVICE == "cpu":
        assert called == [name, f"{name}_backward"]
    assert names(launched) == (["prompt_forward", "prompt_query", "prompt", "reduce", "reduce"] if prompts else [])


@st.composite
def cases(draw):
    """Shapes, banks and layouts; the values come from a seed."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    name, dtype = pick(*PAIRS)
    library = LIBRARIES[name]
    batch, heads_kv, groups, is_causal = pick(1, 3), pick(1, 2), pick(1, 3) if library.grouped else 1, pick(False, True)
    tq, tk = pick(1, 7, 33, 70), pick(2, 9, 64, 70)
    if is_causal and not (library.offset and tq < tk):
        tq = tk
    prompts, bank = pick(0, 1, 8, 40), pick(None, 1, batch, 4)
    kwargs = {"is_causal": is_causal, "scale": pick(None, 1.0)}
    if bank == 4 or pick(False, True):
        kwargs["prompt_index"] = torch.randint(0, bank or 1, (batch,))
    inputs = make(dtype, batch, heads_kv * groups, heads_kv, tq, tk, prompts, 16, bank)
    if dtype != torch.float32 and pick(False, True):
        inputs[3:] = [x.float() for x in inputs[3:]]
    return name, [LAYOUTS[pick(*LAYOUTS)](x) if x.numel() else x for x in inputs], pick(False, True), kwargs


@given(case=cases())
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_matches_the_oracle_on_other_shapes_and_layouts(case):
    name, inputs, with_lse, kwargs = case
    check(inputs, *grads_of(inputs, with_lse), impl=name, **kwargs)


@each_library
@pytest.mark.parametrize("dim", [64, 128])
def test_heads_as_wide_as_those_of_models(name, dim):
    inputs = make(torch.bfloat16, tq=40, tk=40, dim=dim, **heads(name))
    check(inputs, *without_lse(inputs), impl=name, is_causal=True)


@each_library
def test_peaked_attention_on_either_side(name):
    """A part whose share of the softmax is next to nothing neither overflows nor is lost."""
    for part in (1, 3):
        inputs = make(torch.bfloat16, tq=9, tk=9, **heads(name))
        inputs[part] = 20 * inputs[part]
        check(inputs, *without_lse(inputs), impl=name)


@each_library
def test_a_gradient_of_lse_goes_through_our_kernels(name, called, launched):
    inputs = make(torch.bfloat16, tq=9, tk=9, **heads(name))
    check(inputs, *grads_of(inputs), impl=name)
    assert called in ([name], [])
    assert names(launched) == ["prompt_forward", "delta", "query", "key_value", "prompt", "reduce", "reduce"]


@each_library
@pytest.mark.parametrize(
    ("needs", "kernels"),
    [
        (PROMPTS_ONLY, ["delta", "prompt", "reduce", "reduce"]),
        ((True, False, False, False, False), ["prompt_query"]),
        ((False, True, True, False, False), []),
        ((False, True, False, True, False), ["delta", "prompt", "reduce"]),
        ((True, False, False, False, True), ["prompt_query", "prompt", "reduce"]),
    ],
    ids=["prompts", "query", "keys", "key and prompt_key", "query and prompt_value"],
)
def test_only_what_is_needed_is_launched(name, needs, kernels, called, launched):
    inputs = make(torch.bfloat16, tq=9, tk=9, **heads(name))
    check(inputs, *without_lse(inputs), needs=needs, impl=name)
    assert names(launched) == ["prompt_forward", *kernels]
    if TRITON_DEVICE == "cpu":
        assert called == [name] if needs == PROMPTS_ONLY else [name, f"{name}_backward"]


@each_library
@pytest.mark.parametrize("prompts", [0, 3])
@pytest.mark.parametrize("layout", ["contiguous", "bthd", "strided"])
def test_results_lie_in_memory_as_compiled_code_was_told(name, prompts, layout):
    inputs = make(torch.bfloat16, tq=5, tk=5, prompts=prompts, bank=1, **heads(name))
    inputs = to_device([LAYOUTS[layout](x) if x.numel() else x for x in inputs], TRITON_DEVICE)
    operations, options = torch.ops.fastprompt, (None, None, True, 0.25, name)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(operations.prompt_attention.default, (*inputs, *options), test_utils=utils)
    out, lse = operations.prompt_attention(*inputs, *options)
    arguments = (torch.randn_like(out), None, *inputs, None, None, out, lse, True, 0.25, [True] * 5, name)
    torch.library.opcheck(operations.prompt_attention_backward.default, arguments, test_utils=utils)


@each_library
def test_compiles_without_graph_breaks(name):
    inputs = to_device(leaves(make(torch.bfloat16, tq=5, tk=5, **heads(name))), TRITON_DEVICE)
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: prompt_attention(*x, impl=name), fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(prompt_attention(*inputs, impl=name).square().sum(), inputs)
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


REFUSED = {
    "mask": ("a mask hides", {}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, LIBRARIES),
    "scale": ("would be multiplied into", {}, {"scale": 0.0}, LIBRARIES),
    "no keys": ("and 0 keys", {"tk": 0}, {}, LIBRARIES),
    "no samples": ("of 0 samples", {"batch": 0}, {}, LIBRARIES),
    "one key": ("and 1 keys", {"tk": 1}, {}, ["cudnn"]),
    "more queries": ("aligns the diagonal", {"tq": 7}, {"is_causal": True}, LIBRARIES),
    "more keys": ("aligns the diagonal", {"tk": 7}, {"is_causal": True}, ["cudnn", "efficient"]),
    "groups": ("takes no grouped heads", {"heads_kv": 2}, {}, ["efficient"]),
    "float32": ("takes no torch.float32", {"dtype": torch.float32}, {}, ["cudnn", "flash"]),
    "wide": ("head size 256 is more", {"dim": 256}, {}, ["cudnn"]),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_a_library_cannot_take_is_refused(why, called):
    message, shape, kwargs, refusing = REFUSED[why]
    shape = {"dtype": torch.bfloat16, "heads": 4, "heads_kv": 4, "tq": 5, "tk": 5} | shape
    inputs, kwargs = to_device((make(**shape), kwargs), TRITON_DEVICE)
    for name in LIBRARIES:
        if name in refusing:
            with pytest.raises(ImplUnavailableError, match=message):
                prompt_attention(*inputs, impl=name, **kwargs)
        else:
            prompt_attention(*inputs, impl=name, **kwargs)
    assert not set(called) & set(refusing)


def test_a_cudnn_that_is_wrong_is_refused(monkeypatch):
    class Cuda:
        """What the reasons read of a query."""

        dtype, is_cuda, shape = torch.bfloat16, True, (1, 1, 5, 64)

    for version, refused in ((libraries.CUDNN - 1, True), (None, True), (libraries.CUDNN, False)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        reasons = LIBRARIES["cudnn"].reasons_against(Cuda, Cuda, None, False, 0.125)
        assert any("is older than" in reason for reason in reasons) == refused and len(reasons) == refused


@each_library
def test_a_benchmark_times_the_library_it_names_or_none(name, called, monkeypatch):
    monkeypatch.setattr(dispatch, "IMPLS", ("auto", "reference", "triton", "cpp"))
    inputs = to_device(make(torch.bfloat16, tq=5, tk=5, prompts=0, **heads(name)), TRITON_DEVICE)
    by_library(name)(*inputs)
    assert called in ([name], [])
    with pytest.raises(ImplUnavailableError, match=r"dtype torch\.float64"):
        by_library(name)(*(x.double() for x in inputs))
    with pytest.raises(ValueError, match="impl: got"):
        prompt_attention(*inputs, impl=name)


@pytest.fixture
def measured(monkeypatch):
    """A table with entries of this test, on what counts as a GPU of compute capability 9.0."""
    monkeypatch.setattr(wins, "_capability", lambda device: 9)
    monkeypatch.setattr(dispatch, "_reasons_against_triton", lambda *args: [])
    entry = Win("flash", 9, HALF, (16, 32), 32, False, "bench/results/this-gpu.jsonl")
    monkeypatch.setattr(wins, "WINS", (entry, entry._replace(library="cudnn", training=True)))


def chosen(inputs, **kwargs):
    return fastprompt.explain(prompt_attention, *inputs, **kwargs)


def test_nothing_is_chosen_unmeasured():
    assert wins.WINS == ()


def test_auto_takes_a_library_where_it_was_measured_to_win(measured, called):
    inputs = make(torch.bfloat16, tq=32, tk=32)
    choice = chosen(inputs, is_causal=True)
    assert str(choice) == (
        "prompt_attention: flash (measured to win from 32 tokens on, compute capability 9.x "
        "(bench/results/this-gpu.jsonl))"
    )
    inputs = to_device(inputs, TRITON_DEVICE)
    out, lse = prompt_attention(*inputs, is_causal=True, return_lse=True)
    again, lse_again = prompt_attention(*inputs, is_causal=True, return_lse=True, impl="flash")
    assert torch.equal(out, again) and torch.equal(lse, lse_again)
    inputs = leaves(inputs)
    assert chosen(inputs).impl == "cudnn"
    prompt_attention(*inputs).sum().backward()
    if TRITON_DEVICE == "cpu":
        assert called == ["flash", "flash", "cudnn", "cudnn_backward"]


@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        ({"tq": 31}, {}),
        ({"tk": 31}, {}),
        ({"dim": 64}, {}),
        ({"dtype": torch.float32}, {}),
        ({}, {"attn_mask": torch.ones(32, 32, dtype=torch.bool)}),
        ({"tq": 33}, {"is_causal": True}),
        ({}, {"impl": "triton"}),
    ],
)
def test_auto_takes_no_library_elsewhere(measured, shape, kwargs):
    inputs = make(**{"dtype": torch.bfloat16, "tq": 32, "tk": 32} | shape)
    assert chosen(inputs, **kwargs).impl == "triton"


def test_auto_takes_no_library_on_another_gpu_or_for_other_bits(measured, monkeypatch):
    inputs = make(torch.bfloat16, tq=32, tk=32)
    torch.use_deterministic_algorithms(True)
    try:
        assert (chosen(leaves(inputs)).impl, chosen(inputs).impl) == ("triton", "flash")
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        assert chosen(leaves(inputs)).impl == "flash"
    monkeypatch.setattr(wins, "_capability", lambda device: 8)
    assert chosen(inputs).impl == "triton"


@pytest.mark.gpu
@each_pair
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("prompts", [0, 50])
def test_on_the_gpu(name, dtype, dim, prompts):
    for length, is_causal in ((197, False), (640, True)):
        inputs = make(dtype, tq=length, tk=length, prompts=prompts, dim=dim, **heads(name))
        check(inputs, *without_lse(inputs), impl=name, is_causal=is_causal)


@pytest.mark.gpu
def test_no_cudnn_plan_of_another_layout_runs():
    """PyTorch's own attention of the same shape comes first, and its gradient in another layout than its output."""
    inputs = [LAYOUTS["bthd"](x) for x in make(torch.bfloat16, tq=64, tk=64, **heads("cudnn"))]
    query, key, value = to_device(leaves(inputs[:3], (True,) * 3), "cuda")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(query, key, value, enable_gqa=True)
        out.backward(torch.randn(out.shape, device="cuda", dtype=out.dtype))
    check(inputs, *without_lse(inputs), impl="cudnn")


@pytest.mark.gpu
@each_library
def test_all_but_the_gradients_of_the_library_are_bitwise_repeatable(name):
    inputs = make(torch.bfloat16, batch=3, tq=700, tk=700, **heads(name))
    grad = torch.randn_like(inputs[0])
    first, *others = (run(inputs, grad, impl=name) for _ in range(20))
    for x in others:
        for a, b in zip((x.out, x.lse, *x.grads[3:]), (first.out, first.lse, *first.grads[3:]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@each_library
def test_cuda_graphs_replay(name):
    inputs = to_device(leaves(make(torch.bfloat16, tq=70, tk=70, **heads(name))), "cuda")
    step = lambda: torch.autograd.grad(prompt_attention(*inputs, impl=name).sum(), inputs)  # noqa: E731
    want = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
