# SPDX-License-Identifier: Apache-2.0
"""Prefixes in decoders against the published form: the same keys concatenated, one copy a sample."""

import copy

import pytest
import torch
from tiny_decoders import DECODER, DECODERS, VOCABULARY, build, concatenate, leaves, logits, sentences
from tiny_models import assert_as_good, assert_close, checkpointing, randomised, same, untouched
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    StaticCache,
)

import fastprompt
from fastprompt import PrefixKV

LENGTH = 5
PADDINGS = [None, "left", "right"]


def attached(name, dtype=torch.float64, **options):
    """A decoder with a prefix large enough to matter."""
    model = build(name, dtype)
    return model, fastprompt.attach(model, PrefixKV(LENGTH, init="ptuning", **options))


def published(name, handle, dtype=torch.float64):
    """The same decoder and prefix in the published form, and that prefix."""
    prefixes = leaves(handle)
    model = build(name, dtype)
    return concatenate(model, "text", {i: lambda pair=pair: pair for i, pair in prefixes.items()}), [
        p for pair in prefixes.values() for p in pair
    ]


def step(model, parameters, batch):
    """Logits of the tokens that are no padding, and gradients of a loss in which each has its own weight."""
    parameters = list(parameters)
    for p in parameters:
        p.grad = None
    found = logits(model, batch)
    generator = torch.Generator().manual_seed(2)
    (found * torch.randn(found.shape, generator=generator).to(found.dtype)).sum().backward()
    return {"logits": found.detach()} | {f"gradient {i}": p.grad for i, p in enumerate(parameters)}


# Forward and backward


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_is_keys_in_front(name, padding):
    model, handle = attached(name)
    other, prefixes = published(name, handle)
    batch = sentences(padding)
    got = step(model, handle.parameters(), batch)
    assert_close(got, step(other, prefixes, batch))
    with torch.no_grad():
        assert (got["logits"] - logits(build(name, torch.float64), batch)).abs().max() > 0.1
    assert all(got[f"gradient {i}"].abs().max() > 1e-3 for i in range(len(prefixes)))


OTHERS = {
    "Gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=3)),
    "GPT-2": (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=60, attn_pdrop=0.0)),
    "Mistral": (MistralForCausalLM, MistralConfig(**DECODER, sliding_window=4)),
    "Phi3": (Phi3ForCausalLM, Phi3Config(**DECODER)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_decoders_nobody_wrote_code_for(name):
    """Found by what their modules do; float32, since each has norms of its own."""
    kind, config = OTHERS[name]
    model, other = randomised(kind(config)), randomised(kind(config))
    batch = sentences("left")
    with untouched(model):
        handle = fastprompt.attach(model, PrefixKV(LENGTH, init="ptuning"))
        prefixes = leaves(handle)
        got, tokens = step(model, handle.parameters(), batch), generate(model, batch, do_sample=False)
        handle.detach()
    concatenate(other, "text", {i: lambda pair=pair: pair for i, pair in prefixes.items()})
    assert_close(got, step(other, [p for pair in prefixes.values() for p in pair], batch))
    assert torch.equal(tokens, generate(other, batch, do_sample=False, use_cache=False))


def test_padding_rows_see_the_prefix_alone_and_nothing_is_nan():
    model, _ = attached("Llama")
    found = model(**sentences("left")).logits
    assert found.isfinite().all()
    attention = model.model.layers[0].self_attn
    seen = []
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**sentences("left"))
    with torch.no_grad():
        attention.fastprompt.value.zero_()
        model(**sentences("left"))
    padding = sentences("left")["attention_mask"] == 0
    assert seen[0][padding].abs().amin(dim=0).min() > 0
    assert seen[1][padding].abs().max() == 0 < seen[1][~padding].abs().min()


@pytest.mark.parametrize("name", ["Llama", "Qwen2, sliding window", "Qwen3"])
def test_float32_and_half_precision_are_as_good_as_published(name):
    batch = sentences("left")
    for dtype in (torch.float32, torch.bfloat16):
        model, handle = attached(name, dtype)
        assert all(p.dtype == torch.float32 for p in handle.parameters())
        other, prefixes = published(name, handle, dtype)
        exact, leading = published(name, handle)
        for p in exact.parameters():
            p.data = p.data.to(dtype).double()
        got, usual, truth = (
            step(m, p, batch) for m, p in ((model, handle.parameters()), (other, prefixes), (exact, leading))
        )
        assert_as_good(got, usual, {k: x.double() for k, x in truth.items()}, 2 * torch.finfo(dtype).eps)
        assert all(got[f"gradient {i}"].dtype == torch.float32 for i in range(len(prefixes)))


@pytest.mark.parametrize("reparam", [None, "mlp"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Qwen2, sliding window"])
def test_gradient_checkpointing_changes_nothing(name, reentrant, reparam):
    model = build(name, torch.float64).train()
    handle = fastprompt.attach(model, PrefixKV(LENGTH, reparam=reparam))
    batch = sentences("left")
    want = step(model, handle.parameters(), batch)
    checkpointing(model, reentrant)
    calls = []
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *args: calls.append(args))
    for _ in range(2):
        assert_close(step(model, handle.parameters(), batch), want)
    assert len(calls) == 4


def test_labels_give_a_loss_and_a_step_lowers_it():
    model, handle = attached("Qwen2", torch.float32)
    batch = sentences("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is None for n, p in model.named_parameters() if "fastprompt" not in n)


# Generation

STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 8},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}


def generate(model, batch, **options):
    torch.manual_seed(3)
    return model.generate(**batch, **{"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0} | options)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_is_that_of_the_published_form_a_token_at_a_time(name, padding):
    model, handle = attached(name)
    other, _ = published(name, handle)
    batch = sentences(padding)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(6):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            token = other(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, token.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
    for cached in (True, False):
        assert torch.equal(generate(model, batch, do_sample=False, use_cache=cached), ids)
    plain = generate(build(name, torch.float64), batch, do_sample=False)
    assert not torch.equal(plain, ids)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["Llama", "Qwen2, sliding window"])
def test_every_strategy_generates_what_the_published_form_does(name, strategy):
    model, handle = attached(name)
    other, _ = published(name, handle)
    batch = sentences("left")
    want = generate(other, batch, use_cache=False, **STRATEGIES[strategy])
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}):
        assert torch.equal(generate(model, batch, **STRATEGIES[strategy], **options), want), options


def test_a_static_cache_filled_in_parts():
    """Its first part has neither a mask nor as many queries as the cache has places."""
    model, handle = attached("Qwen3")
    other, _ = published("Qwen3", handle)
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids = sentences()["input_ids"]
    with torch.no_grad():
        parts = [model(ids[:, :4], past_key_values=cache).logits, model(ids[:, 4:], past_key_values=cache).logits]
        assert_close({"": torch.cat(parts, dim=1)}, {"": other(ids, use_cache=False).logits})


def test_the_prefix_encoder_runs_once_for_a_whole_generation():
    model = build("Llama")
    handle = fastprompt.attach(model, PrefixKV(LENGTH, reparam="mlp"))
    encoder = model.model.layers[0].self_attn.fastprompt.encoder
    calls = []
    encoder.inner.register_forward_hook(lambda *args: calls.append(args))
    generate(model, sentences("left"), do_sample=False)
    assert len(calls) == 1
    # And once a step of training, for all layers.
    for _ in range(3):
        step(model, handle.parameters(), sentences())
    assert len(calls) == 4


# Keys of real tokens


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_a_start_from_tokens_is_their_cache_in_front(name):
    """A prefix of recorded keys is a cache of these tokens, while the sentence stands at positions of its own."""
    tokens = (7, 3, 9, 12, 5)
    model = build(name, torch.float64)
    ids = sentences()["input_ids"]
    with torch.no_grad():
        cache = model(torch.tensor([tokens] * 3)).past_key_values
        positions = torch.arange(7).expand(3, -1)
        want = model(ids, past_key_values=cache, position_ids=positions).logits
        handle = fastprompt.attach(model, PrefixKV(LENGTH, init=tokens))
        assert handle.config.init == tokens
        assert_close({"": model(ids).logits}, {"": want})


# Back to where it was


@pytest.mark.parametrize("reparam", [None, "mlp"])
@pytest.mark.parametrize("name", DECODERS)
def test_detach_leaves_no_trace(name, reparam):
    model = build(name)
    batch = sentences("left")
    with torch.no_grad():
        before, tokens = logits(model, batch), generate(model, batch)
        with untouched(model):
            handle = fastprompt.attach(model, PrefixKV(LENGTH, reparam=reparam))
            changed = generate(model, batch)
            assert changed.shape == tokens.shape
            handle.detach()
        assert torch.equal(logits(model, batch), before) and torch.equal(generate(model, batch), tokens)


@pytest.mark.parametrize("reparam", [None, "mlp"])
def test_a_copied_model_is_independent(reparam):
    model = build("Llama")
    handle = fastprompt.attach(model, PrefixKV(LENGTH, reparam=reparam))
    want = step(model, handle.parameters(), sentences())
    copied = copy.deepcopy(model)
    other = [p for p in copied.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in other:
            p.mul_(2)
    assert same(step(model, handle.parameters(), sentences()), want)
    assert not torch.equal(step(copied, other, sentences())["logits"], want["logits"])


@pytest.mark.parametrize("reparam", [None, "mlp"])
def test_compiles_as_one_graph(reparam):
    model = build("Llama")
    handle = fastprompt.attach(model, PrefixKV(LENGTH, reparam=reparam))
    ids = {"input_ids": sentences()["input_ids"]}
    weights = torch.randn(3, 7, VOCABULARY, generator=torch.Generator().manual_seed(2))

    def run(forward):
        for p in handle.parameters():
            p.grad = None
        found = forward(**ids, use_cache=False).logits
        (found * weights).sum().backward()
        return {"logits": found.detach()} | {f"gradient {i}": p.grad for i, p in enumerate(handle.parameters())}

    want = run(model)
    try:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            assert_close(run(compiled), want)
    finally:
        torch._dynamo.reset()
