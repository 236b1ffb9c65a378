// SPDX-License-Identifier: Apache-2.0
// The search of `compress_kv` on AMX tiles, for keys in bfloat16.
//
// Rows are scaled by powers of two, which rounds nothing and keeps squares in range; the norms of survivors come after
// the product, where products of bfloat16 are exact and sums are float32, and those of evicted keys at the end.
#pragma once

#include "amx_tiles.h"
#include "compress_kv_kernels.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

class TileSearch {
 public:
  static constexpr int64_t kLanes = 64;

  TileSearch(const CompressKv& p, Cutter& cutter)
      : p_(p), depth_(tiles_of_32(p.dim)), rows_(tiles_of_16(p.slots)), padded_(depth_ * 32) {
    if (p.merge == Merge::drop) return;
    const int64_t heads = p.samples * p.heads;
    tiles_ = cutter.cut<BFloat16>(heads * rows_ * depth_ * kTileHalves);
    factor_ = cutter.cut<float>(heads * rows_ * 16);
  }

  // Tiles of survivors [first, first + count). Returns the first that is not finite, or -1.
  int32_t pack(int64_t h, const int64_t* index, int64_t first, int64_t count) {
    static_assert(kChunk % 16 == 0 && kChunk <= kLanes);
    const Room room = take_room();
    int32_t broken = -1;
    for (int64_t i = 0; i < count; ++i) {
      float& factor = factor_[h * rows_ * 16 + first + i];
      factor = scaled_row(h, index[first + i], room, room.rows + i * padded_);
      if (factor != factor && broken < 0) broken = static_cast<int32_t>(first + i);
    }
    pack_rows([&](int64_t r) { return room.rows + r * padded_; }, count, padded_,
              tiles_ + (h * rows_ + first / 16) * depth_ * kTileHalves);
    return broken;
  }

  void find(int64_t h, int64_t kept, const Evicted& lanes) const {
    const Room room = take_room();
    float factor[kLanes];
    for (int64_t i = 0; i < lanes.count; ++i) {
      factor[i] = scaled_row(h, lanes.position[i], room, room.rows + i * padded_);
    }
    pack_dim_pairs([&](int64_t r) { return room.rows + r * padded_; }, lanes.count, padded_, room.columns);
    const int64_t columns = tiles_of_16(lanes.count);
    const TileScope scope;
    Vec best[kLanes / 16], slot[kLanes / 16];
    for (int64_t n = 0; n < columns; ++n) best[n] = Vec(-std::numeric_limits<float>::infinity()), slot[n] = Vec(0.0f);
    for (int64_t first = 0; first < kept; first += kRows) {
      const int64_t rows = std::min(kept - first, kRows);
      const BFloat16* a = tiles_ + (h * rows_ + first / 16) * depth_ * kTileHalves;
      multiply({a, depth_, 1}, {room.columns, depth_, 1}, tiles_of_16(rows), columns, depth_,
               {room.scores, columns, 1}, false);
      for (int64_t n = 0; n < columns; ++n) take_best(room, h, n, columns, first, rows, best[n], slot[n]);
    }
    for (int64_t i = 0; i < lanes.count; ++i) {
      alignas(kAlignment) float score[kWidth], where[kWidth];
      best[i / 16].store(score), slot[i / 16].store(where);
      lanes.slot[i] = static_cast<int32_t>(where[i % 16]);
      lanes.similarity[i] = score[i % 16] * factor[i];
    }
  }

 private:
  static constexpr int64_t kRows = 32;  // survivors of a product

  struct Room {
    BFloat16 *rows, *columns;
    float *row, *scores;

    Room(Cutter& cutter, int64_t padded)
        : rows(cutter.cut<BFloat16>(kLanes * padded)), columns(cutter.cut<BFloat16>(kLanes * padded)),
          row(cutter.cut<float>(padded)), scores(cutter.cut<float>(kRows * kLanes)) {}
  };

  Room take_room() const {
    Cutter size;
    Room(size, padded_);
    Cutter cutter(Scratch::take(size.used()));
    return Room(cutter, padded_);
  }

  // The row times 2^-e, its largest number then being in [0.5, 1), and 2^e / norm. NaN and zeros if it is not finite.
  float scaled_row(int64_t h, int64_t position, const Room& room, BFloat16* to) const {
    const FloatRow found = load_row(p_.key.at(h / p_.heads, h % p_.heads, position), p_.key.dtype, p_.dim, room.row);
    __m512 largest = _mm512_setzero_ps();
    for (int64_t d = 0; d < p_.dim; d += kWidth) {
      largest = _mm512_max_ps(largest, _mm512_abs_ps(Vec::load(room.row + d).v));
    }
    // What is too large to be squared has similarities of 0, as a row over an infinite norm.
    const bool real = found.sound && found.norm < std::numeric_limits<float>::infinity();
    int power = 0;
    std::frexp(real ? _mm512_reduce_max_ps(largest) : 0.0f, &power);
    const Vec scale(static_cast<float>(-power));
    for (int64_t d = 0; d < padded_; d += kWidth) {
      (real && d < p_.dim ? scale_by_power(Vec::load(room.row + d), scale) : Vec(0.0f)).store_first(to + d, kWidth);
    }
    return found.sound ? std::ldexp(1 / found.norm, power) : kNan;
  }

  // The first of the largest scores of 16 lanes; only what is larger than before counts.
  void take_best(const Room& room, int64_t h, int64_t n, int64_t columns, int64_t first, int64_t rows, Vec& best,
                 Vec& slot) const {
    const float* factor = factor_ + h * rows_ * 16 + first;
    Vec most = best, where = slot;
    for (int64_t j = 0; j < rows; ++j) {
      const float* at = room.scores + ((j / 16 * columns + n) * 16 + j % 16) * 16;
      const Vec score = Vec::load(at) * Vec(factor[j]);
      where = select_less(most, score, Vec(static_cast<float>(first + j)), where);
      most = select_less(most, score, score, most);
    }
    best = most, slot = where;
  }

  const CompressKv& p_;
  int64_t depth_, rows_, padded_;  // tiles of dims, tiles of survivors, dims up to whole tiles
  BFloat16* tiles_ = nullptr;      // [heads, rows, depth]
  float* factor_ = nullptr;        // [heads, rows * 16]
};

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
