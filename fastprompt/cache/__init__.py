# SPDX-License-Identifier: Apache-2.0
"""KV-cache compression without transformers: what a policy sees of a layer, the policies, and `compress`."""

from fastprompt.cache.adakv import AdaKV
from fastprompt.cache.blocks import Blocks, split
from fastprompt.cache.observed import Observed
from fastprompt.cache.policies import H2O, TOVA, KeyDiff, LookM, Random, SnapKV, StreamingLLM
from fastprompt.cache.policy import Decoding, Policy, compress, suffices

__all__ = [
    "H2O", "TOVA", "AdaKV", "Blocks", "Decoding", "KeyDiff", "LookM", "Observed", "Policy", "Random", "SnapKV",
    "StreamingLLM", "compress", "split", "suffices",
]  # fmt: skip
