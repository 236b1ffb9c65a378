// SPDX-License-Identifier: Apache-2.0
// key_scores in float32: lanes are keys, rows are broadcast, sums over rows run down the lanes.
#pragma once

#include "gemm.h"
#include "key_scores_task.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

// Adds exp2(scale * q_m k_j + level_m) of M rows to the sums of N vectors of keys. kHides: row m sees keys below end_m.
template <int M, int N, bool kHides>
inline void add_scores(const float* const* rows, const float* keys, int64_t keys_row, int64_t dim, float scale,
                       const float* levels, const float* ends, float* sums) {
  alignas(kAlignment) static constexpr float numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vec x[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) x[m][v] = Vec(0.0f);
  }
  for (int64_t d = 0; d < dim; ++d, keys += keys_row) {
    Vec k[N];
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) k[v] = Vec::load(keys + v * kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec q(rows[m][d]);
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) x[m][v] = fma(q, k[v], x[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) {
    Vec sum(0.0f);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      Vec weight = exp2(fma(x[m][v], Vec(scale), Vec(levels[m])));
      if constexpr (kHides) {
        const Vec number = Vec::load(numbers) + Vec(static_cast<float>(v * kWidth));
        weight = select_less(number, Vec(ends[m]), weight, Vec(0.0f));
      }
      sum = sum + weight;
    }
    (Vec::load(sums + v * kWidth) + sum).store(sums + v * kWidth);
  }
}

// Some rows over one panel of keys.
struct ScorePanel {
  const float* keys;
  int64_t dim;
  float scale;
  float* sums;

  static constexpr int64_t kKeys = kMostVectors * kWidth;

  template <int N, bool kHides, int M = most_rows(N)>
  void add_tile(int64_t n, const float* const* rows, const float* levels, const float* ends) const {
    if constexpr (M > 1) {
      if (n < M) return add_tile<N, kHides, M - 1>(n, rows, levels, ends);
    }
    add_scores<M, N, kHides>(rows, keys, kKeys, dim, scale, levels, ends, sums);
  }

  // In tiles of nearly equal height: low tiles cannot hide the latency of fma.
  template <bool kHides, int N = kMostVectors>
  void add(int64_t vectors, int64_t n, const float* const* rows, const float* levels, const float* ends) const {
    if constexpr (N > 1) {
      if (vectors < N) return add<kHides, N - 1>(vectors, n, rows, levels, ends);
    }
    const int64_t tiles = (n + most_rows(N) - 1) / most_rows(N);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = t * n / tiles;
      add_tile<N, kHides>((t + 1) * n / tiles - i, rows + i, levels + i, ends + i);
    }
  }
};

class FloatScores {
 public:
  static constexpr int64_t kKeys = 256, kRows = 48;

  void cut(const KeyScores& p, Cutter& cutter) {
    width_ = round_up(p.dim, kWidth);
    keys_ = cutter.cut<float>(kKeys * width_);
    rows_ = cutter.cut<float>(p.query.dtype == DType::float32 ? 0 : kRows * width_);
    padded_ = cutter.cut<float>(kKeys);
  }

  // Panels [dim][ScorePanel::kKeys]; zeros behind the last key.
  void pack(const KeyScores& p, const ScoredKeys& keys) {
    for (int64_t j = 0; j < keys.count; j += kWidth) {
      float* to = keys_ + j / ScorePanel::kKeys * ScorePanel::kKeys * width_ + j % ScorePanel::kKeys;
      for (int64_t d = 0; d < p.dim; d += kWidth) {
        Vec x[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) {
          const bool real = j + i < keys.count;
          const char* at = real ? p.key.at(keys.sample, keys.head, keys.first + j + i) : nullptr;
          x[i] = real ? load_first(at, p.key.dtype, d, p.dim - d) : Vec(0.0f);
        }
        transpose(x);
        for (int64_t i = 0; i < std::min(kWidth, p.dim - d); ++i) x[i].store(to + (d + i) * ScorePanel::kKeys);
      }
    }
  }

  void add(const ScoredRows& all, const ScoredKeys& keys, float* sums) {
    std::fill_n(padded_, kKeys, 0.0f);
    for (int64_t r = 0; r < all.count; r += kRows) add_block(all.from(r).first(kRows), keys);
    std::copy_n(padded_, keys.count, sums);
  }

 private:
  void add_block(const ScoredRows& block, const ScoredKeys& keys) {
    const KeyScores& p = block.p;
    const float* at[kRows];
    float ends[kRows];
    for (int64_t i = 0; i < block.count; ++i) {
      at[i] = reinterpret_cast<const float*>(block.at(i));
      if (p.query.dtype == DType::float32) continue;
      float* to = rows_ + i * width_;
      for (int64_t d = 0; d < p.dim; d += kWidth) load_first(at[i], p.query.dtype, d, p.dim - d).store(to + d);
      at[i] = to;
    }
    for (int64_t j = 0; j < keys.count; j += ScorePanel::kKeys) {
      const int64_t count = std::min(ScorePanel::kKeys, keys.count - j), vectors = (count + kWidth - 1) / kWidth;
      const int64_t blind = block.before(keys.first + j), part = block.before(keys.first + j + count - 1);
      const ScorePanel panel{keys_ + j * width_, p.dim, p.scale * 1.44269504088896340736f, padded_ + j};
      for (int64_t i = blind; i < part; ++i) {
        ends[i] = static_cast<float>(block.rows[i] + p.tk - p.tq + 1 - keys.first - j);
      }
      panel.add<true>(vectors, part - blind, at + blind, block.levels + blind, ends + blind);
      panel.add<false>(vectors, block.count - part, at + part, block.levels + part, ends + part);
    }
  }

  int64_t width_ = 0;
  float *keys_ = nullptr, *rows_ = nullptr, *padded_ = nullptr;
};

void key_scores(const KeyScores& p, const Rows& scores, const Threads& threads) {
  score_all<FloatScores>(p, scores, threads);
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
