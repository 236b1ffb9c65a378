// SPDX-License-Identifier: Apache-2.0
#include "prompt_attention.h"

#include "amx.h"
#include "decode.h"
#include "prompt_attention_levels.h"

namespace fastprompt {

void prompt_attention_forward(const PromptAttention& p, const Rows& out, const Rows& lse, Isa isa,
                              const Threads& threads) {
  if (suits_decode(p)) return decode(p, nullptr, out, lse, isa, threads);
  switch (isa) {
#if defined(__x86_64__)
    case Isa::amx:
#if defined(__linux__)
      if (p.query.dtype == DType::bfloat16) return amx::prompt_attention_forward(p, out, lse, threads);
#endif
      [[fallthrough]];
    case Isa::avx512: return avx512::prompt_attention_forward(p, out, lse, threads);
    case Isa::avx2: return avx2::prompt_attention_forward(p, out, lse, threads);
#endif
    default: return scalar::prompt_attention_forward(p, out, lse, threads);
  }
}

void prompt_attention_backward(const PromptAttention& p, const PromptAttentionGrads& grads, Isa isa,
                               const Threads& threads) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::amx:
#if defined(__linux__)
      if (p.query.dtype == DType::bfloat16) return amx::prompt_attention_backward(p, grads, threads);
#endif
      [[fallthrough]];
    case Isa::avx512: return avx512::prompt_attention_backward(p, grads, threads);
    case Isa::avx2: return avx2::prompt_attention_backward(p, grads, threads);
#endif
    default: return scalar::prompt_attention_backward(p, grads, threads);
  }
}

}  // namespace fastprompt
