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
      : p_(p), g_(g), want_(g), group_(p, cutter), row_(group_.kp_ * 32), x_{p.x, p.tokens}, base_{p.base, p.tokens},
        grad_{g.grad_out, p.tokens}, dx_{g.x, p.tokens}, dbase_{g.base, p.tokens} {
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
    if (want_.scores) {
      for (int64_t r = 0; r < count; ++r) {
        float* scores = row_of(scores_, r);
        const float factor = group_.activate(scores);
        if (want_.values) store_active(scores, factor, active + r * row_);
        if (want_.slopes) store_slopes(scores, row_of(reached_, r), factor, slope + r * row_);
      }
    }
    if (g_.base || g_.log_scale) {
      for (int64_t r = 0; r < count; ++r) pass_base(first + r);
    }
    if (!g_.x) return;
    const auto keys = [&](int64_t column) { return tiles.keys(column); };
    group_.read_prompts(slope, count, keys, [&](int64_t r, int64_t column, int64_t width, const float* sums) {
      BFloat16* to = halves(dx_.at(first + r)) + column;
      for (int64_t d = 0; d < width; d += 32, sums += 2 * kTileFloats) {
        const __m512i x = to_bfloat16(_mm512_load_ps(sums), _mm512_load_ps(sums + kTileFloats));
        _mm512_mask_storeu_epi16(to + d, first_halves(width - d), x);
      }
    });
  }

  void store_active(const float* scores, float by, BFloat16* to) const {
    const __m512 factor = _mm512_set1_ps(by);
    for (int64_t j = 0; j < p_.prompts; j += 32) {
      const auto a = group_.load(scores, j);
      // Zeros stay zeros past the last prompt, whatever the factor.
      const __mmask32 kept = first_halves(p_.prompts - j);
      const __m512i x = to_bfloat16(_mm512_mul_ps(a.low, factor), _mm512_mul_ps(a.high, factor));
      _mm512_store_si512(to + j, _mm512_maskz_mov_epi16(kept, x));
    }
  }

  // Gradients of the scores of a row from what reached its activations; adds to the gradient of log_scale.
  void store_slopes(const float* scores, const float* reached, float by, BFloat16* to) {
    const __m512 factor = _mm512_set1_ps(by), zero = _mm512_setzero_ps();
    float read = 0;
    if (p_.softmax || g_.log_scale) {
      __m512 sum = zero;
      for (int64_t j = 0; j < p_.prompts; j += 32) {
        const auto a = group_.load(scores, j), d = group_.load(reached, j);
        sum = _mm512_fmadd_ps(a.high, d.high, _mm512_fmadd_ps(a.low, d.low, sum));
      }
      read = _mm512_reduce_add_ps(sum);
      total_ += double(by) * double(read);
    }
    if (!want_.slope_rows) return;
    const __m512 mean = _mm512_set1_ps(read);
    for (int64_t j = 0; j < p_.prompts; j += 32) {
      const auto a = group_.load(scores, j), d = group_.load(reached, j);
      __m512 low = _mm512_mul_ps(d.low, factor), high = _mm512_mul_ps(d.high, factor);
      if (p_.softmax) {
        low = _mm512_mul_ps(_mm512_mul_ps(_mm512_sub_ps(d.low, mean), factor), a.low);
        high = _mm512_mul_ps(_mm512_mul_ps(_mm512_sub_ps(d.high, mean), factor), a.high);
      }
      // Where ReLU let nothing through; not where a score is NaN. Past the last prompt there are zeros.
      const __mmask16 first = p_.softmax ? Vec::first(p_.prompts - j) : _mm512_cmp_ps_mask(a.low, zero, _CMP_NLE_UQ);
      const __mmask16 second =
          p_.softmax ? Vec::first(p_.prompts - j - 16) : _mm512_cmp_ps_mask(a.high, zero, _CMP_NLE_UQ);
      _mm512_store_si512(to + j, to_bfloat16(_mm512_maskz_mov_ps(first, low), _mm512_maskz_mov_ps(second, high)));
    }
  }

  // The gradient of base of one row, and what base adds to that of log_scale.
  void pass_base(int64_t r) {
    const BFloat16* from = halves(grad_.at(r));
    const BFloat16* base = g_.log_scale ? halves(base_.at(r)) : nullptr;
    BFloat16* to = g_.base ? halves(dbase_.at(r)) : nullptr;
    const __m512 factor = _mm512_set1_ps(p_.factor);
    __m512 sum = _mm512_setzero_ps(), other = sum;
    for (int64_t d = 0; d < p_.width; d += 32) {
      const __mmask32 kept = first_halves(p_.width - d);
      const __m512i x = _mm512_maskz_loadu_epi16(kept, from + d);
      const __m512 low = widen_low(x), high = widen_high(x);
      if (base) {
        const __m512i b = _mm512_maskz_loadu_epi16(kept, base + d);
        sum = _mm512_fmadd_ps(low, widen_low(b), sum);
        other = _mm512_fmadd_ps(high, widen_high(b), other);
      }
      if (to) {
        const __m512i scaled = to_bfloat16(_mm512_mul_ps(low, factor), _mm512_mul_ps(high, factor));
        _mm512_mask_storeu_epi16(to + d, kept, scaled);
      }
    }
    if (base) total_ += double(p_.factor) * double(_mm512_reduce_add_ps(_mm512_add_ps(sum, other)));
  }

  // sums [prompts, width] (+)= weights^T rows over `count` tokens.
  void add_over_tokens(const BFloat16* weights, const TokenRows& rows, int64_t from, int64_t count, float* sums,
                       bool add) {
    pack_row_pairs<true>([&](int64_t r) { return weights + r * row_; }, count, p_.prompts, columns_);
    const int64_t prompts = tiles_of_16(p_.prompts), depth = tiles_of_32(count);
    for (int64_t column = 0; column < group_.nd_; column += 2) {
      const int64_t width = std::min<int64_t>(p_.width - column * 16, 32), columns = tiles_of_16(width);
      pack_row_pairs<false>([&](int64_t r) { return halves(rows.at(from + r)) + column * 16; }, count, width, panel_);
      multiply({columns_, 1, prompts}, {panel_, 1, columns}, prompts, columns, depth,
               {sums + column * kTileFloats, group_.nd_, 1}, add);
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

// The gradient of prompts' values or keys: tiles of `ranges` sums, `stride` floats apart, added in order.
inline void write_prompt_gradient(const DiffusePrompts& p, const float* sums, int64_t stride, int64_t ranges,
                                  const Rows& to, int64_t first, int64_t end) {
  const int64_t nd = tiles_of_16(p.width);
  for (int64_t j = first; j < end; ++j) {
    for (int64_t d = 0; d < p.width; d += 16) {
      const float* from = sums + (j / 16 * nd + d / 16) * kTileFloats + j % 16 * 16;
      Vec sum(0.0f);
      for (int64_t i = 0; i < ranges; ++i) sum = sum + Vec::load(from + i * stride);
      store_first(sum, to.at(0, 0, j), to.dtype, d, std::min(kWidth, p.width - d));
    }
  }
}

void diffuse_prompts_backward(const DiffusePrompts& p, const DiffusePromptsGrads& g, const Threads& threads) {
  const DiffusedWant want(g);
  DiffusedTiles tiles(p, want.slopes, false, bool(g.x));
  const int64_t ranges = p.rows() ? token_ranges(p) : 0;
  const int64_t size = tiles_of_16(p.prompts) * tiles_of_16(p.width) * kTileFloats;
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
