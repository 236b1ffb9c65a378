# SPDX-License-Identifier: Apache-2.0
"""Policies against their definitions, written out on materialised attention; budgets; what padding must not change."""

import dataclasses

import pytest
import torch
from cache_cases import observe, probabilities, states
from torch.nn.functional import avg_pool1d, cosine_similarity, normalize, pad

from fastprompt import H2O, TOVA, Decoding, KeyDiff, LookM, Random, SnapKV, StreamingLLM
from fastprompt.cache import Observed, Policy, compress, suffices

T = 24
POLICIES = [
    LookM(0.2, 0.2),
    LookM(0.1, 0.2, merge="average", overflow="cap"),
    LookM(0.2, 0.1, merge="weighted", text_prior=False, merge_keys=False),
    H2O(0.2, 0.2),
    H2O(recent=3, important=0.25),
    SnapKV(0.4, window=4, kernel=3),
    SnapKV(5, window=8),
    TOVA(0.4),
    StreamingLLM(0.4, sinks=2),
    KeyDiff(0.3),
    Random(7, seed=3),
]


def images(length=T, first=6, count=12):
    """Text, image tokens, text."""
    text = torch.ones(1, length, dtype=torch.bool)
    text[:, first : first + count] = False
    return text


def kept(policy, seen):
    """The kept positions of every sample and head."""
    return [[h[h >= 0].tolist() for h in sample] for sample in compress(policy, seen)[2]]


def top(score, count, first=()):
    """The positions with the highest score, those of ``first`` before all others, in order."""
    order = sorted(range(len(score)), key=lambda j: (j not in first, -float(score[j]), j))
    return sorted(order[:count])


def close(got, want):
    """To the rounding of a few sums in float64."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= 1e-13 * want.abs().max()


# Scores by definition


def test_h2o_is_the_mean_attention_of_the_queries_that_may_look():
    query, key, value = states()
    attention, _ = probabilities(query, key)
    # As kvpress' observed attention: column sums over T - j queries, then the mean of the group.
    scores = attention.sum(dim=2) / (T - torch.arange(T))
    close(H2O().score(observe(query, key, value)), scores.view(2, 2, 2, T).mean(dim=2))


def test_snapkv_is_the_pooled_attention_of_a_window():
    window, kernel = 4, 5
    query, key, value = states()
    attention, _ = probabilities(query, key)
    scores = avg_pool1d(attention[:, :, -window:, :-window].mean(dim=2), kernel, padding=kernel // 2, stride=1)
    scores = scores.view(2, 2, 2, T - window).mean(dim=2)
    policy = SnapKV(10, window=window, kernel=kernel)
    close(policy.score(observe(query, key, value))[:, :, :-window], scores)
    # As in kvpress, the window gets more than the largest score.
    want = pad(scores, (0, window), value=scores.max().item() + 1).topk(10, dim=-1).indices.sort(dim=-1).values
    assert kept(policy, observe(query, key, value)) == want.tolist()


def test_tova_is_the_last_query_over_all_heads():
    query, key, value = states()
    attention, _ = probabilities(query, key)
    scores = attention[:, :, -1].mean(dim=1)
    close(TOVA().score(observe(query, key, value)), scores[:, None].expand(-1, 2, -1))
    found = kept(TOVA(9), observe(query, key, value))
    assert found == [[top(s, 9, first=[T - 1])] * 2 for s in scores]


def test_keydiff_is_the_distance_from_the_mean_direction():
    query, key, value = states()
    anchor = normalize(key, dim=-1).mean(dim=2, keepdim=True)
    close(KeyDiff().score(observe(query, key, value)), -cosine_similarity(key, anchor, dim=-1))
    order = torch.randperm(T)
    shuffled = KeyDiff().score(Observed(key[:, :, order], value[:, :, order]))
    close(shuffled, -cosine_similarity(key, anchor, dim=-1)[:, :, order])


def test_streaming_keeps_sinks_and_the_latest():
    assert kept(StreamingLLM(7, sinks=3), observe(*states())) == [[[0, 1, 2, 20, 21, 22, 23]] * 2] * 2
    assert kept(StreamingLLM(0.25, sinks=0), observe(*states())) == [[list(range(18, 24))] * 2] * 2


def test_random_draws_differ_by_layer_head_and_seed_and_not_by_sample():
    key, value = states()[1:]
    found = [kept(Random(8, seed=s), Observed(key, value, layer=i)) for s in (0, 1) for i in (0, 1)]
    assert all(a == b for a, b in found)
    draws = [head for a, _ in found for head in a]
    assert len({tuple(d) for d in draws}) == len(draws)
    assert kept(Random(8), Observed(key, value)) == found[0]


@pytest.mark.parametrize("policy", [H2O(5, 5), LookM(5, 5, text_prior=False, merge="drop")])
def test_recent_and_important_keys_stay(policy):
    seen = observe(*states())
    scores = policy.score(seen)
    assert kept(policy, seen) == [[top(s, 10, first=range(T - 5, T)) for s in sample] for sample in scores]


# Text before images


def test_lookm_keeps_all_text_and_the_most_looked_at_image_keys():
    seen = observe(*states(), text=images().expand(2, -1))
    text = [*range(6), *range(18, 24)]
    found = kept(LookM(6, 10, merge="drop"), seen)
    assert found == [[top(s, 16, first=text) for s in sample] for sample in seen.sums]
    # 12 text keys, of which 4 are recent, exceed a budget of 8, which then keeps no image key.
    assert kept(LookM(4, 4, merge="drop"), seen) == [[text] * 2] * 2
    # Recent image keys stay, too.
    seen = observe(*states(), text=images(first=12).expand(2, -1))
    assert kept(LookM(4, 4, merge="drop"), seen) == [[[*range(12), *range(20, 24)]] * 2] * 2


def test_lookm_with_a_cap_keeps_the_most_looked_at_text():
    seen = observe(*states(), text=images().expand(2, -1))
    found = kept(LookM(2, 6, overflow="cap", merge="drop"), seen)
    for sample, sums in zip(found, seen.sums, strict=True):
        for head, scores in zip(sample, sums, strict=True):
            others = scores.where(images()[0], -1.0)[:-2]
            assert head == sorted([*top(others, 6), 22, 23])


def test_text_goes_first_however_large_the_sums_are():
    """A constant added to a score would wipe out the order of small sums beside large ones."""
    seen = observe(*states(), text=images().expand(2, -1))
    seen.sums = torch.full_like(seen.sums, 1e9).float()
    seen.sums[..., 6:18] = 2e9
    seen.sums[..., 8] = 2e9 + 256
    seen.sums[..., 2:4] = torch.tensor([1e-9, 2e-9])
    for overflow in ("keep", "cap"):
        found = kept(LookM(1, 12, overflow=overflow, merge="drop"), seen)
        assert found == [[[*range(6), 8, *range(18, 24)]] * 2] * 2
    assert kept(LookM(0, 11, overflow="cap", merge="drop"), seen) == [[[0, 1, 3, 4, 5, *range(18, 24)]] * 2] * 2


def test_merging_reaches_the_operation():
    query, key, value = states()
    seen = observe(query, key, value, text=images().expand(2, -1))
    results = {m: compress(LookM(0.3, 0.3, merge=m), seen) for m in ("drop", "average", "pivot", "weighted")}
    for name, (k, v, index) in results.items():
        assert torch.equal(index, results["drop"][2])
        gathered = value.gather(2, index[..., None].expand(-1, -1, -1, 8))
        assert torch.equal(v, gathered) == (name == "drop")
        assert torch.equal(k, results["drop"][0]) == (name == "drop")
    k, v, index = compress(LookM(0.3, 0.3, merge_keys=False), seen)
    assert torch.equal(k, results["drop"][0]) and torch.equal(v, results["pivot"][1])


# Budgets


@pytest.mark.parametrize(
    ("policy", "count"),
    [
        (KeyDiff(0.5), 12), (KeyDiff(0.99), 23), (KeyDiff(1), 1), (KeyDiff(0.01), 1), (KeyDiff(100), 24),
        (H2O(0.3, 0.3), 14), (H2O(4, 0.3), 11), (H2O(0.0, 3), 3), (H2O(3, 0), 3), (H2O(0.01, 0.01), 1),
        (LookM(0.1, 0.9, text_prior=False), 24), (KeyDiff(1.0), 24),
    ],
)  # fmt: skip
def test_budgets(policy, count):
    seen = observe(*states())
    key, value, index = compress(policy, seen)
    assert key.shape == value.shape == (2, 2, count, 8) and index.shape == (2, 2, count)
    assert suffices(policy.budget(seen), seen) == (count == 24)
    assert (index.diff(dim=-1) > 0).all()


def test_whole_shares_keep_all_of_every_length():
    for policy in (H2O(0.5, 0.5), LookM(0.3, 0.7), KeyDiff(1.0)):
        assert policy.keeps_all
        for length in range(1, 12):
            seen = Observed(*(x[:, :, :length] for x in states()[1:]), text=images(length).expand(2, -1))
            assert policy.budget(seen) == [length] * 2
    assert not any(p.keeps_all for p in (*POLICIES, KeyDiff(1), H2O(1, 1)))


def test_heads_may_have_budgets_of_their_own():
    @dataclasses.dataclass(frozen=True)
    class Ragged(Policy):
        def score(self, seen):
            return seen.place[:, None].float().expand(seen.key.shape[:3])

        def budget(self, seen):
            return torch.tensor([[3, 5], [30, 1]])

    seen = observe(*states(), valid=torch.arange(T) >= torch.tensor([[0], [4]]))
    assert kept(Ragged(), seen) == [[[21, 22, 23], [19, 20, 21, 22, 23]], [list(range(4, 24)), [23]]]
    assert not suffices(Ragged().budget(seen), seen)
    assert suffices(torch.tensor([[24, 25], [20, 20]]), seen)


# Padding


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(policy, side):
    """A sample in a padded batch keeps what it keeps alone, whatever is in the padding."""
    lengths = [T, 15, 9]
    alone = [states(seed=i, batch=1, length=n) for i, n in enumerate(lengths)]
    texts = [images(n, first=2, count=n // 2) for n in lengths]
    offsets = [T - n if side == "left" else 0 for n in lengths]
    batch = [torch.randn(3, heads, T, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    valid, text = torch.zeros(3, T, dtype=torch.bool), torch.rand(3, T) < 0.5
    for i, (n, start) in enumerate(zip(lengths, offsets, strict=True)):
        place = slice(start, start + n)
        valid[i, place], text[i, place] = True, texts[i]
        for x, own in zip(batch, alone[i], strict=True):
            x[i, :, place] = own
    found = compress(policy, observe(*batch, valid=valid, text=text))
    for i, start in enumerate(offsets):
        key, value, index = compress(policy, observe(*alone[i], text=texts[i]))
        real = found[2][i, 0] >= 0
        assert torch.equal(found[2][i][:, real] - start, index[0])
        for x, want in zip(found[:2], (key, value), strict=True):
            assert (x[i][:, real] - want[0]).abs().max() <= 1e-12
        assert (found[2][i][:, ~real] == -1).all() and all(x[i].isfinite().all() for x in found[:2])


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_compression_is_repeatable_and_follows_the_batch(policy):
    parts = states(), images().expand(2, -1)
    first, again = (compress(policy, observe(*parts[0], text=parts[1])) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    flipped = compress(policy, observe(*(x.flip(0) for x in parts[0]), text=parts[1]))
    assert all(torch.equal(a.flip(0), b) for a, b in zip(first, flipped, strict=True))


# Errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: KeyDiff(0.0), ValueError, r"keep: got 0\.0, expected a share of the prompt in \(0, 1\]"),
        (lambda: KeyDiff(0), ValueError, r"keep: got 0, expected .* or a number of keys >= 1"),
        (lambda: SnapKV(1.5), ValueError, r"keep: got 1\.5"),
        (lambda: TOVA(float("nan")), ValueError, r"keep: got nan"),
        (lambda: TOVA("0.5"), TypeError, r"keep: got '0\.5', expected a share \(a float\)"),
        (lambda: Random(True), TypeError, r"keep: got True"),
        (lambda: Random(seed=-1), ValueError, r"seed: got -1, expected an integer >= 0"),
        (lambda: SnapKV(window=-1), ValueError, r"window: got -1, expected an integer >= 1"),
        (lambda: SnapKV(window=2.0), ValueError, r"window: got 2\.0"),
        (lambda: SnapKV(kernel=4), ValueError, r"kernel: got 4, expected an odd width"),
        (lambda: StreamingLLM(sinks=-1), ValueError, r"sinks: got -1"),
        (lambda: H2O(0.0, 0.0), ValueError, r"important: got 0 and recent 0, expected a budget above 0"),
        (lambda: H2O(0.6, 0.6), ValueError, r"important: got shares of 1\.2 together with recent, expected at most 1"),
        (lambda: LookM(-0.1), ValueError, r"recent: got -0\.1, expected a share of the prompt in \[0, 1\]"),
        (lambda: LookM(merge="mean"), ValueError, r"merge: got 'mean', expected one of 'drop', 'average', 'pivot'"),
        (lambda: LookM(overflow="grow"), ValueError, r"overflow: got 'grow', expected 'keep' or 'cap'"),
        (lambda: Decoding(LookM()), ValueError, r"policy: LookM ranks keys by all queries of the prompt"),
        (lambda: Decoding(Decoding(KeyDiff())), ValueError, r"which compresses during decoding already"),
        (lambda: Decoding(KeyDiff), TypeError, r"policy: got <class .*expected a policy"),
        (lambda: Decoding(KeyDiff(), every=0), ValueError, r"every: got 0, expected an integer >= 1"),
    ],
)
def test_bad_configs(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_a_policy_reads_must_be_there():
    key, value = states()[1:]
    for policy in (H2O(), LookM(text_prior=False)):
        with pytest.raises(ValueError, match="sums: got None; this policy ranks keys by the attention of all queries"):
            compress(policy, Observed(key, value))
    for policy in (SnapKV(), TOVA()):
        with pytest.raises(ValueError, match="query: got None; this policy ranks keys by the attention of the last"):
            compress(policy, Observed(key, value))
    with pytest.raises(ValueError, match="text: got None, but text_prior=True"):
        compress(LookM(), observe(*states()))
    with pytest.raises(ValueError, match="text: the prompt holds no image token"):
        compress(LookM(), observe(*states(), text=torch.ones(2, T, dtype=torch.bool)))


def test_a_policys_repr_is_its_config():
    for policy in (*POLICIES, Decoding(SnapKV(9), every=3)):
        assert eval(repr(policy)) == policy
        with pytest.raises(dataclasses.FrozenInstanceError):
            policy.keep = 1
