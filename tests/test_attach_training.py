# SPDX-License-Identifier: Apache-2.0
"""Training and inference with attached prompts: precision, trajectories, what is computed, copies, compilation."""

import copy

import pytest
import torch
from tiny_models import (
    DEPTHS,
    LAYERS,
    LENGTH,
    WIDTH,
    assert_as_good,
    assert_close,
    attach_prompts,
    build,
    checkpointing,
    inputs,
    insert_prompts,
    loss_of,
    outputs,
    same,
    step,
)

from fastprompt.ops.cpu import prompt_attention as cpu

BF16 = torch.bfloat16


def trained_both(depth, dtype, train=("classifier",)):
    """The same classifier twice: attached, and as published."""
    model = build("ViT classifier", dtype)
    copied = copy.deepcopy(model)
    handle = attach_prompts(model, depth, train=train)
    inserted = insert_prompts(copied, depth)
    head = list(copied.classifier.requires_grad_(True).parameters())
    return (model, list(handle.parameters())), (copied, [*inserted.parameters(), *head])


# Training


@pytest.mark.parametrize("depth", ["deep", "shallow", "a gap"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(depth, reentrant):
    model = build("ViT classifier").train()
    handle = attach_prompts(model, depth, train=("classifier",))
    want = step(model, handle.parameters())
    checkpointing(model, reentrant)
    calls = []
    model.vit.layers[1].attention.q_proj.register_forward_hook(lambda *args: calls.append(args))
    got = step(model, handle.parameters())
    assert len(calls) == 2
    if reentrant:
        # It asks for gradients of the first layer's queries too, and those come from another product.
        assert_close(got, want)
    else:
        assert same(got, want)


@pytest.mark.parametrize("depth", ["deep", "a gap", "shallow"])
def test_autocast_is_as_good_as_published(depth):
    attached, published = trained_both(depth, torch.float32)
    _, truth = trained_both(depth, torch.float64)
    with torch.autocast("cpu", BF16):
        got, usual = step(*attached), step(*published)
    assert got["logits"].dtype == usual["logits"].dtype == BF16
    assert all(p.dtype == torch.float32 == p.grad.dtype for p in attached[1])
    assert_as_good(got, usual, step(*truth), torch.finfo(BF16).eps)


@pytest.mark.parametrize("depth", ["deep", "a gap", "shallow"])
def test_a_bfloat16_model_has_float32_prompts_and_is_as_good_as_published(depth):
    attached, published = trained_both(depth, BF16)
    exact = build("ViT classifier", BF16).double()
    inserted = insert_prompts(exact, depth)
    truth = exact, [*inserted.parameters(), *exact.classifier.requires_grad_(True).parameters()]
    batch = inputs(attached[0])
    got, usual = step(*attached, batch), step(*published, batch)
    prompts, head = attached[1][:-2], attached[1][-2:]
    assert all(p.dtype == torch.float32 == p.grad.dtype for p in prompts)
    assert all(p.dtype == BF16 == p.grad.dtype for p in head)
    exactly = step(*truth, {k: x.double() for k, x in batch.items()})
    assert_as_good(got, usual, exactly, torch.finfo(BF16).eps)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.01),
}


def run(model, parameters, optimizer, steps=30):
    """Losses of a training run on a fixed stream of random batches."""
    generator = torch.Generator().manual_seed(7)
    dtype = next(model.parameters()).dtype
    optimizer = OPTIMIZERS[optimizer](parameters)
    losses = []
    for _ in range(steps):
        images = torch.randn(4, 3, 32, 32, generator=generator).to(dtype)
        labels = torch.randint(2, (4,), generator=generator)
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


# Momentum and Adam's division magnify rounding; 30 steps stay within a thousand roundings of the published run.
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("depth", ["deep", "a gap"])
def test_thirty_steps_follow_the_published_run(optimizer, dtype, depth):
    attached, published = trained_both(depth, dtype)
    start = [p.detach().clone() for p in attached[1]]
    got, want = (run(model.train(), parameters, optimizer) for model, parameters in (attached, published))
    limit = 2**14 * torch.finfo(dtype).eps
    assert (got - want).abs().max() <= limit * want.abs().max()
    for p, q, before in zip(*(parameters for _, parameters in (attached, published)), start, strict=True):
        assert (p - q).abs().max() <= limit * q.abs().max()
        assert (p - before).abs().max() > 0.01 * before.abs().max()


# What is computed, and what is not


def rows_seen(model, name="k_proj"):
    """Shapes that every layer's key projection is called with, as they come."""
    seen = []
    for i, layer in enumerate(model.layers):
        linear = getattr(layer.attention, name)
        linear.register_forward_hook(lambda module, args, output, i=i: seen.append((i, tuple(args[0].shape))))
    return seen


def test_prompt_keys_are_computed_once_a_layer_and_never_once_a_sample():
    model = build()
    attach_prompts(model)
    seen = rows_seen(model)
    outputs(model)
    assert sorted(seen) == sorted((i, s) for i in range(LAYERS) for s in ((LENGTH, WIDTH), (3, 17, WIDTH)))


@pytest.mark.parametrize("depth", ["shallow", "first two", "one in the middle", "a gap", "from the end"])
def test_prompts_are_rows_only_where_nothing_replaces_them(depth):
    model = build()
    attach_prompts(model, depth)
    seen = rows_seen(model)
    outputs(model)
    layers = DEPTHS[depth][1]
    want, rows = [], 17
    for i in range(LAYERS):
        if i in layers:
            as_keys = i + 1 in layers or i == LAYERS - 1
            rows = 17 if as_keys else 17 + LENGTH
            want += [(i, (LENGTH, WIDTH))] if as_keys else []
        want.append((i, (3, rows, WIDTH)))
    assert sorted(seen) == sorted(want)


def in_place(model):
    with torch.no_grad():
        model.layers[1].attention.fastprompt.prompt[0, 0] += 1


def optimizer_step(model):
    prompts = [p for p in model.parameters() if p.requires_grad]
    step(model, prompts)
    torch.optim.SGD(prompts, lr=0.1).step()


def other_state(model):
    model.load_state_dict({name: 1.1 * x for name, x in model.state_dict().items()})


def other_weight(model):
    with torch.no_grad():
        model.layers[1].attention.k_proj.weight.mul_(1.1)


def other_norm(model):
    with torch.no_grad():
        model.layers[1].layernorm_before.bias.add_(0.1)


def replaced_weight(model):
    linear = model.layers[1].attention.v_proj
    linear.weight = torch.nn.Parameter(1.1 * linear.weight.detach())


CHANGES = {
    f.__name__: f for f in (in_place, optimizer_step, other_state, other_weight, other_norm, replaced_weight)
} | {
    "half": lambda model: model.to(BF16),
    "double": lambda model: model.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_at_inference_prompt_keys_are_kept_until_something_changes(change):
    model = build()
    attach_prompts(model)
    fresh = copy.deepcopy(model)
    seen = rows_seen(model)
    rows_seen(fresh)  # a layer that is hooked projects its prompt itself, in this model too
    with torch.no_grad():
        outputs(model)
        outputs(model)
    assert sum(shape == (LENGTH, WIDTH) for _, shape in seen) == LAYERS
    for one in (model, fresh):
        CHANGES[change](one)
    seen.clear()
    with torch.no_grad():
        got, want = outputs(model), outputs(fresh)
    assert 1 <= sum(shape == (LENGTH, WIDTH) for _, shape in seen) <= LAYERS
    assert same(got, want)


def test_autocast_and_inference_mode_keep_keys_of_their_own():
    model = build()
    attach_prompts(model)
    with torch.no_grad():
        plain = outputs(model)
        with torch.autocast("cpu", BF16):
            half = outputs(model)
        assert same(outputs(model), plain)
        prompt = model.layers[0].attention.fastprompt
        assert prompt.key_value()[0].dtype == torch.float32
        with torch.autocast("cpu", BF16):
            assert prompt.key_value()[0].dtype == BF16
    assert not same(half, plain)
    with torch.inference_mode():
        assert same(outputs(model), plain)
    assert same({k: x.detach() for k, x in outputs(model).items()}, plain)


@pytest.mark.parametrize("train", [(), ("layers.3",)])
def test_training_goes_on_after_inference_mode(train):
    model = build()
    handle = attach_prompts(model, train=train)
    want = step(model, handle.parameters())
    with torch.inference_mode():
        outputs(model)
    assert same(step(model, handle.parameters()), want)


@pytest.mark.parametrize("depth", ["deep", "a gap", "first two"])
def test_nothing_below_the_first_prompt_gets_gradients(monkeypatch, composition, depth):
    model = build()
    handle = attach_prompts(model, depth)
    needs = []
    backward = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *args: needs.append(list(args[-1])) or backward(*args))
    tracked = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: tracked.append(args[0].requires_grad))
    step(model, handle.parameters())
    first, *others = DEPTHS[depth][1]
    # Backward runs from the last layer to the first.
    as_keys = [i for i in (first, *others) if i + 1 in (first, *others) or i == LAYERS - 1]
    want = [[i != first] * 3 + [True, True] for i in reversed(as_keys)]
    assert needs == want
    inserted_first = first not in as_keys
    assert tracked == [i > first or (inserted_first and i == first) for i in range(LAYERS)]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


# Copies and compilation


@pytest.mark.parametrize("depth", ["deep", "a gap", "shallow"])
def test_a_copied_model_is_independent(depth):
    model = build()
    handle = attach_prompts(model, depth)
    with torch.no_grad():
        want = outputs(model)
    copied = copy.deepcopy(model)
    other = [p for p in copied.parameters() if p.requires_grad]
    assert len(other) == len(list(handle.parameters()))
    with torch.no_grad():
        assert same(outputs(copied), want)
        for p in other:
            p.neg_()
        assert not same(outputs(copied), want)
        assert same(outputs(model), want)
        for layer in copied.layers:
            layer.attention.k_proj.weight.mul_(-1)
        assert same(outputs(model), want)
    gradients = step(copied, other)
    assert all(gradients[f"gradient {i}"].abs().max() > 0 for i in range(len(other)))
    assert all(p.grad is None for p in handle.parameters())
    handle.detach()
    assert [n for n, _ in copied.named_modules() if n.endswith("fastprompt")]


@pytest.mark.parametrize("depth", ["deep", "a gap"])
def test_compiles_as_one_graph(depth):
    model = build()
    handle = attach_prompts(model, depth)
    want = step(model, handle.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for p in handle.parameters():
        p.grad = None
    try:
        found = dict(compiled(**inputs(model)).items())
        loss_of(found).backward()
    finally:
        torch._dynamo.reset()
    gradients = {f"gradient {i}": p.grad for i, p in enumerate(handle.parameters())}
    assert_close({k: x.detach() for k, x in found.items()} | gradients, want)
