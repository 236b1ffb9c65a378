// SPDX-License-Identifier: Apache-2.0
// The kernels of diffuse_prompts of every level; that of AMX takes bfloat16 alone.
#pragma once

#include "diffuse_prompts.h"

namespace fastprompt {

namespace scalar {
void diffuse_prompts_forward(const DiffusePrompts& p, const Rows& out, const Threads& threads);
void diffuse_prompts_backward(const DiffusePrompts& p, const DiffusePromptsGrads& grads, const Threads& threads);
}  // namespace scalar

namespace avx2 {
void diffuse_prompts_forward(const DiffusePrompts& p, const Rows& out, const Threads& threads);
void diffuse_prompts_backward(const DiffusePrompts& p, const DiffusePromptsGrads& grads, const Threads& threads);
}  // namespace avx2

namespace avx512 {
void diffuse_prompts_forward(const DiffusePrompts& p, const Rows& out, const Threads& threads);
void diffuse_prompts_backward(const DiffusePrompts& p, const DiffusePromptsGrads& grads, const Threads& threads);
}  // namespace avx512

namespace amx {
void diffuse_prompts_forward(const DiffusePrompts& p, const Rows& out, const Threads& threads);
void diffuse_prompts_backward(const DiffusePrompts& p, const DiffusePromptsGrads& grads, const Threads& threads);
}  // namespace amx

}  // namespace fastprompt
