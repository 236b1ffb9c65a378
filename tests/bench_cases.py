# SPDX-License-Identifier: Apache-2.0
"""Tiny versions of the benchmark cases, and whether their providers agree."""

from importlib.util import find_spec

import pytest

from bench.case import difference
from bench.measure import FAILED, WRONG, attempt

#: Marks of tests of a case that needs an extra which a GPU machine without network may lack.
NEEDS = {"ipadapter": pytest.mark.skipif(not find_spec("diffusers"), reason="diffusers is not installed")}

TINY = {
    "apt_step": {"layers": 2, "batch": 2, "prompts": 3},
    "cocoop_step": {"batch": 3, "classes": 5, "layers": 2, "width": 128, "vocab": 1200, "pixels": 32},
    "compress_kv": {"tokens": 40, "dim": 16},
    "coop_text": {"classes": 7, "context": 5, "layers": 2, "width": 128, "vocab": 1200},
    "cpu_candidates": {"batch": 2, "heads": 2, "tokens": 19, "dim": 16, "prompts": 3},
    "decode": {"tokens": 40, "layers": 2, "width": 72, "vocab": 31},
    "decode_attention": {"tokens": 70, "heads": 4, "heads_kv": 2, "dim": 16},
    "decoupled_attention": {"batch": 2, "heads": 2, "tokens": 19, "text": 5},
    "diffuse_prompts": {"batch": 2, "tokens": 19, "width": 32, "prompts": 5, "head_dim": 16},
    "ipadapter": {"steps": 3, "layers": 1, "queries": 24, "text": 5},
    "key_scores": {"tokens": 70, "heads": 4, "heads_kv": 2, "dim": 16},
    "maple_step": {"classes": 5, "depth": 2, "layers": 3, "width": 128, "vocab": 1200, "pixels": 32},
    "multilane": {"tasks": 2, "batch": 2, "layers": 2, "width": 64, "pixels": 28, "summaries": 3, "length": 2},
    "prefill_compress": {"tokens": 40, "layers": 2, "width": 72, "vocab": 31},
    "prefill_kvpress": {"tokens": 40, "layers": 2, "width": 72, "vocab": 31},
    "prefix_step": {"batch": 2, "tokens": 7, "prompts": 5, "layers": 2, "width": 72, "vocab": 31},
    "prompt_attention": {"batch": 2, "heads": 2, "tokens": 19, "dim": 16, "prompts": 3},
    "prompt_bank": {"tenants": 7, "batch": 5, "heads": 2, "tokens": 19, "dim": 16, "prompts": 3},
    "prompt_attention_varlen": {"classes": 5, "heads": 2, "dim": 16, "prompts": 3},
    "summarize_tokens": {"batch": 2, "tokens": 19, "width": 32, "tasks": 2, "summaries": 3},
    "vpt_step": {"layers": 2, "batch": 2, "prompts": 3},
}


def agreed(case):
    """The providers that were compared with the reference, and why the others were not."""
    want = case.reference()
    compared, reasons = set(), {}
    for name, provider in case.providers.items():
        found, why_not = None, provider.why_not
        if why_not is None:
            found, why_not = attempt(lambda n=name: difference(case, n, want))
            assert not (why_not or "").startswith((WRONG, FAILED)), f"{name}: {why_not}"
        if why_not:
            reasons[name] = why_not
        elif found is not None:
            compared.add(name)
    return compared, reasons
