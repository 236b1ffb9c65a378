# SPDX-License-Identifier: Apache-2.0
"""The attention processors against those of diffusers: outputs and gradients in float64, and clear errors."""

import copy

import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import nn

from fastprompt.diffusers import DecoupledAttnProcessor, PromptAttnProcessor, processors
from fastprompt.ops import decoupled_attention

WIDTH, TEXT, HEADS, GRID = 32, 24, 4, (4, 6)
ROWS = GRID[0] * GRID[1]
PLAIN: dict = {}
# With everything that a diffusers layer may have around its attention.
FULL = {"bias": True, "residual_connection": True, "rescale_output_factor": 1.7, "norm_num_groups": 4}
LAYERS = {
    "plain": PLAIN,
    "full": FULL,
    "layer_norm": FULL | {"cross_attention_norm": "layer_norm"},
    "group_norm": {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4},
}


def layer(processor=None, **options):
    made = Attention(
        WIDTH, cross_attention_dim=TEXT, heads=HEADS, dim_head=WIDTH // HEADS, processor=processor, **options
    )
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0, 0.3)
    return made.double()


def pair(num_tokens, scale, **options):
    """A layer with diffusers' processor, and the same with ours."""
    theirs = layer(IPAdapterAttnProcessor2_0(WIDTH, TEXT, num_tokens, copy.deepcopy(scale)), **options)
    ours = layer(DecoupledAttnProcessor(WIDTH, TEXT, num_tokens, copy.deepcopy(scale)), **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tokens(batch, images, num):
    return torch.randn(batch, images, num, TEXT, dtype=torch.float64)


def run(attn, x, text, images, **options):
    """The output, and gradients of everything."""
    leaves = [t.detach().requires_grad_() for t in (x, text, *images)]
    x, text, *images = leaves
    out = attn(x, encoder_hidden_states=(text, images), **options)
    weights = [p for p in attn.parameters() if p.requires_grad]
    torch.manual_seed(7)
    found = torch.autograd.grad(out, [*leaves, *weights], torch.randn_like(out), allow_unused=True)
    return [out.detach(), *found]


def agree(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        # A branch that is left out gives no gradient, where diffusers gives none as well.
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def masks(images, batch=1):
    pictures = torch.rand(images, 8 * GRID[0], 8 * GRID[1])
    found = IPAdapterMaskProcessor(do_resize=False).preprocess(pictures).double()
    return found.reshape(1, images, *found.shape[-2:]).repeat(batch, 1, 1, 1)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("four", [False, True], ids=["rows", "grid"])
def test_every_kind_of_layer(kind, four):
    theirs, ours = pair((3,), 0.6, **LAYERS[kind])
    x = torch.randn(2, WIDTH, *GRID).double() if four else torch.randn(2, ROWS, WIDTH).double()
    given = x, torch.randn(2, 7, TEXT).double(), [tokens(2, 1, 3)]
    agree(run(ours, *given), run(theirs, *given))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("num_tokens", "images", "scale"),
    [
        ((4,), (3,), 0.5),
        ((4,), (2,), [[0.0, 0.0]]),
        ((4, 2), (1, 2), [0.5, 1.5]),
        ((4, 2), (1, 2), [0.0, -1.5]),
        ((4, 2), (2, 1), 0.0),
    ],
)
def test_several_adapters_and_images_share_a_softmax_an_adapter(num_tokens, images, scale, batch):
    theirs, ours = pair(num_tokens, scale)
    given = torch.randn(batch, ROWS, WIDTH).double(), torch.randn(batch, 7, TEXT).double()
    given = *given, [tokens(batch, n, m) for n, m in zip(images, num_tokens, strict=True)]
    agree(run(ours, *given), run(theirs, *given))


MASKED = {
    "number": ((3,), [0.7]), "list": ((3,), [[0.7, -0.2, 1.0]]), "zeros in a list": ((3,), [[0.0, 0.5, 0.0]]),
    "all zero": ((2,), [[0.0, 0.0]]), "two adapters": ((2, 1), [[0.3, 1.1], 0.6]),
    "zero and list": ((2, 1), [0.0, [0.6]]),
}  # fmt: skip


@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("batch", [1, 2])
def test_with_masks_every_image_is_a_branch(case, batch):
    images, scale = MASKED[case]
    theirs, ours = pair((4,) * len(images), scale)
    given = torch.randn(batch, ROWS, WIDTH).double(), torch.randn(batch, 7, TEXT).double()
    given = *given, [tokens(batch, n, 4) for n in images]
    options = {"ip_adapter_masks": [masks(n) for n in images]}
    agree(run(ours, *given, **options), run(theirs, *given, **options))


def test_masks_of_some_adapters_of_samples_and_in_one_tensor():
    theirs, ours = pair((4, 4), [0.6, 0.9])
    given = torch.randn(2, ROWS, WIDTH).double(), torch.randn(2, 7, TEXT).double()
    several = *given, [tokens(2, 2, 4), tokens(2, 1, 4)]
    for given_masks in ([None, masks(1)], [masks(2), None], [masks(2, batch=2), masks(1)]):
        agree(run(ours, *several, ip_adapter_masks=given_masks), run(theirs, *several, ip_adapter_masks=given_masks))
    one = *given, [tokens(2, 1, 4), tokens(2, 1, 4)]
    tensor = torch.cat([masks(1), masks(1)])
    agree(run(ours, *one, ip_adapter_masks=tensor), run(theirs, *one, ip_adapter_masks=tensor))


@pytest.mark.filterwarnings("ignore:You have passed a tensor as `encoder_hidden_states`:FutureWarning")
def test_text_mask_and_one_tensor_of_text_and_image_tokens():
    theirs, ours = pair((4,), 0.8)
    x, text = torch.randn(2, ROWS, WIDTH).double(), torch.randn(2, 7, TEXT).double()
    hidden = torch.zeros(2, 1, 7).double()
    hidden[1, :, 4:] = -10000.0
    image = tokens(2, 1, 4)
    agree(*(run(a, x, text, [image], attention_mask=hidden) for a in (ours, theirs)))
    both = torch.cat([text, image[:, 0]], dim=1)
    torch.testing.assert_close(ours(x, both), theirs(x, both), rtol=1e-10, atol=1e-12)


def test_half_precision_is_as_close_to_float64_as_diffusers():
    for masked in (False, True):
        theirs, ours = pair((4,), [[0.6, 1.2]] if masked else 0.6)
        x, text, images = torch.randn(2, ROWS, WIDTH).double(), torch.randn(2, 7, TEXT).double(), [tokens(2, 2, 4)]
        options = {"ip_adapter_masks": [masks(2)]} if masked else {}
        with torch.no_grad():
            exact = theirs(x, (text, images), **options)
            low = [t.bfloat16() for t in (x, text, *images)]
            errors = []
            for attn in (ours, theirs):
                got = attn.bfloat16()(low[0], (low[1], low[2:]), **options)
                assert got.dtype == torch.bfloat16
                errors.append((got - exact).norm() / exact.norm())
        assert errors[0] <= 1.5 * errors[1] + 2**-9


def test_weights_that_learn_may_be_float32_beside_half_precision():
    _, ours = pair((4,), 0.6)
    ours.bfloat16()
    ours.processor.float()
    given = torch.randn(2, ROWS, WIDTH).bfloat16(), torch.randn(2, 7, TEXT).bfloat16(), [tokens(2, 1, 4).float()]
    out, *_, last = run(ours, *given)
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32


def test_image_tokens_of_the_whole_batch_are_never_copied(monkeypatch):
    theirs, ours = pair((4,), 0.6)
    x, text, image = torch.randn(3, ROWS, WIDTH).double(), torch.randn(3, 7, TEXT).double(), tokens(1, 2, 4)
    want = theirs(x, (text, [image.repeat(3, 1, 1, 1)]))
    seen = []

    def recorded(query, keys, *rest, **options):
        seen.append([len(key) for key in keys])
        return decoupled_attention(query, keys, *rest, **options)

    monkeypatch.setattr(processors, "decoupled_attention", recorded)
    for given in (image, image.expand(3, -1, -1, -1)):
        torch.testing.assert_close(ours(x, (text, [given])), want, rtol=1e-10, atol=1e-12)
    assert seen == [[3, 1], [3, 1]]


def test_scales_that_learn():
    _, ours = pair((4,), 0.6)
    gate = nn.Parameter(torch.zeros((), dtype=torch.float64))
    ours.processor.scale[0] = gate
    x, text = torch.randn(2, ROWS, WIDTH).double(), torch.randn(2, 7, TEXT).double()
    (grad,) = torch.autograd.grad(ours(x, (text, [tokens(2, 1, 4)])).sum(), gate)
    assert grad.abs() > 1e-6


def test_a_scale_of_zero_is_the_layer_without_adapter():
    _, ours = pair((4,), 0.0)
    base = layer(AttnProcessor2_0())
    base.load_state_dict(ours.state_dict(), strict=False)
    for dtype in (torch.float32, torch.bfloat16):
        x, text = torch.randn(2, ROWS, WIDTH).to(dtype), torch.randn(2, 7, TEXT).to(dtype)
        assert torch.equal(ours.to(dtype)(x, (text, [tokens(2, 1, 4).to(dtype)])), base.to(dtype)(x, text))


@pytest.mark.parametrize("kind", ["plain", "full", "layer_norm"])
@pytest.mark.parametrize("length", [0, 1, 5])
def test_prompts_beside_the_text_are_prompts_among_its_tokens(kind, length):
    ours = layer(PromptAttnProcessor(TEXT, length), **LAYERS[kind])
    theirs = layer(AttnProcessor2_0(), **LAYERS[kind])
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(2, WIDTH, *GRID).double() if kind == "full" else torch.randn(2, ROWS, WIDTH).double()
    text = torch.randn(2, 7, TEXT).double().requires_grad_()
    hidden = torch.zeros(2, 1, 7).double()
    hidden[0, :, 5:] = -10000.0
    prompt = ours.processor.prompt
    joined, wide = text if theirs.norm_cross is None else theirs.norm_cross(text), hidden
    if length:
        joined = torch.cat([prompt.expand(2, -1, -1), joined], dim=1)
        wide = torch.cat([hidden.new_zeros(2, 1, length), hidden], dim=2)
    theirs.norm_cross = None
    learned = [text, *([prompt] if length else [])]
    out = ours(x, text, attention_mask=hidden), theirs(x, joined, attention_mask=wide)
    if not length:
        assert torch.equal(*out)
    grads = (torch.autograd.grad(o.square().sum(), learned, retain_graph=True) for o in out)
    agree([out[0], *next(grads)], [out[1], *next(grads)])


def test_prompts_in_self_attention_and_behind_key_norms():
    ours = layer(PromptAttnProcessor(TEXT, 3), qk_norm="layer_norm")
    theirs = layer(AttnProcessor2_0(), qk_norm="layer_norm")
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x, text = torch.randn(2, ROWS, WIDTH).double(), torch.randn(2, 7, TEXT).double()
    joined = torch.cat([ours.processor.prompt.expand(2, -1, -1), text], dim=1)
    torch.testing.assert_close(ours(x, text), theirs(x, joined), rtol=1e-10, atol=1e-12)
    itself = Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, processor=PromptAttnProcessor(WIDTH, 3)).double()
    x = torch.randn(2, ROWS, WIDTH).double()
    got = itself(x)
    joined = torch.cat([itself.processor.prompt.expand(2, -1, -1), x], dim=1)
    itself.set_processor(AttnProcessor2_0())
    torch.testing.assert_close(got, itself(x, joined), rtol=1e-10, atol=1e-12)


def error(match, scale=0.6, images=None, kind=ValueError, num_tokens=(4,), text=None, **options):
    _, ours = pair(num_tokens, scale)
    text = torch.randn(2, 7, TEXT).double() if text is None else text
    images = [tokens(2, 2, 4)] if images is None else images
    with pytest.raises(kind, match=match):
        ours(torch.randn(2, ROWS, WIDTH).double(), (text, images), **options)


def test_errors_name_what_disagrees():
    error(r"images: got 2 entries, expected 1, one for every adapter", images=[tokens(2, 1, 4)] * 2)
    error(r"images\[0\]: got shape \[3, 2, 4, 24\], expected \[2 or 1,images,tokens,24\]", images=[tokens(3, 2, 4)])
    error(r"images\[0\]: got shape \[2, 1, 4, 10\]", images=[torch.randn(2, 1, 4, 10).double()])
    error(r"ip_adapter_masks: got 2 entries, expected 1", ip_adapter_masks=[masks(2), masks(2)])
    error(r"ip_adapter_masks\[0\]: got 3 masks for image tokens \[2, 2, 4, 24\]", ip_adapter_masks=[masks(3)])
    error(r"ip_adapter_masks\[0\]: got shape \[32, 48\].*IPAdapterMaskProcessor", ip_adapter_masks=[masks(1)[0, 0]])
    error(r"ip_adapter_masks\[0\]: got str", ip_adapter_masks=["left"])
    error(
        r"ip_adapter_masks\[0\]: got shape \[3, 2, 32, 48\], expected \[1 or 2,", ip_adapter_masks=[masks(2, batch=3)]
    )
    error(r"scale\[0\]: got a list, one scale an image, but no mask", scale=[[0.5, 0.5]])
    error(r"scale\[0\]: got 3 scales, expected 2", scale=[[0.5, 0.5, 0.1]], ip_adapter_masks=[masks(2)])
    _, ours = pair((4,), 0.6)
    with pytest.raises(ValueError, match="encoder_hidden_states: got None"):
        ours(torch.randn(2, ROWS, WIDTH).double())
    ours.processor.scale.append(0.5)
    with pytest.raises(ValueError, match="scale: got 2 entries, expected 1"):
        ours(torch.randn(2, ROWS, WIDTH).double(), (torch.randn(2, 7, TEXT).double(), [tokens(2, 1, 4)]))
    with pytest.raises(ValueError, match="width: got 0, expected the width of the tokens that 3 prompts join"):
        PromptAttnProcessor(length=3)


@pytest.mark.parametrize("shape", [(48, 32), (32, 32), (32, 160)])
def test_masks_of_another_aspect_ratio_are_an_error(shape):
    want = rf"ip_adapter_masks\[0\]: got {shape[0]} x {shape[1]} \(height x width\), but the picture has 23 queries"
    _, ours = pair((4,), 0.6)
    given = torch.randn(2, 23, WIDTH).double(), (torch.randn(2, 7, TEXT).double(), [tokens(2, 1, 4)])
    with pytest.raises(ValueError, match=want):
        ours(*given, ip_adapter_masks=[torch.ones(1, 1, *shape).double()])


@pytest.mark.filterwarnings("ignore:The aspect ratio of the mask:UserWarning")
def test_grids_that_rounding_makes_are_cut_as_diffusers_cuts_them():
    """A mask of 640 x 264 pixels at an eighth of an eighth: 10 x 5 queries, taken for 12 x 4 and padded."""
    theirs, ours = pair((4,), 0.6)
    given = torch.randn(2, 50, WIDTH).double(), (torch.randn(2, 7, TEXT).double(), [tokens(2, 1, 4)])
    options = {"ip_adapter_masks": [torch.rand(1, 1, 640, 264).double()]}
    torch.testing.assert_close(ours(*given, **options), theirs(*given, **options), rtol=1e-10, atol=1e-12)
