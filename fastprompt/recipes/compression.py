# SPDX-License-Identifier: Apache-2.0
"""Cards of the policies that compress a key-value cache; nothing of them is trained."""

from __future__ import annotations

from typing import Any

from fastprompt.cache.adakv import AdaKV
from fastprompt.cache.policies import H2O, TOVA, KeyDiff, LookM, Random, SnapKV, StreamingLLM
from fastprompt.recipes.card import Card

_SHARED: dict[str, Any] = {"tier": 1, "family": "cache compression", "use": "compress", "trains": ()}
_ALL = {"keep": 1.0}

CARDS: dict[type, Card] = {
    LookM: Card(
        row=43,
        title="LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference",
        paper="https://arxiv.org/abs/2406.18139",
        status="exact",
        headline="KV memory down by up to 80 %, decoding up to 1.5 times faster",
        repo="SUSTechBruce/LOOK-M",
        identity={"recent": 1.0, "important": 0.0},
        deviations=(
            "The published method; the released code merges other rows than it describes, and knows one image.",
        ),
        **_SHARED,
    ),
    H2O: Card(
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        paper="https://arxiv.org/abs/2306.14048",
        status="exact",
        repo="FMInference/H2O",
        identity={"recent": 1.0, "important": 0.0},
        deviations=("A key's sum is divided by the number of queries that may see it; the released code does not.",),
        **_SHARED,
    ),
    SnapKV: Card(
        title="SnapKV: LLM Knows What You are Looking for Before Generation",
        paper="https://arxiv.org/abs/2404.14469",
        status="exact",
        repo="FasterDecoding/SnapKV",
        identity=_ALL,
        **_SHARED,
    ),
    TOVA: Card(
        title="Transformers are Multi-State RNNs",
        paper="https://arxiv.org/abs/2401.06104",
        status="exact",
        repo="schwartz-lab-NLP/TOVA",
        identity=_ALL,
        **_SHARED,
    ),
    StreamingLLM: Card(
        title="Efficient Streaming Language Models with Attention Sinks",
        paper="https://arxiv.org/abs/2309.17453",
        status="approximation",
        repo="mit-han-lab/streaming-llm",
        identity=_ALL,
        deviations=("Positions stay those of the text; the released code numbers the keys that are left.",),
        **_SHARED,
    ),
    KeyDiff: Card(
        title="KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference",
        paper="https://arxiv.org/abs/2504.15364",
        status="exact",
        identity=_ALL,
        **_SHARED,
    ),
    AdaKV: Card(
        title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
        paper="https://arxiv.org/abs/2407.11550",
        status="exact",
        repo="FFY0/AdaKV",
        identity={"policy": SnapKV(keep=1.0)},
        deviations=("Shares of the budget as kvpress has them, which the paper's first author reviewed.",),
        **_SHARED,
    ),
    Random: Card(
        title="Random keys, the baseline of every policy",
        paper="https://arxiv.org/abs/2306.14048",
        status="exact",
        identity=_ALL,
        **_SHARED,
    ),
}
