// SPDX-License-Identifier: Apache-2.0
// What masks and causality hide, as numbers added to a block of scores [key][lane] in units of log 2.
#pragma once

#include "attention_blocks.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

// `n` neighbouring elements of a mask, as numbers to add in units of log 2: finite ones stay finite.
inline Vec load_mask(const Mask& mask, int64_t offset, int64_t n) {
  if (mask.dtype == DType::boolean) {
    const auto* may = static_cast<const unsigned char*>(mask.data) + offset;
    alignas(kAlignment) float hidden[kWidth] = {};
    for (int64_t i = 0; i < n && i < kWidth; ++i) hidden[i] = may[i] ? 0.0f : -kInfinity;
    return Vec::load(hidden);
  }
  const Vec x = n >= kWidth ? load(mask.data, mask.dtype, offset) : load_first(mask.data, mask.dtype, offset, n);
  const Vec lowest(kLowest), scaled = x * Vec(kLog2e);
  return select_less(scaled, lowest, select_less(x, lowest, scaled, lowest), scaled);
}

// The mask over instance keys [first, first + count) for a block of lanes: to[j * width + lane], 0 past the last lane.
class MaskBlock {
 public:
  MaskBlock(const KeyHead& head, const Lanes& lanes) : mask_(head.p.mask), lanes_(lanes) {
    if (!mask_) return;
    same_for_all_ = mask_.query == 0 && mask_.head == 0;
    head.runs(lanes, [&](int64_t lane, int64_t h, int64_t query, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        at_[lane + i] = head.sample * mask_.sample + h * mask_.head + (query + i) * mask_.query;
      }
    });
  }

  void fill(int64_t first, int64_t count, float* to) const {
    if (same_for_all_) {
      for (int64_t j = 0; j < count; ++j) {
        alignas(kAlignment) float one[kWidth];
        load_mask(mask_, at_[0] + (first + j) * mask_.key, 1).store(one);
        for (int64_t lane = 0; lane < lanes_.width; lane += kWidth) Vec(one[0]).store(to + j * lanes_.width + lane);
      }
      return;
    }
    for (int64_t lane = 0; lane < lanes_.width; lane += kWidth) {
      for (int64_t j = 0; j < count; j += kWidth) fill_square(lane, first + j, std::min(kWidth, count - j), j, to);
    }
  }

 private:
  void fill_square(int64_t lane, int64_t key, int64_t n, int64_t row, float* to) const {
    Vec x[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) {
      if (lane + i >= lanes_.count) {
        x[i] = Vec(0.0f);
      } else if (mask_.key == 1) {
        x[i] = load_mask(mask_, at_[lane + i] + key, n);
      } else {
        alignas(kAlignment) float spread[kWidth] = {}, one[kWidth];
        for (int64_t j = 0; j < n; ++j) {
          load_mask(mask_, at_[lane + i] + (key + j) * mask_.key, 1).store(one);
          spread[j] = one[0];
        }
        x[i] = Vec::load(spread);
      }
    }
    transpose(x);
    for (int64_t j = 0; j < n; ++j) x[j].store(to + (row + j) * lanes_.width + lane);
  }

  const Mask& mask_;
  Lanes lanes_;
  bool same_for_all_ = false;
  int64_t at_[kLanes];
};

// How many instance keys each lane sees of a causal head (a float for comparisons: exact up to 2^24), and the bounds.
struct CausalLimits {
  alignas(kAlignment) float seen[kLanes];
  int64_t least, most;

  CausalLimits(const KeyHead& head, const Lanes& lanes) : least(head.tk), most(head.p.causal ? 0 : head.tk) {
    if (!head.p.causal) return;
    for (int64_t i = 0; i < lanes.width; ++i) seen[i] = 0;
    head.runs(lanes, [&](int64_t lane, int64_t, int64_t query, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t limit = std::clamp<int64_t>(query + i + 1 + head.tk - head.tq, 0, head.tk);
        seen[lane + i] = static_cast<float>(limit);
        least = std::min(least, limit), most = std::max(most, limit);
      }
    });
  }

  // Hides what lies past the limits from scores [count][width] of instance keys from `first` on.
  void hide(int64_t first, int64_t count, int64_t width, float* scores) const {
    if (first + count <= least) return;
    for (int64_t j = std::max<int64_t>(least - first, 0); j < count; ++j) {
      const Vec key(static_cast<float>(first + j));
      for (int64_t lane = 0; lane < width; lane += kWidth) {
        float* at = scores + j * width + lane;
        select_less(key, Vec::load(seen + lane), Vec::load(at), Vec(-kInfinity)).store(at);
      }
    }
  }
};

// Both together, for one block of lanes.
class Hiding {
 public:
  Hiding(const KeyHead& head, const Lanes& lanes)
      : head_(head), width_(lanes.width), mask_(head, lanes), causal_(head, lanes) {}

  // Whether no lane sees any key of the block: it needs no scores.
  bool whole(const KeyBlock& block) const {
    return block.prompts == 0 && block.first - head_.p.prompts >= causal_.most;
  }

  // Adds to scores [key][width] of the block; `scratch` has room for as many.
  void apply(const KeyBlock& block, float* scores, float* scratch) const {
    const int64_t first = block.first + block.prompts - head_.p.prompts, count = block.instance();
    if (count == 0) return;
    scores += block.prompts * width_;
    if (head_.p.mask) {
      mask_.fill(first, count, scratch);
      for (int64_t i = 0; i < count * width_; i += kWidth) {
        (Vec::load(scores + i) + Vec::load(scratch + i)).store(scores + i);
      }
    }
    causal_.hide(first, count, width_, scores);
  }

 private:
  const KeyHead& head_;
  int64_t width_;
  MaskBlock mask_;
  CausalLimits causal_;
};

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
