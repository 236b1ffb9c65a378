# SPDX-License-Identifier: Apache-2.0
"""A language model as a text classifier: scores, padding, the command line; SmolLM2 on real messages."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_texts import WORDS, language_model, save_model, tokenizer, write_csv

import fastprompt
from bench import tune_text
from fastprompt import cli, cli_tune
from fastprompt.cli import main
from fastprompt.data.texts import TextSample
from fastprompt.hf.texts import LabelScorer
from fastprompt.tuning import TuneConfig, evaluate, tune
from fastprompt.tuning.texts import TextTask

TEMPLATE = "{text} Label:"
SAMPLES = [TextSample("the iron", 1), TextSample("a plum and some fig of the lime", 0), TextSample("one", 1)]


def scorer(template=TEMPLATE, words=tuple(WORDS), dtype=torch.float32):
    return LabelScorer(language_model().to(dtype), tokenizer(), template, words)


def alone(model, text):
    """The language model's log-probabilities of the next token, for one prompt without padding."""
    ids = torch.tensor([tokenizer()(TEMPLATE.replace("{text}", text)).input_ids])
    return model.lm(input_ids=ids).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("attached", [False, True])
def test_scores_are_the_language_models_whatever_the_padding(attached):
    model = scorer(dtype=torch.float64)
    if attached:
        handle = fastprompt.attach(model.lm, fastprompt.PrefixKV(3, init="ptuning"))
        assert all(p.dtype == torch.float64 for p in handle.parameters())
    batch = torch.utils.data.default_collate(list(model.encode(SAMPLES, 64)))
    output = model(**batch)
    texts = sorted(SAMPLES, key=lambda s: len(s.text.split()))
    assert batch["labels"].tolist() == [s.label for s in texts]
    ids = [tokenizer().convert_tokens_to_ids(word) for word in WORDS]
    expected = torch.stack([alone(model, s.text) for s in texts])
    found = output.logits.log_softmax(-1)
    torch.testing.assert_close(found, expected[:, ids].log_softmax(-1).float(), rtol=0, atol=1e-5)
    loss = -torch.stack([row[ids[s.label]] for row, s in zip(expected, texts, strict=True)]).mean()
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-5)


def test_columns_of_padding_alone_are_not_computed_and_logits_only_at_the_end():
    model = scorer()
    seen = []
    model.lm.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape), with_kwargs=True)
    model.lm.lm_head.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape))
    data = model.encode(SAMPLES, 64)
    assert data.input_ids.shape == (3, 10)
    model(**torch.utils.data.default_collate([data[0], data[1]]))
    assert seen == [(2, 4), (2, 1, 32)]


def test_gradients_reach_the_prompts_and_do_not_depend_on_padding():
    model = scorer(dtype=torch.float64)
    handle = fastprompt.attach(model.lm, fastprompt.PrefixKV(3, init="ptuning"))
    data = model.encode(SAMPLES, 64)
    together = model(**torch.utils.data.default_collate(list(data))).loss
    apart = sum(model(**torch.utils.data.default_collate([example])).loss for example in data) / 3
    grads = [torch.autograd.grad(loss, list(handle.parameters())) for loss in (together, apart)]
    for got, want in zip(*grads, strict=True):
        assert want.abs().max() > 1e-4
        # The loss is taken in float32.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_long_texts_are_cut_and_counted():
    model = scorer()
    data = model.encode(SAMPLES, 3)
    assert data.cut == 1
    assert tokenizer().decode(data.input_ids[-1]).split() == ["a", "plum", "and", "Label", ":"]
    with pytest.raises(ValueError, match="max_tokens: got 0"):
        model.encode(SAMPLES, 0)


def test_templates_and_words_that_cannot_be_scored_are_refused():
    for template in ("Label:", "{text} {text}"):
        with pytest.raises(ValueError, match=r"expected a text that holds '\{text\}' once"):
            scorer(template)
    with pytest.raises(ValueError, match="'fruit' and 'fruit fig' begin with the same token"):
        scorer(words=("fruit", "fruit fig"))
    with pytest.raises(ValueError, match="words: got 'gas', which the tokenizer does not know"):
        scorer(words=("fruit", "gas"))
    with pytest.raises(ValueError, match="the word 'fruit' is no token of its own"):
        LabelScorer(language_model(), lambda text: SimpleNamespace(input_ids=[text]), TEMPLATE, tuple(WORDS))
    with pytest.raises(ValueError, match="got a word for gas, expected classes fruit, metal"):
        TextTask(data="a.csv", words={"gas": "air"}).label_words(("fruit", "metal"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return SimpleNamespace(model=save_model(folder / "lm"), data=write_csv(folder / "table.csv"))


def tune_arguments(files, out, *extra):
    return [
        "tune", "--task", "text", "--model", str(files.model), "--data", str(files.data), "--template", TEMPLATE,
        "--shots", "8", "--length", "3", "--epochs", "6", "--batch-size", "8", "--lr", "0.05",
        "--autocast", "off", "--device", "cpu", "--out", str(out), *extra,
    ]  # fmt: skip


def test_tune_eval_inspect(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(tune_arguments(files, out, "--max-tokens", "5", "--epochs", "20")) == 0
    tuned = capsys.readouterr().out
    run = json.loads((out / "run.json").read_text())
    assert run["after"]["loss"] < 0.6 * run["before"]["loss"]
    assert run["after"]["n"] == run["before"]["n"] == 30
    assert (run["kind"], run["steps"], run["task"]["template"]) == ("text", 40, TEMPLATE)
    assert "without prompts: accuracy" in tuned and "on 30 texts" in tuned and "are cut (--max-tokens)" in tuned
    assert main(["eval", str(out)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first in tuned and first.startswith("accuracy")
    assert main(["eval", str(out), "--data", str(files.data)]) == 0
    assert "on 60 texts" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    assert "PrefixKV(length=3" in capsys.readouterr().out


def test_apt(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(tune_arguments(files, out, "--recipe", "apt", "--lr", "0.01", "--epochs", "12")) == 0
    run = json.loads((out / "run.json").read_text())
    assert run["after"]["loss"] < run["before"]["loss"] and run["recipe"].startswith("APT(length=3")
    tuned = capsys.readouterr().out
    assert main(["eval", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] in tuned


def test_mlp_on_validation_texts(files, tmp_path):
    runs = []
    for part in ("validation", "test"):
        arguments = tune_arguments(files, tmp_path / part, "--reparam", "mlp", "--lr", "0.001", "--part", part)
        assert main(arguments) == 0
        runs.append(json.loads((tmp_path / part / "run.json").read_text()))
    assert (tmp_path / "test/prompts.safetensors").read_bytes() == (
        tmp_path / "validation/prompts.safetensors"
    ).read_bytes()
    assert runs[0]["after"]["n"] == 14 and runs[1]["after"]["n"] == 30


def test_interrupted_run_resumes_to_the_same_bits(files, tmp_path, monkeypatch, capsys):
    from fastprompt.tuning import loop

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(tune_arguments(files, whole)) == 0
    taken = loop.Run._take_step

    def interrupt(self):
        if self.step == 5:
            raise KeyboardInterrupt
        return taken(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_take_step", interrupt)
        assert main(tune_arguments(files, parts)) == 130
    assert main(tune_arguments(files, parts, "--resume")) == 0
    assert (whole / "prompts.safetensors").read_bytes() == (parts / "prompts.safetensors").read_bytes()
    capsys.readouterr()
    assert main(tune_arguments(files, parts, "--resume", "--eval-size", "20")) == 1
    assert "eval_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--image-size", "32"], "--image-size: got a value with --recipe prefix, but it is for --recipe vpt"),
        (["--model", "nowhere"], "expected 'smollm2-135m' or a local folder"),
        (["--data", "nowhere.csv"], "is not a file"),
        (["--shots", "40"], "has 30 texts, expected 55"),
        (["--words", "fruit=gold", "metal=gold"], "'gold' and 'gold' begin with the same token"),
        (["--words", "gas=air"], "got a word for gas"),
        (["--template", "no slot"], "template: got 'no slot'"),
        (["--max-tokens", "0"], "max_tokens: got 0"),
        (["--length", "0"], "length: got 0"),
    ],
)
def test_clear_errors(files, tmp_path, capsys, extra, message):
    out = tmp_path / "out"
    assert main(tune_arguments(files, out, *extra)) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not out.exists()


def test_text_options_are_refused_for_images(tmp_path, capsys):
    assert main(["tune", "--reparam", "mlp", "--out", str(tmp_path / "out")]) == 1
    assert "--reparam: got a value with --recipe vpt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tune", "--task", "text", "--words", "ham", "--out", str(tmp_path / "out")])
    assert "expected CLASS=WORD" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "reparam", "lr"),
    [([], "none", 1e-2), (["--reparam", "mlp"], "mlp", 1e-3), (["--reparam", "mlp", "--lr", "0.5"], "mlp", 0.5)],
)
def test_rate_and_template_that_are_left_out_or_escaped(extra, reparam, lr):
    command = ["tune", "--task", "text", "--out", "x", "--template", r"{text}\nLabel:", *extra]
    args = cli._parser().parse_args(command)
    kind = cli_tune.fill_in(args)
    job = kind.__new__(kind)
    assert (args.reparam, job.settings(args)["lr"], args.length) == (reparam, lr, 8)
    assert kind.name_task(args) == TextTask(template="{text}\nLabel:")


def test_eval_on_other_classes_is_refused(files, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(tune_arguments(files, out)) == 0
    other = tmp_path / "other.csv"
    other.write_text("text,label\niron,metal\nair,gas\n")
    assert main(["eval", str(out), "--data", str(other)]) == 1
    assert "expected ['fruit', 'metal']" in capsys.readouterr().err


def test_features_of_the_baseline_are_those_of_the_prompt_alone():
    model = scorer(dtype=torch.float64)
    found = tune_text.features(model, model.encode(SAMPLES, 64), batch=2)
    texts = sorted(SAMPLES, key=lambda s: len(s.text.split()))
    for row, sample in zip(found, texts, strict=True):
        ids = torch.tensor([tokenizer()(TEMPLATE.replace("{text}", sample.text)).input_ids])
        torch.testing.assert_close(row, model.lm.model(input_ids=ids).last_hidden_state[0, -1], rtol=0, atol=1e-6)


def test_linear_head_of_the_baseline_separates_and_does_not_see_the_test_labels():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    x[:, 0] += 12 * labels
    train, test = (x[:20], labels[:20]), (x[20:], labels[20:])
    assert tune_text.linear_head(train, test, 2) == 1.0
    assert tune_text.linear_head(train, (test[0], 1 - test[1]), 2) == 0.0


def test_table_and_plot_of_the_results(tmp_path):
    common = {"words": ["a", "b"], "model": "m", "data": "d", "shots": 4, "recipe": "r"}
    rows = [("zero-shot", [0.5, 0.5], 0), ("linear head", [0.6, 0.7], 10), ("PrefixKV", [0.8, 0.9], 1000)]
    file = tmp_path / "results.jsonl"
    file.write_text(
        "".join(json.dumps({"method": m, "accuracy": a, "trainable": n, **common}) + "\n" for m, a, n in rows)
    )
    assert tune_text.table(file).splitlines()[2:] == [
        "| zero-shot | 50.0 % | 0 |", "| linear head | 65.0 ± 7.1 % | 10 |", "| PrefixKV | 85.0 ± 7.1 % | 1,000 |",
    ]  # fmt: skip
    tune_text.plot(file, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.assets
def test_smollm2_learns_to_tell_spam():
    task = TextTask(shots=4, seed=0, eval_size=8, max_tokens=24, part="validation")
    model = task.build_model(task.texts().classes)
    assert sum(p.numel() for p in model.lm.parameters()) == 134_515_008
    capital = model.tokenizer("The capital of France is", return_tensors="pt")
    assert model.tokenizer.decode(model.lm(**capital).logits[0, -1].argmax()) == " Paris"
    train_set, _ = task.split(model)
    before = evaluate(model, train_set, batch_size=8, progress=False)
    handle = fastprompt.attach(model.lm, fastprompt.PrefixKV(8))
    config = TuneConfig(epochs=6, batch_size=8, lr=3e-2, warmup=0.0)
    result = tune(model, handle, train_set, train_set, config=config, progress=False)
    assert result.evaluation.loss < 0.6 * before.loss
