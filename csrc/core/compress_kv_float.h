// SPDX-License-Identifier: Apache-2.0
// The search of `compress_kv` in float: products of unit rows, survivors against lanes of evicted keys.
#pragma once

#include "compress_kv_kernels.h"
#include "gemm.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

class FloatSearch {
 public:
  static constexpr int64_t kLanes = 64;

  FloatSearch(const CompressKv& p, Cutter& cutter) : p_(p), padded_(round_up(p.dim, kWidth)) {
    if (p.merge != Merge::drop) units_ = cutter.cut<float>(p.samples * p.heads * p.slots * padded_);
  }

  // Unit rows of survivors [first, first + count). Returns the first that is not finite, or -1.
  int32_t pack(int64_t h, const int64_t* index, int64_t first, int64_t count) {
    int32_t broken = -1;
    for (int64_t c = first; c < first + count; ++c) {
      const bool sound = unit_row(h, index[c], units_ + (h * p_.slots + c) * padded_);
      if (!sound && broken < 0) broken = static_cast<int32_t>(c);
    }
    return broken;
  }

  void find(int64_t h, int64_t kept, const Evicted& lanes) const {
    const int64_t width = round_up(lanes.count, kWidth);
    Cutter size;
    Room(size, width, padded_);
    Cutter cutter(Scratch::take(size.used()));
    const Room room(cutter, width, padded_);
    pack_lanes(h, lanes, width, room);
    for (int64_t i = 0; i < width; ++i) room.best[i] = -std::numeric_limits<float>::infinity();
    for (int64_t first = 0; first < kept; first += kRows) {
      const int64_t rows = std::min(kept - first, kRows);
      const float* a = units_ + (h * p_.slots + first) * padded_;
      multiply<Into::overwrite>({rows, width, p_.dim, a, padded_, 1, room.columns, width, room.scores, width});
      take_best(room, width, first, rows, lanes);
    }
    for (int64_t i = 0; i < lanes.count; ++i) lanes.similarity[i] = room.sound[i] ? room.best[i] : kNan;
  }

 private:
  static constexpr int64_t kRows = 72;  // survivors of a product

  struct Room {
    float *columns, *row, *best, *local, *scores;
    bool* sound;

    Room(Cutter& cutter, int64_t width, int64_t padded)
        : columns(cutter.cut<float>(padded * width)), row(cutter.cut<float>(kWidth * padded)),
          best(cutter.cut<float>(width)), local(cutter.cut<float>(width)), scores(cutter.cut<float>(kRows * width)),
          sound(cutter.cut<bool>(width)) {}
  };

  // A row over its norm; zeros, and false, if it is not finite.
  bool unit_row(int64_t h, int64_t position, float* to) const {
    const FloatRow found = load_row(p_.key.at(h / p_.heads, h % p_.heads, position), p_.key.dtype, p_.dim, to);
    const Vec norm(found.norm);
    for (int64_t d = 0; d < padded_; d += kWidth) {
      (found.sound ? Vec::load(to + d) / norm : Vec(0.0f)).store(to + d);
    }
    return found.sound;
  }

  // Unit rows of evicted keys as columns: columns[d * width + lane].
  void pack_lanes(int64_t h, const Evicted& lanes, int64_t width, const Room& room) const {
    for (int64_t lane = 0; lane < width; lane += kWidth) {
      for (int64_t i = 0; i < kWidth; ++i) {
        float* row = room.row + i * padded_;
        if (lane + i < lanes.count) {
          room.sound[lane + i] = unit_row(h, lanes.position[lane + i], row);
        } else {
          std::memset(row, 0, static_cast<size_t>(padded_) * sizeof(float));
        }
      }
      for (int64_t d = 0; d < padded_; d += kWidth) {
        Vec x[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) x[i] = Vec::load(room.row + i * padded_ + d);
        transpose(x);
        for (int64_t i = 0; i < kWidth; ++i) x[i].store(room.columns + (d + i) * width + lane);
      }
    }
  }

  // The first of the largest scores, down the rows; only what is larger than before counts.
  static void take_best(const Room& room, int64_t width, int64_t first, int64_t rows, const Evicted& lanes) {
    for (int64_t lane = 0; lane < width; lane += kWidth) {
      Vec best = Vec::load(room.best + lane), local(-1.0f);
      for (int64_t j = 0; j < rows; ++j) {
        const Vec score = Vec::load(room.scores + j * width + lane);
        local = select_less(best, score, Vec(static_cast<float>(j)), local);
        best = select_less(best, score, score, best);
      }
      best.store(room.best + lane);
      local.store(room.local + lane);
    }
    for (int64_t i = 0; i < lanes.count; ++i) {
      if (room.local[i] >= 0) lanes.slot[i] = static_cast<int32_t>(first + static_cast<int64_t>(room.local[i]));
    }
  }

  const CompressKv& p_;
  int64_t padded_;
  float* units_ = nullptr;  // [heads, slots, padded]
};

void compress_kv(const CompressKv& p, const Rows& key, const Rows& value, const Threads& threads) {
  compress<FloatSearch>(p, key, value, threads);
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
