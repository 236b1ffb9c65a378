// SPDX-License-Identifier: Apache-2.0
// Memory that the next task will touch, brought near a few lines at a time between the tiles of products at work: the
// caches of servers are large and slow, and products alone would leave them idle.
#pragma once

#include "types.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

class Ahead {
 public:
  void clear() { count_ = next_ = 0; }

  // Rows [first, first + count) of one head. More than the near cache holds would drive out what is in use.
  void add(const Rows& rows, int64_t sample, int64_t head, int64_t first, int64_t count, int64_t dim) {
    constexpr int64_t most = int64_t{128} << 10;
    const int64_t bytes = dim * size_of(rows.dtype), pitch = rows.row * size_of(rows.dtype);
    if (!rows || count_ == kRegions || count <= 0 || bytes * count > most || pitch < 0) return;
    const char* at = rows.at(sample, head, first);
    if (pitch <= bytes + kLine) {
      regions_[count_++] = {at, 0, 1, std::max<int64_t>((count - 1) * pitch + bytes, 0)};
    } else {
      regions_[count_++] = {at, pitch, count, bytes};
    }
  }

  // The next few lines.
  void step() {
    if (next_ == count_) return;
    Region& region = regions_[next_];
    const int64_t end = std::min(done_ + kLinesAStep * kLine, region.bytes);
    for (int64_t i = done_; i < end; i += kLine) __builtin_prefetch(region.at + i, 0, 2);
    done_ = end;
    if (done_ < region.bytes) return;
    done_ = 0;
    region.at += region.pitch;
    if (--region.rows == 0) ++next_;
  }

 private:
  struct Region {
    const char* at;
    int64_t pitch, rows, bytes;
  };
  static constexpr int64_t kLine = 64, kLinesAStep = 16;
  static constexpr int kRegions = 16;

  Region regions_[kRegions];
  int count_ = 0, next_ = 0;
  int64_t done_ = 0;
};

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
