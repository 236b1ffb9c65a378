// SPDX-License-Identifier: Apache-2.0
// What runs on AMX tiles: bfloat16 queries, keys and values. Prompts may be float32: they are rounded first.
#pragma once

#include "prompt_attention.h"

namespace fastprompt::amx {

void prompt_attention_forward(const PromptAttention& p, const Rows& out, const Rows& lse, const Threads& threads);
void prompt_attention_backward(const PromptAttention& p, const PromptAttentionGrads& grads, const Threads& threads);

}  // namespace fastprompt::amx
