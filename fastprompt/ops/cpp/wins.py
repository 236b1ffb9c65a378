# SPDX-License-Identifier: Apache-2.0
"""Where ``impl="auto"`` takes the C++ kernels: the one table, with the files of the measurements behind it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastprompt.ops.cpp import extension
from fastprompt.ops.cpp.extension import ISAS, missing

#: The least level, for an operation and a dtype, at which C++ was measured to be faster than the composition of
#: PyTorch's kernels that `auto` would take otherwise.
LEAST_ISA: dict[str, dict[str, str]] = {
    # bench/results/compress_kv-cpu.jsonl
    "compress_kv": {"float32": "avx512", "bfloat16": "amx", "float16": "avx512"},
    # bench/results/decoupled_attention-cpu.jsonl, -avx512.jsonl, -avx2.jsonl
    "decoupled_attention": {"float32": "avx2", "bfloat16": "avx2", "float16": "avx2"},
    # bench/results/diffuse_prompts-cpu.jsonl
    "diffuse_prompts": {"float32": "avx512", "bfloat16": "amx"},
    # bench/results/key_scores-cpu.jsonl, -avx512.jsonl, -avx2.jsonl
    "key_scores": {"float32": "avx2", "bfloat16": "amx", "float16": "avx512"},
    # bench/results/prompt_attention-cpu.jsonl, -avx512.jsonl, -avx2.jsonl; decode_attention-*.jsonl
    "prompt_attention": {"float32": "avx2", "bfloat16": "amx", "float16": "avx512"},
    # bench/results/prompt_attention_varlen-cpu.jsonl, -avx512.jsonl, -avx2.jsonl
    "prompt_attention_varlen": {"float32": "avx2", "bfloat16": "amx", "float16": "avx512"},
}

#: The largest head size that the kernels of attention take.
MOST_DIM = 256


def why(op: str, tensors: Sequence[Tensor]) -> str:
    """Why ``auto`` takes the C++ kernels, where nothing is against them."""
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    return f"measured to win in {dtype} from {LEAST_ISA[op][dtype]} on; this processor has {extension.best_isa()}"


def reasons_against(op: str, tensors: Sequence[Tensor], by_name: bool) -> list[str]:
    """Why the C++ kernels cannot run ``op`` on these CPU tensors, or, unless asked for by name, would not win."""
    if missing():
        return [missing()]
    dtype, reasons = str(tensors[0].dtype).removeprefix("torch."), []
    least = LEAST_ISA[op].get(dtype)
    if dtype not in ("float32", "bfloat16", "float16"):
        reasons.append(f"dtype {dtype} is not float16, bfloat16 or float32")
    elif not by_name and least is None:
        reasons.append(f"in {dtype} it was not measured to win")
    elif not by_name and least is not None and ISAS.index(extension.best_isa()) < ISAS.index(least):
        reasons.append(f"in {dtype} it was measured to win from {least} on; this processor has {extension.best_isa()}")
    if op != "diffuse_prompts" and tensors[0].shape[-1] > MOST_DIM:
        reasons.append(f"head size {tensors[0].shape[-1]} is more than {MOST_DIM}")
    return reasons
