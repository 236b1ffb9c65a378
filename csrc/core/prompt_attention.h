// SPDX-License-Identifier: Apache-2.0
// One softmax over prompt keys that samples share and the keys of each sample: forward and backward.
//
//   out = softmax(scale * q [K_p; K]^T + [0; mask]) [V_p; V]
//
// Batched: sample s has query rows [0, tq) and key rows [0, tk) at stride `sample`. Packed (cu_seqlens given): sequence
// s has the rows [cu[s], cu[s+1]) of queries and of keys, tq and tk are the longest, strides `sample` are 0.
// Query head h reads key head h / (heads / heads_kv). A causal query i sees instance key j <= i + tk - tq.
// What a sample's output is, to the bit, depends on that sample alone: not on the batch, not on the threads.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"
#include "types.h"

namespace fastprompt {

// Over instance keys: bool (true: may attend) or additive; strides in elements, 0 where it broadcasts.
struct Mask {
  const void* data = nullptr;
  DType dtype = DType::boolean;
  int64_t sample = 0, head = 0, query = 0, key = 0;

  explicit operator bool() const { return data != nullptr; }
};

struct PromptAttention {
  int64_t samples = 0, heads = 0, heads_kv = 0, tq = 0, tk = 0, dim = 0;
  int64_t prompts = 0;                    // keys of one prompt
  int64_t bank = 1;                       // how many prompts there are
  const int64_t* prompt_index = nullptr;  // [samples]: which one a sample reads; none: 0 if bank is 1, else its number
  const int32_t* cu_seqlens = nullptr;    // [samples + 1]
  Rows query, key, value;                 // one element type
  Rows prompt_key, prompt_value;          // that type or float32; stride `sample` goes from prompt to prompt
  Mask mask;
  bool causal = false;
  float scale = 1;

  int64_t groups() const { return heads / heads_kv; }
  int64_t prompt_of(int64_t s) const { return prompt_index ? prompt_index[s] : bank == 1 ? 0 : s; }
  int64_t first_row(int64_t s) const { return cu_seqlens ? cu_seqlens[s] : 0; }
  int64_t queries_of(int64_t s) const { return cu_seqlens ? cu_seqlens[s + 1] - cu_seqlens[s] : tq; }
  int64_t keys_of(int64_t s) const { return cu_seqlens ? cu_seqlens[s + 1] - cu_seqlens[s] : tk; }
};

// out [.., dim] in the query's type; lse float32, one element a row (`row` usually 1). A row that sees nothing gives 0
// and -inf.
void prompt_attention_forward(const PromptAttention& p, const Rows& out, const Rows& lse, Isa isa,
                              const Threads& threads);

// Gradients that are not wanted are empty. dq, dk, dv in the query's type; prompt gradients in that of their prompt.
// Every row of a wanted gradient is written; a prompt that no sample reads gets zeros. Sums over samples and rows are
// float32, in an order that only shapes and prompt_index decide, and are rounded once.
struct PromptAttentionGrads {
  Rows grad_out;           // in the query's type
  Rows grad_lse;           // float32, may be empty
  Rows out, lse;           // what the forward gave
  Rows query, key, value;  // written
  Rows prompt_key, prompt_value;
};

void prompt_attention_backward(const PromptAttention& p, const PromptAttentionGrads& grads, Isa isa,
                               const Threads& threads);

}  // namespace fastprompt
