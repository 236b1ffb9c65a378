# SPDX-License-Identifier: Apache-2.0
"""APT on models of every kind, against the released module put by name behind every attention module, in float64."""

import copy
from dataclasses import dataclass, field

import pytest
import tiny_decoders
import torch
from tiny_models import assert_close, checkpointing, outputs, randomised, same, step, untouched
from torch.nn.functional import linear
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    BlipTextConfig,
    BridgeTowerConfig,
    BridgeTowerModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LxmertConfig,
    LxmertModel,
    MobileNetV2Config,
    MobileNetV2Model,
    RobertaConfig,
    RobertaModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
    ViltConfig,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
    ViltModel,
    WhisperConfig,
    WhisperModel,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

import fastprompt
from fastprompt.errors import UnsupportedModelError

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = SIZE | {"vocab_size": 50, "max_position_embeddings": 20}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
LEARNED = ("prompt", "down", "up", "log_scale")
DECODER = {"is_decoder": True, "add_cross_attention": True}


def tokens(count=6):
    return torch.randint(3, 50, (2, count), generator=torch.Generator().manual_seed(4))


def rows(count, width):
    return torch.randn(2, count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def images(size=32):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def bridge_tower():
    size = SIZE | {"hidden_size": 64}
    text = size | {"vocab_size": 50, "max_position_embeddings": 20}
    vision = size | {"patch_size": 16, "image_size": 32}
    return BridgeTowerModel(BridgeTowerConfig(**size, text_config=text, vision_config=vision))


def bart():
    config = BartConfig(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=20, **SPECIAL,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def t5():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


def lxmert():
    config = LxmertConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=50, visual_feat_dim=8, l_layers=1,
        x_layers=2, r_layers=1,
    )  # fmt: skip
    return LxmertModel(config)


def vilt(kind=ViltModel, **options):
    return kind(ViltConfig(**TEXT, image_size=32, patch_size=16, **options))


@dataclass
class Family:
    """A model, a batch, and where its attention modules are: stable name -> path, and the projection from there."""

    build: object
    batch: object
    places: dict = field(default_factory=dict)
    projection: str = "../output.dense"
    tower: str | None = None


def stack(path, *inside, first=0, count=2):
    """Stable names of the attention modules ``inside`` every layer of a stack."""
    return {
        f"{first + i}.{part}" if part else str(first + i): f"{path}.{i}.{name}"
        for i in range(count) for part, name in enumerate(inside)
    }  # fmt: skip


BERT, BOTH = "attention.self", ("attention.self", "crossattention.self")
SEEN = {"encoder_hidden_states": rows(3, 24)}

FAMILIES = {
    "ViLT": Family(
        vilt, lambda: {"input_ids": tokens(), "pixel_values": images()}, stack("encoder.layer", "attention.attention")
    ),
    "ViLT, questions": Family(
        lambda: vilt(ViltForQuestionAnswering, num_labels=3),
        lambda: {"input_ids": tokens(), "pixel_values": images()},
        stack("vilt.encoder.layer", "attention.attention"),
    ),
    "ViLT, two images": Family(
        lambda: vilt(ViltForImagesAndTextClassification, num_images=2, num_labels=2, modality_type_vocab_size=3),
        lambda: {"input_ids": tokens(), "pixel_values": torch.stack([images(), images().flip(0)], 1)},
        stack("vilt.encoder.layer", "attention.attention"),
    ),
    "LXMERT": Family(
        lxmert,
        lambda: {"input_ids": tokens(), "visual_feats": rows(3, 8), "visual_pos": rows(3, 4)},
        stack("encoder.layer", BERT, count=1)
        | {
            k: f"{v}.{'att' if 'visual' in v else 'self'}"
            for k, v in stack("encoder.x_layers", "visual_attention", "lang_self_att", "visn_self_att", first=1).items()
        }
        | stack("encoder.r_layers", BERT, first=3, count=1),
    ),
    "BridgeTower, two streams": Family(
        bridge_tower,
        lambda: {"input_ids": tokens(), "pixel_values": images(), "attention_mask": torch.ones(2, 6).long()},
        stack("cross_modal_image_layers", *BOTH) | stack("cross_modal_text_layers", *BOTH, first=2),
        tower="joint",
    ),
    "Swin, windows": Family(
        lambda: SwinModel(
            SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4)
        ),
        lambda: {"pixel_values": images()},
        {
            "0": "encoder.layers.0.blocks.0.attention", "0.1": "encoder.layers.0.blocks.1.attention",
            "1": "encoder.layers.1.blocks.0.attention",
        },
        "o_proj",
    ),
    "RoBERTa": Family(
        lambda: RobertaModel(RobertaConfig(**TEXT)), lambda: {"input_ids": tokens()}, stack("encoder.layer", BERT)
    ),
    "DeBERTa": Family(
        lambda: DebertaV2Model(DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"])),
        lambda: {"input_ids": tokens()},
        stack("encoder.layer", BERT),
    ),
    "BERT, cross-attention": Family(
        lambda: BertModel(BertConfig(**TEXT, **DECODER)),
        lambda: {"input_ids": tokens(), "encoder_hidden_states": rows(3, 32)},
        stack("encoder.layer", *BOTH),
    ),
    "BLIP text": Family(
        lambda: BlipTextModel(BlipTextConfig(**TEXT, **SPECIAL, encoder_hidden_size=24)),
        lambda: {"input_ids": tokens(), **SEEN},
        stack("encoder.layer", *BOTH),
    ),
    "Q-Former": Family(
        lambda: Blip2QFormerModel(Blip2QFormerConfig(**SIZE, encoder_hidden_size=24, cross_attention_frequency=2)),
        lambda: {"query_embeds": rows(4, 32), **SEEN},
        {
            "0": "encoder.layer.0.attention.attention", "0.1": "encoder.layer.0.crossattention.attention",
            "1": "encoder.layer.1.attention.attention",
        },
    ),
    "BART": Family(
        bart,
        lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(4)},
        stack("model.encoder.layers", "self_attn", count=1)
        | stack("model.decoder.layers", "self_attn", "encoder_attn", first=1),
        "out_proj",
    ),
    "T5": Family(
        t5,
        lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(4)},
        stack("encoder.block", "layer.0.SelfAttention", count=1)
        | stack("decoder.block", "layer.0.SelfAttention", "layer.1.EncDecAttention", first=1, count=1),
        "o",
    ),
    "GPT-2, fused": Family(
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=20, **SPECIAL)),
        lambda: {"input_ids": tokens()},
        stack("transformer.h", "attn"),
        "c_proj",
    ),
    "Qwen2": Family(
        lambda: tiny_decoders.build("Qwen2", torch.float64),
        lambda: {"input_ids": tokens()},
        stack("model.layers", "self_attn", count=3),
        "o_proj",
    ),
}  # fmt: skip


def build(name):
    torch.manual_seed(1)
    model = FAMILIES[name].build()
    return (model if name == "Qwen2" else randomised(model)).double().eval()


def seeded(function, *args):
    """ViLT draws the order of an image's patches."""
    torch.manual_seed(7)
    return function(*args)


def attach(model, name, **options):
    """Prompts of which every part matters."""
    torch.manual_seed(3)
    handle = fastprompt.attach(model, fastprompt.APT(length=3, rank=2, **options), tower=FAMILIES[name].tower)
    with torch.no_grad():
        for p in handle.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return handle


def release(model, name, learned):
    """Put the released module behind the projection of every place."""
    modules = dict(model.named_modules())
    for place, path in FAMILIES[name].places.items():
        prompts, down, up, log_scale = (learned[f"layers.{place}.{n}"] for n in LEARNED)
        projection = FAMILIES[name].projection
        above = projection.startswith("../")
        inner = f"{path.rpartition('.')[0]}.{projection[3:]}" if above else f"{path}.{projection}"
        entered = []

        def enter(module, args, kwargs, entered=entered):
            entered.append(args[0] if args else kwargs["hidden_states"])

        def leave(module, args, y, entered=entered, prompts=prompts, down=down, up=up, log_scale=log_scale):
            active = linear(entered.pop(), prompts + linear(linear(prompts, down), up)).relu()
            return log_scale.exp() * (y + active.detach().max(-1, keepdim=True).values * (active @ prompts))

        modules[path].register_forward_pre_hook(enter, with_kwargs=True)
        modules[inner].register_forward_hook(leave)


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_released_module_and_is_found_by_stable_names(name, tmp_path):
    """Outputs, every gradient, saved names, and the way back."""
    model, batch = build(name), FAMILIES[name].batch()
    published = copy.deepcopy(model).requires_grad_(False)
    before = seeded(outputs, model, batch)
    with untouched(model), attach(model, name) as handle:
        copies = {n: p.detach().clone().requires_grad_() for n, p in handle.named_parameters()}
        assert list(copies) == [f"layers.{i}.{n}" for i in FAMILIES[name].places for n in LEARNED]
        release(published, name, copies)
        want = seeded(step, published, copies.values(), batch)
        assert_close(seeded(step, model, handle.parameters(), batch), want)
        handle.save(tmp_path)
        after = seeded(outputs, model, batch)
    assert same(seeded(outputs, model, batch), before)
    fastprompt.load(model, tmp_path)
    assert same(seeded(outputs, model, batch), after)


def test_a_layer_number_means_all_attention_of_that_layer():
    """Numbers go on from stack to stack: encoder 0, decoder 1 and 2."""
    model = build("BART")
    with fastprompt.attach(model, fastprompt.APT(length=3, layers=(0, -1))) as handle:
        places = dict.fromkeys(n.removeprefix("layers.").rpartition(".")[0] for n, _ in handle.named_parameters())
        assert list(places) == ["0", "2", "2.1"]


@pytest.mark.parametrize("name", ["Qwen2", "BART", "T5", "GPT-2, fused"])
def test_decoding_with_a_cache_equals_recomputing(name):
    model = build(name)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(tokens(), **settings)
    attach(model, name)
    found = model.generate(tokens(), **settings)
    assert torch.equal(found, model.generate(tokens(), use_cache=False, **settings)) and not torch.equal(found, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_vilt_with_gradient_checkpointing(reentrant):
    model, batch = build("ViLT").train(), FAMILIES["ViLT"].batch()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    handle = attach(model, "ViLT")
    want = seeded(step, model, handle.parameters(), batch)
    checkpointing(model, reentrant)
    assert_close(seeded(step, model, handle.parameters(), batch), want)


def test_vilt_learns_with_its_head():
    """What a step trains: prompts and the head, and nothing of the base."""
    model, batch = build("ViLT, questions"), FAMILIES["ViLT, questions"].batch()
    handle = fastprompt.attach(model, fastprompt.APT(length=3), train=("classifier",))
    seeded(step, model, handle.parameters(), batch)
    assert {n for n, p in model.named_parameters() if p.grad is not None and ".fastprompt." not in n} == {
        f"classifier.{i}.{n}" for i in (0, 1, 3) for n in ("weight", "bias")
    }
    assert all(p.grad is not None for p in handle.parameters())


def test_prompts_of_another_vilt_are_refused(tmp_path):
    with attach(build("ViLT"), "ViLT") as handle:
        handle.save(tmp_path)
    other = randomised(vilt(), seed=9).double()
    with untouched(other), pytest.raises(fastprompt.CheckpointError, match="prompts' base model held"):
        fastprompt.load(other, tmp_path)


def test_which_tower_is_asked_where_there_are_several():
    model = build("BridgeTower, two streams")
    with pytest.raises(ValueError, match="pass tower='text' or tower='joint'"):
        fastprompt.attach(model, fastprompt.APT(length=3))
    with attach(model, "BridgeTower, two streams"), fastprompt.attach(model, fastprompt.APT(length=3), tower="text"):
        pass
    with pytest.raises(ValueError, match="ViltModel has joint \\(ViltModel\\)"):
        fastprompt.attach(build("ViLT"), fastprompt.APT(length=3), tower="vision")


def test_attention_that_does_not_run_is_named():
    model = build("RoBERTa")
    model.encoder.layer[1].forward = lambda hidden, *args, **kwargs: hidden
    with untouched(model), pytest.raises(UnsupportedModelError, match=r"layer 1 .*: it did not run in one forward"):
        fastprompt.attach(model, fastprompt.APT(length=3))


def test_a_model_without_such_attention_is_unsupported():
    model = MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.1, image_size=32))
    with pytest.raises(UnsupportedModelError, match="layers of its own for queries, keys and values"):
        fastprompt.attach(model, fastprompt.APT(length=3))


def test_a_model_of_other_inputs_is_unsupported():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = WhisperModel(WhisperConfig(**sizes, **heads, **SPECIAL, vocab_size=50, decoder_start_token_id=1))
    with untouched(model), pytest.raises(UnsupportedModelError, match="WhisperModel reads input_features"):
        fastprompt.attach(model, fastprompt.APT(length=3))


def test_the_model_keeps_its_attention():
    """Prompts behind attention need no attention of ours."""
    model = build("RoBERTa")
    model.set_attn_implementation("eager")
    with attach(model, "RoBERTa"):
        assert model.config._attn_implementation == "eager"
        assert model(tokens(), output_attentions=True).attentions is not None
