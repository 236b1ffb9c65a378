# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the float64 oracle: interpreted on the CPU, on the device where there is one."""

import pytest
import torch
from attention_cases import (
    LAYOUTS,
    PROMPTS_ONLY,
    TRITON_DEVICE,
    check,
    grads_of,
    leaves,
    make,
    run,
    to_device,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fastprompt
from fastprompt.errors import ImplUnavailableError
from fastprompt.kernels import prompt_attention as launchers
from fastprompt.ops import prompt_attention
from fastprompt.ops.dispatch import HEAD_SIZES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (1, 77, 197, 257, 577)
NEEDS = {
    "query": ({"delta", "query"}, (True, False, False, False, False)),
    "key": ({"delta", "key_value"}, (False, True, False, False, False)),
    "value": ({"delta", "key_value"}, (False, False, True, False, False)),
    "prompt_key": ({"delta", "prompt", "reduce"}, (False, False, False, True, False)),
    "prompt_value": ({"delta", "prompt", "reduce"}, (False, False, False, False, True)),
    "prompts": ({"delta", "prompt", "reduce"}, PROMPTS_ONLY),
}


def triton(inputs, **kwargs):
    """Output, lse and gradients by the kernels, the same gradients of out and lse every time."""
    torch.manual_seed(1)
    return run(inputs, *grads_of(inputs), impl="triton", **kwargs)


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length):
    check(make(torch.float32, 1, 1, 1, length, length, prompts=10), impl="triton", is_causal=length % 2 == 0)


@pytest.mark.parametrize(("tq", "tk"), [(1, 77), (40, 33), (33, 70), (5, 0), (0, 5)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_rectangles(tq, tk, is_causal):
    check(make(torch.float32, 1, 2, 1, tq, tk, prompts=33), impl="triton", is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", HEAD_SIZES)
def test_head_sizes(dim, dtype):
    check(make(dtype, 1, 2, 1, 5, 9, dim=dim), impl="triton")


@st.composite
def cases(draw):
    """Shapes, masks, banks and layouts; the values come from a seed."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, heads_kv, groups, tq, tk = pick(1, 3), pick(1, 2), pick(1, 3), pick(1, 7, 40), pick(0, 1, 9, 37)
    prompts = pick(0, 1, 8, 40) if tk else pick(1, 8)
    bank = pick(None, 1, batch, 4)
    kwargs = {"is_causal": pick(False, True), "scale": pick(None, 0.0, 1.0)}
    if bank == 4 or pick(False, True):
        kwargs["prompt_index"] = torch.randint(0, bank or 1, (batch,))
    inputs = make(pick(*DTYPES), batch, heads_kv * groups, heads_kv, tq, tk, prompts, 16, bank)
    if inputs[0].dtype != torch.float32 and pick(False, True):
        inputs[3:] = [x.float() for x in inputs[3:]]
    mask = pick(None, None, bool, float)
    if mask is not None:
        visible = torch.rand(pick((tq, tk), (batch, 1, 1, tk), (1, heads_kv * groups, tq, 1))) < 0.7
        additive = torch.randn(visible.shape).masked_fill(~visible, -torch.inf).to(inputs[0].dtype)
        kwargs["attn_mask"] = visible if mask is bool else additive
    inputs = [LAYOUTS[pick(*LAYOUTS)](x) if x.numel() else x for x in inputs]
    return inputs, pick(False, True), kwargs


@given(case=cases())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_matches_the_oracle(case):
    inputs, with_lse, kwargs = case
    check(inputs, *grads_of(inputs, with_lse), impl="triton", **kwargs)


@pytest.mark.parametrize("view", [lambda i: i.repeat_interleave(2)[::2], lambda i: i[:1].expand(3)], ids=["step", "0"])
def test_an_index_with_strides(view):
    index = view(torch.tensor([4, 1, 4]))
    check(make(torch.float32, batch=3, bank=5), impl="triton", prompt_index=index)


def test_float32_prompts_beside_half_precision():
    """Values that half precision has to round."""
    inputs = make(torch.float16)
    inputs[3:] = [torch.randn(x.shape) for x in inputs[3:]]
    check(inputs, impl="triton")


def test_no_samples_and_no_prompts():
    inputs = to_device(leaves(make(torch.float32, batch=0, bank=0)), TRITON_DEVICE)
    out = prompt_attention(*inputs, impl="triton")
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [x.shape for x in grads] == [x.shape for x in inputs]


def test_rows_with_nothing_to_attend():
    visible = torch.ones(2, 1, 5, 3, dtype=torch.bool)
    visible[0, 0, 1], visible[1, 0, 4] = False, False
    for dtype in DTYPES:
        actual = check(make(dtype, tk=3, prompts=0), impl="triton", attn_mask=visible)
        assert not actual.out[0, :, 1].any() and (actual.lse[0, :, 1] == -torch.inf).all()


@pytest.mark.parametrize("name", NEEDS)
def test_only_what_is_needed_is_launched(name, launched):
    kernels, needs = NEEDS[name]
    check(make(torch.float32), needs=needs, impl="triton")
    assert {x.kernel.__name__.removesuffix("_kernel") for x in launched} == kernels | {"forward"}


def test_inputs_are_read_in_place(launched):
    """Kernels get the memory of the arguments themselves, whatever the strides; nothing is expanded or copied."""
    inputs = make(torch.float32, batch=3)
    strided = [LAYOUTS["strided"](x) for x in inputs[:3]] + inputs[3:]
    inputs = to_device(leaves(strided), TRITON_DEVICE)
    prompt_attention(*inputs, impl="triton").sum().backward()
    names = ("query", "key", "value", "prompt_key", "prompt_value")
    for launch in launched:
        for name, x in zip(names, inputs, strict=True):
            if name in launch.arguments:
                assert launch.arguments[name].data_ptr() == x.data_ptr(), f"{launch.kernel.__name__}: {name} was copied"
    # The gradient of a sum is one number with stride 0 everywhere.
    assert launched[1].arguments["sdo"] == (0, 0, 0, 0)


def test_results_are_bitwise_repeatable(launched):
    inputs = make(torch.float32, batch=3, tq=70)
    first, second = triton(inputs), triton(inputs)
    assert max(x.arguments.get("splits", 1) for x in launched) > 1, "the reduction was not split"
    for a, b in zip((first.out, first.lse, *first.grads), (second.out, second.lse, *second.grads), strict=True):
        assert torch.equal(a, b)


def test_a_sample_does_not_depend_on_its_batch():
    inputs = make(torch.float32, batch=3, tq=40)
    whole, alone = triton(inputs), triton([x[1:2] for x in inputs[:3]] + inputs[3:])
    assert torch.equal(whole.out[1:2], alone.out) and torch.equal(whole.lse[1:2], alone.lse)


@pytest.mark.parametrize(("axis", "step"), [(0, 2**31 + 64), (1, 2**31 + 64), (2, 2**31 + 64), (1, 3 * 2**29)])
def test_elements_past_two_to_the_31(axis, step):
    """The last sample, head or row begins more than 2^31 elements after the first, though a stride may be less.

    Memory that nobody touches costs nothing.
    """
    size = 2 if step > 2**31 else 3
    inputs = make(torch.float16, 2, size, size, 2, 2, prompts=2, dim=16)
    for i in range(3):
        shape, stride = inputs[i].shape, list(inputs[i].stride())
        stride[axis] = step
        far = torch.empty(stride[axis] * (shape[axis] - 1) + inputs[i].numel(), dtype=torch.float16)
        inputs[i] = far.as_strided(shape, stride).copy_(inputs[i])
        if i == 0:
            check(inputs, impl="triton")
            inputs[i] = inputs[i].contiguous()
    check(inputs, impl="triton")


def test_custom_op_contract():
    inputs = to_device(leaves(make(torch.float32, batch=2, tq=3, tk=3)), TRITON_DEVICE)
    arguments = (*inputs[:3], *(x.detach().unsqueeze(0).requires_grad_() for x in inputs[3:]), None, None, True, 0.25)
    torch.library.opcheck(torch.ops.fastprompt.prompt_attention.default, (*arguments, "triton"))


def test_gradients_lie_in_memory_as_compiled_code_was_told():
    """Prompts, too, whose gradients are summed in a layout of their own."""
    inputs = to_device([LAYOUTS["bthd"](x) for x in make(torch.float32, tq=3, tk=3, bank=1)], TRITON_DEVICE)
    out, lse = torch.ops.fastprompt.prompt_attention(*inputs, None, None, True, 0.25, "triton")
    arguments = (torch.randn_like(out), None, *inputs, None, None, out, lse, True, 0.25, [True] * 5, "triton")
    operation = torch.ops.fastprompt.prompt_attention_backward.default
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_graph_breaks():
    inputs = to_device(leaves(make(torch.float32, tq=3, tk=3)), TRITON_DEVICE)
    compiled = torch.compile(lambda *x: prompt_attention(*x, impl="triton"), fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(prompt_attention(*inputs, impl="triton").square().sum(), inputs)
    got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_every_reason_is_listed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = make(torch.float64, dim=24)
    with pytest.raises(ImplUnavailableError) as caught:
        prompt_attention(*inputs, impl="triton")
    for reason in (
        "the tensors are on the CPU (set TRITON_INTERPRET=1 ",
        "dtype torch.float64 is not",
        "head size 24 ",
    ):
        assert reason in str(caught.value)


def test_auto_never_interprets():
    choice = fastprompt.explain(prompt_attention, *make(torch.float32))
    assert choice.impl in ("cpp", "cpu") and choice.refused["triton"]


def test_splits_follow_from_shapes_alone():
    """A prompt bank needs no splits to fill a GPU; one shared prompt does, up to a bounded workspace."""
    for batch, bank, most in ((64, 1, 264 // 12), (64, 64, 1)):
        tensors = [torch.empty(batch, 12, 197, 64, device="meta") for _ in range(3)]
        prompts = [torch.empty(bank, 12, 32, 64, device="meta") for _ in range(2)]
        problem = launchers.Problem(*tensors, *prompts, None, None, False, 0.125)
        grads = launchers.allocate(problem, list(PROMPTS_ONLY))
        lse = torch.empty(batch, 12, 197, device="meta")
        plan = launchers.plan_backward(problem, tensors[0], lse, tensors[0], None, grads)
        assert next(x.arguments["splits"] for x in plan if "splits" in x.arguments) == most


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", HEAD_SIZES)
@pytest.mark.parametrize("prompts", [0, 10, 50, 200])
def test_full_matrix(dtype, dim, prompts):
    for tq, tk in (*((n, n) for n in LENGTHS), (1, 577), (77, 257), (257, 77)):
        for is_causal, groups in ((False, 1), (True, 2)):
            check(make(dtype, 2, 2 * groups, 2, tq, tk, prompts, dim), impl="triton", is_causal=is_causal)


@pytest.mark.gpu
def test_cuda_graphs_replay():
    inputs = to_device(leaves(make(torch.bfloat16, tq=70, tk=70)), "cuda")
    step = lambda: torch.autograd.grad(prompt_attention(*inputs, impl="triton").sum(), inputs)  # noqa: E731
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
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_auto_is_triton_on_the_gpu():
    assert fastprompt.explain(prompt_attention, *to_device(make(torch.bfloat16), "cuda")).impl == "triton"
