// SPDX-License-Identifier: Apache-2.0
// How much attention every key has received: column sums of a softmax whose row sums are known.
//
//   c[b, h, j] = sum_i exp(scale * q_i k_j - lse_i), over the counted rows i that may see key j,
//
// then one number for the query heads of a key head. Nothing of size tq * tk is stored.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"
#include "types.h"

namespace fastprompt {

enum class GroupReduce : int { mean = 0, sum = 1, max = 2 };

struct KeyScores {
  int64_t samples = 0, heads = 0, heads_kv = 0, tq = 0, tk = 0, dim = 0;
  Rows query, key;       // one element type
  Rows lse;              // float32, one element a row; a row with -inf counts for no key
  Rows query_mask;       // bool, one element a row, may be empty: rows to count
  Rows key_mask;         // bool, one element a key, may be empty: other keys score 0
  int64_t query_start = 0;  // rows from here on are counted
  bool causal = true;       // query i sees key j <= i + tk - tq
  bool visible = false;     // divide by the number of counted rows that may see the key, whatever their lse
  GroupReduce reduce = GroupReduce::mean;
  float scale = 1;

  int64_t groups() const { return heads / heads_kv; }
};

// scores float32, one element a key (`row` is its stride). What rows and keys hold that do not count does not matter.
// The bits of a sample's scores depend on that sample alone.
void key_scores(const KeyScores& p, const Rows& scores, Isa isa, const Threads& threads);

}  // namespace fastprompt
