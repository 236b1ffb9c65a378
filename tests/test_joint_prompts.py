# SPDX-License-Identifier: Apache-2.0
"""Prompts of many layers projected together: the same numbers as each layer gives, in launches that do not grow."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from tiny_models import (
    LAYERS,
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
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTForImageClassification

import fastprompt
from fastprompt.nn.diffused import DiffusedPrompt
from fastprompt.nn.joint_prompts import JointPrompts
from fastprompt.nn.prompts import LayerPrompt

BF16 = torch.bfloat16
TOGETHER = ("ViT", "DeiT", "Dinov2", "DINOv3ViT", "SiglipVision", "CLIPVision", "Blip2Vision, fused qkv", "CLIP")


def attached(name="ViT", dtype=torch.float32, depth="deep", **options):
    """A model with prompts, the handle, and the object that its prompts share."""
    model = build(name, dtype)
    handle = attach_prompts(model, depth, **options)
    (joint,) = {p.joint for p in model.modules() if isinstance(p, LayerPrompt)}
    return model, handle, joint


def alone(model):
    """A copy each of whose layers projects its own prompt."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, LayerPrompt):
            module.joint = None
    return copied


def prompts_of(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("depth", ["deep", "first two", "from the end", "a gap"])
@pytest.mark.parametrize("name", TOGETHER)
def test_together_as_alone(name, depth):
    model, _, joint = attached(name, depth=depth, tower="vision" if name == "CLIP" else None)
    projected = [p for p in joint.members if not p.inserted]
    own = alone(model)
    got, want = (step(m, prompts_of(m)) for m in (model, own))
    assert set(joint.taken) == (set(projected) if len(projected) > 1 else set())
    assert_close(got, want)


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Blip2Vision, fused qkv"])
def test_in_float64_they_agree_to_its_rounding(name):
    model, _, _ = attached(name, torch.float64)
    assert_close(*(step(m, prompts_of(m)) for m in (model, alone(model))))


@pytest.mark.parametrize("autocast", [False, True])
def test_in_half_precision_they_are_as_good(autocast):
    exact, (model, _, joint) = build("ViT classifier", torch.float64), attached("ViT classifier")
    inserted = insert_prompts(exact)
    own = alone(model)
    if not autocast:
        model, own = model.to(BF16), own.to(BF16)
        for m in (model, own):
            for p in prompts_of(m):
                p.data = p.data.float()
    found = []
    for m in (model, own):
        with torch.autocast("cpu", BF16, enabled=autocast):
            found.append(step(m, prompts_of(m)))
    assert joint.taken
    assert_as_good(*found, step(exact, inserted.parameters()), torch.finfo(BF16).eps)


class Count(TorchDispatchMode):
    """Counts the operations of a step that a device would run: all but views, empty memory and attention itself."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        seen = [x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)]
        first = out[0] if isinstance(out, (list, tuple)) else out
        view = isinstance(first, torch.Tensor) and first.untyped_storage().data_ptr() in seen and name[-1] != "_"
        self.found[name] += not (view or "attention" in name or "empty" in name or name in ("detach", "promote_types"))
        return out


def launches(layers, recipe=None):
    """Operations of a training step, with a recipe's prompts or without."""
    config = ViTConfig(hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64,
                       image_size=32, num_labels=3)  # fmt: skip
    model = ViTForImageClassification(config).eval()
    if recipe is not None:
        fastprompt.attach(model, recipe, train=("classifier",))
    else:
        model.requires_grad_(False).classifier.requires_grad_(True)
        model.base_model.embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())

    def run():
        model.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = model(pixel_values=torch.zeros(2, 3, 32, 32), labels=torch.zeros(2, dtype=torch.int64)).loss
        loss.backward()

    run()  # stacks the weights
    with Count() as count:
        run()
    return count.found.total()


@pytest.mark.parametrize("recipe, a_layer", [(fastprompt.VPT(length=5), 0), (fastprompt.APT(length=5), 8)])
def test_prompts_cost_the_same_launches_however_many_layers(recipe, a_layer):
    """But for attention's own, and for what APT does to tokens: its operation and gradient, their casts, and sums."""
    few, many = (launches(layers, recipe) - launches(layers) for layers in (3, 9))
    assert many - few <= 6 * a_layer and few - 3 * a_layer < 24


def test_weights_are_stacked_once_and_again_when_one_changes():
    model, handle, joint = attached()
    step(model, handle.parameters())
    stacked = joint.weights[1][0]
    step(model, handle.parameters())
    assert joint.weights[1][0] is stacked and not any(x.requires_grad for x in joint.weights[1])
    with torch.no_grad():
        model.layers[2].attention.k_proj.weight.mul_(1.5)
        model.layers[1].layernorm_before.bias.add_(0.5)
    assert_close(*(step(m, prompts_of(m)) for m in (model, alone(model))))
    assert joint.weights[1][0] is not stacked
    with torch.autocast("cpu", BF16):
        step(model, handle.parameters())
    assert joint.weights[1][0].dtype == BF16


def hooked(model):
    model.layers[1].attention.k_proj.register_forward_hook(lambda module, args, out: 2 * out)


def wrapped(model):
    class Wrapped(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.layers[0].attention.v_proj.__class__ = Wrapped


def replaced_forward(model):
    linear = model.layers[2].attention.v_proj
    linear.forward = lambda x: 2 * nn.functional.linear(x, linear.weight, linear.bias)


def reparameterised(model):
    nn.utils.parametrizations.weight_norm(model.layers[1].attention.k_proj)


def trained(model):
    model.layers[1].attention.k_proj.weight.requires_grad_(True)


def other_epsilon(model):
    model.layers[1].layernorm_before.eps = 0.5


@pytest.mark.parametrize("change", [hooked, wrapped, replaced_forward, reparameterised, trained, other_epsilon])
def test_layers_that_are_more_than_their_weights_project_their_own(change):
    model, _, joint = attached()
    own = alone(model)
    for m in (model, own):
        change(m)
    assert same(*(step(m, prompts_of(m)) for m in (model, own)))
    assert not joint.taken


def test_shards_are_not_stacked():
    """Between two forwards of a sharded layer its weights are parameters of one dimension, or of nothing."""
    model, _, joint = attached()
    for layer in model.layers:
        linear = layer.attention.k_proj
        linear.weight = nn.Parameter(linear.weight.detach().flatten()[:8], requires_grad=False)
    joint.begin()
    assert not joint._shares


def test_norms_of_queries_and_keys_are_left_to_the_layer():
    model, _, joint = attached("InternVLVision, qk norm")
    step(model, prompts_of(model))
    assert not joint.taken


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_of_layers_that_run_again(reentrant):
    """The first forward's layers run again after the second has begun."""
    model, handle, _ = attached("ViT classifier")
    batches = [inputs(model, seed=seed) for seed in (1, 2)]

    def both():
        loss = sum(loss_of(outputs(model, batch)) for batch in batches)
        return dict(enumerate(torch.autograd.grad(loss, list(handle.parameters())) if not reentrant else grads(loss)))

    def grads(loss):  # reentrant checkpoints know no torch.autograd.grad
        for p in handle.parameters():
            p.grad = None
        loss.backward()
        return [p.grad for p in handle.parameters()]

    want = both()
    model.train()
    checkpointing(model, reentrant)
    assert_close(both(), want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_users_checkpoint(reentrant):
    model, handle, joint = attached()
    # A reentrant checkpoint passes gradients on to its inputs alone.
    model.embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    want = step(model, handle.parameters())
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=reentrant)
    assert_close(step(model, handle.parameters()), want)
    assert bool(joint.taken) != reentrant


def test_a_graph_serves_one_step_and_layers_by_themselves_make_their_own():
    model, handle, _ = attached()
    parameters = list(handle.parameters())
    for _ in range(2):  # no update in between: nothing else tells the steps apart
        loss_of(outputs(model)).backward()
    x = torch.randn(2, 17, 32)
    for _ in range(2):
        out = model.layers[1](x)
        (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
    assert all(p.grad.isfinite().all() for p in parameters)


def test_an_interrupted_forward_leaves_nothing_open():
    model, _, joint = attached()
    model.layers[2].register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
        outputs(model)
    assert joint.share(joint.members[0]) is None
    model.layers[2]._forward_pre_hooks.clear()
    assert_close(*(step(m, prompts_of(m)) for m in (model, alone(model))))


def test_a_copy_shares_with_its_own_layers():
    model, handle, joint = attached()
    outputs(model)  # shares belong to a graph, which cannot be copied
    copied = copy.deepcopy(model)
    (other,) = {p.joint for p in copied.modules() if isinstance(p, LayerPrompt)}
    assert other is not joint and not set(other.members) & set(joint.members)
    want = step(model, handle.parameters())
    assert same(step(copied, prompts_of(copied)), want)
    assert other.taken == set(other.members) and len(other.members) == LAYERS


def test_one_prompt_and_evaluation_need_no_stack():
    for depth, gradients in (("one in the middle", True), ("deep", False)):
        model, _, joint = attached(depth=depth)
        with torch.set_grad_enabled(gradients):
            outputs(model)
        assert joint.weights is None
    assert JointPrompts([]).members == []


def diffused(**options):
    """A model with approximated prompts, and the object that they share."""
    model = build("ViT classifier")
    fastprompt.attach(model, fastprompt.APT(length=5, **options))
    prompts = [m for m in model.modules() if isinstance(m, DiffusedPrompt)]
    with torch.no_grad():
        for p in prompts:
            p.up.normal_(std=0.1)
    return model, prompts, prompts[0].joint


@pytest.mark.parametrize("options", [{}, {"zero_init": True}, {"scale_trainable": False}], ids=str)
def test_key_maps_together_as_alone(options):
    model, prompts, joint = diffused(**options)
    got = step(model, prompts_of(model))
    assert joint.taken == set(prompts)
    for p in prompts:
        p.joint = None
    assert_close(got, step(model, prompts_of(model)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_key_maps_of_layers_that_run_again(reentrant):
    model, _, _ = diffused()
    want = step(model, prompts_of(model))
    model.train()
    checkpointing(model, reentrant)
    assert_close(step(model, prompts_of(model)), want)


def test_layers_of_other_shapes_map_their_own_keys():
    model, prompts, joint = diffused()
    other = DiffusedPrompt(3, 32, 4)
    prompts[1].prompt, prompts[1].down, prompts[1].up = other.prompt, other.down, other.up
    found = step(model, prompts_of(model))
    assert not joint.taken and all(x.isfinite().all() for x in found.values())
