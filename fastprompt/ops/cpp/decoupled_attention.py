# SPDX-License-Identifier: Apache-2.0
"""`decoupled_attention` on the C++ kernels, branch by branch."""

from functools import partial

from fastprompt.ops import branches
from fastprompt.ops.cpp import prompt_attention

forward = partial(branches.forward, prompt_attention)
backward = partial(branches.backward, prompt_attention)
