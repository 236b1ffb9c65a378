# SPDX-License-Identifier: Apache-2.0
"""The contract of every recipe: its card says what is so, on a tiny model of the kind it is for."""

from fnmatch import fnmatchcase
from importlib.util import find_spec

import pytest
import torch
from recipe_hosts import HOSTS, OPTIONS

import fastprompt
from fastprompt.recipes.card import Card
from fastprompt.recipes.registry import CARDS

NAMES = {recipe.__name__: recipe for recipe in CARDS}


def each(names):
    """A test for every recipe; one whose packages are not there is skipped, and says which."""

    def param(name):
        missing = [package for package in CARDS[NAMES[name]].needs if not find_spec(package)]
        return pytest.param(
            name, marks=pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)}: not installed")
        )

    return pytest.mark.parametrize("name", [param(name) for name in names])


EVERY = each(NAMES)
TRAINED = each([n for n, r in NAMES.items() if CARDS[r].trains])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def made(name, **options):
    """The recipe, its card, and its host."""
    card = CARDS[NAMES[name]]
    return NAMES[name](**{**OPTIONS.get(name, {}), **options}), card, HOSTS[card.use]


def hold(name, model, **options):
    torch.manual_seed(0)
    recipe, _, host = made(name, **options)
    return host.hold(model, recipe)


def train(held, batch, steps=3):
    """Names of the parameters that got a gradient, and of those whose gradient was ever above 0; losses."""
    parameters = held.parameters()
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05)
    given, moved, losses = set(), set(), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = held.loss(batch)
        loss.backward()
        given |= {n for n, p in parameters.items() if p.grad is not None}
        moved |= {n for n, p in parameters.items() if p.grad is not None and p.grad.abs().max() > 0}
        losses.append(loss.item())
        optimizer.step()
    return given, moved, losses


@EVERY
@DTYPES
@pytest.mark.parametrize("batch", [1, 3])
def test_it_builds_and_gives_what_the_base_gives_in_shape(name, dtype, batch):
    _, _, host = made(name)
    model, x = host.build(dtype), host.batch(batch, dtype)
    with torch.no_grad():
        before = host.base(model, x)
        with hold(name, model) as held:
            found = held.outputs(x)
    assert found.shape == before.shape and len(found) == batch
    assert found.isfinite().any() and not found.isnan().any()


@EVERY
@pytest.mark.parametrize("batch", [1, 3])
def test_its_identity_setting_gives_what_the_base_gives(name, batch):
    _, card, host = made(name)
    if card.identity is None:
        assert any("identity" in line for line in card.deviations), "the card does not say why there is none"
        return
    model, x = host.build(torch.float32), host.batch(batch, torch.float32)
    with torch.no_grad():
        before = host.base(model, x)
        with hold(name, model, **card.identity) as held:
            found = held.outputs(x)
    # Another order of sums, where texts are packed: some 200 of them in a row, in float32.
    limit = 0.0 if host.exact else 256 * torch.finfo(torch.float32).eps * before.abs().max().item()
    assert torch.equal(found.isfinite(), before.isfinite())
    assert (found - before)[before.isfinite()].abs().max().item() <= limit


@TRAINED
@DTYPES
def test_three_steps_move_what_the_card_says_and_nothing_of_the_base(name, dtype):
    _, card, host = made(name)
    model, x = host.build(dtype), host.batch(3, dtype)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with hold(name, model) as held:
        learned = held.parameters()
        start = {n: p.detach().clone() for n, p in learned.items()}
        named = {n for n in learned if any(fnmatchcase(n, pattern) for pattern in card.trains)}
        given, moved, losses = train(held, x)
        assert given == named == moved == set(learned), "gradients, the card, and what is not 0"
        theirs = {id(p) for p in learned.values()}
        assert not [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in theirs]
        assert any(not torch.equal(p, start[n]) for n, p in learned.items())
    assert all(torch.tensor(losses).isfinite())
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}


@each([n for n, r in NAMES.items() if not CARDS[r].trains])
def test_what_is_free_of_training_has_nothing_to_train(name):
    _, _, host = made(name)
    with hold(name, host.build(torch.float32)) as held:
        assert not held.parameters()


@TRAINED
def test_what_was_saved_gives_the_same_bits_again(name, tmp_path):
    _, card, host = made(name)
    model, x = host.build(torch.float32), host.batch(3, torch.float32)
    with hold(name, model) as held:
        train(held, x)
        held.save(tmp_path)
        with torch.no_grad():
            want = held.outputs(x)
    with torch.random.fork_rng(), host.load(host.build(torch.float32), tmp_path) as held, torch.no_grad():
        assert torch.equal(held.outputs(x), want)
        assert all(any(fnmatchcase(n, pattern) for pattern in card.trains) for n in held.parameters())


@EVERY
def test_taken_off_the_base_is_as_it_was(name):
    _, card, host = made(name)
    model, x = host.build(torch.float32), host.batch(3, torch.float32)
    with torch.no_grad():
        before = host.base(model, x)
    with hold(name, model) as held:
        if card.trains:
            train(held, x, 1)
    with torch.no_grad():
        assert torch.equal(host.base(model, x), before)


@EVERY
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_every_implementation_gives_what_the_default_gives(name, impl, monkeypatch):
    if impl == "triton" and not fastprompt.ops.dispatch.interpreting():
        pytest.skip("Triton kernels run on a CPU under TRITON_INTERPRET=1 alone")
    _, card, host = made(name)
    x = host.batch(1, torch.float32)
    found = {}
    for chosen in ("auto", impl):
        monkeypatch.setattr("fastprompt.config.IMPL", chosen)
        with hold(name, host.build(torch.float32)) as held:
            with torch.no_grad():
                found[chosen] = {"outputs": held.outputs(x).nan_to_num(neginf=0.0)}
            if card.trains:
                train(held, x, 1)
                found[chosen] |= {n: p.grad for n, p in held.parameters().items()}
    for part, want in found["auto"].items():
        # Four layers of sums of up to 96 terms, forward and backward.
        limit = 4096 * torch.finfo(torch.float32).eps * want.abs().max().item()
        assert (found[impl][part] - want).abs().max().item() <= limit, part


@EVERY
def test_its_card_and_its_name(name):
    recipe = NAMES[name]
    card = CARDS[recipe]
    assert getattr(fastprompt, name) is recipe and name in fastprompt.__all__
    assert card.paper in recipe.__doc__ or card.paper.startswith("https://arxiv.org/abs/")
    assert card.tier in (1, 2, 3, 4) and (card.row is None or 1 <= card.row <= 65)
    assert card.status == "exact" or card.deviations
    assert all(line.endswith(".") for line in card.deviations)


def test_no_two_recipes_are_one_method():
    rows = [card.row for card in CARDS.values() if card.row is not None]
    assert len(rows) == len(set(rows))


def test_a_card_of_an_unknown_kind():
    known = {"title": "A title", "paper": "https://arxiv.org/abs/0", "tier": 2, "family": "prompt", "trains": ()}
    with pytest.raises(ValueError, match="use: got 'plug', expected one of 'attach'"):
        Card(**known, use="plug", status="exact")
    with pytest.raises(ValueError, match="status: got 'done', expected one of 'exact'"):
        Card(**known, use="attach", status="done")
