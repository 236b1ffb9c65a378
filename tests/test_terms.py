# SPDX-License-Identifier: Apache-2.0
"""Losses as named terms: their weighted sum is what is minimised, and each is logged."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from toy_classifier import CONFIG, Blobs, Toy, ToyHandle

from fastprompt.errors import CheckpointError
from fastprompt.nn.terms import SUPERVISED, Term, terms_of, total
from fastprompt.tuning import tune

SMALL = Term("small prompt", lambda model, output, batch: model.prompt.square().sum(), weight=0.5)
NEVER = Term("never", lambda *_: pytest.fail("a term of weight 0 was computed"), weight=0.0)


def run(terms, folder=None, **options):
    model = Toy(noise=0)
    with torch.no_grad():
        model.prompt.fill_(0.3)
    result = tune(
        model, ToyHandle(model), Blobs(), config=replace(CONFIG, **options.pop("config", {})), progress=False,
        out_dir=folder, terms=terms, **options,
    )  # fmt: skip
    return model, result


def test_the_first_step_follows_the_gradient_of_the_weighted_sum(tmp_path):
    config = {"optimizer": "sgd", "epochs": 1, "batch_size": 14, "clip_norm": None}
    plain, _ = run([SUPERVISED], tmp_path / "plain", config=config)
    model, _ = run([SUPERVISED, SMALL, NEVER], tmp_path / "sum", config=config)
    first = json.loads((tmp_path / "sum" / "log.jsonl").read_text().splitlines()[0])
    alone = json.loads((tmp_path / "plain" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss: small prompt"] == pytest.approx(8 * 0.3**2)
    assert first["loss"] == pytest.approx(first["loss: loss"] + 0.5 * first["loss: small prompt"])
    assert first["loss: loss"] == alone["loss"] and "loss: loss" not in alone
    # One step of one rate: the heads agree, the prompts differ by the rate times the term's gradient.
    assert torch.equal(plain.head.weight, model.head.weight)
    assert not torch.equal(plain.prompt, model.prompt)
    moved = (plain.prompt - model.prompt) / first["lr"]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5 * 2 * 0.3), rtol=1e-3, atol=0.0)


def test_a_run_of_other_terms_is_not_gone_on_with(tmp_path):
    run([SUPERVISED], tmp_path)
    with pytest.raises(CheckpointError, match="terms"):
        run([SUPERVISED, SMALL], tmp_path, resume=True)


def test_what_a_recipe_minimises():
    @dataclass(frozen=True)
    class Careful:
        weight: float = 2.0

        def terms(self):
            return [SUPERVISED, replace(SMALL, weight=self.weight)]

    assert terms_of(object()) == (SUPERVISED,)
    assert [term.weight for term in terms_of(Careful())] == [1.0, 2.0]


def test_terms_that_cannot_be_summed():
    with pytest.raises(ValueError, match=r"terms: got two named 'small prompt'"):
        total([SMALL, SMALL], Toy(), None, {})
    with pytest.raises(ValueError, match="terms: got none with a weight"):
        total([NEVER], Toy(), None, {})
