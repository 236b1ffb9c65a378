// SPDX-License-Identifier: Apache-2.0
// key_scores on AMX tiles, bfloat16: rows of a product's tile are queries, its columns keys.
#pragma once

#include "amx_tiles.h"
#include "key_scores_task.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

class TileScores {
 public:
  static constexpr int64_t kKeys = 256, kRows = 64, kPair = 32;  // kPair: rows or keys of two tiles

  void cut(const KeyScores& p, Cutter& cutter) {
    depth_ = tiles_of_32(p.dim);
    keys_ = cutter.cut<BFloat16>(tiles_of_16(kKeys) * depth_ * kTileHalves);
    rows_ = cutter.cut<BFloat16>(tiles_of_16(kRows) * depth_ * kTileHalves);
    products_ = cutter.cut<float>(2 * tiles_of_16(kRows) * kTileFloats);
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
  void add_block(const ScoredRows& block, const ScoredKeys& keys) {
    const KeyScores& p = block.p;
    pack_rows([&](int64_t i) { return reinterpret_cast<const BFloat16*>(block.at(i)); }, block.count, p.dim, rows_);
    for (int64_t j = 0; j < keys.count; j += kPair) {
      // Whole pairs of row tiles, from the first row that sees one of these keys.
      const int64_t begin = block.before(keys.first + j) / kPair * kPair;
      const int64_t part = block.before(keys.first + j + kPair - 1);
      if (begin >= block.count) break;
      add_pair(block, begin, part, keys_ + j / 16 * depth_ * kTileHalves, padded_ + j, keys.first + j);
    }
  }

  // The weights of two tiles of keys. First all products, then all arithmetic on them: while a tile product runs, the
  // processor has only half of its vector units.
  void add_pair(const ScoredRows& block, int64_t begin, int64_t part, const BFloat16* keys, float* to, int64_t key) {
    const Operand right{keys, depth_, 1};
    for (int64_t r = begin; r < block.count; r += kPair) {
      const Operand left{rows_ + r / 16 * depth_ * kTileHalves, depth_, 1};
      const Result product{products_ + r / 16 * 2 * kTileFloats, 2, 1};
      if (block.count - r > 16) {
        multiply_block<2, 2>(left, right, depth_, product, false);
      } else {
        multiply_block<1, 2>(left, right, depth_, product, false);
      }
    }
    __m512 sums[2] = {_mm512_loadu_ps(to), _mm512_loadu_ps(to + 16)};
    add_rows<true>(block, begin, part, key, sums);
    add_rows<false>(block, std::max(begin, part), block.count, key, sums);
    _mm512_storeu_ps(to, sums[0]);
    _mm512_storeu_ps(to + 16, sums[1]);
  }

  template <bool kHides>
  void add_rows(const ScoredRows& block, int64_t begin, int64_t end, int64_t key, __m512 (&sums)[2]) const {
    const __m512 scale = _mm512_set1_ps(block.p.scale * 1.44269504088896340736f);
    for (int64_t r = begin; r < end; ++r) {
      const float* product = products_ + r / 16 * 2 * kTileFloats + r % 16 * 16;
      const __m512 level = _mm512_set1_ps(block.levels[r]);
      const int64_t seen = kHides ? block.rows[r] + block.p.tk - block.p.tq + 1 - key : 0;
      for (int64_t half = 0; half < 2; ++half) {
        __m512 x = _mm512_fmadd_ps(_mm512_load_ps(product + half * kTileFloats), scale, level);
        x = exp2_of_any_to_round(x);
        if constexpr (kHides) x = _mm512_maskz_mov_ps(Vec::first(seen - 16 * half), x);
        sums[half] = _mm512_add_ps(sums[half], x);
      }
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
