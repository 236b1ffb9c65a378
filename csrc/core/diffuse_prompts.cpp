// SPDX-License-Identifier: Apache-2.0
#include "diffuse_prompts.h"

#include "diffuse_prompts_levels.h"

namespace fastprompt {

#if defined(__x86_64__)
#if defined(__linux__)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif

void diffuse_prompts_forward(const DiffusePrompts& p, const Rows& out, Isa isa, const Threads& threads) {
  if constexpr (kTiles) {
    if (isa == Isa::amx && p.x.dtype == DType::bfloat16) return amx::diffuse_prompts_forward(p, out, threads);
  }
  if (isa >= Isa::avx512) return avx512::diffuse_prompts_forward(p, out, threads);
  if (isa == Isa::avx2) return avx2::diffuse_prompts_forward(p, out, threads);
  scalar::diffuse_prompts_forward(p, out, threads);
}

void diffuse_prompts_backward(const DiffusePrompts& p, const DiffusePromptsGrads& grads, Isa isa,
                              const Threads& threads) {
  if constexpr (kTiles) {
    if (isa == Isa::amx && p.x.dtype == DType::bfloat16) return amx::diffuse_prompts_backward(p, grads, threads);
  }
  if (isa >= Isa::avx512) return avx512::diffuse_prompts_backward(p, grads, threads);
  if (isa == Isa::avx2) return avx2::diffuse_prompts_backward(p, grads, threads);
  scalar::diffuse_prompts_backward(p, grads, threads);
}

#else

void diffuse_prompts_forward(const DiffusePrompts& p, const Rows& out, Isa, const Threads& threads) {
  scalar::diffuse_prompts_forward(p, out, threads);
}

void diffuse_prompts_backward(const DiffusePrompts& p, const DiffusePromptsGrads& grads, Isa, const Threads& threads) {
  scalar::diffuse_prompts_backward(p, grads, threads);
}

#endif

}  // namespace fastprompt
