# SPDX-License-Identifier: Apache-2.0
"""The policies: how keys are ranked, how many stay, and what becomes of the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastprompt.cache.observed import Observed
from fastprompt.cache.policy import Policy
from fastprompt.cache.ranks import ranks

MERGES = ("drop", "average", "pivot", "weighted")


def _check_share(name: str, value: float, low: int = 1) -> None:
    """A float is a share of the prompt, an int a number of keys; ``low = 0`` allows none of either."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a share (a float) or a number of keys (an int)")
    good = value >= low if isinstance(value, int) else 0 < value <= 1 or (not low and value == 0)
    if not good:
        raise ValueError(
            f"{name}: got {value!r}, expected a share of the prompt in {'(' if low else '['}0, 1] (a float) or a "
            f"number of keys >= {low} (an int)"
        )


def _check_count(name: str, value: int, low: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: got {value!r}, expected an integer >= {low}")


def _count(share: float, length: int) -> int:
    # 0.29 * 100 is 28.999999999999996.
    return share if isinstance(share, int) else int(share * length + 1e-9)


@dataclass(frozen=True)
class _Heavy(Policy):
    """Recent keys and important ones; the budget is the sum of both numbers, as released."""

    recent: float = 0.1
    important: float = 0.1

    def __post_init__(self):
        _check_share("recent", self.recent, low=0)
        _check_share("important", self.important, low=0)
        if not self.recent and not self.important:
            raise ValueError("important: got 0 and recent 0, expected a budget above 0; nothing would stay")
        if isinstance(self.recent, float) and isinstance(self.important, float):
            total = self.recent + self.important
            if total > 1 + 1e-9:
                raise ValueError(f"important: got shares of {total:g} together with recent, expected at most 1")

    @property
    def rows(self) -> int | None:
        return None

    @property
    def keeps_all(self) -> bool:
        # Whole shares, although each is rounded down on its own.
        shares = isinstance(self.recent, float) and isinstance(self.important, float)
        return shares and self.recent + self.important >= 1 - 1e-9

    def budget(self, seen: Observed) -> list[int] | Tensor:
        if self.keeps_all:
            return seen.lengths
        return [max(1, _count(self.recent, n) + _count(self.important, n)) for n in seen.lengths]

    def protect(self, seen: Observed) -> Tensor:
        return seen.last([_count(self.recent, n) for n in seen.lengths])


@dataclass(frozen=True)
class LookM(_Heavy):
    """LOOK-M (Wan et al., 2024, https://arxiv.org/abs/2406.18139): text stays, evicted image keys are merged.

    Keys are ranked by their column sum over all queries of the prompt, not normalised by how many may see them; with
    ``text_prior`` every text key ranks before every image key. It is the published method, not the released code: the
    order among image keys is exact (the code adds -65516 to a score in half precision), evicted pairs are merged where
    they belong, in batches, with grouped-query attention and padding. Without ``text_prior`` the released code also
    forces the first 4 keys, which their sums favour anyway.

    Args:
        recent: Share of the prompt (or number of keys, an int) at its end that stays.
        important: Share (or number) that stays by score; the budget is ``int(recent T) + int(important T)``.
        merge: What becomes of evicted pairs, as in ``fastprompt.ops.compress_kv``: ``"drop"``, ``"average"``,
            ``"pivot"`` (the paper's choice) or ``"weighted"``.
        text_prior: Text ranks before images. A prompt without an image is an error then.
        overflow: What a prompt with more text than budget does: ``"keep"`` keeps all text, as published, ``"cap"``
            keeps the budget.
        merge_keys: False merges values alone and leaves rotated keys as they are.

    Example:
        >>> import fastprompt
        >>> fastprompt.LookM(recent=0.05, important=0.15)
        LookM(recent=0.05, important=0.15, merge='pivot', text_prior=True, overflow='keep', merge_keys=True)
    """

    merge: str = "pivot"
    text_prior: bool = True
    overflow: str = "keep"
    merge_keys: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.merge not in MERGES:
            raise ValueError(f"merge: got {self.merge!r}, expected one of {', '.join(map(repr, MERGES))}")
        if self.overflow not in ("keep", "cap"):
            raise ValueError(f"overflow: got {self.overflow!r}, expected 'keep' or 'cap'")

    @property
    def reads_text(self) -> bool:
        """As ``text_prior`` says."""
        return self.text_prior

    @property
    def comparable(self) -> bool:
        """Sums are, ranks are not."""
        return not self.text_prior or self.overflow == "keep"

    @property
    def merging(self) -> tuple[str, bool]:
        """As ``merge`` and ``merge_keys`` say."""
        return self.merge, self.merge_keys

    def score(self, seen: Observed) -> Tensor:
        """Column sums; under ``overflow="cap"`` ranks by them, text first."""
        sums = seen.column_sums()
        if self.comparable:
            return sums
        images = ~self._text(seen)[:, None].expand_as(sums)
        return -ranks(sums, images.byte()).float()

    def budget(self, seen: Observed) -> list[int] | Tensor:
        """The shares; more where all text is to stay."""
        budget = super().budget(seen)
        if not self.text_prior or self.overflow == "cap" or self.keeps_all:
            return budget
        protected = self.protect(seen).sum(dim=-1).tolist()
        return [max(b, n) for b, n in zip(budget, protected, strict=True)]

    def protect(self, seen: Observed) -> Tensor:
        """Recent keys; under ``overflow="keep"`` all text, too."""
        recent = super().protect(seen)
        return recent | self._text(seen) if self.text_prior and self.overflow == "keep" else recent

    def _text(self, seen: Observed) -> Tensor:
        if seen.text is None:
            raise ValueError("text: got None, but text_prior=True ranks text before images; say which keys are text, "
                             "or use text_prior=False")  # fmt: skip
        if bool(seen.text.all()):
            raise ValueError("text: the prompt holds no image token, so text_prior=True would keep all of it; use "
                             "text_prior=False for prompts without images, or pass image_mask")  # fmt: skip
        return seen.text & seen.mask


@dataclass(frozen=True)
class H2O(_Heavy):
    """H2O (Zhang et al., 2023, https://arxiv.org/abs/2306.14048): recent keys and heavy hitters.

    The score is the mean attention that a key gets from the queries that may see it, ``sum_i A_ij / (T - j)``, then the
    mean over the query heads of a key head; the official code sums without dividing, which favours early keys.

    Args:
        recent: Share of the prompt (or number of keys, an int) at its end that stays.
        important: Share (or number) that stays by score.

    Example:
        >>> import fastprompt
        >>> fastprompt.H2O(recent=32, important=0.2)
        H2O(recent=32, important=0.2)
    """

    @property
    def comparable(self) -> bool:
        """Yes."""
        return True

    def score(self, seen: Observed) -> Tensor:
        """Column sums over the number of queries that may see the key."""
        lengths = torch.tensor(seen.lengths, device=seen.key.device)[:, None]
        return seen.column_sums() / (lengths - seen.place).clamp(min=1)[:, None]


@dataclass(frozen=True)
class _Keep(Policy):
    """One budget: a share of the prompt, or a number of keys a key head."""

    keep: float = 0.2

    def __post_init__(self):
        _check_share("keep", self.keep)

    @property
    def keeps_all(self) -> bool:
        return isinstance(self.keep, float) and self.keep == 1

    def budget(self, seen: Observed) -> list[int] | Tensor:
        return [max(1, _count(self.keep, n)) for n in seen.lengths]


@dataclass(frozen=True)
class SnapKV(_Keep):
    """SnapKV (Li et al., 2024, https://arxiv.org/abs/2404.14469): what the last queries of the prompt look at.

    The mean attention of the last ``window`` queries, averaged over ``kernel`` neighbouring keys (zeros beyond the
    ends) and over the query heads of a key head; the window itself stays, its latest keys first.

    Args:
        keep: Share of the prompt (a float) or number of keys a key head (an int), window included.
        window: Number of queries.
        kernel: Odd width of the average pool.

    Example:
        >>> import fastprompt
        >>> fastprompt.SnapKV(keep=1024)
        SnapKV(keep=1024, window=64, kernel=5)
    """

    window: int = 64
    kernel: int = 5

    def __post_init__(self):
        super().__post_init__()
        _check_count("window", self.window)
        _check_count("kernel", self.kernel)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: got {self.kernel}, expected an odd width")

    @property
    def rows(self) -> int | None:
        """The window."""
        return self.window

    @property
    def comparable(self) -> bool:
        """Yes."""
        return True

    def score(self, seen: Observed) -> Tensor:
        """Pooled attention of the window; inside it, the place."""
        window = self.protect(seen)[:, None]
        attention = seen.attention_of_last(self.window).masked_fill(window, 0.0)
        pooled = torch.nn.functional.avg_pool1d(attention, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.where(window, seen.place[:, None].to(pooled.dtype), pooled)

    def protect(self, seen: Observed) -> Tensor:
        """The window."""
        return seen.last(self.window)


@dataclass(frozen=True)
class TOVA(_Keep):
    """TOVA (Oren et al., 2024, https://arxiv.org/abs/2401.06104): what the last query looks at.

    Its attention, averaged over all heads: every head keeps the same keys. The last key stays.

    Args:
        keep: Share of the prompt (a float) or number of keys (an int).

    Example:
        >>> import fastprompt
        >>> fastprompt.TOVA(keep=0.5)
        TOVA(keep=0.5)
    """

    @property
    def rows(self) -> int | None:
        """One."""
        return 1

    def score(self, seen: Observed) -> Tensor:
        """Attention of the last query, the mean of all heads."""
        attention = seen.attention_of_last(1)
        return attention.mean(dim=1, keepdim=True).expand_as(attention)

    def protect(self, seen: Observed) -> Tensor:
        """The last key."""
        return seen.last(1)


@dataclass(frozen=True)
class StreamingLLM(_Keep):
    """StreamingLLM (Xiao et al., 2024, https://arxiv.org/abs/2309.17453): the first keys and the most recent ones.

    Keys stay rotated to their own positions; the paper gives them positions inside the cache.

    Args:
        keep: Share of the prompt (a float) or number of keys (an int), sinks included.
        sinks: Number of first keys that stay.

    Example:
        >>> import fastprompt
        >>> fastprompt.StreamingLLM(keep=256)
        StreamingLLM(keep=256, sinks=4)
    """

    sinks: int = 4

    def __post_init__(self):
        super().__post_init__()
        _check_count("sinks", self.sinks, low=0)

    def score(self, seen: Observed) -> Tensor:
        """The place."""
        return seen.place[:, None].float().expand(seen.key.shape[:3])

    def protect(self, seen: Observed) -> Tensor:
        """The sinks."""
        return seen.mask & (seen.place < self.sinks)


@dataclass(frozen=True)
class KeyDiff(_Keep):
    """KeyDiff (Park et al., 2025, https://arxiv.org/abs/2504.15364): keys that are unlike the others; reads no query.

    The score is ``-cos(k_j, mean_i k_i / |k_i|)``, in float32.

    Args:
        keep: Share of the prompt (a float) or number of keys a key head (an int).

    Example:
        >>> import fastprompt
        >>> fastprompt.KeyDiff(keep=0.5)
        KeyDiff(keep=0.5)
    """

    def score(self, seen: Observed) -> Tensor:
        """How far a key points away from the mean direction."""
        key = seen.key.to(torch.promote_types(seen.key.dtype, torch.float32))
        unit = torch.nn.functional.normalize(key, dim=-1)
        # The sum points where the mean does.
        mean = (unit * seen.mask[:, None, :, None]).sum(dim=2, keepdim=True)
        return -torch.nn.functional.cosine_similarity(key, mean, dim=-1)


@dataclass(frozen=True)
class Random(_Keep):
    """Any keys: the control that a policy has to beat. Layers and heads draw their own, samples of a batch the same.

    Args:
        keep: Share of the prompt (a float) or number of keys a key head (an int).
        seed: Of the draw.

    Example:
        >>> import fastprompt
        >>> fastprompt.Random(keep=0.2, seed=1)
        Random(keep=0.2, seed=1)
    """

    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        _check_count("seed", self.seed, low=0)

    def score(self, seen: Observed) -> Tensor:
        """A number for every place of a sample, whatever is padded."""
        generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + seen.layer)
        draws = torch.rand(max(seen.lengths), seen.key.shape[1], generator=generator, device="cpu").to(seen.key.device)
        return draws[seen.place.clamp(min=0)].transpose(1, 2)
