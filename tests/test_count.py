# SPDX-License-Identifier: Apache-2.0
"""``fastprompt count``: APT's published column, and counts against PyTorch's flop counter on real forwards."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, ViTConfig, ViTModel

import fastprompt
from fastprompt.cli import main
from fastprompt.hf.outputs import attention_towers
from fastprompt.hf.published import InsertedPrompts, ReadPrompts
from fastprompt.hf.shapes import layers_of
from fastprompt.recipes.cost import BASELINE, own_cost, prompt_costs

LENGTH, BATCH = 5, 3


def counted(tmp_path, *arguments):
    file = tmp_path / "count.json"
    assert main(["count", *arguments, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    return found, {(r["recipe"], r["form"].partition(":")[0]): r for r in found["rows"]}


def test_the_vilt_column_of_apts_paper(tmp_path, capsys):
    """0.91 G against 5.14 G for deep prompts, -82.30 %; 1.917 M and 1.84 M parameters; and what sharing keys gives."""
    found, rows = counted(tmp_path, "vilt", "--batch", "256")
    apt, deep, shared = rows["APT", "as published"], rows["VPT", BASELINE], rows["VPT", "fastprompt"]
    assert (found["tokens"], found["length"], found["width"], found["attentions"]) == ([243], 200, 768, 12)
    assert [round(r["multiply_adds"] / 1e9, 2) for r in (apt, deep)] == [0.91, 5.14]
    # The paper divides the rounded numbers.
    rounded = [round(r["multiply_adds"] / 1e9, 2) for r in (apt, deep)]
    assert round(100 * (rounded[0] / rounded[1] - 1), 2) == -82.30 and abs(100 * apt["against"] + 82.30) < 0.01
    assert apt["trained"] == 12 * (200 * 768 + 2 * 4 * 768 + 1) == 1_916_940
    assert deep["trained"] == 12 * 200 * 768
    # Exact deep prompts, keys and values once a batch, add no more than the approximation is said to.
    assert shared["multiply_adds"] == 12 * (2 * 243 * 200 * 768 + 2 * 200 * 768**2 / 256) < apt["multiply_adds"]
    printed = capsys.readouterr().out
    assert "0.911" in printed and "5.143" in printed and "1.917 M" in printed and "does not state" in printed


def test_meter_like_streams(tmp_path):
    """6 layers of two streams, self- and cross-attention each: 2.31 G and 3.834 M parameters, as published."""
    found, rows = counted(
        tmp_path, "bridgetower", "--tower", "joint", "--tokens", "577", "50", "--recipe", "apt"
    )  # fmt: skip
    assert (found["layers"], found["attentions"]) == (12, 24)
    assert round(rows["APT", "fastprompt, baked"]["multiply_adds"] / 1e9, 2) == 2.31
    assert rows["APT", "as published"]["trained"] == 24 * (200 * 768 + 2 * 4 * 768 + 1)


@pytest.mark.parametrize(
    ("model", "tower", "width", "tokens"),
    [("vit-b16", "vision", 768, 197), ("clip-vit-b16", "vision", 768, 197), ("dinov2-s", "vision", 384, 257)],
)
def test_presets_know_their_tokens(tmp_path, model, tower, width, tokens):
    found, _ = counted(tmp_path, model, "--tower", tower)
    assert (found["width"], found["tokens"], found["layers"]) == (width, [tokens], 12)


def vit(**options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    config = ViTConfig(**sizes | options, image_size=32, patch_size=8, attn_implementation="eager")
    return ViTModel(config).eval()


def products(model):
    """Multiply-adds of the matrix products of one forward of a batch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(BATCH, 3, 32, 32))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("options", [{}, {"hidden_size": 48, "intermediate_size": 40}, {"num_hidden_layers": 2}])
def test_counts_are_those_of_real_forwards(options, monkeypatch):
    """The forms as published, and ours with the reference, whose operations the counter sees; in any shape."""
    monkeypatch.setattr("fastprompt.config.IMPL", "reference")
    model = vit(**options)
    layers = layers_of(model, attention_towers(model)[0])
    base, patches = products(model), 16 * 3 * 8 * 8 * layers[0].attentions[0].site.width
    pooler = layers[0].attentions[0].site.width ** 2
    assert BATCH * (own_cost(layers, [17]) + patches + pooler) == base

    found = {c.form: c.multiply_adds for c in prompt_costs(layers, fastprompt.APT(LENGTH), [17], BATCH)}
    with fastprompt.attach(model, fastprompt.APT(LENGTH)) as handle:
        assert products(model) - base == BATCH * found[f"fastprompt: key map once a batch of {BATCH}"]
        assert products(handle.bake().model) - base == BATCH * found["fastprompt, baked"]
    once = {c.form: c.multiply_adds for c in prompt_costs(layers, fastprompt.APT(LENGTH), [17])}
    ReadPrompts(fastprompt.attach(model, fastprompt.APT(LENGTH)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() // 2 - base // BATCH == once["as published: one sample"]

    recipe = fastprompt.VPT(LENGTH, init="normal")
    found = {c.form: c.multiply_adds for c in prompt_costs(layers, recipe, [17], BATCH)}
    model = vit(**options)
    prompts = {i: torch.nn.Parameter(torch.zeros(LENGTH, model.config.hidden_size)) for i in range(len(layers))}
    with InsertedPrompts(model, prompts):
        assert products(model) - base == BATCH * found["as published: tokens in every layer"]
    with fastprompt.attach(model, recipe):
        assert products(model) - base == BATCH * found[f"fastprompt: keys and values once a batch of {BATCH}"]

    (prefix,) = prompt_costs(layers, fastprompt.PrefixKV(LENGTH), [17], BATCH)
    with fastprompt.attach(model, fastprompt.PrefixKV(LENGTH)) as handle:
        assert products(model) - base == BATCH * prefix.multiply_adds and handle.num_trainable == prefix.trained


def test_trained_numbers_are_those_of_handles():
    model = vit()
    layers = layers_of(model, attention_towers(model)[0])
    for recipe in (fastprompt.VPT(LENGTH, layers=(1, 2)), fastprompt.APT(LENGTH, 2, layers=(0,), zero_init=True)):
        with fastprompt.attach(model, recipe) as handle:
            assert {c.trained for c in prompt_costs(layers, recipe, [17])} == {handle.num_trainable}


def test_fused_projections_and_cross_attention_count_the_same():
    """GPT-2 makes queries, keys and values in one layer; BERT's cross-attention reads other tokens."""
    gpt = GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=20))
    (tower,) = attention_towers(gpt)
    layers = layers_of(gpt, tower)
    assert own_cost(layers, [7]) == 2 * (7 * 12 * 32 * 32 + 2 * 32 * 7 * 7)
    assert layers[0].attentions[0].matrices == (32 * 32, 2 * 32 * 32)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    bert = BertModel(BertConfig(**sizes, vocab_size=50, is_decoder=True, add_cross_attention=True))
    layers = layers_of(bert, attention_towers(bert)[0])
    crossed = 7 * (6 + 4) * 32 * 32 + 3 * 2 * 32 * 32 + 2 * 32 * 7 * (7 + 3)
    assert own_cost(layers, [7], context=3) == crossed
    assert [len(layer.attentions) for layer in layers] == [2]


def test_a_config_file_is_a_model(tmp_path):
    vit().config.save_pretrained(tmp_path)
    found, _ = counted(tmp_path, str(tmp_path / "config.json"), "--length", "5")
    assert (found["class"], found["width"], found["tokens"]) == ("ViTModel", 32, [17])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vilt-b"], "model: got 'vilt-b', expected one of vilt, vit-b16"),
        (["bert"], "--tokens: got none, which bert does not tell"),
        (["vit-b16", "--tokens", "3", "4"], "--tokens: got 2 numbers, expected 1 or 1"),
        (["vit-b16", "--tokens", "0"], "--tokens: got [0], expected numbers >= 1"),
        (["vit-b16", "--batch", "0"], "--batch: got 0, expected numbers >= 1"),
        (["clip-vit-b16"], "pass tower='vision' or tower='text'"),
        (["vit-b16", "--length", "0"], "length: got 0"),
        (["vit-b16", "--recipe", "vpt", "--layers", "0"], "expected deep prompts up to the last layer"),
        (["vit-b16", "--recipe", "apt", "--rank", "1000"], "rank: got 1000, expected at most 768"),
    ],
)
def test_errors(arguments, message, capsys):
    assert main(["count", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_recipes_without_a_count_are_refused():
    model = vit()
    with pytest.raises(ValueError, match=r"recipe: got CoOp\(.*expected one of VPT, APT, PrefixKV"):
        prompt_costs(layers_of(model, attention_towers(model)[0]), fastprompt.CoOp(), [17])
