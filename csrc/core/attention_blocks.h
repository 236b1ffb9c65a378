// SPDX-License-Identifier: Apache-2.0
// What kernels of attention work on: lanes (the query rows of one key head), blocks of its keys, what masks hide.
//
// The rows of all query heads of a key head are numbered head by head; a block of them are the lanes of vectors.
// Keys of a sample are numbered prompts first, then instance keys; no copy joins them.
#pragma once

#include "prompt_attention.h"
#include "vec.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

constexpr int64_t kLanes = 64;  // most lanes of a block
constexpr int64_t kKeys = 72;   // most keys of a block: tiles of 6, 8 and 12 rows divide it

constexpr int64_t blocks_of(int64_t count, int64_t most) { return (count + most - 1) / most; }
constexpr int64_t to_vectors(int64_t count) { return round_up(count, kWidth); }

// Lanes [first, first + count); arrays over lanes have `width` elements, whole vectors.
struct Lanes {
  int64_t first, count, width;
};

// Number b of the `blocks_of(all, kLanes)` blocks, which are nearly equal.
inline Lanes lanes_of_block(int64_t all, int64_t b) {
  const int64_t blocks = blocks_of(all, kLanes), vectors = blocks_of(all, kWidth);
  const int64_t first = b * vectors / blocks * kWidth;
  const int64_t count = std::min((b + 1) * vectors / blocks * kWidth, all) - first;
  return {first, count, to_vectors(count)};
}

// The queries and keys of one key head of one sample.
struct KeyHead {
  const PromptAttention& p;
  int64_t sample, head;  // head: of keys
  int64_t tq = p.queries_of(sample), tk = p.keys_of(sample), row = p.first_row(sample);
  int64_t groups = p.groups();

  int64_t lanes() const { return groups * tq; }
  int64_t keys() const { return p.prompts + tk; }

  // f(lane within the block, query head, query, count) for every run of lanes that are rows of one head.
  template <class Function>
  void runs(const Lanes& lanes, const Function& f) const {
    if (groups == 1) return f(int64_t{0}, head, lanes.first, lanes.count);
    for (int64_t lane = 0; lane < lanes.count;) {
      const int64_t r = lanes.first + lane, query = r % tq;
      const int64_t count = std::min(tq - query, lanes.count - lane);
      f(lane, head * groups + r / tq, query, count);
      lane += count;
    }
  }
};

// Keys [first, first + count) of a sample; the first `prompts` of them are keys of its prompt.
struct KeyBlock {
  int64_t first, count, prompts;

  int64_t instance() const { return count - prompts; }  // how many instance keys
};

// How the keys of a sample are cut: prompts and instance keys apart, unless all fit in one block.
struct KeyBlocks {
  int64_t prompts, keys;  // keys: prompts included
  bool joined = keys <= kKeys;
  int64_t of_prompts = joined ? 0 : blocks_of(prompts, kKeys);
  int64_t count = joined ? (keys > 0 ? 1 : 0) : of_prompts + blocks_of(keys - prompts, kKeys);

  KeyBlock operator[](int64_t b) const {
    if (joined) return {0, keys, prompts};
    const bool prompt = b < of_prompts;
    const int64_t start = prompt ? 0 : prompts, all = prompt ? prompts : keys - prompts;
    const int64_t i = prompt ? b : b - of_prompts, blocks = prompt ? of_prompts : count - of_prompts;
    // Whole tiles of 6 rows but in the last block.
    const int64_t size = std::min<int64_t>(round_up(blocks_of(all, blocks), 6), kKeys);
    const int64_t first = std::min(i * size, all), length = std::min(first + size, all) - first;
    return {start + first, length, prompt ? length : 0};
  }
};

// `count` rows of `dim` elements as floats, rows `to_row` apart, zeros up to whole vectors. `through`: prompts in
// float32 beside queries in half precision are rounded as the queries are.
inline void copy_rows(const char* from, DType dtype, int64_t from_row, int64_t count, int64_t dim, DType through,
                      float* to, int64_t to_row) {
  const bool narrower = dtype == DType::float32 && through != DType::float32;
  for (int64_t r = 0; r < count; ++r, from += from_row * size_of(dtype), to += to_row) {
    for (int64_t d = 0; d < dim; d += kWidth) {
      const int64_t n = dim - d;
      Vec x = n >= kWidth ? load(from, dtype, d) : load_first(from, dtype, d, n);
      if (narrower) {
        alignas(kAlignment) float rounded[kWidth];  // room for any type
        store_first(x, rounded, through, 0, kWidth);
        x = load(rounded, through, 0);
      }
      x.store(to + d);
    }
  }
}

// `count` rows of dense floats, times `scale`, to rows of any type.
inline void store_rows(const float* from, int64_t from_row, int64_t count, int64_t dim, float scale, char* to,
                       DType dtype, int64_t to_row) {
  const Vec factor(scale);
  for (int64_t r = 0; r < count; ++r, from += from_row, to += to_row * size_of(dtype)) {
    for (int64_t d = 0; d < dim; d += kWidth) {
      store_first(Vec::load(from + d) * factor, to, dtype, d, std::min(kWidth, dim - d));
    }
  }
}

// The lanes' rows as columns, times `scale`: to[d * width + lane] for d < dim; lanes past the last are 0.
inline void pack_lanes(const KeyHead& head, const Lanes& lanes, const Rows& rows, float scale, float* to) {
  const char* at[kLanes];
  head.runs(lanes, [&](int64_t lane, int64_t h, int64_t query, int64_t count) {
    for (int64_t i = 0; i < count; ++i) at[lane + i] = rows.at(head.sample, h, head.row + query + i);
  });
  const Vec factor(scale);
  for (int64_t lane = 0; lane < lanes.width; lane += kWidth) {
    for (int64_t d = 0; d < head.p.dim; d += kWidth) {
      const int64_t n = std::min(kWidth, head.p.dim - d);
      Vec x[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        const bool real = lane + i < lanes.count;
        x[i] = real ? load_first(at[lane + i], rows.dtype, d, n) * factor : Vec(0.0f);
      }
      transpose(x);
      for (int64_t i = 0; i < n; ++i) x[i].store(to + (d + i) * lanes.width + lane);
    }
  }
}

// The lanes' rows as dense rows of floats, rows `to_row` apart.
inline void copy_lanes(const KeyHead& head, const Lanes& lanes, const Rows& rows, float* to, int64_t to_row) {
  head.runs(lanes, [&](int64_t lane, int64_t h, int64_t query, int64_t count) {
    copy_rows(rows.at(head.sample, h, head.row + query), rows.dtype, rows.row, count, head.p.dim, rows.dtype,
              to + lane * to_row, to_row);
  });
}

// Dense rows of the lanes, times `scale`, to where the rows belong.
inline void store_lanes(const KeyHead& head, const Lanes& lanes, const float* from, int64_t from_row, float scale,
                        const Rows& rows) {
  head.runs(lanes, [&](int64_t lane, int64_t h, int64_t query, int64_t count) {
    store_rows(from + lane * from_row, from_row, count, head.p.dim, scale,
               rows.at(head.sample, h, head.row + query), rows.dtype, rows.row);
  });
}

// One float a row (lse and its gradient), to or from an array over lanes.
inline void copy_lane_values(const KeyHead& head, const Lanes& lanes, const Rows& rows, float* to) {
  head.runs(lanes, [&](int64_t lane, int64_t h, int64_t query, int64_t count) {
    const auto* from = reinterpret_cast<const float*>(rows.at(head.sample, h, head.row + query));
    for (int64_t i = 0; i < count; ++i) to[lane + i] = from[i * rows.row];
  });
  for (int64_t i = lanes.count; i < lanes.width; ++i) to[i] = 0;
}
inline void store_lane_values(const KeyHead& head, const Lanes& lanes, const float* from, const Rows& rows) {
  head.runs(lanes, [&](int64_t lane, int64_t h, int64_t query, int64_t count) {
    auto* to = reinterpret_cast<float*>(rows.at(head.sample, h, head.row + query));
    for (int64_t i = 0; i < count; ++i) to[i * rows.row] = from[lane + i];
  });
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
