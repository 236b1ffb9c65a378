# SPDX-License-Identifier: Apache-2.0
"""AdaKV's budgets against a loop over all keys of a layer, and what it refuses."""

import dataclasses

import pytest
import torch
from cache_cases import observe, states

from fastprompt import H2O, TOVA, AdaKV, Decoding, KeyDiff, LookM, Random, SnapKV, StreamingLLM
from fastprompt.cache import Policy, compress, suffices

T = 24
POLICIES = [
    AdaKV(SnapKV(0.4, window=4, kernel=3)), AdaKV(SnapKV(3, window=8)), AdaKV(H2O(0.1, 0.3), floor=0.5),
    AdaKV(H2O(2, 9), floor=0.0), AdaKV(LookM(0.1, 0.2, merge="drop"), floor=0.3), AdaKV(SnapKV(0.5), floor=1.0),
]  # fmt: skip


def layer(lengths=(T, T), side="left"):
    """A layer whose heads attend more or less sharply; text around image tokens."""
    query, key, value = states(batch=len(lengths))
    query = query * torch.tensor([0.1, 0.2, 2.0, 3.0], dtype=query.dtype).view(1, 4, 1, 1)
    columns, counts = torch.arange(T), torch.tensor(lengths)[:, None]
    valid = columns >= T - counts if side == "left" else columns < counts
    place = valid.cumsum(-1) - 1
    text = (place < 2) | (place >= 6)
    return observe(query, key, value, None if all(n == T for n in lengths) else valid, text)


def shares(policy, seen, sample):
    """Budgets of one sample, key by key: protected ones, the floor, then the best of the layer."""
    inner, mask = policy.policy, seen.mask[sample]
    k, score = min(inner.budget(seen)[sample], int(mask.sum())), inner.score(seen)[sample]
    protected = inner.protect(seen)[sample] & mask
    taken = []
    for h in range(len(score)):
        order = sorted(
            (j for j in range(T) if mask[j]), key=lambda j: (not protected[j], -score[h, j].item(), j)
        )  # fmt: skip
        taken.append(order[: min(k, max(int(policy.floor * k), int(protected.sum())))])
    left = len(score) * k - sum(map(len, taken))
    others = [(-score[h, j].item(), h, j) for h in range(len(score)) for j in range(T) if mask[j] and j not in taken[h]]
    for _, h, j in sorted(others)[:left]:
        taken[h].append(j)
    return [sorted(x) for x in taken]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize(
    ("lengths", "side"), [((T, T), "left"), ((T, 15), "left"), ((9, T), "right"), ((T, 2), "left")]
)
def test_budgets_are_those_of_the_loop(policy, lengths, side):
    seen = layer(lengths, side)
    found = compress(policy, seen)[2]
    want = [shares(policy, seen, b) for b in range(2)]
    assert [[h[h >= 0].tolist() for h in sample] for sample in found] == want
    budget = torch.as_tensor(policy.budget(seen))
    each = torch.minimum(torch.tensor(policy.policy.budget(seen)), torch.tensor(lengths))
    if budget.dim() == 2:
        assert budget.dtype == torch.int64 and torch.equal(budget.sum(-1), 2 * each)
        assert (budget <= torch.tensor(lengths)[:, None]).all()
        assert (budget >= (policy.floor * each).long()[:, None]).all()


@pytest.mark.parametrize(("floor", "budget"), [(0.0, [11, 1]), (0.2, [11, 1]), (0.5, [9, 3]), (1.0, [6, 6])])
def test_heads_that_look_around_keep_more(floor, budget):
    seen = layer()
    # Head 0 looks everywhere, head 1 at one key.
    seen.sums = torch.full_like(seen.sums, 1.0)
    seen.sums[:, 1] = 0.01
    seen.sums[:, 1, 7] = 20.0
    assert AdaKV(LookM(0.0, 0.25, text_prior=False), floor).budget(seen).tolist() == [budget] * 2


def test_a_whole_budget_needs_no_scores():
    seen = dataclasses.replace(layer((T, 15)), sums=None, query=None)
    for policy in (AdaKV(SnapKV(1.0)), AdaKV(H2O(0.5, 0.5)), AdaKV(SnapKV(100))):
        assert suffices(policy.budget(seen), seen)
        assert policy.keeps_all == policy.policy.keeps_all
    assert AdaKV(LookM(0.1, 0.1)).reads_text and AdaKV(LookM(0.1, 0.1, merge="weighted")).merging == ("weighted", True)


def test_what_is_evicted_is_merged_into_what_a_head_keeps():
    seen = layer()
    for floor in (0.0, 0.5):
        merged = compress(AdaKV(LookM(0.0, 0.2, text_prior=False, merge="average"), floor), seen)
        dropped = compress(AdaKV(LookM(0.0, 0.2, text_prior=False, merge="drop"), floor), seen)
        assert torch.equal(merged[2], dropped[2]) and not torch.equal(merged[1], dropped[1])
        assert merged[0].isfinite().all() and (merged[0][merged[2] < 0] == 0).all()


class Counting(Policy):
    comparable = True

    def budget(self, seen):
        return torch.full(seen.key.shape[:2], 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AdaKV(StreamingLLM()), ValueError, r"scores of StreamingLLM\(.*\) do not compare between heads"),
        (lambda: AdaKV(Random()), ValueError, r"do not compare between heads"),
        (lambda: AdaKV(KeyDiff()), ValueError, r"use one that ranks keys by the attention that a head gives them"),
        (lambda: AdaKV(TOVA()), ValueError, r"or are the same for all of them"),
        (lambda: AdaKV(LookM(overflow="cap")), ValueError, r"LookM without overflow='cap'"),
        (lambda: AdaKV(Decoding(SnapKV())), ValueError, r"expected a policy without Decoding: budgets are shared out"),
        (lambda: AdaKV(AdaKV(SnapKV())), ValueError, r"expected a policy without AdaKV"),
        (lambda: Decoding(AdaKV(SnapKV())), ValueError, r"AdaKV gives heads budgets of their own, which cannot be"),
        (lambda: Decoding(AdaKV(H2O())), ValueError, r"use the policy inside it"),
        (lambda: AdaKV(SnapKV), TypeError, r"policy: got <class .*expected a policy such as SnapKV"),
        (lambda: AdaKV(SnapKV(), floor=1.5), ValueError, r"floor: got 1\.5, expected a share of a head's budget in"),
        (lambda: AdaKV(SnapKV(), floor=float("nan")), ValueError, r"floor: got nan"),
        (lambda: AdaKV(SnapKV(), floor="0.2"), TypeError, r"floor: got '0\.2'"),
        (lambda: AdaKV(SnapKV(), floor=True), TypeError, r"floor: got True"),
        (lambda: AdaKV(Counting()).budget(layer()), ValueError, r"gave heads budgets of their own, expected one numb"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_repr_is_the_config(policy):
    assert eval(repr(policy)) == policy
