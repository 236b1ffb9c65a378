# SPDX-License-Identifier: Apache-2.0
"""`compress_kv`: keep the keys with the best scores, and merge the others into them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops import reference
from fastprompt.ops.checks import check_device, check_dtypes, check_tensor, without_autocast
from fastprompt.ops.direct import Direct
from fastprompt.ops.dispatch import LIBRARY, Choice, backend, choose
from fastprompt.ops.key_scores import check_mask

MERGE = ("drop", "average", "pivot", "weighted")

LIBRARY.define(
    "nearest_survivor(Tensor key, Tensor kept_key, Tensor index, str impl) -> (Tensor survivor, Tensor similarity)"
)
LIBRARY.define(
    "merge_evicted(Tensor x, Tensor kept, Tensor order, Tensor starts, Tensor weight, float half, str impl) -> Tensor"
)
LIBRARY.define(
    "merge_kv(Tensor key, Tensor value, Tensor index, Tensor? valid, str merge, bool merge_keys, str impl) "
    "-> (Tensor, Tensor)"
)


def compress_kv(
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    budget: int | Tensor,
    *,
    protect: Tensor | None = None,
    recent: int = 0,
    merge: str = "drop",
    merge_keys: bool = True,
    valid: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep ``budget`` keys a key head with their values, and merge every evicted pair into its most similar survivor.

    Kept are first the last ``recent`` keys, then those in ``protect``, then those with the highest score; ties go to
    the lower position. With ``S_c`` the evicted keys whose most cosine-similar survivor is c (ties to the lowest
    position), ``m = |S_c|`` and ``u_i`` their similarity, a survivor's key (and likewise its value) becomes

    - ``"drop"``: ``k_c``
    - ``"average"``: ``(k_c + sum k_i) / (m + 1)``
    - ``"pivot"``: ``(k_c + sum (k_i + k_c) / 2) / (m + 1)``
    - ``"weighted"``: ``(k_c + sum u_i k_i) / (m + 1)``

    as LOOK-M describes them. Its released code differs: it merges the wrong rows in ``"average"``, and leaves out pairs
    of low similarity in ``"average"`` and ``"weighted"``. Similarities are of the keys as given (rotated, if they are),
    in float32; the ``evicted x kept`` matrix of them is never stored. B batch, Hkv key heads, Tk keys, D head size.

    Args:
        key: ``[B,Hkv,Tk,D]``.
        value: ``[B,Hkv,Tk,Dv]``.
        scores: ``[B,Hkv,Tk]``, float, such as `key_scores` gives; get no gradient.
        budget: Keys to keep, a hard cap that includes ``recent`` and ``protect``: an int >= 1, or int64 ``[B,Hkv]``
            (read by the host), one a head.
        protect: bool ``[B,Tk]``, kept before others.
        recent: How many of the last (valid) keys to keep.
        merge: What becomes of evicted pairs.
        merge_keys: False merges values alone: rotated keys of different positions do not average well.
        valid: bool ``[B,Tk]``; keys with False (padding) are neither kept nor merged.
        impl: ``"auto"``, or ``"reference"``, ``"triton"``, ``"cpp"``, which never fall back.

    Returns:
        ``key' [B,Hkv,K,D]``, ``value' [B,Hkv,K,Dv]`` and ``index [B,Hkv,K]`` (int64, ascending positions) with
        ``K = min(budget, Tk)``, of a budget tensor its maximum. Slots that a head does not fill are last, with index -1
        and zeros. A budget of ``Tk`` or more without ``valid`` gives the inputs back. Differentiable in key and value.

    Raises:
        TypeError: wrong type or mixed dtypes.
        ValueError: wrong rank, shape, device, budget or option.
        ImplUnavailableError: an explicit ``impl`` cannot run these inputs.

    Example:
        >>> import torch
        >>> from fastprompt.ops import compress_kv
        >>> x = torch.randn(1, 1, 6, 4)
        >>> scores = torch.tensor([[[5.0, 0.0, 3.0, 4.0, 0.0, 0.0]]])
        >>> compress_kv(x, x, scores, 3, recent=1)[2]
        tensor([[[0, 3, 5]]])

    The compression of LOOK-M: https://arxiv.org/abs/2406.18139.
    """
    _check(key, value, scores, protect, recent, merge, valid)
    slots, budgets = _slots(budget, key)
    chosen = choose("compress_kv", (key, value), impl).impl
    if slots >= key.shape[2] and budgets is None and valid is None:
        index = torch.arange(key.shape[2], device=key.device)
        return key, value, index.expand(key.shape[:3]).clone()
    with without_autocast(key.device.type):
        index = reference.select_keys(scores.detach(), min(slots, key.shape[2]), budgets, protect, recent, valid)
        tracked = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        if chosen == "cpp" and not tracked:
            merged = _run_merge_kv(key, value, index, valid, merge, merge_keys, chosen)
            return *merged, index
        if merge == "drop" or chosen == "reference" or tracked:
            # Gradients are autograd's own, of the plain form.
            return *reference.merge_kv(key, value, index, merge, merge_keys, valid), index
        return *_merge(key, value, index, merge, merge_keys, valid, chosen), index


def _resolve(
    key, value, scores, budget, *, protect=None, recent=0, merge="drop", merge_keys=True, valid=None, impl="auto"
) -> Choice:
    _check(key, value, scores, protect, recent, merge, valid)
    _slots(budget, key)
    return choose("compress_kv", (key, value), impl)


compress_kv.resolve = _resolve  # type: ignore[attr-defined]


def _check(key, value, scores, protect, recent, merge, valid) -> None:
    for name, x in (("key", key), ("value", value), ("scores", scores)):
        check_tensor(name, x)
        if x.dim() != (3 if name == "scores" else 4):
            layout = "[B,Hkv,Tk]" if name == "scores" else "[B,Hkv,Tk,D]"
            raise ValueError(f"{name}: got rank {x.dim()} (shape {list(x.shape)}), expected {layout}")
    check_device(key=key, value=value, scores=scores, protect=protect, valid=valid)
    check_dtypes(("key", "value"), (key, value))
    shape = key.shape[:3]
    if value.shape[:3] != shape:
        raise ValueError(f"value: got shape {list(value.shape)}, expected {[*shape, 'Dv']} to match key")
    if scores.shape != shape:
        raise ValueError(f"scores: got shape {list(scores.shape)}, expected {list(shape)} to match key")
    check_mask("protect", protect, (shape[0], shape[2]))
    check_mask("valid", valid, (shape[0], shape[2]))
    if type(recent) is not int or recent < 0:
        raise ValueError(f"recent: got {recent!r}, expected an integer >= 0, a number of keys")
    if merge not in MERGE:
        raise ValueError(f"merge: got {merge!r}, expected one of {', '.join(map(repr, MERGE))}")


def _slots(budget: int | Tensor, key: Tensor) -> tuple[int, Tensor | None]:
    """Keys of the head that keeps most, and the budgets where heads differ."""
    if not isinstance(budget, Tensor):
        if type(budget) is not int or budget < 1:
            raise ValueError(f"budget: got {budget!r}, expected an integer >= 1 (keys a head), or int64 [B,Hkv]")
        return budget, None
    if budget.dtype != torch.int64:
        raise TypeError(f"budget: got dtype {budget.dtype}, expected int64 of shape {list(key.shape[:2])}; use .long()")
    if budget.shape != key.shape[:2]:
        raise ValueError(f"budget: got shape {list(budget.shape)}, expected {list(key.shape[:2])} (one a key head)")
    check_device(key=key, budget=budget)
    if not budget.numel():
        return 0, budget
    low, high = (int(x) for x in budget.aminmax())
    if low < 0 or high < 1:
        raise ValueError(f"budget: got values in [{low}, {high}], expected values >= 0, and one >= 1")
    return high, budget


def _merge(
    key: Tensor, value: Tensor, index: Tensor, merge: str, merge_keys: bool, valid: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    """`reference.merge_kv` by kernels of a GPU: the search, and sums over each survivor's own run of evicted pairs."""
    kept_key, kept_value = reference.gather_kv(key, value, index)
    survivor, similarity = _run_nearest_survivor(key, kept_key, index, impl)
    # Evicted pairs in the order of their survivors; what is kept or not valid sorts behind them all.
    survivor = survivor.masked_fill(~reference.evicted(index, key.shape[2], valid), index.shape[2])
    runs, order = survivor.sort(dim=-1, stable=True)
    bounds = torch.arange(index.shape[2] + 1, device=key.device).expand(*index.shape[:2], -1).contiguous()
    starts = torch.searchsorted(runs, bounds)
    weight = similarity if merge == "weighted" else torch.full_like(similarity, 0.5 if merge == "pivot" else 1.0)
    half = 0.5 if merge == "pivot" else 0.0
    merged = _run_merge_evicted(value, kept_value, order, starts, weight, half, impl)
    if merge_keys:
        kept_key = _run_merge_evicted(key, kept_key, order, starts, weight, half, impl)
    return kept_key, merged


def _nearest_survivor(*args):
    return backend("compress_kv", args[-1]).nearest_survivor(*args[:-1])


def _merge_evicted(*args):
    return backend("compress_kv", args[-1]).merge_evicted(*args[:-1])


def _merge_kv(*args):
    return backend("compress_kv", args[-1]).merge_kv(*args[:-1])


LIBRARY.impl("nearest_survivor", _nearest_survivor, "CompositeExplicitAutograd")
LIBRARY.impl("merge_evicted", _merge_evicted, "CompositeExplicitAutograd")
LIBRARY.impl("merge_kv", _merge_kv, "CompositeExplicitAutograd")


@torch.library.register_fake("fastprompt::nearest_survivor", lib=LIBRARY)
def _fake_nearest(key, kept_key, index, impl):
    return index.new_empty(key.shape[:3]), key.new_empty(key.shape[:3], dtype=torch.float32)


@torch.library.register_fake("fastprompt::merge_evicted", lib=LIBRARY)
def _fake_merge(x, kept, *_):
    return torch.empty_like(kept)


@torch.library.register_fake("fastprompt::merge_kv", lib=LIBRARY)
def _fake_merge_kv(key, value, index, *_):
    return tuple(x.new_empty(*index.shape, x.shape[-1]) for x in (key, value))


_run_nearest_survivor = Direct("nearest_survivor", _nearest_survivor)
_run_merge_evicted = Direct("merge_evicted", _merge_evicted)
_run_merge_kv = Direct("merge_kv", _merge_kv)
