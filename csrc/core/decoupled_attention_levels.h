// SPDX-License-Identifier: Apache-2.0
// The float engine of decoupled_attention, compiled once a level.
#pragma once

#include "decoupled_attention.h"

namespace fastprompt {

namespace scalar {
void decoupled_attention_forward(const DecoupledAttention& p, const Rows& out, const Threads& threads);
void decoupled_attention_backward(const DecoupledAttention& p, const Rows& grad_out, const Rows& query_grad,
                                  const Threads& threads);
}  // namespace scalar

namespace avx2 {
void decoupled_attention_forward(const DecoupledAttention& p, const Rows& out, const Threads& threads);
void decoupled_attention_backward(const DecoupledAttention& p, const Rows& grad_out, const Rows& query_grad,
                                  const Threads& threads);
}  // namespace avx2

namespace avx512 {
void decoupled_attention_forward(const DecoupledAttention& p, const Rows& out, const Threads& threads);
void decoupled_attention_backward(const DecoupledAttention& p, const Rows& grad_out, const Rows& query_grad,
                                  const Threads& threads);
}  // namespace avx512

}  // namespace fastprompt
