// SPDX-License-Identifier: Apache-2.0
// Separate softmaxes over sets of keys, added with weights, in one pass over the queries: forward and backward.
//
//   out = sum_j w_j softmax(scale q K_j^T) V_j
//
// For few keys (text and image tokens) of many queries. There reading and writing rows costs as much as products do, so
// every row of q, dO and dq is touched once: the scores of all keys of all branches are there before the first softmax,
// and the forward leaves nothing for the backward. Half precision is widened to float as rows are read; products on AMX
// tiles would gain little where rows are what costs.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"
#include "prompt_attention.h"
#include "types.h"

namespace fastprompt {

// One set of keys. Gradients that are not wanted are empty.
struct KeyBranch {
  int64_t keys = 0;
  bool shared = false;          // by all samples: their gradients are summed
  Rows key, value;              // in the query's type
  float factor = 1;             // the weight of all rows, or
  Rows weight;                  // of each, float32; strides may be 0
  Rows key_grad, value_grad;    // written, in the query's type; one sample where shared
  Rows weight_grad;             // written, float32, one a row
};

struct DecoupledAttention {
  PromptAttention rows;  // the queries, their shape, the scale; without keys
  const KeyBranch* branches = nullptr;
  int64_t count = 0;

  int64_t keys() const;  // of all branches
};

// Most keys of all branches together: their scores and rows stay in the near caches.
constexpr int64_t kMostBranchKeys = 512;

// out [.., dim] in the query's type. A row of a branch without keys gets nothing of it.
void decoupled_attention_forward(const DecoupledAttention& p, const Rows& out, Isa isa, const Threads& threads);

// Every row of a wanted gradient is written; query_grad may be empty. Sums over rows and samples are float32, in an
// order that shapes alone decide, and are rounded once.
void decoupled_attention_backward(const DecoupledAttention& p, const Rows& grad_out, const Rows& query_grad, Isa isa,
                                  const Threads& threads);

}  // namespace fastprompt
