# SPDX-License-Identifier: Apache-2.0
"""What a policy of KV-cache compression is, and how one is applied to a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastprompt.cache.observed import Observed
from fastprompt.ops import compress_kv


class Policy:
    """A rule that ranks the keys of a layer and says how many of them stay.

    A frozen dataclass whose repr is its config. To write one, inherit, and give `score` and `budget`; the rest has
    defaults. Scores order the keys of one key head; only `AdaKV` compares them between heads.
    """

    @property
    def rows(self) -> int | None:
        """Which queries `score` reads: 0 none, ``n`` the last n of the prompt, None all, as column sums."""
        return 0

    @property
    def reads_text(self) -> bool:
        """The policy tells text tokens from image tokens."""
        return False

    @property
    def keeps_all(self) -> bool:
        """The budget is the whole prompt, however long it is."""
        return False

    @property
    def comparable(self) -> bool:
        """Scores of different heads of a sample mean the same, such as attention, and differ."""
        return False

    @property
    def per_head(self) -> bool:
        """Heads get budgets of their own."""
        return False

    @property
    def merging(self) -> tuple[str, bool]:
        """What `compress_kv` does with evicted pairs: its ``merge`` and ``merge_keys``."""
        return "drop", True

    @property
    def interval(self) -> int | None:
        """After how many generated tokens the cache is compressed again; None: never."""
        return None

    def score(self, seen: Observed) -> Tensor:
        """``[B,Hkv,T]``, in float32 or wider: keys with the highest stay."""
        raise NotImplementedError

    def budget(self, seen: Observed) -> list[int] | Tensor:
        """How many keys a key head keeps: one number a sample, or int64 ``[B,Hkv]``; more than there are is allowed."""
        raise NotImplementedError

    def protect(self, seen: Observed) -> Tensor | None:
        """Bool ``[B,T]``: keys that stay before all others, as far as the budget goes."""
        return None


def suffices(budget: list[int] | Tensor, seen: Observed) -> bool:
    """Whether a budget holds every key, so that nothing needs to go."""
    if isinstance(budget, Tensor):
        lengths = torch.tensor(seen.lengths, device=budget.device)
        return bool((budget >= lengths.view(-1, *[1] * (budget.dim() - 1))).all())
    return all(b >= n for b, n in zip(budget, seen.lengths, strict=True))


def compress(policy: Policy, seen: Observed, budget: list[int] | Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Keep what a policy keeps of one layer.

    Args:
        policy: The policy.
        seen: The layer.
        budget: Instead of ``policy.budget(seen)``.

    Returns:
        ``(key, value, index)`` as ``fastprompt.ops.compress_kv`` gives them: ``[B,Hkv,K,D]`` twice, and int64
        ``[B,Hkv,K]``, ascending; K is the largest budget, index -1 where a sample has a smaller one.

    Raises:
        ValueError: the policy reads queries or text that ``seen`` does not have.

    Example:
        >>> import torch
        >>> from fastprompt.cache import KeyDiff, Observed, compress
        >>> key, value = torch.randn(2, 1, 4, 10, 16)
        >>> compress(KeyDiff(keep=0.3), Observed(key, value))[2].shape
        torch.Size([1, 4, 3])
    """
    budget = policy.budget(seen) if budget is None else budget
    lengths = torch.tensor(seen.lengths, device="cpu")
    kept = torch.as_tensor(budget, device="cpu")
    kept = torch.minimum(kept, lengths.view(-1, *[1] * (kept.dim() - 1)))
    # One number where there is one: nothing is padded then, and no device is waited for.
    low, high = (int(x) for x in kept.aminmax())
    each = kept.view(len(kept), -1).expand(-1, seen.key.shape[1]).to(seen.key.device)
    merge, merge_keys = policy.merging
    return compress_kv(
        seen.key, seen.value, policy.score(seen), low if low == high else each, protect=policy.protect(seen),
        merge=merge, merge_keys=merge_keys, valid=seen.valid,
    )  # fmt: skip


@dataclass(frozen=True)
class Around(Policy):
    """A policy around another; as that one in all that it does not change."""

    policy: Policy

    def __post_init__(self):
        if not isinstance(self.policy, Policy):
            raise TypeError(f"policy: got {self.policy!r}, expected a policy such as SnapKV(keep=1024)")

    @property
    def rows(self) -> int | None:
        """As the policy inside."""
        return self.policy.rows

    @property
    def reads_text(self) -> bool:
        """As the policy inside."""
        return self.policy.reads_text

    @property
    def keeps_all(self) -> bool:
        """As the policy inside."""
        return self.policy.keeps_all

    @property
    def merging(self) -> tuple[str, bool]:
        """As the policy inside."""
        return self.policy.merging

    def score(self, seen: Observed) -> Tensor:
        """As the policy inside."""
        return self.policy.score(seen)

    def budget(self, seen: Observed) -> list[int] | Tensor:
        """As the policy inside."""
        return self.policy.budget(seen)

    def protect(self, seen: Observed) -> Tensor | None:
        """As the policy inside."""
        return self.policy.protect(seen)


@dataclass(frozen=True)
class Decoding(Around):
    """Compresses during decoding, too: after ``every`` generated tokens the cache returns to the prompt's budget.

    Queries that a window looks at are then those of the tokens since the last time.

    Args:
        policy: What ranks keys; one that reads all queries of a prompt (`LookM`, `H2O`) cannot, nor can `AdaKV`.
        every: Number of generated tokens.

    Example:
        >>> import fastprompt
        >>> fastprompt.Decoding(fastprompt.StreamingLLM(keep=256), every=32)
        Decoding(policy=StreamingLLM(keep=256, sinks=4), every=32)
    """

    every: int = 64

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every: got {self.every!r}, expected an integer >= 1")
        if self.policy.interval is not None:
            raise ValueError(f"policy: got {self.policy!r}, which compresses during decoding already")
        if self.policy.per_head:
            raise ValueError(
                f"policy: {type(self.policy).__name__} gives heads budgets of their own, which cannot be compressed "
                "again during decoding; use the policy inside it"
            )
        if self.policy.rows is None:
            raise ValueError(
                f"policy: {type(self.policy).__name__} ranks keys by all queries of the prompt, which nobody has "
                "during decoding; use one that reads none (StreamingLLM, KeyDiff) or the last ones (SnapKV, TOVA)"
            )

    @property
    def interval(self) -> int | None:
        """As ``every`` says; None for a policy that keeps all."""
        return None if self.policy.keeps_all else self.every
