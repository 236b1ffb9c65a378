# SPDX-License-Identifier: Apache-2.0
"""KV-cache compression without transformers: what a policy sees of a layer, the policies, and `compress`."""

from fastprompt.cache.observed import Observed
from fastprompt.cache.policies import H2O, TOVA, KeyDiff, LookM, Random, SnapKV, StreamingLLM
from fastprompt.cache.policy import Decoding, Policy, compress, suffices

__all__ = [
    "H2O", "TOVA", "Decoding", "KeyDiff", "LookM", "Observed", "Policy", "Random", "SnapKV", "StreamingLLM",
    "compress", "suffices",
]  # fmt: skip
