# SPDX-License-Identifier: Apache-2.0
"""What a supervised run is told: the hyper-parameters, and the learning rate that they give each step."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TuneConfig:
    """Hyper-parameters of `tune`; the defaults suit a few images a class and a frozen backbone.

    The learning rate rises linearly for ``warmup`` of all steps, or stays at ``warmup_lr`` for them, then falls from
    ``lr`` along half a cosine to zero.

    Args:
        epochs: passes over the training set (default 50).
        batch_size: examples a step; the last batch of an epoch may be smaller (default 32).
        lr: highest learning rate (default 1e-3).
        weight_decay: decoupled for AdamW, added to the gradient for SGD (default 1e-4).
        optimizer: ``"adamw"`` or ``"sgd"`` with momentum 0.9 (default ``"adamw"``).
        warmup: fraction of all steps, from 0 to below 1 (default 0.1).
        warmup_lr: the learning rate of all warm-up steps; None rises linearly to ``lr`` (default None).
        clip_norm: largest norm of the gradient over all parameters together; None leaves it alone (default 1.0).
        autocast: ``"bfloat16"`` runs the model under ``torch.autocast``; None in its own types (default None).
        seed: of the order of the data and of torch's generators, from 0 to 2**32 - 1 (default 0).
        save_every: steps between checkpoints; 0 writes one only at the end and on Ctrl-C (default 0).
        eval_every: epochs between evaluations; 0 evaluates only at the end (default 0).
        eval_batch_size: examples at a time in evaluations; None is ``batch_size`` (default None).

    Raises:
        ValueError: a value is of the wrong type or out of range.

    Example:
        >>> TuneConfig(epochs=2, lr=0.1).optimizer
        'adamw'
    """

    epochs: int = 50
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    warmup: float = 0.1
    warmup_lr: float | None = None
    clip_norm: float | None = 1.0
    autocast: Literal["bfloat16"] | None = None
    seed: int = 0
    save_every: int = 0
    eval_every: int = 0
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "epochs": (_whole(self.epochs, 1), "a whole number >= 1"),
            "batch_size": (_whole(self.batch_size, 1), "a whole number >= 1"),
            "lr": (_real(self.lr) and self.lr > 0, "a finite number > 0"),
            "weight_decay": (_real(self.weight_decay) and self.weight_decay >= 0, "a finite number >= 0"),
            "optimizer": (self.optimizer in ("adamw", "sgd"), "'adamw' or 'sgd'"),
            "warmup": (_real(self.warmup) and 0 <= self.warmup < 1, "a fraction of all steps, 0 <= warmup < 1"),
            "warmup_lr": (
                self.warmup_lr is None or (_real(self.warmup_lr) and self.warmup_lr > 0),
                "a finite number > 0, or None for a linear rise",
            ),
            "clip_norm": (
                self.clip_norm is None or (_real(self.clip_norm) and self.clip_norm > 0),
                "a finite number > 0, or None for no clipping",
            ),
            "autocast": (self.autocast in ("bfloat16", None), "'bfloat16' or None"),
            "seed": (_whole(self.seed, 0) and self.seed < 2**32, "a whole number from 0 to 2**32 - 1"),
            "save_every": (_whole(self.save_every, 0), "a whole number of steps >= 0 (0: only at the end)"),
            "eval_every": (_whole(self.eval_every, 0), "a whole number of epochs >= 0 (0: only at the end)"),
            "eval_batch_size": (
                self.eval_batch_size is None or _whole(self.eval_batch_size, 1),
                "a whole number >= 1, or None for batch_size",
            ),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                got = getattr(self, name)
                raise ValueError(f"{name}: got {got!r}, expected {expected}; pass TuneConfig({name}=...) accordingly.")


def learning_rate(config: TuneConfig, step: int, total: int) -> float:
    """Return the learning rate of one step: the warm-up, then half a cosine that would reach zero at ``total``.

    Args:
        config: gives ``lr``, ``warmup`` and ``warmup_lr``.
        step: the step about to be taken, counted from 0.
        total: steps of the whole run.

    Example:
        >>> learning_rate(TuneConfig(lr=1.0, warmup=0.0), 5, 10)
        0.5
    """
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup if config.warmup_lr is None else config.warmup_lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
