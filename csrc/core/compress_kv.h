// SPDX-License-Identifier: Apache-2.0
// Kept keys and values of a cache, with every evicted pair merged into its most cosine-similar survivor.
//
// Survivor c, m evicted pairs i of similarities u_i nearest to it:
//   average  (k_c + sum k_i) / (m + 1)
//   pivot    (k_c + sum (k_i + k_c) / 2) / (m + 1)
//   weighted (k_c + sum u_i k_i) / (m + 1)
// and likewise values. Ties go to the lower slot; NaN is the highest similarity. Sums are float32, by position: what is
// written depends on a head's keys and values alone, to the bit.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"
#include "types.h"

namespace fastprompt {

enum class Merge : int { drop = 0, average = 1, pivot = 2, weighted = 3 };

struct CompressKv {
  int64_t samples = 0, heads = 0, length = 0, slots = 0, dim = 0, dim_value = 0;  // length < 2^31
  Rows key, value;                       // [samples, heads, length], one element type
  const int64_t* index = nullptr;        // [samples, heads, slots]: positions that stay, ascending, and -1 behind them
  const unsigned char* valid = nullptr;  // [samples, length], bool; none: all are. What is 0 (padding) is never read
  Merge merge = Merge::drop;
  bool merge_keys = true;  // false: only values are merged
};

// Writes [samples, heads, slots] rows of the inputs' type; zeros where the index is -1.
void compress_kv(const CompressKv& p, const Rows& key, const Rows& value, Isa isa, const Threads& threads);

}  // namespace fastprompt
