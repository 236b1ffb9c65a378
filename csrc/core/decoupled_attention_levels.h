// SPDX-License-Identifier: Apache-2.0
// The kernels of decoupled_attention of every level; that of AMX takes bfloat16 alone.
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

namespace amx {
void decoupled_attention_forward(const DecoupledAttention& p, const Rows& out, const Threads& threads);
void decoupled_attention_backward(const DecoupledAttention& p, const Rows& grad_out, const Rows& query_grad,
                                  const Threads& threads);
}  // namespace amx

}  // namespace fastprompt
