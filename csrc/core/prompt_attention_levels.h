// SPDX-License-Identifier: Apache-2.0
// The float engine of prompt attention, compiled once a level.
#pragma once

#include "prompt_attention.h"

namespace fastprompt {

namespace scalar {
void prompt_attention_forward(const PromptAttention& p, const Rows& out, const Rows& lse, const Threads& threads);
void prompt_attention_backward(const PromptAttention& p, const PromptAttentionGrads& grads, const Threads& threads);
}  // namespace scalar

namespace avx2 {
void prompt_attention_forward(const PromptAttention& p, const Rows& out, const Rows& lse, const Threads& threads);
void prompt_attention_backward(const PromptAttention& p, const PromptAttentionGrads& grads, const Threads& threads);
}  // namespace avx2

namespace avx512 {
void prompt_attention_forward(const PromptAttention& p, const Rows& out, const Rows& lse, const Threads& threads);
void prompt_attention_backward(const PromptAttention& p, const PromptAttentionGrads& grads, const Threads& threads);
}  // namespace avx512

}  // namespace fastprompt
