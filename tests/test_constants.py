# SPDX-License-Identifier: Apache-2.0
"""Keys and values that are kept over denoising steps: when they are used again, and that they are never stale."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from tiny_unets import linear_calls
from torch import nn

from fastprompt.diffusers import DecoupledAttnProcessor, PromptAttnProcessor
from fastprompt.diffusers.constants import Constants

WIDTH, TEXT = 32, 24


@pytest.fixture
def layers():
    """A layer with diffusers' processor, and one with ours that shares its weights."""
    theirs = Attention(WIDTH, cross_attention_dim=TEXT, heads=4, dim_head=8, cross_attention_norm="layer_norm")
    theirs.set_processor(IPAdapterAttnProcessor2_0(WIDTH, TEXT, (4,), 0.6))
    ours = copy.copy(theirs)
    ours._modules = dict(theirs._modules)
    ours.processor = DecoupledAttnProcessor.sharing(theirs.processor)
    return theirs, ours


def steps(attn, text, image, count=3, **options):
    """Outputs of some steps, and how often each projection ran."""
    with torch.no_grad(), linear_calls() as calls:
        torch.manual_seed(5)
        out = [attn(torch.randn(2, 9, WIDTH), (text, [image]), **options) for _ in range(count)]
    return torch.stack(out), [
        calls[x] for x in (attn.to_k, attn.to_v, attn.processor.to_k_ip[0], attn.processor.to_v_ip[0])
    ]


def fresh():
    return torch.randn(2, 7, TEXT), torch.randn(2, 2, 4, TEXT)


def check(layers, text, image, calls, **options):
    """Ours gives what diffusers gives, with so many calls of each projection."""
    theirs, ours = layers
    got, ran = steps(ours, text, image, **options)
    want, _ = steps(theirs, text, image, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert ran == calls


def test_constant_tokens_are_projected_once(layers):
    given = fresh()
    check(layers, *given, [1, 1, 1, 1])
    check(layers, *given, [0, 0, 0, 0])
    check(layers, *given, [0, 0, 0, 0], ip_adapter_masks=[torch.rand(1, 2, 9, 9)])


CHANGES = {
    "text": (lambda text, image, attn: text.mul_(1.5), "text"),
    "a view of the text": (lambda text, image, attn: text[0].zero_(), "text"),
    "the text's data": (lambda text, image, attn: setattr(text, "data", torch.randn(2, 7, TEXT)), "text"),
    "image": (lambda text, image, attn: image.copy_(torch.randn_like(image)), "image"),
    "to_k": (lambda text, image, attn: attn.to_k.weight.add_(0.1), "text"),
    "norm": (lambda text, image, attn: attn.norm_cross.bias.add_(0.1), "text"),
    "to_v_ip": (lambda text, image, attn: attn.processor.to_v_ip[0].weight.add_(0.1), "image"),
    "a new weight": (lambda text, image, attn: setattr(attn.to_v, "weight", nn.Parameter(weight())), "text"),
    "a weight's data": (lambda text, image, attn: setattr(attn.to_v.weight, "data", weight()), "text"),
    "loaded weights": (lambda text, image, attn: attn.to_k.load_state_dict({"weight": weight()}), "text"),
    "a new projection": (lambda text, image, attn: setattr(attn, "to_k", nn.Linear(TEXT, WIDTH, bias=False)), "text"),
}


def weight():
    return torch.randn(WIDTH, TEXT)


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_is_seen(layers, what):
    change, which = CHANGES[what]
    calls = [1, 1, 0, 0] if which == "text" else [0, 0, 1, 1]
    text, image = fresh()
    theirs, ours = layers
    check(layers, text, image, [1, 1, 1, 1])
    with torch.no_grad():
        change(text, image, ours)
    theirs._modules = dict(ours._modules) | {"processor": theirs.processor}
    check(layers, text, image, calls)
    check(layers, text, image, [0, 0, 0, 0])


def test_new_tokens_that_take_the_place_of_old_ones(layers):
    places = set()
    for _ in range(20):
        text, image = fresh()
        places.add((id(text), text.data_ptr()))
        check(layers, text, image, [1, 1, 1, 1])
        del text, image
    assert len(places) < 20, "no address came back, so nothing was tested"


def test_data_that_takes_the_address_of_old_data():
    """The same parameter object, version and address, and other numbers."""
    constants, layer, x = Constants(), nn.Linear(64, 64, bias=False), torch.randn(3, 64)
    addresses = set()
    with torch.no_grad():
        for _ in range(20):
            layer.weight.data = torch.empty(0)
            layer.weight.data = torch.randn(64, 64)
            addresses.add(layer.weight.data_ptr())
            assert torch.equal(constants.get("k", x, [layer], (), lambda: layer(x)), layer(x))
    assert len(addresses) < 20, "no address came back, so nothing was tested"


def test_two_prompts_in_turn_are_both_kept_and_a_third_pushes_one_out(layers):
    _, ours = layers
    pairs = [fresh() for _ in range(3)]
    ran = [steps(ours, *pairs[i], count=1)[1] for i in (0, 1, 0, 1, 2, 2, 0)]
    once, none = [1, 1, 1, 1], [0, 0, 0, 0]
    assert ran == [once, once, none, none, once, none, once]


def test_what_is_kept_is_freed_with_the_tokens(layers):
    _, ours = layers
    text, image = fresh()
    steps(ours, text, image)
    constants = ours.processor.constants
    kept = [weakref.ref(x) for entries in constants._kept.values() for entry in entries for x in entry.result]
    assert len(constants) == 2 and len(kept) == 4
    del text
    gc.collect()
    assert len(constants) == 1
    constants.clear()
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_freed_processors_free_what_they_keep_at_once(layers):
    _, ours = layers
    text, image = fresh()
    steps(ours, text, image)
    ref = weakref.ref(next(iter(ours.processor.constants._kept.values()))[0].result[0])
    gc.disable()
    try:
        ours.set_processor(AttnProcessor2_0())
        assert ref() is None
    finally:
        gc.enable()


def test_moving_a_model_frees_its_old_weights():
    constants, layer, x = Constants(), nn.Linear(8, 8), torch.randn(3, 8)
    with torch.no_grad():
        constants.get("k", x, [layer], (), lambda: layer(x))
    storage = torch.multiprocessing.reductions.StorageWeakRef(layer.weight.untyped_storage())
    layer.double()
    assert storage.expired()


def test_nothing_is_kept_while_gradients_are_on(layers):
    theirs, ours = layers
    text, image = fresh()
    steps(ours, text, image)
    x = torch.randn(2, 9, WIDTH)
    for _ in range(2):
        with linear_calls() as calls:
            out = ours(x, (text, [image]))
        assert calls[ours.processor.to_k_ip[0]] == calls[ours.to_k] == 1
        (got,) = torch.autograd.grad(out.sum(), ours.processor.to_k_ip[0].weight)
        (want,) = torch.autograd.grad(theirs(x, (text, [image])).sum(), theirs.processor.to_k_ip[0].weight)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not len(ours.processor.constants)


def test_training_steps_between_samples(layers):
    _, ours = layers
    text, image = fresh()
    optimizer = torch.optim.SGD(ours.processor.parameters(), lr=0.1)
    for _ in range(3):
        check(layers, text, image, [1, 1, 1, 1])
        ours(torch.randn(2, 9, WIDTH), (text, [image])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_autocast_is_part_of_what_a_result_depends_on(layers):
    text, image = fresh()
    theirs, ours = layers
    plain = steps(ours, text, image)[0]
    with torch.autocast("cpu", torch.bfloat16):
        low, calls = steps(ours, text, image)
        want = steps(theirs, text, image)[0]
    assert calls == [1, 1, 1, 1]
    torch.testing.assert_close(low, want, rtol=0.05, atol=0.05)
    again, calls = steps(ours, text, image)
    assert torch.equal(again, plain) and calls == [1, 1, 1, 1]


def test_what_cannot_be_watched_is_not_kept(layers):
    theirs, ours = layers
    with torch.inference_mode():
        hidden = fresh()
    check(layers, *hidden, [3, 3, 3, 3])
    given = fresh()
    ours.to_k.register_forward_hook(lambda module, args, out: out * 2)
    check(layers, *given, [3, 3, 1, 1])

    class Scaled(nn.Linear):
        factor = 1.0

        def forward(self, x):
            return self.factor * super().forward(x)

    theirs.to_v = ours.to_v = Scaled(TEXT, WIDTH)
    check(layers, *given, [3, 3, 0, 0])
    ours.to_v.factor = 2.0
    check(layers, *given, [3, 3, 0, 0])


def test_one_processor_for_several_layers_keeps_theirs_apart():
    processor = PromptAttnProcessor(TEXT, 3)
    first, second = (Attention(WIDTH, cross_attention_dim=TEXT, heads=4, dim_head=8, processor=processor) for _ in "ab")
    x, text = torch.randn(2, 9, WIDTH), torch.randn(2, 7, TEXT)
    want = [attn(x, text).detach() for attn in (first, second)]
    with torch.no_grad(), linear_calls() as calls:
        for _ in range(3):
            for attn, expected in zip((first, second), want, strict=True):
                torch.testing.assert_close(attn(x, text), expected)
    assert [calls[attn.to_k] for attn in (first, second)] == [2, 2]  # of text and of prompts
    with torch.no_grad():
        processor.prompt.add_(1.0)
        changed = first(x, text)
    assert not torch.allclose(changed, want[0])
    torch.testing.assert_close(changed, first(x, text).detach())


def test_copies_and_pickles_start_empty(layers):
    _, ours = layers
    text, image = fresh()
    want = steps(ours, text, image)[0]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert not len(twin.processor.constants)
        assert torch.equal(steps(twin, text, image)[0], want)
    assert len(ours.processor.constants) == 2


def test_compiled_layers_compute_everything(layers):
    theirs, ours = layers
    text, image = fresh()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x, (text, [image])), theirs(x, (text, [image])), rtol=1e-4, atol=1e-5)
            text.mul_(2)
