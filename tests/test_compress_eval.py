# SPDX-License-Identifier: Apache-2.0
"""Long prompts, what is measured on them, and ``fastprompt compress-eval``."""

import json
from types import SimpleNamespace

import pytest
import tiny_texts
import torch
from torch.nn.functional import cross_entropy

import fastprompt
from fastprompt.cli import main
from fastprompt.cli_compress import POLICIES, Run, make_policy, read, table
from fastprompt.data.long_texts import excerpt, passkey
from fastprompt.errors import DataError
from fastprompt.hf.language_models import load_language_model
from fastprompt.tuning.long_context import continuation_loss, recalls


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_texts.save_model(tmp_path_factory.mktemp("model"))


def test_passkey_stands_where_it_should_and_fills_the_length():
    tokenizer = tiny_texts.tokenizer()
    places = []
    for depth in (0.0, 0.5, 1.0):
        text, key = passkey(tokenizer, 400, depth, seed=3)
        length = len(tokenizer(text).input_ids)
        assert 400 - 30 < length <= 400 and text.count(key) == 2 and text.endswith("The pass key is")
        places.append(text.index(key) / len(text))
    assert places == sorted(places) and places[0] < 0.2 and places[2] > 0.8 and abs(places[1] - 0.5) < 0.1
    assert passkey(tokenizer, 400, 0.5, seed=3) == passkey(tokenizer, 400, 0.5, seed=3)
    assert passkey(tokenizer, 400, 0.5, seed=3).key != passkey(tokenizer, 400, 0.5, seed=4).key


@pytest.mark.parametrize(("length", "depth", "message"), [(20, 0.5, "length: got 20"), (400, 1.5, "depth: got 1.5")])
def test_passkey_that_cannot_be(length, depth, message):
    with pytest.raises(DataError, match=message):
        passkey(tiny_texts.tokenizer(), length, depth, 0)


def test_excerpts_are_parts_of_one_text():
    tokenizer = tiny_texts.tokenizer()
    first, second = excerpt(tokenizer, 50, 0), excerpt(tokenizer, 50, 1)
    assert first.shape == second.shape == (1, 50) and not torch.equal(first, second)
    with pytest.raises(DataError, match=r"length: got 10000000 tokens"):
        excerpt(tokenizer, 10_000_000, 0)


def test_the_loss_is_that_of_the_model_and_dropping_keys_changes_it():
    model = tiny_texts.language_model().double()
    ids = torch.randint(len(tiny_texts.VOCABULARY), (2, 40))
    want = cross_entropy(model(ids).logits[:, 24:-1].flatten(0, 1), ids[:, 25:].flatten()).item()
    assert continuation_loss(model, ids, 25) == pytest.approx(want, rel=1e-12)
    assert continuation_loss(model, ids, 25, fastprompt.KeyDiff(keep=1.0)) == pytest.approx(want, rel=1e-12)
    assert continuation_loss(model, ids, 25, fastprompt.StreamingLLM(keep=5)) != pytest.approx(want, rel=1e-6)
    for context in (0, 40):
        with pytest.raises(ValueError, match=f"context: got {context} of 40 tokens"):
            continuation_loss(model, ids, context)


@pytest.mark.parametrize(("answer", "found"), [("12345", True), ("12346", False)])
def test_an_answer_counts_where_it_is_the_number(answer, found):
    """The number stands in the prompt, too; what follows it alone counts."""

    class Inputs(dict):
        input_ids = torch.zeros(1, 4)

        def to(self, device):
            return self

    class Numbers:
        eos_token_id = pad_token_id = 0

        def __call__(self, text, **kwargs):
            return Inputs() if kwargs.get("return_tensors") else SimpleNamespace(input_ids=list(text))

        def decode(self, ids):
            return answer if len(ids) == 5 else "12345 " + answer

    model = SimpleNamespace(device="cpu", generate=lambda **options: torch.zeros(1, 9))
    assert recalls(model, Numbers(), SimpleNamespace(text="12345?", key="12345")) is found


def test_every_policy_drops_what_the_ratio_says():
    model = tiny_texts.language_model()
    for name in POLICIES:
        cache = fastprompt.PromptCache(model, make_policy(name, 0.8))
        with torch.no_grad():
            model(torch.randint(10, (1, 100)), past_key_values=cache)
        cache.finalize()
        assert {layer.kept for layer in cache.stats()} == {20}, name
        cache.close()


def test_command(folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["compress-eval", "--model", str(folder), "--policy", "lookm", "streamingllm", "--ratio", "0.5", "0.8"]
    arguments += ["--length", "90", "--depth", "0.5", "--seeds", "2", "--dtype", "float32", "--out", str(out)]
    arguments += ["--device", "cpu"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "| passkey: numbers found, % (90 tokens) | 50% dropped | 80% dropped |" in shown
    assert "| loss: loss, nats a token (90 tokens) |" in shown and "| streamingllm |" in shown
    assert (out / "results.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = (out / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2 * (1 + 2 * 2)
    assert all(json.loads(line)["model"] == str(folder) for line in lines)
    (out / "results.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:20]]))
    assert main(arguments) == 0
    again = (out / "results.jsonl").read_text().splitlines()
    assert len(read(out / "results.jsonl")) == len(again) == len(lines) and again[:-1] == lines[:-1]
    # Nothing was whole, or what is there is no row.
    for torn in (lines[0][:20], "[1]\n"):
        (out / "results.jsonl").write_text(torn)
        assert main([*arguments, "--task", "loss"]) == 0
        assert len(read(out / "results.jsonl")) == len((out / "results.jsonl").read_text().splitlines()) == 2 * 5
    capsys.readouterr()
    assert main([*arguments, "--dtype", "bfloat16"]) == 1
    assert f"holds runs of {folder} in float32, expected {folder} in bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--ratio", "1"], "--ratio: got 1.0, expected shares in [0, 1)"),
        (["--seeds", "0"], "--seeds: got 0"),
        (["--model", "nowhere"], "model: got 'nowhere', expected 'smollm2-135m' or a local folder"),
        (["--length", "10", "--task", "passkey"], "length: got 10 tokens"),
    ],
)
def test_errors(folder, tmp_path, capsys, extra, message):
    arguments = ["compress-eval", "--model", str(folder), "--device", "cpu", "--out", str(tmp_path), *extra]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_table_leaves_out_what_was_not_measured():
    """A mean over other prompts than the plain cache's would not compare."""
    rows = {Run("passkey", "none", 0.0, 100, 0.5, seed): 1.0 for seed in (0, 1)}
    rows |= {Run("passkey", "tova", 0.5, 100, 0.5, seed): float(seed) for seed in (0, 1)}
    rows |= {Run("passkey", "lookm", 0.8, 100, 0.5, seed): 1.0 for seed in (0, 1)}
    rows |= {Run("passkey", "lookm", 0.5, 100, 0.5, 0): 1.0, Run("passkey", "tova", 0.8, 200, 0.5, 0): 1.0}
    assert table(rows).splitlines() == [
        "| passkey: numbers found, % (100, 200 tokens) | 50% dropped | 80% dropped |",
        "|---|---|---|",
        "| lookm |  | 100 |",
        "| tova | 50 |  |",
        "| plain cache: 100 |  |  |",
    ]


@pytest.mark.assets
def test_smollm2_finds_a_number_behind_a_compressed_cache():
    model, tokenizer = load_language_model("smollm2-135m", dtype=torch.bfloat16)
    task = passkey(tokenizer, 512, 0.5, seed=0)
    assert recalls(model, tokenizer, task) and recalls(model, tokenizer, task, fastprompt.TOVA(keep=0.5))
    assert not recalls(model, tokenizer, task, fastprompt.StreamingLLM(keep=0.2))
