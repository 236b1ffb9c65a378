// SPDX-License-Identifier: Apache-2.0
// key_scores on AMX tiles, bfloat16: rows of a product's tile are queries, its columns keys.
#pragma once

#include "amx_tiles.h"
#include "key_scores_task.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

class TileScores {
 public:
  static constexpr int64_t kKeys = 256, kRows = 32, kPair = 32;  // keys of two tiles

  void cut(const KeyScores& p, Cutter& cutter) {
    depth_ = tiles_of_32(p.dim);
    keys_ = cutter.cut<BFloat16>(tiles_of_16(kKeys) * depth_ * kTileHalves);
    rows_ = cutter.cut<BFloat16>(tiles_of_16(kRows) * depth_ * kTileHalves);
    products_ = cutter.cut<float>(2 * 4 * kTileFloats);
    padded_ = cutter.cut<float>(kKeys);
  }

  void pack(const KeyScores& p, const ScoredKeys& keys) {
    const auto row = [&](int64_t j) {
      return reinterpret_cast<const BFloat16*>(p.key.at(keys.sample, keys.head, keys.first + j));
    };
    pack_dim_pairs(row, keys.count, p.dim, keys_);
    // The other half of a last pair of tiles.
    const int64_t tiles = tiles_of_16(keys.count);
    if (tiles % 2) std::memset(keys_ + tiles * depth_ * kTileHalves, 0, depth_ * kTileHalves * sizeof(BFloat16));
  }

  void add(const ScoredRows& all, const ScoredKeys& keys, float* sums) {
    const TileScope scope;
    std::fill_n(padded_, kKeys, 0.0f);
    for (int64_t r = 0; r < all.count; r += kRows) add_block(all.from(r).first(kRows), keys);
    std::copy_n(padded_, keys.count, sums);
  }

 private:
  // Products run one step ahead of the arithmetic on them, on their own part of the processor.
  void add_block(const ScoredRows& block, const ScoredKeys& keys) {
    const KeyScores& p = block.p;
    pack_rows([&](int64_t i) { return reinterpret_cast<const BFloat16*>(block.at(i)); }, block.count, p.dim, rows_);
    int64_t pairs = (keys.count + kPair - 1) / kPair;
    const int64_t offset = p.tk - p.tq - keys.first;  // row i sees keys up to i + offset of the block
    if (p.causal) pairs = std::min(pairs, (block.rows[block.count - 1] + offset) / kPair + 1);
    multiply(block.count, 0);
    for (int64_t i = 0; i < pairs; ++i) {
      if (i + 1 < pairs) multiply(block.count, i + 1);
      if (p.causal && block.rows[0] + offset < (i + 1) * kPair - 1) {
        add_pair<true>(block, i, offset);
      } else {
        add_pair<false>(block, i, offset);
      }
    }
  }

  void multiply(int64_t rows, int64_t pair) {
    const Operand queries{rows_, depth_, 1}, keys{keys_ + 2 * pair * depth_ * kTileHalves, depth_, 1};
    const Result to{products_ + (pair & 1) * 4 * kTileFloats, 2, 1};
    if (rows > 16) {
      multiply_block<2, 2>(queries, keys, depth_, to, false);
    } else {
      multiply_block<1, 2>(queries, keys, depth_, to, false);
    }
  }

  template <bool kHides>
  void add_pair(const ScoredRows& block, int64_t pair, int64_t offset) {
    const float* from = products_ + (pair & 1) * 4 * kTileFloats;
    float* to = padded_ + pair * kPair;
    const __m512 scale = _mm512_set1_ps(block.p.scale * 1.44269504088896340736f);
    // Of even and of odd rows.
    __m512 sums[2][2] = {{_mm512_loadu_ps(to), _mm512_loadu_ps(to + 16)}, {_mm512_setzero_ps(), _mm512_setzero_ps()}};
    const auto add = [&](int64_t r, __m512(&sum)[2]) {
      const float* row = from + r / 16 * 2 * kTileFloats + r % 16 * 16;
      const __m512 level = _mm512_set1_ps(block.levels[r]);
      const int64_t seen = kHides ? block.rows[r] + offset + 1 - pair * kPair : 0;
      for (int64_t half = 0; half < 2; ++half) {
        __m512 x = _mm512_fmadd_ps(_mm512_load_ps(row + half * kTileFloats), scale, level);
        x = exp2_of_any_to_round(x);
        if constexpr (kHides) x = _mm512_maskz_mov_ps(Vec::first(seen - 16 * half), x);
        sum[half] = _mm512_add_ps(sum[half], x);
      }
    };
    int64_t r = 0;
    for (; r + 1 < block.count; r += 2) {
      add(r, sums[0]);
      add(r + 1, sums[1]);
    }
    if (r < block.count) add(r, sums[0]);
    for (int64_t half = 0; half < 2; ++half) {
      _mm512_storeu_ps(to + 16 * half, _mm512_add_ps(sums[0][half], sums[1][half]));
    }
  }

  int64_t depth_ = 0;
  BFloat16 *keys_ = nullptr, *rows_ = nullptr;
  float *products_ = nullptr, *padded_ = nullptr;
};

void key_scores(const KeyScores& p, const Rows& scores, const Threads& threads) {
  score_all<TileScores>(p, scores, threads);
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
