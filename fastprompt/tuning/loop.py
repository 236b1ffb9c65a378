# SPDX-License-Identifier: Apache-2.0
"""The loop of a supervised run: steps, evaluations and checkpoints, each wholly done or not at all."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.nn.terms import SUPERVISED, Term, total
from fastprompt.tuning.batches import Examples, device_of, load_batch, run_model
from fastprompt.tuning.checkpoint import Checkpoint, capture, check_fits, read_checkpoint, write_checkpoint
from fastprompt.tuning.config import TuneConfig, learning_rate
from fastprompt.tuning.evaluation import EvalResult, evaluate
from fastprompt.tuning.interrupts import hold_interrupts
from fastprompt.tuning.journal import Journal, Record
from fastprompt.tuning.progress import progress_bar
from fastprompt.tuning.randomness import cuda_devices, epoch_order, get_rng, seed_rng, set_rng

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"

# These settings change when a run saves and measures, never what it computes.
_FREE_SETTINGS = {"save_every", "eval_every", "eval_batch_size"}


class Run:
    """The state of one run, from its first step or its checkpoint to its last step.

    Args:
        model: in eval mode, with all but ``params`` frozen.
        params: the tensors to train.
        train_set: examples to learn from.
        eval_set: examples to measure on, or None.
        config: hyper-parameters.
        folder: for log and checkpoint, or None.
        shown: whether to show bars.
        about: what else decides what the run computes.
        terms: what is minimised.
    """

    def __init__(
        self,
        model: nn.Module,
        params: list[Tensor],
        train_set: Examples,
        eval_set: Examples | None,
        config: TuneConfig,
        folder: Path | None,
        shown: bool,
        about: Mapping[str, str | int],
        terms: Sequence[Term] = (SUPERVISED,),
    ) -> None:
        self.model, self.params, self.train_set, self.eval_set = model, params, train_set, eval_set
        self.config, self.folder, self.shown, self.about = config, folder, shown, about
        self.terms = tuple(terms)
        self.device, self.devices = device_of(model), cuda_devices(model)
        self.optimizer = _optimizer(params, config)
        self.steps_an_epoch = math.ceil(len(train_set) / config.batch_size)
        self.total = config.epochs * self.steps_an_epoch
        self.step = 0
        self.loss = math.nan
        self.evaluation: EvalResult | None = None
        self.evaluated_step: int | None = None
        self.saved_step: int | None = None
        self.seconds: list[float] = []
        self.journal: Journal | None = None

    def start(self, resume: bool) -> None:
        """Seed the generators or take up a checkpoint, then open the log.

        Args:
            resume: go on from the folder's checkpoint if there is one.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another run; nothing was changed.
        """
        seed_rng(self.config.seed, self.devices)
        self.rng = get_rng(self.devices)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume and (self.folder / CHECKPOINT).exists():
            self._load(self.folder / CHECKPOINT)
            self.journal = Journal(self.folder / LOG, keep=self._is_logged)
        else:
            self.journal = Journal(self.folder / LOG)

    def finish(self) -> None:
        """Take the steps that are left, with evaluations and checkpoints between them.

        Raises:
            FloatingPointError: loss or gradient is not finite.
            ValueError: the loss does not depend on the parameters.
        """
        bar = progress_bar("tune", self.total, unit="step", shown=self.shown, initial=self.step)
        try:
            with bar:
                while True:
                    if self.eval_set is not None and self._evaluation_is_due():
                        self._evaluate(self.eval_set)
                    if self._save_is_due():
                        self._save()
                    if self.step == self.total:
                        return
                    bar.set_postfix(self._take_step(), refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            if self.step != self.saved_step:
                self._save()
            raise
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            if self.journal is not None:
                self.journal.close()

    def _take_step(self) -> dict[str, str]:
        """Take one step, wholly or not at all, and return what the bar shows of it."""
        began = time.perf_counter()
        epoch, place = divmod(self.step, self.steps_an_epoch)
        order = epoch_order(len(self.train_set), self.config.seed, epoch)
        indices = order[place * self.config.batch_size :][: self.config.batch_size].tolist()
        batch = load_batch(self.train_set, indices, self.device)
        rate = learning_rate(self.config, self.step, self.total)
        output = run_model(self.model, batch, self.config.autocast)
        loss_tensor, values = total(self.terms, self.model, output, batch)
        loss, norm = self._gradients(loss_tensor, rate)
        accuracy = (output.logits.argmax(-1) == batch["labels"]).double().mean().item()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with hold_interrupts():
            self.optimizer.step()
            self.step, self.loss = self.step + 1, loss
            self.rng = get_rng(self.devices)
            self.seconds.append(time.perf_counter() - began)
            numbers = {"loss": loss, "accuracy": accuracy, "lr": rate, "grad_norm": norm, "seconds": self.seconds[-1]}
            # One term alone is the loss.
            named = {f"loss: {name}": x.item() for name, x in values.items()} if len(self.terms) > 1 else {}
            self._log("step", epoch + 1, numbers | named)
        shown = {"loss": loss, "acc": accuracy, "lr": rate, "s/step": self.seconds[-1]}
        return {name: f"{value:.3g}" for name, value in shown.items()}

    def _gradients(self, loss: Tensor, rate: float) -> tuple[float, float]:
        """Fill the gradients, clipped, and return the loss and the norm before clipping."""
        if not loss.requires_grad:
            raise ValueError(
                "handle: got parameters that the loss does not depend on, expected some that the model uses; "
                "pass the handle that was attached to this model."
            )
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if math.isfinite(value):
            loss.backward()
            gradients = [param.grad for param in self.params if param.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            if self.config.clip_norm is not None:
                nn.utils.clip_grads_with_norm_(self.params, self.config.clip_norm, norm)
            if math.isfinite(norm.item()):
                return value, norm.item()
            value_name = f"gradient norm {norm.item()}"
        else:
            value_name = f"loss {value}"
        raise FloatingPointError(
            f"step {self.step + 1} at lr {rate:.3g}: got {value_name}, expected a finite number; parameters and "
            "checkpoint are those of an earlier step: lower lr, set clip_norm, or check the data for NaN."
        )

    def _evaluation_is_due(self) -> bool:
        if self.step == 0 or self.evaluated_step == self.step:
            return False
        epochs, rest = divmod(self.step, self.steps_an_epoch)
        every = self.config.eval_every
        return self.step == self.total or (every > 0 and rest == 0 and epochs % every == 0)

    def _evaluate(self, eval_set: Examples) -> None:
        size, autocast = self.config.eval_batch_size or self.config.batch_size, self.config.autocast
        result = evaluate(self.model, eval_set, batch_size=size, autocast=autocast, progress=self.shown)
        with hold_interrupts():
            self.evaluation, self.evaluated_step, self.saved_step = result, self.step, None
            numbers = {"accuracy": result.accuracy, "loss": result.loss, "n": result.n}
            self._log("eval", self.step // self.steps_an_epoch, numbers)

    def _log(self, event: str, epoch: int, numbers: dict[str, float]) -> None:
        if self.journal is not None:
            self.journal.write({"event": event, "step": self.step, "epoch": epoch, **numbers})

    def _is_logged(self, record: Record) -> bool:
        """Whether a line of the log was written before the checkpoint that the run goes on from."""
        is_later_evaluation = record["event"] == "eval" and self.evaluated_step != self.step == record["step"]
        return record["step"] <= self.step and not is_later_evaluation

    def _save_is_due(self) -> bool:
        every = self.config.save_every
        due = self.step == self.total or (self.step > 0 and every > 0 and self.step % every == 0)
        return due and self.step != self.saved_step

    def _save(self) -> None:
        if self.folder is None or self.journal is None:
            return
        # The lines that a checkpoint counts on must not be younger than it.
        self.journal.sync()
        evaluation = None if self.evaluation is None else asdict(self.evaluation)
        progress = {
            "step": self.step,
            "loss": self.loss,
            "evaluated_step": self.evaluated_step,
            "evaluation": evaluation,
        }
        tensors = capture(self.params, self.optimizer, self.rng)
        write_checkpoint(self.folder / CHECKPOINT, Checkpoint(tensors, self._trajectory(), progress))
        self.saved_step = self.step

    def _load(self, path: Path) -> None:
        checkpoint = read_checkpoint(path)
        check_fits(path, checkpoint, self._trajectory(), self.params, self.rng)
        checkpoint.apply(self.params, self.optimizer)
        self.rng = checkpoint.rng()
        set_rng(self.rng, self.devices)
        progress = checkpoint.progress
        self.step = self.saved_step = progress["step"]
        self.loss, self.evaluated_step = progress["loss"], progress["evaluated_step"]
        if progress["evaluation"] is not None:
            self.evaluation = EvalResult.from_json(progress["evaluation"])

    def _trajectory(self) -> dict[str, Any]:
        """Return all that decides what the run computes, for its checkpoint to be refused by any other."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in _FREE_SETTINGS}
        # The model's own loss is not spelt out, so that runs from before there were terms go on.
        terms = {} if self.terms == (SUPERVISED,) else {"terms": [[t.name, t.weight] for t in self.terms]}
        return settings | terms | {"train_examples": len(self.train_set), **self.about}


def _optimizer(params: list[Tensor], config: TuneConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(params, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
