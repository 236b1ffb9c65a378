# SPDX-License-Identifier: Apache-2.0
"""Supervised few-shot tuning of a frozen classifier: a loop that can stop anywhere and go on bit for bit."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fastprompt.nn.terms import SUPERVISED, Term
from fastprompt.tuning.batches import Examples, check_examples, eval_mode, frozen_except
from fastprompt.tuning.config import TuneConfig
from fastprompt.tuning.evaluation import EvalResult
from fastprompt.tuning.loop import CHECKPOINT, Run
from fastprompt.tuning.randomness import cuda_devices


class Handle(Protocol):
    """What `tune` trains: anything with ``parameters()``; its ``save(folder)``, if any, is called at the end."""

    def parameters(self) -> Iterable[Tensor]:
        """Return the leaf tensors to train, always in the same order."""


@dataclass(frozen=True)
class TuneResult:
    """What `tune` did.

    Args:
        steps: optimizer steps of the whole run, those before a resume included.
        epochs: passes over the training set.
        train_loss: loss of the last step.
        evaluation: of the final parameters on the evaluation set; None without one.
        seconds_per_step: median over the steps of this call, data included; NaN if it had none left to take.
        trainable_parameters: numbers trained.
    """

    steps: int
    epochs: int
    train_loss: float
    evaluation: EvalResult | None
    seconds_per_step: float
    trainable_parameters: int


def tune(
    model: nn.Module,
    handle: Handle,
    train_set: Examples,
    eval_set: Examples | None = None,
    *,
    config: TuneConfig,
    out_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    about: Mapping[str, str | int] | None = None,
    terms: Sequence[Term] = (SUPERVISED,),
) -> TuneResult:
    """Train the handle's parameters on a labelled data set while everything else in the model stays frozen.

    The model runs in eval mode throughout (no dropout, fixed statistics), as visual prompt tuning has it; its training
    flags, its ``requires_grad`` flags and torch's generators are as before when the call ends, however it ends.

    ``out_dir`` gets ``log.jsonl`` (one line a step and one an evaluation), ``checkpoint.safetensors`` (every
    ``save_every`` steps, on Ctrl-C and at the end) and, at the end, what ``handle.save(out_dir)`` writes. A run
    that is stopped anywhere and resumed computes, on a CPU, the same bits as one that is not. Only torch's generators
    are carried over: the model and the data set must draw from no other.

    Args:
        model: called as ``model(**batch)``, returns an object with ``.loss`` (a mean over the batch) and ``.logits``.
        handle: its ``parameters()`` are trained, in a fixed order; they may live inside or outside the model.
        train_set: examples as dictionaries of tensors with ``labels``, always the same for an index.
        eval_set: measured every ``config.eval_every`` epochs and at the end (default None).
        config: hyper-parameters.
        out_dir: folder for log and checkpoint, made if missing; None writes nothing (default None).
        resume: go on from the checkpoint in ``out_dir``; without one, start, overwriting any log (default False).
        progress: show bars (default True).
        about: what else the run is (recipe, model, data, ...); a checkpoint of a run that says otherwise is refused.
        terms: what is minimised: named losses with weights, each of which the log holds (default: ``.loss`` alone).

    Raises:
        ValueError: the handle has nothing to train, no term has a weight, or an option needs ``out_dir``.
        DataError: a data set is empty or has no labels.
        FileExistsError: ``out_dir`` holds a checkpoint and ``resume`` is False.
        CheckpointError: the checkpoint is damaged or belongs to another run; nothing was changed.
        FloatingPointError: loss or gradient is not finite; parameters and checkpoint are those of the step before.

    Example:
        >>> from types import SimpleNamespace
        >>> class Linear(nn.Linear):
        ...     def forward(self, pixel_values, labels):
        ...         logits = super().forward(pixel_values)
        ...         return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)
        >>> pixels = torch.tensor([[-1.0], [1.0]])
        >>> examples = [{"pixel_values": pixels[i], "labels": torch.tensor(i)} for i in (0, 1)]
        >>> model = Linear(1, 2)
        >>> result = tune(model, model, examples, examples, config=TuneConfig(epochs=9, lr=1.0), progress=False)
        >>> result.steps, result.evaluation.accuracy
        (9, 1.0)
    """
    folder = None if out_dir is None else Path(out_dir)
    params = _trainable(handle)
    check_examples("train_set", train_set)
    if eval_set is not None:
        check_examples("eval_set", eval_set)
    _check_folder(folder, config, resume)
    with eval_mode(model), frozen_except(model, params), torch.random.fork_rng(cuda_devices(model)):
        run = Run(model, params, train_set, eval_set, config, folder, progress, about or {}, terms)
        run.start(resume)
        run.finish()
    if folder is not None and hasattr(handle, "save"):
        handle.save(folder)
    return TuneResult(
        steps=run.step,
        epochs=config.epochs,
        train_loss=run.loss,
        evaluation=run.evaluation if run.evaluated_step == run.step else None,
        seconds_per_step=statistics.median(run.seconds) if run.seconds else math.nan,
        trainable_parameters=sum(param.numel() for param in params),
    )


def _trainable(handle: Handle) -> list[Tensor]:
    params = list(handle.parameters())
    unfit = [i for i, p in enumerate(params) if not (p.is_leaf and p.requires_grad and p.is_floating_point())]
    if not params or unfit:
        got = f"tensors {unfit} that are frozen, not leaves or not floating point" if params else "no tensor"
        raise ValueError(
            f"handle.parameters(): got {got}, expected floating-point leaves with requires_grad=True; unfreeze them."
        )
    if len({id(param) for param in params}) < len(params):
        raise ValueError("handle.parameters(): got a tensor twice, expected each once; list shared tensors once.")
    return params


def _check_folder(folder: Path | None, config: TuneConfig, resume: bool) -> None:
    if folder is None:
        for option, value, asked in (("resume", resume, resume), ("save_every", config.save_every, config.save_every)):
            if asked:
                raise ValueError(f"{option}: got {value!r} with out_dir=None, expected a folder; pass out_dir=...")
    elif not resume and (folder / CHECKPOINT).exists():
        raise FileExistsError(
            f"out_dir: got {folder} with the {CHECKPOINT} of an earlier run, expected a folder without one; "
            "pass resume=True (--resume) to go on with that run, or choose another folder."
        )
