# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tiny_models import WIDTH, attach_prompts, build, outputs, same, step

import fastprompt


@pytest.mark.parametrize("depth", ["deep", "a gap", "shallow"])
def test_baking_freezes_prompts_and_changes_no_output(tmp_path, depth):
    model = build("ViT classifier")
    handle = attach_prompts(model, depth, train=("classifier",))
    want = outputs(model)
    head = step(model, model.classifier.parameters())
    assert handle.bake() is handle
    assert same(outputs(model), want)
    assert handle.num_trainable == 2 * WIDTH + 2
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]
    handle.save(tmp_path)
    other = build("ViT classifier")
    loaded = fastprompt.load(other, tmp_path)
    assert same(outputs(other), want) and loaded.num_trainable > handle.num_trainable
    assert same(step(model.train(), model.classifier.parameters()), head)
    handle.detach()
    assert same(outputs(model.eval()), outputs(build("ViT classifier")))


def test_baked_keys_are_computed_once_in_training_too():
    model = build("ViT classifier").train()
    attach_prompts(model, train=("classifier",)).bake()
    seen = []
    model.vit.layers[1].attention.v_proj.register_forward_hook(lambda m, args, out: seen.append(args[0].dim()))
    for _ in range(3):
        step(model, model.classifier.parameters())
    assert sorted(seen) == [2, 3, 3, 3]


# In the layer itself the prompt's keys need a gradient; above it, its queries do.
@pytest.mark.parametrize("layer", ["vit.layers.1", "vit.layers.0.mlp"])
def test_base_weights_trained_beside_baked_prompts_get_all_of_their_gradient(layer):
    model = build("ViT classifier")
    handle = attach_prompts(model, train=(layer,))
    trained = [p for n, p in handle.named_parameters() if n.startswith("base.")]
    want = step(model, trained)
    handle.bake()
    with torch.inference_mode():
        outputs(model)
    assert same(step(model, trained), want)
