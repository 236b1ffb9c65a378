// SPDX-License-Identifier: Apache-2.0
// Backward of diffuse_prompts on tiles: ranges of tokens, each with float32 sums of its own, added in order.
//
// Within a range, groups of 32 tokens give the gradients of their rows and leave activations and slopes in bfloat16;
// blocks of groups are then summed over tokens, a panel of 32 columns of the gradient of the output or of x at a time.
#pragma once

#include "diffuse_prompts_amx.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

// What is computed for the gradients that are wanted.
struct DiffusedWant {
  explicit DiffusedWant(const DiffusePromptsGrads& g)
      : values(g.values), keys(g.keys), slopes(g.slopes()), slope_rows(g.x || g.keys), scores(values || slopes) {}
  bool values, keys, slopes, slope_rows, scores;
};

class DiffusedBackward {
 public:
  DiffusedBackward(const DiffusePrompts& p, const DiffusePromptsGrads& g, Cutter cutter)
      : p_(p), g_(g), want_(g), group_(p, cutter), row_(group_.kp_ * 32), x_(p.x, p), base_(p.base, p),
        grad_(g.grad_out, p), dx_(g.x, p), dbase_(g.base, p) {
    const int64_t scores = 4 * group_.kp_ * kTileFloats;
    scores_ = cutter.cut<float>(scores);
    reached_ = cutter.cut<float>(scores);
    active_ = cutter.cut<BFloat16>(kBlock * row_);
    slope_ = cutter.cut<BFloat16>(kBlock * row_);
    columns_ = cutter.cut<BFloat16>(kBlock * row_);
    panel_ = cutter.cut<BFloat16>(kBlock * 32);
    bytes_ = cutter.used();
  }

  int64_t bytes() const { return bytes_; }

  // Tokens [first, to); sums of gradients [prompts, width] in tiles are overwritten. Returns that of log_scale.
  double run(const DiffusedTiles& tiles, int64_t first, int64_t to, float* values, float* keys) {
    total_ = 0;
    const int64_t blocks = (to - first + kBlock - 1) / kBlock;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t from = first + first_of_part(to - first, b, blocks);
      const int64_t count = first + first_of_part(to - first, b + 1, blocks) - from;
      for (int64_t r = 0; r < count; r += kGroup) run_group(tiles, from + r, std::min(count - r, kGroup), r);
      if (want_.values) add_over_tokens(active_, grad_, from, count, values, b > 0);
      if (want_.keys) add_over_tokens(slope_, x_, from, count, keys, b > 0);
    }
    return total_;
  }

 private:
  float* row_of(float* scores, int64_t r) const {
    return scores + r / 16 * 2 * group_.kp_ * kTileFloats + r % 16 * 16;
  }

  void run_group(const DiffusedTiles& tiles, int64_t first, int64_t count, int64_t slot) {
    if (want_.scores) group_.multiply_rows(x_, first, count, tiles.keys_by_dim(), scores_);
    if (want_.slopes) group_.multiply_rows(grad_, first, count, tiles.values_by_dim(), reached_);
    BFloat16 *active = active_ + slot * row_, *slope = slope_ + slot * row_;
    for (int64_t r = 0; want_.scores && r < count; ++r) {
      weigh_row(row_of(scores_, r), row_of(reached_, r), active + r * row_, slope + r * row_);
    }
    if (g_.base || g_.log_scale) {
      for (int64_t r = 0; r < count; ++r) pass_base(first + r);
    }
    if (!g_.x) return;
    const auto keys = [&](int64_t column) { return tiles.keys(column); };
    group_.read_prompts(slope, count, keys, [&](int64_t r, int64_t column, int64_t width, const float* sums) {
      BFloat16* to = halves(dx_.at(first + r)) + column;
      each_32(width, [&](int64_t d, auto kept) {
        const float* at = sums + d * 16;
        store_32(to + d, kept, to_bfloat16(_mm512_load_ps(at), _mm512_load_ps(at + kTileFloats)));
      });
    });
  }

  // Activations and slopes of a row in bfloat16, from its scores and what reached its activations.
  void weigh_row(float* scores, float* reached, BFloat16* active, BFloat16* slope) {
    const float by = group_.activate(scores);
    if (want_.values) {
      const __m512 factor = _mm512_set1_ps(by);
      for (int64_t j = 0; j < group_.kp_; ++j) {
        const float* at = scores + j * 2 * kTileFloats;
        const __m512 low = _mm512_mul_ps(_mm512_load_ps(at), factor);
        _mm512_store_si512(active + j * 32, to_bfloat16(low, _mm512_mul_ps(_mm512_load_ps(at + kTileFloats), factor)));
      }
    }
    if (!want_.slopes) return;
    group_.clear_pads(reached, 0);
    float read = 0;
    if (p_.softmax || g_.log_scale) {
      __m512 sum = _mm512_setzero_ps(), other = sum;
      for (int64_t j = 0; j < 2 * kTileFloats * group_.kp_; j += 2 * kTileFloats) {
        sum = _mm512_fmadd_ps(_mm512_load_ps(scores + j), _mm512_load_ps(reached + j), sum);
        const __m512 d = _mm512_load_ps(reached + j + kTileFloats);
        other = _mm512_fmadd_ps(_mm512_load_ps(scores + j + kTileFloats), d, other);
      }
      read = _mm512_reduce_add_ps(_mm512_add_ps(sum, other));
      total_ += double(by) * double(read);
    }
    if (!want_.slope_rows) return;
    p_.softmax ? store_slopes<true>(scores, reached, by, read, slope)
               : store_slopes<false>(scores, reached, by, read, slope);
  }

  // Gradients of the scores of a row.
  template <bool kSoftmax>
  void store_slopes(const float* scores, const float* reached, float by, float read, BFloat16* to) const {
    const __m512 factor = _mm512_set1_ps(by), mean = _mm512_set1_ps(read), zero = _mm512_setzero_ps();
    const auto slope = [&](int64_t j) {
      const __m512 a = _mm512_load_ps(scores + j), d = _mm512_load_ps(reached + j);
      if constexpr (kSoftmax) return _mm512_mul_ps(_mm512_mul_ps(_mm512_sub_ps(d, mean), factor), a);
      // Nothing where ReLU let nothing through; not where a score is NaN.
      return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(a, zero, _CMP_NLE_UQ), d, factor);
    };
    for (int64_t j = 0; j < group_.kp_; ++j) {
      const int64_t at = j * 2 * kTileFloats;
      _mm512_store_si512(to + j * 32, to_bfloat16(slope(at), slope(at + kTileFloats)));
    }
  }

  // The gradient of base of one row, and what base adds to that of log_scale.
  void pass_base(int64_t r) {
    const BFloat16* from = halves(grad_.at(r));
    if (g_.base) {
      BFloat16* to = halves(dbase_.at(r));
      const __m512 factor = _mm512_set1_ps(p_.factor);
      each_32(p_.width, [&](int64_t d, auto kept) {
        const __m512i x = load_32(from + d, kept);
        const __m512 low = _mm512_mul_ps(widen_low(x), factor), high = _mm512_mul_ps(widen_high(x), factor);
        store_32(to + d, kept, to_bfloat16(low, high));
      });
    }
    if (g_.log_scale) {
      const BFloat16* base = halves(base_.at(r));
      __m512 sum = _mm512_setzero_ps();
      each_32(p_.width, [&](int64_t d, auto kept) {
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(load_32(from + d, kept)),
                               reinterpret_cast<__m512bh>(load_32(base + d, kept)));
      });
      total_ += double(p_.factor) * double(_mm512_reduce_add_ps(sum));
    }
  }

  // sums [prompts, width] (+)= weights^T rows over `count` tokens.
  void add_over_tokens(const BFloat16* weights, const TokenRows& rows, int64_t from, int64_t count, float* sums,
                       bool add) {
    pack_row_pairs<true>([&](int64_t r) { return weights + r * row_; }, count, p_.prompts, columns_);
    const int64_t prompts = tiles_of_16(p_.prompts), depth = tiles_of_32(count);
    for (int64_t column = 0; column < 2 * group_.kd_; column += 2) {
      const int64_t width = std::min<int64_t>(p_.width - column * 16, 32);
      pack_panel(rows, from, count, column * 16, width);
      multiply({columns_, 1, prompts}, {panel_, 1, 2}, prompts, 2, depth,
               {sums + column * kTileFloats, 2 * group_.kd_, 1}, add);
    }
  }

  // Pairs of rows of a panel of 32 columns as two tiles, of its even and of its odd columns: no word changes its place.
  void pack_panel(const TokenRows& rows, int64_t from, int64_t count, int64_t column, int64_t width) const {
    const __mmask32 kept = first_halves(width);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const auto row = [&](int64_t r) {
      return r < count ? _mm512_maskz_loadu_epi16(kept, rows.at(from + r) + column * 2) : _mm512_setzero_si512();
    };
    BFloat16* to = panel_;
    for (int64_t first = 0; first < count; first += 32, to += 2 * kTileHalves) {
      for (int64_t i = 0; i < 16; ++i) {
        const __m512i a = row(first + 2 * i), b = row(first + 2 * i + 1);
        const __m512i even = _mm512_or_si512(_mm512_andnot_si512(high, a), _mm512_slli_epi32(b, 16));
        const __m512i odd = _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(high, b));
        _mm512_store_si512(to + i * 32, even);
        _mm512_store_si512(to + kTileHalves + i * 32, odd);
      }
    }
  }

  const DiffusePrompts& p_;
  const DiffusePromptsGrads& g_;
  const DiffusedWant want_;
  const DiffusedGroup group_;
  const int64_t row_;  // weights of a token, zeros up to whole tiles
  const TokenRows x_, base_, grad_, dx_, dbase_;
  double total_ = 0;
  int64_t bytes_;
  float *scores_, *reached_;
  BFloat16 *active_, *slope_, *columns_, *panel_;
};

// The gradient of prompts' values or keys: tiles of `ranges` sums, `stride` floats apart, added in order. Of two tiles
// one has even columns, one odd ones.
inline void write_prompt_gradient(const DiffusePrompts& p, const float* sums, int64_t stride, int64_t ranges,
                                  const Rows& to, int64_t first, int64_t end) {
  const int64_t columns = 2 * tiles_of_32(p.width);
  const __m512i half = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  for (int64_t j = first; j < end; ++j) {
    for (int64_t d = 0; d < p.width; d += 32) {
      const float* from = sums + (j / 16 * columns + d / 16) * kTileFloats + j % 16 * 16;
      Vec even(0.0f), odd(0.0f);
      for (int64_t i = 0; i < ranges; ++i) {
        even = even + Vec::load(from + i * stride);
        odd = odd + Vec::load(from + i * stride + kTileFloats);
      }
      const Vec low(_mm512_permutex2var_ps(even.v, half, odd.v));
      const Vec high(_mm512_permutex2var_ps(even.v, _mm512_add_epi32(half, _mm512_set1_epi32(8)), odd.v));
      store_first(low, to.at(0, 0, j), to.dtype, d, std::min(kWidth, p.width - d));
      store_first(high, to.at(0, 0, j), to.dtype, d + kWidth, std::clamp<int64_t>(p.width - d - kWidth, 0, kWidth));
    }
  }
}

void diffuse_prompts_backward(const DiffusePrompts& p, const DiffusePromptsGrads& g, const Threads& threads) {
  const DiffusedWant want(g);
  DiffusedTiles tiles(p, want.slopes, false, bool(g.x));
  const int64_t ranges = p.rows() ? token_ranges(p) : 0;
  const int64_t size = tiles_of_16(p.prompts) * 2 * tiles_of_32(p.width) * kTileFloats;
  const int64_t planes = int64_t(want.values) + int64_t(want.keys);
  const CallMemory memory(std::max((planes * size * 4 + 8) * ranges, kAlignment));
  Cutter cutter(memory.data());
  float* sums = cutter.cut<float>(planes * size * ranges);
  double* totals = cutter.cut<double>(ranges);
  if (ranges && want.scores) tiles.pack(threads);
  const double products = 2.0 * double(p.rows()) * double(p.prompts) * double(p.width);
  const int64_t bytes = DiffusedBackward(p, g, Cutter()).bytes();
  for_each(threads, ranges, 5 * products + 4.0 * double(p.rows()) * double(p.width), [&](int64_t i) {
    DiffusedBackward kernel(p, g, Cutter(Scratch::take(bytes)));
    const TileScope scope;
    float* mine = sums + i * planes * size;
    totals[i] = kernel.run(tiles, first_of_part(p.rows(), i, ranges), first_of_part(p.rows(), i + 1, ranges), mine,
                           want.values ? mine + size : mine);
  });
  const int64_t stride = planes * size, parts = tiles_of_16(p.prompts);
  for_each(threads, parts, double(stride * (ranges + 1)), [&](int64_t i) {
    const int64_t first = i * 16, end = std::min<int64_t>(first + 16, p.prompts);
    if (g.values) write_prompt_gradient(p, sums, stride, ranges, g.values, first, end);
    if (g.keys) write_prompt_gradient(p, sums + (want.values ? size : 0), stride, ranges, g.keys, first, end);
  });
  if (g.log_scale) {
    double total = 0;
    for (int64_t i = 0; i < ranges; ++i) total += totals[i];
    *g.log_scale = static_cast<float>(total);
  }
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
