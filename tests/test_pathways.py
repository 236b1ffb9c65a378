# SPDX-License-Identifier: Apache-2.0
"""Task pathways against the released formulation, all rows and one task at a time; what growing leaves alone."""

import json

import pytest
import tiny_models
import torch
from torch import nn
from torch.nn.functional import normalize, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import fastprompt
from fastprompt import MultiLane, TaskPathways
from fastprompt.errors import AttachError, CheckpointError, UnsupportedModelError
from fastprompt.recipes.multi_lane import REPLACE

FAMILIES = ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "CLIPVision", "Blip2Vision, fused qkv", "CLIP")
RECIPE = MultiLane(summaries=3, length=4, layers=(0, 1, 2))

each_replace = pytest.mark.parametrize("replace", REPLACE)


def make(name="ViT", dtype=torch.float32, tasks=(2, 3), block=4, **options):
    """Pathways whose every parameter counts; all lanes differ."""
    recipe = MultiLane(**{"summaries": 3, "length": 4, "layers": (0, 1, 2)} | options)
    pathways = TaskPathways(tiny_models.build(name, dtype), recipe, block=block)
    for classes in tasks:
        add(pathways, classes)
    return pathways


def add(pathways, classes):
    pathways.grow(classes)
    with torch.no_grad():
        for p in pathways.newest().parameters():
            p.copy_(torch.randn_like(p))


def images(pathways, batch=3):
    return tiny_models.inputs(pathways.model, batch)["pixel_values"]


def published(model, lane, pixels, recipe):
    """The feature of one task as the released code computes it, for a ViT: every row runs in every layer.

    Tokens are [class token; selectors]. A layer normalises them, draws summaries of the normed frozen tokens, attends
    over prompts, class token and summaries, puts the normed selectors back, and only then adds the residual.
    """
    hidden = model.embeddings(pixels)
    tokens = torch.cat([hidden[:, :1], lane.selectors.expand(len(pixels), -1, -1)], dim=1)
    if recipe.replace == "none":
        tokens = torch.cat([tokens[:, :1], draw(model.layers[0].layernorm_before, lane.selectors, hidden)], dim=1)
    for i, layer in enumerate(model.layers):
        attention, normed = layer.attention, layer.layernorm_before(tokens)
        if recipe.replace == "none":
            read = normed
        else:
            read = torch.cat([normed[:, :1], draw(layer.layernorm_before, tokens[:, 1:], hidden)], dim=1)
        heads = [p(read).unflatten(-1, (tiny_models.HEADS, -1)).transpose(1, 2) for p in
                 (attention.q_proj, attention.k_proj, attention.v_proj)]  # fmt: skip
        if i in recipe.layers:
            at = recipe.layers.index(i)
            for place, prompts in ((1, lane.keys), (2, lane.values)):
                heads[place] = torch.cat([prompts[at].expand(len(pixels), -1, -1, -1), heads[place]], dim=2)
        out = attention.o_proj(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        if recipe.replace != "none":
            out = torch.cat([out[:, :1], normed[:, 1:]], dim=1)
        tokens = tokens + out
        tokens = tokens + layer.mlp(layer.layernorm_after(tokens))
        if recipe.replace == "reset":
            tokens = torch.cat([tokens[:, :1], lane.selectors.expand(len(pixels), -1, -1)], dim=1)
        hidden = layer(hidden).detach()
    return normalize(model.layernorm(tokens[:, 0]), dim=-1)


def draw(norm, selectors, hidden):
    """Summaries ``softmax(LN(s) x^T / sqrt(C)) x`` of the normed, detached tokens x."""
    x = norm(hidden).detach()
    return (norm(selectors) @ x.mT * x.shape[-1] ** -0.5).softmax(-1) @ x


@each_replace
def test_equals_the_released_formulation(replace):
    """Features and every gradient, in float64; the rows that do not run here run there."""
    pathways = make(dtype=torch.float64, replace=replace)
    pixels = images(pathways)
    pathways.lanes.requires_grad_(True)
    got = pathways.features(pixels)
    want = torch.stack([published(pathways.model, lane, pixels, pathways.recipe) for lane in pathways.lanes])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weight = torch.randn_like(want)
    learned = [p for lane in pathways.lanes for p in (lane.selectors, lane.keys, lane.values)]
    found, exact = (torch.autograd.grad((x * weight).sum(), learned) for x in (got, want))
    for a, b in zip(found, exact, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@each_replace
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("block", [1, 2, None])
def test_batched_equals_a_loop_over_tasks(name, replace, block):
    pathways = make(name, torch.float64, (2, 1, 3), block, replace=replace)
    pixels = images(pathways)
    loop = torch.cat([pathways(pixels, task=t).logits for t in range(3)], dim=-1)
    torch.testing.assert_close(pathways(pixels).logits, loop, rtol=1e-10, atol=1e-10)
    assert loop.std(dim=0).min() > 1e-4


@pytest.mark.parametrize("replace", REPLACE)
@pytest.mark.parametrize(
    ("name", "dtype"), [("ViT", torch.float32), ("Dinov2", torch.bfloat16), ("CLIP", torch.float32)]
)
def test_older_logits_stay_bit_for_bit(name, dtype, replace):
    """From one task to six, over the border of a block; alone, in batches of any size."""
    pathways = make(name, dtype, (2,), replace=replace)
    pixels = images(pathways, 5)
    with torch.no_grad():
        before = [pathways(pixels[:b]).logits for b in (1, 5)]
        for classes in (3, 1, 2, 2, 1):
            add(pathways, classes)
            after = [pathways(pixels[:b]).logits for b in (1, 5)]
            for old, new in zip(before, after, strict=True):
                assert torch.equal(old, new[:, : old.shape[1]])
            before = after


def test_a_new_task_starts_with_the_prompts_of_the_one_before():
    pathways = make(tasks=(2,))
    first = pathways.lanes[0]
    pathways.grow(2)
    second = pathways.lanes[1]
    for name in ("selectors", "keys", "values"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert not torch.equal(first.head.weight, second.head.weight)
    assert [p.requires_grad for p in first.parameters()] == [False] * 5
    assert all(p.requires_grad for p in second.parameters())
    assert pathways.num_trainable == sum(p.numel() for p in second.parameters())


def test_training_touches_the_newest_lane_alone():
    """The base gets no gradient, and it and older lanes stay as they were, bit for bit."""
    pathways = make(tasks=(2, 3))
    newest, pixels, labels = pathways.newest(), images(pathways), torch.tensor([0, 2, 1])
    everything = dict(pathways.model.named_parameters()) | dict(pathways.named_parameters())
    before = {name: p.detach().clone() for name, p in everything.items()}
    optimizer = torch.optim.Adam(newest.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = newest(pixels, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in pathways.model.parameters())
    changed = {name for name, p in everything.items() if not torch.equal(p, before[name])}
    assert changed == {f"lanes.1.{n}" for n, _ in pathways.lanes[1].named_parameters()}


@pytest.mark.parametrize("task", [0, 1, 2])
def test_the_gradient_of_a_lane_touches_that_lane_alone(task):
    pathways = make(tasks=(2, 1, 3))
    pathways.lanes.requires_grad_(True)
    features = pathways.features(images(pathways))
    (features[task] * torch.randn_like(features[task])).sum().backward()
    for t, lane in enumerate(pathways.lanes):
        for p in (lane.selectors, lane.keys, lane.values):
            assert (p.grad is not None and bool(p.grad.any())) == (t == task)


@pytest.mark.parametrize("option", ["tasks", "summaries"])
def test_the_cost_is_linear(option, monkeypatch):
    """Multiply-adds of lanes, counted: the frozen stream is there once; each task, each summary costs the same."""
    monkeypatch.setattr(fastprompt.config, "IMPL", "reference")

    def count(number):
        options = {"tasks": (2,) * number} if option == "tasks" else {"summaries": number}
        pathways = make(block=None, **options)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pathways(images(pathways))
        return counter.get_total_flops()

    one, two, five = map(count, (1, 2, 5))
    assert five - two == 3 * (two - one) > 0
    pathways = make()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pathways.model(images(pathways))
    # Nothing reads what the frozen stream's last layer makes of the tokens.
    assert one < 1.5 * counter.get_total_flops()


def test_loss_and_labels():
    pathways = make(tasks=(2, 3))
    labels = torch.tensor([4, 0, 2])
    out = pathways(images(pathways), labels)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, labels))
    assert pathways(images(pathways)).loss is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """As far from float64 as a ViT's own forward is: every layer rounds its rows."""
    low, exact = make(dtype=dtype), make(dtype=torch.float64)
    exact.load_state_dict(low.state_dict())
    exact.model.load_state_dict(low.model.state_dict())
    pixels = images(low)
    got, want = low.features(pixels), exact.features(pixels.double())
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lanes_cast_to_half(dtype):
    pathways = make()
    want = pathways(images(pathways)).logits
    out = pathways.to(dtype)(images(pathways).to(dtype), torch.tensor([0, 1, 2]))
    out.loss.backward()
    torch.testing.assert_close(out.logits.float(), want, rtol=0.1, atol=0.1)


def test_autocast():
    pathways = make()
    want = pathways(images(pathways)).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = pathways.newest()(images(pathways), torch.tensor([0, 1, 2]))
    out.loss.backward()
    torch.testing.assert_close(out.logits.float(), want[:, 2:], rtol=0.1, atol=0.1)
    assert all(p.grad.dtype == torch.float32 for p in pathways.newest().parameters())


def test_save_and_load(tmp_path):
    pathways = make(tasks=(2, 3))
    want = pathways(images(pathways)).logits
    pathways.save(tmp_path)
    pathways.detach()
    found = TaskPathways.load(pathways.model, tmp_path)
    assert torch.equal(found(images(found)).logits, want)
    assert found.classnames == pathways.classnames and found.recipe == pathways.recipe
    assert [p.requires_grad for p in found.lanes[0].parameters()] == [False] * 5
    found.grow(["new"])
    assert torch.equal(found(images(found)).logits[:, :5], want)


def test_load_refuses_what_does_not_fit(tmp_path):
    pathways = make()
    pathways.save(tmp_path / "lanes")
    other = tiny_models.build("Dinov2")
    with pytest.raises(CheckpointError, match="key projection of layer"):
        TaskPathways.load(tiny_models.randomised(other, seed=5), tmp_path / "lanes")
    assert not any(hasattr(m, "fastprompt") for m in other.modules())
    with pytest.raises(CheckpointError, match=r"TaskPathways\.load"):
        fastprompt.load(other, tmp_path / "lanes")
    with fastprompt.attach(other, fastprompt.VPT(length=2)) as handle:
        handle.save(tmp_path / "vpt")
    with pytest.raises(CheckpointError, match="got 'VPT', expected 'MultiLane'"):
        TaskPathways.load(other, tmp_path / "vpt")
    file = tmp_path / "lanes" / "prompt_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tasks": [["a"]]}))
    with pytest.raises(CheckpointError, match="sha256"):
        TaskPathways.load(other, tmp_path / "lanes")


def test_detach_restores_everything():
    model = tiny_models.mixed(tiny_models.build())
    flags = [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters()]
    before = tiny_models.outputs(model.eval())
    tiny_models.mixed(model)
    config = model.config
    pathways = TaskPathways(model, RECIPE)
    pathways.grow(2)
    pathways(images(pathways))
    pathways.detach()
    assert [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters()] == flags
    assert model.config is config and not any(hasattr(m, "fastprompt") for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    after = tiny_models.outputs(model.eval())
    assert all(torch.equal(after[name], x) for name, x in before.items())
    for call in (lambda: pathways(images(pathways)), pathways.detach, lambda: pathways.grow(2)):
        with pytest.raises(AttachError, match="detached already"):
            call()


def test_the_model_itself_runs_as_before():
    """Between calls, the model gives its own outputs, and holds no tensor of the last forward."""
    model = tiny_models.build()
    before = tiny_models.outputs(model)
    pathways = TaskPathways(model, RECIPE)
    pathways.grow(2)
    pathways(images(pathways))
    after = tiny_models.outputs(model)
    assert all(child.stream is None and child.called is None for child in pathways.base._children)
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_modes_and_devices():
    """The base stays in eval mode; lanes and base change type together."""
    pathways = make()
    pathways.train()
    assert not any(m.training for m in pathways.model.modules())
    pathways.double()
    assert next(pathways.model.parameters()).dtype == torch.float64
    assert pathways(images(pathways)).logits.dtype == torch.float64
    assert set(pathways.state_dict()) == {n for n, _ in pathways.named_parameters()}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: TaskPathways(nn.Linear(2, 2), RECIPE), TypeError, "model: got Linear"),
        (lambda m: TaskPathways(m, fastprompt.VPT(length=2)), TypeError, "recipe: got VPT"),
        (lambda m: TaskPathways(m, RECIPE, block=0), ValueError, "block: got 0"),
        (lambda m: TaskPathways(m, MultiLane()), ValueError, "layers: got [0, 1, 2, 3, 4]"),
        (lambda m: TaskPathways(tiny_models.build("SiglipVision"), RECIPE), UnsupportedModelError, "no class token"),
        (lambda m: TaskPathways(tiny_models.build("DINOv3ViT"), RECIPE), UnsupportedModelError, "rotates keys"),
        (lambda m: TaskPathways(m, RECIPE)(torch.zeros(1, 3, 32, 32)), ValueError, "call grow(classes) first"),
        (lambda m: fastprompt.attach(m, RECIPE), TypeError, "expected a recipe such as"),
        (lambda m: MultiLane(summaries=0), ValueError, "summaries: got 0"),
        (lambda m: MultiLane(replace="never"), ValueError, "replace: got 'never'"),
        (lambda m: MultiLane(layers=[]), ValueError, "layers: got []"),
    ],
)
def test_errors(call, error, message):
    model = tiny_models.build()
    with pytest.raises(error) as raised:
        call(model)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.grow(0), "classes: got 0"),
        (lambda p: p.grow("cat"), "classes: got 'cat'"),
        (lambda p: p.grow(["a", "a"]), "of which a exist"),
        (lambda p: p.grow(["class 1"]), "of which class 1 exist"),
        (lambda p: p(torch.zeros(1, 3, 32, 32), task=2), "task: got 2, expected a number in [-2, 1]"),
        (lambda p: p(torch.zeros(3, 32, 32)), "pixel_values: got [3, 32, 32]"),
    ],
)
def test_errors_of_calls(call, message):
    with pytest.raises(ValueError) as raised:
        call(make())
    assert message in str(raised.value)


def test_one_handle_a_tower():
    model = tiny_models.build()
    pathways = TaskPathways(model, RECIPE)
    with pytest.raises(AttachError, match="already hold"):
        fastprompt.attach(model, fastprompt.VPT(length=2))
    pathways.detach()
    with fastprompt.attach(model, fastprompt.VPT(length=2)), pytest.raises(AttachError, match="already holds prompts"):
        TaskPathways(model, RECIPE)
    assert not any(hasattr(m, "fastprompt") for m in model.modules())


def test_a_lane_held_for_training_stays_the_lane_of_its_task():
    pathways = make(tasks=(2,))
    first, pixels = pathways.newest(), images(pathways)
    want = first(pixels).logits
    add(pathways, 3)
    assert torch.equal(first(pixels).logits, want)
    assert pathways.newest()(pixels).logits.shape == (3, 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 5, 1], "labels: got 5, expected class numbers from 0 to 4"),
        ([0, -1, 1], "labels: got -1, expected class numbers from 0 to 4"),
        ([0, 1], r"labels: got torch.int64 \[2\], expected int64 \[3\]"),
        ([0.0, 1.0, 0.0], r"labels: got torch.float32 \[3\], expected int64 \[3\]"),
    ],
)
def test_wrong_labels(labels, message):
    pathways = make()
    with pytest.raises(ValueError, match=message):
        pathways(images(pathways), torch.tensor(labels))


def test_labels_of_one_task_count_from_its_first():
    pathways = make()
    for task, classes in ((0, 2), (1, 3), (-1, 3), (-2, 2)):
        pathways(images(pathways), torch.full((3,), classes - 1), task=task)
        with pytest.raises(ValueError, match=f"labels: got {classes}, expected class numbers from 0 to {classes - 1}"):
            pathways(images(pathways), torch.full((3,), classes), task=task)


@pytest.mark.parametrize("classes", [True, 0, 2.5, None, [], [""], ["a", "a"], [1], "cat"])
def test_classes_that_a_task_cannot_have(classes):
    with pytest.raises(ValueError, match="classes: got"):
        make().grow(classes)
