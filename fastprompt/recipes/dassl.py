# SPDX-License-Identifier: Apache-2.0
"""The optimisation that the released code of CoOp, CoCoOp and MaPLe shares: that of the Dassl toolbox."""

from __future__ import annotations

from typing import Any


def dassl(lr: float, batch_size: int, epochs: int) -> dict[str, Any]:
    """Settings of a `fastprompt.tuning.TuneConfig`: SGD with momentum 0.9, one epoch at 1e-5, then half a cosine.

    The released code takes a step along the cosine after every epoch and stops short of zero; here it is one a step.
    It also drops an epoch's last batch where that is smaller, and crops and flips images at random.

    Example:
        >>> dassl(2e-3, 32, 50)["warmup"]
        0.02
    """
    return {
        "optimizer": "sgd", "lr": lr, "batch_size": batch_size, "epochs": epochs, "weight_decay": 5e-4,
        "warmup": one_epoch(epochs), "warmup_lr": 1e-5, "clip_norm": None,
    }  # fmt: skip


def one_epoch(epochs: int) -> float:
    """The fraction of all steps that one epoch of warm-up is; a run of one epoch has none."""
    return 1 / epochs if epochs > 1 else 0.0
