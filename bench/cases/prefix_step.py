# SPDX-License-Identifier: Apache-2.0
"""A training step of prefix tuning on SmolLM2-135M shapes, forward and backward, random weights.

Providers: `peft` (PEFT's PrefixTuningConfig as published: prefixes enter as a key-value cache), `kv_concat` (the fair
form: learned keys and values concatenated in the attention of every layer), `fastprompt`, and the `floor`: the same
frozen model without prefixes, gradients flowing down to the embedding output. PEFT's cache shifts positions by the
prefix length; so that all compute the same, the others are given shifted positions.
"""

from __future__ import annotations

import copy
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import LlamaConfig, LlamaForCausalLM

import fastprompt
from bench.case import CannotRun, Case, Provider, Step, composed
from fastprompt.hf import attention


def build(
    device: str, batch: int = 8, tokens: int = 128, prompts: int = 100, layers: int = 30, width: int = 576,
    vocab: int = 49152, dtype: str = "bfloat16", checkpointing: int = 0,
) -> Case:  # fmt: skip
    """The case; ``layers``, ``width`` and ``vocab`` make a quick version, ``checkpointing`` 1 recomputes layers."""
    chosen = getattr(torch, dtype)
    torch.manual_seed(0)
    head_dim = width // 9
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=width * 8 // 3, vocab_size=vocab, tie_word_embeddings=True, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, use_cache=False,
    )  # fmt: skip
    with torch.device(device):  # a processor takes seconds to draw them
        base = LlamaForCausalLM(config)
    ids = torch.randint(vocab, (batch, tokens), device=device)
    batched = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    shifted = {"position_ids": torch.arange(prompts, prompts + tokens, device=device).expand(batch, -1)}
    initial = [torch.randn(2, 3, prompts, head_dim) for _ in range(layers)]  # keys and values of every layer

    def fresh(kind: torch.dtype) -> LlamaForCausalLM:
        model = copy.deepcopy(base).to(kind).requires_grad_(False)
        model.train()  # recomputing is for training mode; no dropout
        if checkpointing:
            # Its name since transformers 5.23 and before.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return model

    def step(model: nn.Module, trained: list[nn.Parameter], **inputs: Tensor) -> Step:
        def run() -> list[Tensor]:
            for p in trained:
                p.grad = None
            out = model(**batched, **inputs)
            out.loss.backward()
            return [out.logits.detach(), *(p.grad for p in trained)]

        return run

    def attached(kind: torch.dtype = chosen) -> Step:
        model = fresh(kind)
        handle = fastprompt.attach(model, fastprompt.PrefixKV(length=prompts))
        trained = list(handle.parameters())
        with torch.no_grad():
            for p, value in zip(trained, (x for pair in initial for x in pair), strict=True):
                p.copy_(value)
        return step(model, trained, **shifted)

    def kv_concat(kind: torch.dtype = chosen) -> Step:
        run = attached(kind)

        def concatenated() -> list[Tensor]:
            with patch.object(attention, "prompt_attention", _kv_concat):
                return run()

        return concatenated

    def peft(kind: torch.dtype = chosen) -> Step:
        try:
            from peft import PrefixTuningConfig, get_peft_model
        except ImportError as error:
            raise CannotRun("peft is not installed") from error
        model = fresh(kind)
        try:
            model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prompts))
        except ValueError as error:
            raise CannotRun(f"peft: {error}") from error
        (embedding,) = (p for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            embedding.copy_(torch.stack(initial).permute(3, 0, 1, 2, 4).reshape(prompts, -1))  # [P, L * 2 * Hkv * D]
        return step(model, [embedding])

    def peft_in_order() -> list[Tensor]:
        """Its results, the gradient of all layers taken apart."""
        logits, grad = peft(torch.float32)()
        by_layer = grad.unflatten(1, (2 * layers, 3, head_dim)).permute(1, 2, 0, 3)
        return [logits, *by_layer]

    def floor() -> Step:
        model = fresh(chosen)
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
        return step(model, [])

    providers = {
        "floor": Provider(floor),
        "peft": Provider(peft, peft_in_order),
        "kv_concat": Provider(kv_concat, lambda: kv_concat(torch.float32)()),
        "fastprompt": Provider(attached, lambda: attached(torch.float32)()),
    }
    providers |= composed(device, providers)
    params = {"batch": batch, "tokens": tokens, "prompts": prompts, "layers": layers, "width": width, "vocab": vocab,
              "dtype": dtype, "checkpointing": checkpointing}  # fmt: skip
    return Case("prefix_step", providers, "floor", lambda: kv_concat(torch.float64)(), 1e-3, params)


def _kv_concat(query, key, value, prompt_key, prompt_value, *, attn_mask, is_causal, scale, **_):
    """The fair baseline: K_p and V_p copied to every sample in front of its keys; no padding here, so no mask."""
    if attn_mask is not None or not is_causal:
        raise ValueError(f"attn_mask, is_causal: got {attn_mask} and {is_causal}, expected None and True")
    keys, values = (
        torch.cat([prompt.to(instance.dtype).expand(len(instance), -1, -1, -1), instance], dim=2)
        for prompt, instance in ((prompt_key, key), (prompt_value, value))
    )
    mask = causal_lower_right(query.shape[2], keys.shape[2])
    # The log-sum-exp is for compressing caches; there is none.
    return nn.functional.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=True), None
