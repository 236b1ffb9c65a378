# SPDX-License-Identifier: Apache-2.0
"""Heads that keep different numbers of keys: attention over blocks, whole decodes, and the memory that they free."""

import copy
from types import SimpleNamespace

import pytest
import torch
from attention_cases import TRITON_DEVICE
from cache_cases import Kept, generate, inputs, prompts, stepwise, with_masks
from tiny_decoders import PREFIXES, build, leaves
from tiny_models import assert_close
from transformers import DynamicCache

import fastprompt
from fastprompt import H2O, AdaKV, LookM, PrefixKV, PromptCache, SnapKV, config
from fastprompt.cache import Policy, blocks, split
from fastprompt.hf import cache_layer
from fastprompt.hf.sites import choose_tower

POLICIES = [
    AdaKV(SnapKV(0.5, window=4)), AdaKV(H2O(0.1, 0.4), floor=0.0),
    AdaKV(LookM(0.1, 0.4, merge="drop", text_prior=False), floor=0.1),
]  # fmt: skip


@pytest.fixture(autouse=True, params=[1, 3])
def size(request, monkeypatch):
    """Keys of a block, as on a CPU and as on a small GPU, and little room for new tokens."""
    monkeypatch.setitem(blocks.SIZES, "cpu", request.param)
    monkeypatch.setattr(cache_layer, "ROOM", 5)
    return request.param


def llama():
    """Two heads that look at few keys, two that look around."""
    model = build("Llama", torch.float64)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.detach().view(4, 8, 32).mul_(torch.tensor([9.0, 9.0, 0.3, 0.3]).view(4, 1, 1))
    return model


def ragged(cache):
    """Whether a layer has blocks, and not as many for every head."""
    return any(x.blocks is not None and len({n for s in x.blocks.counts for n in s}) > 1 for x in cache.layers)


# Blocks


def kept(counts, dim=8, dtype=torch.float64):
    """Keys and values of heads that keep these numbers, as `compress` gives them."""
    lengths = torch.tensor(counts)
    index = torch.arange(int(lengths.max())).expand(*lengths.shape, -1)
    index = index.masked_fill(index >= lengths[..., None], -1)
    key, value = torch.randn(2, *index.shape, dim, dtype=dtype).masked_fill((index < 0)[..., None], 0.0)
    return key, value, index


def attend(query, key, value, index):
    """Attention of a layer's queries over what its heads keep, head by head, and its log-sum-exp."""
    groups = query.shape[1] // key.shape[1]
    out, lse = torch.zeros_like(query), torch.full(query.shape[:3], -torch.inf, dtype=query.dtype)
    for b in range(len(query)):
        for h in range(query.shape[1]):
            here = index[b, h // groups] >= 0
            scores = query[b, h] @ key[b, h // groups, here].T * query.shape[-1] ** -0.5
            lse[b, h] = scores.logsumexp(-1)
            out[b, h] = scores.softmax(-1) @ value[b, h // groups, here]
    return out, lse


def close(got, want, tolerance=1e-14):
    """To the rounding of a few sums; -inf where nothing is seen."""
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        assert (a - b)[b.isfinite()].abs().max() <= tolerance


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "counts", [[[12, 2]], [[0, 31], [7, 3]], [[1, 0, 9], [9, 0, 0]], [[6, 0], [0, 0], [3, 9]], [[64, 6], [6, 6]]]
)
def test_blocks_and_the_rest_hold_all(counts, rows, size, monkeypatch):
    key, value, index = kept(counts)
    query = torch.randn(len(counts), 2 * key.shape[1], rows, 8, dtype=torch.float64)
    found, *rest = split(key, value, index)
    want = attend(query, key, value, index)
    for limit in (1 << 24, 1):
        monkeypatch.setattr(blocks, "PASS", limit)
        close(fastprompt.ops.merge_states(*found.attend(query, None), *attend(query, *rest)), want)
    numbers = torch.tensor(counts)
    assert found.key.shape == found.value.shape == (int((numbers // size).sum()), size, 8)
    assert rest[0].shape[2] == int((numbers % size).max()) and torch.equal((rest[2] >= 0).sum(-1), numbers % size)
    tables = 0 if size == 1 else 8 * (len(found.key) + numbers.numel() * int(numbers.max() // size))
    assert found.nbytes() == 2 * found.key.nbytes + tables


@pytest.mark.parametrize("counts", [[[7, 7], [7, 7]], [[8, 7]], [[2, 0]], [[4, 3]]])
def test_blocks_that_save_nothing_are_not_made(counts, size):
    given = kept(counts)
    found, *rest = split(*given)
    if size == 1 and counts[0][0] != counts[0][1]:
        assert len(found.key) == sum(counts[0]) and not rest[0].numel()
    else:
        assert found is None and all(a is b for a, b in zip(rest, given, strict=True))


def test_blocks_in_half_precision():
    key, value, index = kept([[12, 2], [0, 61]], dtype=torch.bfloat16)
    query = torch.randn(2, 4, 3, 8, dtype=torch.bfloat16)
    found, *rest = split(key, value, index)
    third = attend(*(x.double() for x in (query, *rest[:2])), rest[2])
    out, lse = fastprompt.ops.merge_states(*found.attend(query, None), third[0].bfloat16(), third[1].float())
    want = attend(query.double(), key.double(), value.double(), index)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    # Outputs of blocks, of their sum and of the whole are rounded to 8 bits, each once; values are below 4.
    close([out.double()], want[:1], 3 * 4 * 2**-9)
    # PyTorch's kernel takes exponentials of half precision to some 16 bits.
    close([lse.double()], want[1:], 2**-14)


def test_blocks_by_triton(monkeypatch):
    monkeypatch.setitem(blocks.SIZES, TRITON_DEVICE, 5)
    key, value, index = (x.to(TRITON_DEVICE) for x in kept([[12, 2], [0, 31]], dim=16, dtype=torch.float32))
    query = torch.randn(2, 4, 3, 16, device=TRITON_DEVICE)
    found, *rest = split(key, value, index)
    monkeypatch.setattr(config, "IMPL", "triton")
    state = found.attend(query)
    monkeypatch.undo()
    close(fastprompt.ops.merge_states(*state, *attend(query, *rest)), attend(query, key, value, index), 1e-5)


@pytest.mark.parametrize("counts", [[[12, 2], [0, 31]], [[3, 6], [9, 0]]])
def test_gradients_and_new_keys(counts):
    key, value, index = kept(counts)
    query, grad = torch.randn(2, 4, 1, 8, dtype=torch.float64), torch.randn(2, 4, 1, 8, dtype=torch.float64)
    found, *rest = split(key, value, index)
    new = torch.randn(2, 2, 2, 5, 8, dtype=torch.float64)
    here = torch.nn.functional.pad(rest[2] + 1, (0, 5), value=9) - 1
    new_key, new_value = (torch.cat(x, dim=2) for x in zip(rest[:2], new, strict=True))
    all_key, all_value = (torch.cat(x, dim=2) for x in zip((key, value), new, strict=True))
    everything = torch.nn.functional.pad(index + 1, (0, 5), value=9) - 1
    found_all = []
    for of_blocks in (True, False):
        q = query.clone().requires_grad_()
        if not of_blocks:
            out, lse = attend(q, all_key, all_value, everything)
        elif (here >= 0).all():
            out, lse = found.attend(q, None, new_key, new_value)
            # Without gradients by a kernel of its own.
            close(found.attend(query, None, new_key, new_value), (out.detach(), lse.detach()))
        else:
            out, lse = fastprompt.ops.merge_states(*found.attend(q), *attend(q, new_key, new_value, here))
        found_all.append((out.detach(), lse.detach(), *torch.autograd.grad((out * grad).sum() + lse.sum(), q)))
    close(*found_all, 1e-13)


def test_samples_of_blocks_can_be_chosen(size):
    key, value, index = kept([[12, 2], [0, 31], [7, 3]])
    query = torch.randn(4, 4, 2, 8, dtype=torch.float64)
    order = [2, 0, 0, 1]
    found, *rest = split(key, value, index)
    other = found.select(order)
    got = fastprompt.ops.merge_states(*other.attend(query, 0.5), *attend(query * 8**0.5 / 2, *(x[order] for x in rest)))
    want = attend(query * 8**0.5 / 2, key[order], value[order], index[order])
    close(got, want)
    assert other.counts == [[n // size for n in heads] for heads in ([7, 3], [12, 2], [12, 2], [0, 31])]


# Dropping is masking


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_long_decode_sees_a_full_cache_without_the_dropped_keys(policy, padding, monkeypatch):
    model, other = llama(), with_masks(llama())
    recorded, batch = Kept(monkeypatch), prompts(padding)
    got, cache = stepwise(model, batch, 17, PromptCache(model, policy))
    assert ragged(cache)
    want, _ = stepwise(other, batch, 17, before=lambda: recorded.apply(other))
    assert_close({"": got}, {"": want})
    counts = torch.stack([recorded.allowed(i).sum(-1) for i in range(3)])
    assert (counts[..., 0] != counts[..., 1]).any()
    lengths = batch["attention_mask"].sum(-1).tolist()
    assert counts.sum(-1).tolist() == [[2 * n for n in policy.policy.budget(SimpleNamespace(lengths=lengths))]] * 3
    assert [cache.get_seq_length(i) for i in range(3)] == [47] * 3


@pytest.mark.parametrize(
    "options",
    [
        {}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3, "top_k": 5}, {"prefill_chunk_size": 7},
    ],
    ids=["greedy", "beams", "three samples", "chunks"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["Qwen3", "Qwen2-VL", "SmolLM2"])
def test_every_strategy(name, options, monkeypatch):
    if "chunk" in str(options) and name == "Qwen2-VL":
        # Transformers takes no chunks of prompts with images.
        options = {"num_beams": 2}
    model, recorded = build(name, torch.float64), Kept(monkeypatch)
    batch = inputs(name, model)
    plain = generate(model, batch, **options)
    with fastprompt.compress(model, POLICIES[0]):
        got = generate(model, batch, **options)
    assert ragged(got.past_key_values)
    other = with_masks(build(name, torch.float64))
    recorded.apply(other)
    want = generate(other, batch, **{k: v for k, v in options.items() if "chunk" not in k})
    assert torch.equal(got.sequences, want.sequences)
    scores = [torch.stack(x.scores) for x in (got, want)]
    finite = scores[1].isfinite()
    assert_close({"": scores[0][finite]}, {"": scores[1][finite]})
    assert not torch.allclose(plain.scores[-1], got.scores[-1], atol=0.01)


def test_prefixes_take_part():
    model = build("Llama", torch.float64)
    handle = fastprompt.attach(model, PrefixKV(5, init="ptuning"))
    other = with_masks(build("Llama", torch.float64))
    pairs = leaves(handle)
    attentions = choose_tower(other, "text").attentions
    PREFIXES.update({attentions[i]: lambda pair=pair: pair for i, pair in pairs.items()})
    with pytest.MonkeyPatch.context() as patch:
        recorded = Kept(patch)
        got, cache = stepwise(model, prompts("left"), 9, PromptCache(model, POLICIES[1]))
        assert ragged(cache)
        want, _ = stepwise(other, prompts("left"), 9, before=lambda: recorded.apply(other))
    assert_close({"": got}, {"": want})


def test_several_rows_at_once_and_padding_among_them():
    model, other = llama(), with_masks(llama())
    batch, more = prompts("left"), torch.tensor([[7, 8, 9, 4], [5, 6, 0, 0], [3, 0, 0, 0]])
    mask = torch.cat([batch["attention_mask"], (more != 0).long()], dim=1)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        recorded = Kept(patch)
        cache, plain = PromptCache(model, POLICIES[0]), DynamicCache(config=other.config)
        model(**batch, past_key_values=cache)
        cache.finalize()
        assert ragged(cache)
        other(**batch, past_key_values=plain)
        recorded.apply(other)
        got = model(more, mask, past_key_values=cache).logits
        want = other(more, mask, past_key_values=plain).logits
        assert_close({"": got[more != 0]}, {"": want[more != 0]})
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
        got = model(more[:, :1], mask, past_key_values=cache).logits
        assert_close({"": got}, {"": other(more[:, :1], mask, past_key_values=plain).logits})


@torch.no_grad()
def test_batches_can_be_changed_copied_and_forgotten():
    model, batch = build("Llama", torch.float64), prompts("left")

    def steps(cache, mask):
        for token in (5, 6, 7):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            out = model(torch.full((3, 1), token), mask, past_key_values=cache)
        return out.logits

    order = [2, 0, 1]
    plain = PromptCache(model, POLICIES[0])
    model(batch["input_ids"][order], batch["attention_mask"][order], past_key_values=plain)
    want = steps(plain, batch["attention_mask"][order])
    cache = PromptCache(model, POLICIES[0])
    for change in ("before", "after"):
        cache.reset()
        assert cache.nbytes() == 0
        model(**batch, past_key_values=cache)
        if change == "after":
            cache.finalize()
            assert ragged(cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 2, 4]))
        cache.reorder_cache(torch.tensor(order))
        twin = copy.deepcopy(cache)
        for x in (cache, twin):
            assert_close({"": steps(x, batch["attention_mask"][order])}, {"": want})


class Uneven(Policy):
    """One of a user's own."""

    def __init__(self, *budgets):
        self.budgets = budgets

    def score(self, seen):
        return seen.place[:, None].float().expand(seen.key.shape[:3])

    def budget(self, seen):
        return torch.tensor(self.budgets)


# Memory


def test_samples_of_different_lengths_free_memory_too(size, monkeypatch):
    model, other = llama(), with_masks(llama())
    recorded, batch = Kept(monkeypatch), prompts("right")
    got, cache = stepwise(model, batch, 3, PromptCache(model, SnapKV(0.5, window=4)))
    # 15, 10 and 6 keys a head: blocks of 3 leave one.
    counts = [[n // size] * 2 for n in (15, 10, 6)]
    assert all(x.blocks.counts == counts and x.physical == (size == 3) + 3 for x in cache.layers)
    assert [x.kept for x in cache.stats()] == [15 + (size == 3) + 3] * 3
    want, _ = stepwise(other, batch, 3, before=lambda: recorded.apply(other))
    assert_close({"": got}, {"": want})


@torch.no_grad()
def test_bytes(size):
    """Blocks hold the sum of the budgets, not as many slots for all as the largest head needs."""
    model, batch = build("Llama"), prompts()
    budgets = [[20, 4], [7, 9], [1, 30]]
    cache = PromptCache(model, Uneven(*budgets))
    model(**batch, past_key_values=cache)
    cache.finalize()
    assert sum(map(sum, budgets)) == 71
    # Keys and values of eight floats, and five slots for new tokens in each of six heads.
    layer = 2 * 8 * 4 * (71 + 6 * 5)
    if size == 3:
        # 22 blocks of three; two slots a head for the rest, with a bool for each slot; whose block it is, and a table.
        layer = 2 * 8 * 4 * (66 + 6 * (2 + 5)) + 6 * (2 + 5) + 8 * (22 + 6 * 10)
    assert cache.nbytes() == 3 * layer
    # The mean of the heads of the last sample, rounded up; or its ten blocks and two slots.
    assert [x.kept for x in cache.stats()] == [16 if size == 1 else 15 + 2] * 3


def test_budgets_of_its_own_cannot_be_compressed_again():
    model = build("Llama")
    for every in (Uneven([20, 4]), Uneven([2, 1])):
        policy = fastprompt.Decoding(every, every=2)
        with pytest.raises(ValueError, match="heads of layer 0 budgets of their own, which cannot be compressed again"):
            generate(model, {"input_ids": prompts()["input_ids"][:1]}, past_key_values=PromptCache(model, policy))
