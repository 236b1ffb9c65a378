# SPDX-License-Identifier: Apache-2.0
"""`PromptAttention` against prompt rows put before the input and dropped after: outputs and every gradient."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention

import fastprompt
from fastprompt.nn import PromptAttention

B, T, C, P = 2, 6, 16, 3
MASK = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(1)) < 0.7


class FusedAttention(nn.Module):
    """The attributes of timm's attention, and its forward."""

    def __init__(self, dim, num_heads, qkv_bias=True, qk_norm=False, proj_bias=True, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.attn_drop, self.norm, self.gate = nn.Dropout(attn_drop), nn.Identity(), None
        self.proj, self.proj_drop = nn.Linear(dim, dim, bias=proj_bias), nn.Dropout(proj_drop)

    def forward(self, x, attn_mask=None, is_causal=False):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        out = scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj(self.norm(out.transpose(1, 2).flatten(2)))


def joined(layer, x, attn_mask=None, is_causal=False):
    """The layer as plain self-attention over ``[prompt; x]``; prompts attend to everything, as nobody reads them."""
    rows = torch.cat([layer.prompt.expand(len(x), -1, -1), x], dim=1)
    hq, hkv, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    query, key, value = layer.qkv(rows).split([hq * dim, hkv * dim, hkv * dim], dim=-1)
    query, key, value = (y.unflatten(-1, (-1, dim)).transpose(1, 2) for y in (query, key, value))
    query, key = layer.q_norm(query), layer.k_norm(key)
    key, value = (y.repeat_interleave(hq // hkv, dim=1) for y in (key, value))
    mask = torch.zeros(1, 1, T, T, dtype=x.dtype)
    if attn_mask is not None:
        mask = mask + (
            torch.zeros(()).masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask
        )
    if is_causal:
        mask = mask.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    mask = pad(mask, (len(layer.prompt), 0, len(layer.prompt), 0))
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask.to(x.dtype))
    return layer.proj(out.transpose(1, 2).flatten(2))[:, len(layer.prompt) :]


def results(function, module, x):
    """Output and the gradients of the input and of every parameter of ``module``."""
    x = x.clone().requires_grad_()
    out = function(x)
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    wanted = [x, *module.parameters()]
    return [out, *torch.autograd.grad((out * weights).sum(), wanted, materialize_grads=True)]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", [(4, None), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"is_causal": True},
        {"attn_mask": MASK},
        {"attn_mask": MASK[:1, :, 0], "is_causal": True},
        {"attn_mask": torch.arange(T * T).view(T, T).double().cos()},
    ],
    ids=["full", "causal", "bool", "bool and causal", "float"],
)
def test_equals_prompt_rows_joined_and_dropped(heads, bias, kwargs):
    layer = PromptAttention(C, heads[0], P, heads[1], bias=bias, dtype=torch.float64)
    x = torch.randn(B, T, C, dtype=torch.float64)
    actual = results(lambda x: layer(x, **kwargs), layer, x)
    assert_same(actual, results(lambda x: joined(layer, x, **kwargs), layer, x))
    names = dict(layer.named_parameters())
    assert names["prompt"].shape == (P, C)
    assert all(grad.abs().max() > 1e-6 for grad in actual[1:])


@pytest.mark.parametrize("bias", [True, False])
def test_from_multihead(bias):
    """The prompt of the layer are rows of the nn.MultiheadAttention it came from."""
    plain = nn.MultiheadAttention(C, 4, bias=bias, batch_first=True).double()
    layer = PromptAttention.from_multihead(plain, P)
    x = torch.randn(B, T, C, dtype=torch.float64)
    hidden = ~MASK[:1, 0]
    # True means hidden in nn.MultiheadAttention; its prompt rows may see everything.
    mask = pad(hidden[0], (P, 0, P, 0), value=False)

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompt = nn.Parameter(layer.prompt.detach().clone())
            self.attn = plain

        def forward(self, x):
            rows = torch.cat([self.prompt.expand(B, -1, -1), x], dim=1)
            return self.attn(rows, rows, rows, attn_mask=mask, need_weights=False)[0][:, P:]

    rows = Rows()
    actual, expected = results(lambda x: layer(x, attn_mask=~hidden), layer, x), results(rows, rows, x)
    assert [name for name, _ in layer.named_parameters()][:1] == ["prompt"]
    assert_same(actual, expected)
    assert layer.qkv.weight is plain.in_proj_weight
    assert layer.proj is plain.out_proj


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_from_fused_qkv(bias, qk_norm, is_causal):
    plain = FusedAttention(C, 4, qkv_bias=bias, qk_norm=qk_norm, proj_bias=bias).double()
    x = torch.randn(B, T, C, dtype=torch.float64)
    without = PromptAttention.from_fused_qkv(plain, 0)
    torch.testing.assert_close(without(x, is_causal=is_causal), plain(x, is_causal=is_causal))
    layer = PromptAttention.from_fused_qkv(plain, P)
    assert layer.qkv is plain.qkv
    rows = torch.cat([layer.prompt.expand(B, -1, -1), x], dim=1)
    mask = pad(torch.ones(T, T).tril().bool(), (P, 0, P, 0), value=True) if is_causal else None
    torch.testing.assert_close(layer(x, is_causal=is_causal), plain(rows, attn_mask=mask)[:, P:])
    assert_same(
        results(lambda x: layer(x, is_causal=is_causal), layer, x),
        results(lambda x: joined(layer, x, is_causal=is_causal), layer, x),
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_flags_and_mode_are_taken_over(frozen):
    for plain, convert in (
        (nn.MultiheadAttention(C, 4, batch_first=True), PromptAttention.from_multihead),
        (FusedAttention(C, 4, qk_norm=True), PromptAttention.from_fused_qkv),
    ):
        layer = convert(plain.requires_grad_(not frozen).eval(), P)
        trained = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert trained == ({"prompt"} if frozen else {name for name, _ in layer.named_parameters()})
        assert not layer.training
        assert not any(p.is_meta for p in layer.parameters())


def test_a_frozen_layer_gives_the_prompt_its_gradient_and_nothing_else():
    layer = PromptAttention.from_multihead(nn.MultiheadAttention(C, 4, batch_first=True).requires_grad_(False), P)
    layer(torch.randn(B, T, C)).square().sum().backward()
    assert layer.prompt.grad.abs().max() > 0
    assert all(p.grad is None for name, p in layer.named_parameters() if name != "prompt")


def test_the_state_of_a_fused_layer_loads_by_name():
    plain, layer = FusedAttention(C, 4), PromptAttention(C, 4, P)
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (["prompt"], [])


def test_state_dict_and_copies():
    layer, x = PromptAttention(C, 4, P, 2), torch.randn(B, T, C)
    other = PromptAttention(C, 4, P, 2)
    other.load_state_dict(layer.state_dict())
    twin = copy.deepcopy(layer)
    for same in (other, twin):
        assert torch.equal(same(x), layer(x))
    with torch.no_grad():
        twin.prompt.add_(1.0)
    assert torch.equal(other(x), layer(x))
    assert not torch.equal(twin(x), layer(x))


def test_dtypes():
    x = torch.randn(B, T, C)
    layer = PromptAttention(C, 4, P, dtype=torch.bfloat16)
    assert layer.prompt.dtype == torch.float32
    layer(x.bfloat16()).sum().backward()
    assert layer.prompt.grad.dtype == torch.float32
    assert layer.half()(x.half()).dtype == torch.float16
    full = PromptAttention(C, 4, P)
    with torch.autocast("cpu", torch.bfloat16):
        out = full(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), full(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic):
    torch.compiler.reset()
    layer = PromptAttention(C, 4, P, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (T, T + 3):
        x = torch.randn(B, rows, C)
        for kwargs in ({}, {"is_causal": True}):
            for graph, eager in zip(
                results(lambda x, kw=kwargs: compiled(x, **kw), layer, x),
                results(lambda x, kw=kwargs: layer(x, **kw), layer, x),
                strict=True,
            ):
                torch.testing.assert_close(graph, eager)


def test_gradient_checkpointing():
    layer = PromptAttention(C, 4, P, dtype=torch.float64)
    x = torch.randn(B, T, C, dtype=torch.float64)
    checkpointed = results(lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False), layer, x)
    assert_same(checkpointed, results(layer, layer, x))


def test_what_print_shows():
    shown = repr(fastprompt.nn.PromptAttention(C, 4, P, 2))
    assert "embed_dim=16, num_heads=4, num_kv_heads=2, length=3" in shown


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 3, 2), "embed_dim: got 16 for 3 heads, expected a multiple of num_heads"),
        ((16, 0, 2), "embed_dim: got 16 for 0 heads, expected a multiple of num_heads"),
        ((16, 4, 2, 3), "num_kv_heads: got 3, expected a divisor of num_heads = 4"),
        ((16, 4, -1), "length: got -1, expected 0 prompts or more"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError) as error:
        PromptAttention(*sizes)
    assert str(error.value) == message


@pytest.mark.parametrize("sizes", [(16, 4, 2.5), (16, "4", 2), (16, 4, True), (16, 4, 2, 2.0)], ids=str)
def test_sizes_that_are_no_integers(sizes):
    with pytest.raises(TypeError, match=r"(length|num_heads|num_kv_heads): got .*, expected an int"):
        PromptAttention(*sizes)


def test_inputs_of_another_shape():
    layer = PromptAttention(C, 4, P)
    for shape in ((T, C), (B, T, C + 1)):
        with pytest.raises(ValueError, match=r"x: got shape \[.*\], expected \[B,T,C\] with C = 16"):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"attn_mask: got shape .* prompt keys are always visible"):
        layer(torch.zeros(B, T, C), attn_mask=torch.ones(T, P + T, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "batch_first=False (set it, and give the model [B,T,C])"),
        ({"batch_first": True, "kdim": 8}, "kdim=8 and vdim=16 beside embed_dim=16"),
        ({"batch_first": True, "add_bias_kv": True}, "add_bias_kv=True"),
        ({"batch_first": True, "add_zero_attn": True}, "add_zero_attn=True"),
        ({"batch_first": True, "dropout": 0.1}, "dropout=0.1 (set attention.dropout = 0.0)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_multihead_attention_that_cannot_be_carried_over(options, reason):
    with pytest.raises(ValueError) as error:
        PromptAttention.from_multihead(nn.MultiheadAttention(C, 4, **options), P)
    assert str(error.value) == f"attention: got {reason}, which PromptAttention cannot carry over"
    with pytest.raises(TypeError, match=r"attention: got Linear, expected an nn.MultiheadAttention"):
        PromptAttention.from_multihead(nn.Linear(4, 4), P)


def changed(**attributes):
    plain = FusedAttention(C, 4)
    for name, value in attributes.items():
        setattr(plain, name, value)
    return plain


def with_buffer():
    plain = FusedAttention(C, 4)
    plain.register_buffer("relative_position_bias", torch.zeros(3))
    return plain


@pytest.mark.parametrize(
    ("plain", "error", "message"),
    [
        (FusedAttention(C, 4, attn_drop=0.1), ValueError, "attn_drop: Dropout(p=0.1, inplace=False)"),
        (FusedAttention(C, 4, proj_drop=0.2), ValueError, "proj_drop: Dropout(p=0.2, inplace=False)"),
        (changed(norm=nn.LayerNorm(C)), ValueError, "norm: LayerNorm((16,)"),
        (changed(gate=nn.Linear(C, C)), ValueError, "gate: Linear(in_features=16"),
        (changed(relative_bias=nn.Parameter(torch.zeros(3))), ValueError, "got parameter relative_bias, which"),
        (changed(qkv=nn.Linear(C, 24)), ValueError, "got qkv 16 -> 24, proj 16 -> 16, which"),
        (changed(scale=1.0), ValueError, "got scale=1.0, expected 0.5, which"),
        (changed(scale=1), ValueError, "got scale=1, expected 0.5, which"),
        (changed(head_dim=8), ValueError, "got head_dim=8, expected 4, which"),
        (changed(num_kv_heads=2), ValueError, "got num_kv_heads=2, expected 4, which"),
        (changed(rope=lambda x: x), ValueError, "got rope, which"),
        (with_buffer(), ValueError, "got buffer relative_position_bias, which"),
        (nn.Linear(4, 4), TypeError, "attention.qkv: got NoneType, expected Linear"),
        (changed(num_heads="4"), TypeError, "attention.num_heads: got str, expected int"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_fused_attention_that_cannot_be_carried_over(plain, error, message):
    with pytest.raises(error) as raised:
        PromptAttention.from_fused_qkv(plain, P)
    assert message in str(raised.value)
