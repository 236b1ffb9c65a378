// SPDX-License-Identifier: Apache-2.0
// Prompts that every token reads after attention: out = factor * (base + m * (a values)), a = act(x keys^T), with
// m = max_j a_j, a constant in the backward, or 1. See fastprompt/ops/diffuse_prompts.py.
#pragma once

#include "isa.h"
#include "parallel.h"
#include "types.h"

namespace fastprompt {

struct DiffusePrompts {
  int64_t samples = 0, tokens = 0, width = 0, prompts = 0;
  Rows x, base;       // [sample, token], one type; the backward reads base for the gradient of log_scale alone
  Rows values, keys;  // [prompt] by stride `row`, in the type of x or in float32, which is rounded to that of x first
  float factor = 1;   // exp(log_scale)
  bool softmax = false, rowmax = true;

  int64_t rows() const { return samples * tokens; }
};

// out: every row is written, in the type of x.
void diffuse_prompts_forward(const DiffusePrompts& p, const Rows& out, Isa isa, const Threads& threads);

// Gradients that are not wanted are empty. Sums over tokens are float32, in an order that shapes alone decide, and are
// rounded once.
struct DiffusePromptsGrads {
  Rows grad_out;               // in the type of x
  Rows x, base;                // written, in the type of x
  Rows values, keys;           // written, in the type of what they are gradients of
  float* log_scale = nullptr;  // written

  bool slopes() const { return x || keys || log_scale; }  // whether the gradient reaches the activations
};

void diffuse_prompts_backward(const DiffusePrompts& p, const DiffusePromptsGrads& grads, Isa isa,
                              const Threads& threads);

// Rows of all tokens, sample after sample.
struct TokenRows {
  TokenRows(const Rows& r, const DiffusePrompts& p)
      : rows(r), tokens(p.tokens), even(p.samples == 1 || r.sample == p.tokens * r.row) {}

  char* at(int64_t r) const {
    if (even) return rows.at(0, 0, r);
    const int64_t s = r / tokens;
    return rows.at(s, 0, r - s * tokens);
  }

  const Rows rows;
  const int64_t tokens;
  const bool even;  // whether the next row is always as far
};

// Token number `i` of `count` nearly equal parts of all rows, at whole groups of 32.
inline int64_t first_of_part(int64_t rows, int64_t i, int64_t count) {
  const int64_t groups = (rows + 31) / 32, first = groups * i / count * 32;
  return first < rows ? first : rows;
}

// Ranges of tokens with sums of their own: enough for a few threads, and more where a range still has many tokens for
// every prompt, since each costs a pass over its sums.
inline int64_t token_ranges(const DiffusePrompts& p) {
  const int64_t few = std::min<int64_t>(4, p.rows() / 256), more = p.rows() / (8 * p.prompts + 256);
  return std::clamp<int64_t>(std::max(few, more), 1, 16);
}

}  // namespace fastprompt
