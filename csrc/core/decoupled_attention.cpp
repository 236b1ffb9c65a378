// SPDX-License-Identifier: Apache-2.0
#include "decoupled_attention.h"

#include "decoupled_attention_levels.h"

namespace fastprompt {

int64_t DecoupledAttention::keys() const {
  int64_t total = 0;
  for (int64_t j = 0; j < count; ++j) total += branches[j].keys;
  return total;
}

void decoupled_attention_forward(const DecoupledAttention& p, const Rows& out, Isa isa, const Threads& threads) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::amx:
    case Isa::avx512: return avx512::decoupled_attention_forward(p, out, threads);
    case Isa::avx2: return avx2::decoupled_attention_forward(p, out, threads);
#endif
    default: return scalar::decoupled_attention_forward(p, out, threads);
  }
}

void decoupled_attention_backward(const DecoupledAttention& p, const Rows& grad_out, const Rows& query_grad, Isa isa,
                                  const Threads& threads) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::amx:
    case Isa::avx512: return avx512::decoupled_attention_backward(p, grad_out, query_grad, threads);
    case Isa::avx2: return avx2::decoupled_attention_backward(p, grad_out, query_grad, threads);
#endif
    default: return scalar::decoupled_attention_backward(p, grad_out, query_grad, threads);
  }
}

}  // namespace fastprompt
