// SPDX-License-Identifier: Apache-2.0
// What forward and backward of attention on tiles share: rows of a key head, prompts as bfloat16, masks, causal limits.
#pragma once

#include "amx_tiles.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// Rows that a product takes. Of queries: those of all heads of a key head, query by query, so that what a causal row
// sees only grows with its number.
struct HeadRows {
  Rows rows;
  int64_t sample, head, first, groups;

  char* at(int64_t r) const {
    const int64_t i = groups == 1 ? r : r / groups;
    return rows.at(sample, head + r - i * groups, first + i);
  }
  const BFloat16* operator()(int64_t r) const { return reinterpret_cast<const BFloat16*>(at(r)); }
};

inline HeadRows query_rows(const PromptAttention& p, const Rows& rows, int64_t s, int64_t head_kv) {
  return {rows, s, head_kv * p.groups(), p.first_row(s), p.groups()};
}
inline HeadRows key_rows(const PromptAttention& p, const Rows& rows, int64_t s, int64_t head_kv) {
  return {rows, s, head_kv, p.first_row(s), 1};
}

// Keys of prompt g; float32 is rounded to `rounded` [prompts, dim].
inline HeadRows prompt_rows(const PromptAttention& p, const Rows& rows, int64_t g, int64_t head_kv, BFloat16* rounded) {
  if (rows.dtype == DType::bfloat16) return {rows, g, head_kv, 0, 1};
  for (int64_t r = 0; r < p.prompts; ++r) {
    const auto* from = reinterpret_cast<const float*>(rows.at(g, head_kv, r));
    for (int64_t d = 0; d < p.dim; d += kWidth) {
      Vec::load_first(from + d, p.dim - d).store_first(rounded + r * p.dim + d, p.dim - d);
    }
  }
  return {{rounded, DType::bfloat16, 0, 0, p.dim}, 0, 0, 0, 1};
}
inline int64_t rounded_prompt(const PromptAttention& p, const Rows& rows) {
  return rows.dtype == DType::bfloat16 ? 0 : p.prompts * p.dim;
}

// Rows that a task will read next, fetched while it computes: from the last cache they take longer than their packing.
class Ahead {
 public:
  Ahead() = default;
  // To be fetched in about `steps` calls.
  Ahead(const PromptAttention& p, int64_t s, int64_t head_kv, int64_t steps)
      : bytes_(p.dim * size_of(p.query.dtype)),
        streams_{{query_rows(p, p.query, s, head_kv), p.queries_of(s) * p.groups()},
                 {key_rows(p, p.key, s, head_kv), p.keys_of(s)},
                 {key_rows(p, p.value, s, head_kv), p.keys_of(s)}} {
    for (Stream& stream : streams_) stream.step = stream.count / std::max<int64_t>(steps, 1) + 1;
  }

  void fetch() {
    for (Stream& stream : streams_) {
      const int64_t end = std::min(stream.next + stream.step, stream.count);
      for (; stream.next < end; ++stream.next) {
        const char* row = stream.rows.at(stream.next);
        for (int64_t i = 0; i < bytes_; i += 64) __builtin_prefetch(row + i, 0, 2);
      }
    }
  }

 private:
  struct Stream {
    HeadRows rows;
    int64_t count, step = 0, next = 0;
  };

  int64_t bytes_ = 0;
  Stream streams_[3] = {};
};

// How many instance keys query row r of a sample may see by causality.
struct Causal {
  bool on;
  int64_t keys, offset, groups;

  Causal(const PromptAttention& p, int64_t s)
      : on(p.causal), keys(p.keys_of(s)), offset(keys - p.queries_of(s)), groups(p.groups()) {}
  int64_t limit(int64_t r) const {
    return on ? std::clamp<int64_t>(r / groups + 1 + offset, 0, keys) : keys;
  }
};

// One row of a mask.
struct MaskRow {
  const char* data;
  DType dtype;
  int64_t key;

  MaskRow(const Mask& mask, const HeadRows& rows, int64_t r) : dtype(mask.dtype), key(mask.key) {
    const int64_t i = r / rows.groups, h = rows.head + r - i * rows.groups;
    data = static_cast<const char*>(mask.data) +
           (rows.sample * mask.sample + h * mask.head + i * mask.query) * size_of(mask.dtype);
  }

  // What keys [j, j + n), at most 16, add to scores in units of log2.
  __m512 load(int64_t j, int64_t n) const {
    if (key != 1) return load_strided(j, n);
    const __mmask16 kept = Vec::first(n);
    if (dtype != DType::boolean) {
      return _mm512_mul_ps(load_first(data, dtype, j, n).v, _mm512_set1_ps(kLog2e));
    }
    const __m128i seen = _mm_maskz_loadu_epi8(kept, data + j);
    const __mmask16 hidden = _mm_testn_epi8_mask(seen, seen);
    return _mm512_maskz_mov_ps(hidden, _mm512_set1_ps(-std::numeric_limits<float>::infinity()));
  }

 private:
  __m512 load_strided(int64_t j, int64_t n) const {
    alignas(64) char found[64] = {};
    const int64_t size = size_of(dtype);
    for (int64_t x = 0; x < n && x < kWidth; ++x) std::memcpy(found + x * size, data + (j + x) * key * size, size);
    MaskRow dense = *this;
    dense.data = found, dense.key = 1;
    return dense.load(0, std::min(n, kWidth));
  }
};

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
