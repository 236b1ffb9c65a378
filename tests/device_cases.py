# SPDX-License-Identifier: Apache-2.0
"""Every operation that has Triton kernels, as one step: outputs and all gradients, from tensors on the device."""

import attention_cases
import decoupled_cases
import test_compress_kv
import test_diffuse_prompts
import test_key_scores
import test_summarize_tokens
import torch
import varlen_cases
from attention_cases import TRITON_DEVICE, leaves, to_device
from test_decoupled_attention_autograd import split

from fastprompt.ops import (
    compress_kv,
    diffuse_prompts,
    key_scores,
    prompt_attention,
    prompt_attention_varlen,
    summarize_tokens,
)

LENGTHS = (33, 3)


def _prompt_attention(dtype):
    inputs = attention_cases.make(dtype, tq=40, tk=40, prompts=10, dim=32)
    return inputs, lambda *x: prompt_attention(*x, is_causal=True, return_lse=True, impl="triton")


def _prompt_attention_varlen(dtype):
    inputs, ends = varlen_cases.make(dtype, LENGTHS, prompts=17, dim=32), varlen_cases.ends(LENGTHS).to(TRITON_DEVICE)
    options = {"max_seqlen": max(LENGTHS), "is_causal": True, "return_lse": True, "impl": "triton"}
    return inputs, lambda *x: prompt_attention_varlen(*x, ends, **options)


def _decoupled_attention(dtype):
    inputs, attend = split(decoupled_cases.make(dtype, tq=40, dim=32, lengths=(20, 4)))
    return inputs, lambda *x: (attend(*x, impl="triton"),)


def _diffuse_prompts(dtype):
    inputs = test_diffuse_prompts.make(dtype, tokens=40, prompts=20, width=32)
    return inputs, lambda *x: (diffuse_prompts(*x, impl="triton"),)


def _summarize_tokens(dtype):
    inputs = test_summarize_tokens.make(dtype, tokens=40, summaries=9, width=32)
    return inputs, lambda *x: (summarize_tokens(*x, impl="triton"),)


def _key_scores(dtype):
    inputs = test_key_scores.make(dtype, tq=40, tk=40, dim=32)
    return inputs, lambda *x: (key_scores(*x, impl="triton"),)


def _compress_kv(dtype):
    inputs = test_compress_kv.make(dtype, length=70, dim=32)
    return inputs, lambda *x: compress_kv(*x, 20, recent=5, merge="weighted", impl="triton")


#: Operation -> given a dtype, inputs on the CPU, and the function of such inputs.
OPERATIONS = {
    f.__name__.removeprefix("_"): f
    for f in (
        _prompt_attention, _prompt_attention_varlen, _decoupled_attention, _diffuse_prompts, _summarize_tokens,
        _key_scores, _compress_kv,
    )
}  # fmt: skip
#: These carry no gradients: a compressed cache is for inference.
WITHOUT_GRADIENTS = ("key_scores", "compress_kv")


class Operation:
    """An operation on the device.

    Attributes:
        inputs: Leaves; all require a gradient where the operation has one.
        call: Gives its outputs.
    """

    def __init__(self, name, dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        inputs, self.call = OPERATIONS[name](dtype)
        inputs = leaves(inputs, (name not in WITHOUT_GRADIENTS,) * len(inputs))
        self.inputs = to_device(list(inputs), TRITON_DEVICE)

    def step(self, call=None):
        """Outputs, and the gradients where those of outputs are they themselves, but at most 1, for float16."""
        outputs = (call or self.call)(*self.inputs)
        live = [x for x in self.inputs if x.requires_grad]
        found = torch.autograd.grad(outputs, live, [x.detach().clamp(-1, 1) for x in outputs]) if live else ()
        return [x.detach() for x in (*outputs, *found)]
