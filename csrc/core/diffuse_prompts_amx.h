// SPDX-License-Identifier: Apache-2.0
// diffuse_prompts on tiles: tokens are rows of A, read where they are; keys and values are packed once a call.
//
// Activations of a token are a row of scores, in tiles: what runs along it are vectors of 16 prompts. Activations and
// slopes are rounded to bfloat16 for the products that read them, once.
#pragma once

#include "amx_tiles.h"
#include "diffuse_prompts.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

constexpr int64_t kGroup = 32;   // tokens of one product of scores
constexpr int64_t kChunk = 8;    // tiles of columns of one product that is written out
constexpr int64_t kBlock = 256;  // most tokens of one product that sums over them

inline const BFloat16* halves(const char* at) { return reinterpret_cast<const BFloat16*>(at); }
inline BFloat16* halves(char* at) { return reinterpret_cast<BFloat16*>(at); }

inline __m512 widen_low(__m512i x) { return Vec::widen(_mm512_castsi512_si256(x)); }
inline __m512 widen_high(__m512i x) { return Vec::widen(_mm512_extracti64x4_epi64(x, 1)); }

// Keys and values of a call as the B of products: pairs of dims for sums over the width, pairs of prompts for sums
// over prompts.
class DiffusedTiles {
 public:
  DiffusedTiles(const DiffusePrompts& p, bool values_by_dim, bool values, bool keys)
      : p_(p), kd_(tiles_of_32(p.width)), nd_(tiles_of_16(p.width)), kp_(tiles_of_32(p.prompts)),
        memory_(std::max(size(Cutter(), values_by_dim, values, keys), kAlignment)) {
    size(Cutter(memory_.data()), values_by_dim, values, keys);
  }

  void pack(const Threads& threads) {
    const int64_t bytes = kGroup * p_.width * 2;
    for_each(threads, 2 * kp_, 8.0 * double(p_.prompts) * double(p_.width), [&](int64_t task) {
      auto* rounded = reinterpret_cast<BFloat16*>(Scratch::take(bytes));
      const int64_t run = task / 2, count = std::min(p_.prompts - run * kGroup, kGroup);
      const bool of_keys = task % 2 == 0;
      const Rows& rows = of_keys ? p_.keys : p_.values;
      BFloat16 *by_dim = of_keys ? keys_by_dim_ : values_by_dim_, *by_prompt = of_keys ? keys_ : values_;
      if (!by_dim && !by_prompt) return;
      const auto row = read(rows, run * kGroup, count, rounded);
      if (by_dim) pack_dim_pairs(row, count, p_.width, by_dim + run * 2 * kd_ * kTileHalves);
      if (by_prompt) pack_row_pairs<false>(row, count, p_.width, by_prompt + run * nd_ * kTileHalves);
    });
  }

  Operand keys_by_dim() const { return {keys_by_dim_, kd_, 1}; }
  Operand values_by_dim() const { return {values_by_dim_, kd_, 1}; }
  Operand keys(int64_t column) const { return {keys_ + column * kTileHalves, 1, nd_}; }
  Operand values(int64_t column) const { return {values_ + column * kTileHalves, 1, nd_}; }

 private:
  struct Row {
    const char* data;
    int64_t bytes;
    const BFloat16* operator()(int64_t r) const { return halves(data + r * bytes); }
  };

  Row read(const Rows& rows, int64_t first, int64_t count, BFloat16* rounded) const {
    if (rows.dtype == DType::bfloat16) return {rows.at(0, 0, first), rows.row * 2};
    for (int64_t r = 0; r < count; ++r) {
      const auto* from = reinterpret_cast<const float*>(rows.at(0, 0, first + r));
      for (int64_t d = 0; d < p_.width; d += kWidth) {
        Vec::load_first(from + d, p_.width - d).store_first(rounded + r * p_.width + d, p_.width - d);
      }
    }
    return {reinterpret_cast<const char*>(rounded), p_.width * 2};
  }

  int64_t size(Cutter cutter, bool values_by_dim, bool values, bool keys) {
    const int64_t dims = 2 * kp_ * kd_ * kTileHalves, prompts = kp_ * nd_ * kTileHalves;
    keys_by_dim_ = cutter.cut<BFloat16>(dims);
    if (values_by_dim) values_by_dim_ = cutter.cut<BFloat16>(dims);
    if (values) values_ = cutter.cut<BFloat16>(prompts);
    if (keys) keys_ = cutter.cut<BFloat16>(prompts);
    return cutter.used();
  }

  const DiffusePrompts& p_;
  const int64_t kd_, nd_, kp_;
  BFloat16 *keys_by_dim_ = nullptr, *values_by_dim_ = nullptr, *keys_ = nullptr, *values_ = nullptr;
  CallMemory memory_;
};

// What a task does with a group of tokens: scores, activations, products with prompts.
class DiffusedGroup {
 public:
  DiffusedGroup(const DiffusePrompts& p, Cutter& cutter)
      : p_(p), kd_(tiles_of_32(p.width)), nd_(tiles_of_16(p.width)), kp_(tiles_of_32(p.prompts)),
        even_(p.width % 32 == 0) {
    packed_ = cutter.cut<BFloat16>(2 * kd_ * kTileHalves);
    sums_ = cutter.cut<float>(2 * kChunk * kTileFloats);
  }

  // scores [tiles of tokens, 2 * kp_] = the rows' product with keys or values.
  void multiply_rows(const TokenRows& rows, int64_t first, int64_t count, const Operand& b, float* scores) const {
    const int64_t tiles = tiles_of_16(count);
    multiply(operand(rows, first, count), b, tiles, tiles_of_16(p_.prompts), kd_, {scores, 2 * kp_, 1}, false);
  }

  // write(r, first tile of columns, tiles, their sums) for every row of weights [count, 32 * kp_] times prompts.
  template <class Prompts, class Write>
  void read_prompts(const BFloat16* weights, int64_t count, const Prompts& prompts, const Write& write) const {
    const Operand a{weights, 16 * kp_, 1, 32, kp_ * 64};
    for (int64_t column = 0; column < nd_; column += kChunk) {
      const int64_t columns = std::min(nd_ - column, kChunk);
      multiply(a, prompts(column), tiles_of_16(count), columns, kp_, {sums_, kChunk, 1}, false);
      for (int64_t r = 0; r < count; ++r) {
        write(r, column * 16, std::min(p_.width - column * 16, columns * 16),
              sums_ + r / 16 * kChunk * kTileFloats + r % 16 * 16);
      }
    }
  }

  // Activations of a row, in place of its scores; returns its weight times `factor`. What stands past the last prompt
  // is not read: it may be NaN.
  float activate(float* scores) const {
    const __m512 low = _mm512_set1_ps(p_.softmax ? -std::numeric_limits<float>::infinity() : 0.0f);
    __m512 top = low;
    __mmask16 nan = 0;
    for (int64_t j = 0; j < p_.prompts; j += 16, scores += kTileFloats) {
      const __m512 x = _mm512_mask_load_ps(low, Vec::first(p_.prompts - j), scores);
      const __m512 a = _mm512_max_ps(low, x);  // x where x is NaN
      nan |= _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
      top = _mm512_max_ps(top, a);
      _mm512_store_ps(scores, a);
    }
    float peak = nan ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(top);
    if (p_.softmax) peak = normalize(scores - tiles_of_16(p_.prompts) * kTileFloats, peak);
    return p_.rowmax && p_.prompts ? p_.factor * peak : p_.factor;
  }

  // Two tiles of a row from prompt j on, zeros past the last prompt.
  struct Pair {
    __m512 low, high;
  };
  Pair load(const float* row, int64_t j) const {
    const float* at = row + j * 16;
    return {_mm512_maskz_load_ps(Vec::first(p_.prompts - j), at),
            _mm512_maskz_load_ps(Vec::first(p_.prompts - j - 16), at + kTileFloats)};
  }

  const DiffusePrompts& p_;
  const int64_t kd_, nd_, kp_;  // tiles of dims, by 32 and by 16; tiles of 32 prompts

 private:
  // Rows of whole tiles are read where they are, others are copied.
  Operand operand(const TokenRows& rows, int64_t first, int64_t count) const {
    if (even_ && count % 16 == 0 && rows.even(p_.samples)) {
      return {halves(rows.at(first)), rows.rows.row, 2, 16, rows.rows.row * 2};
    }
    pack_rows([&](int64_t r) { return halves(rows.at(first + r)); }, count, p_.width, packed_);
    return {packed_, kd_, 1};
  }

  // Softmax; returns its largest weight.
  float normalize(float* scores, float peak) const {
    const __m512 down = _mm512_set1_ps(peak), log2e = _mm512_set1_ps(1.44269504f);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < p_.prompts; j += 16) {
      float* at = scores + j * 16;
      const __m512 x = exp2_to_round(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(at), down), log2e));
      sum = _mm512_mask_add_ps(sum, Vec::first(p_.prompts - j), sum, x);
      _mm512_store_ps(at, x);
    }
    const float inverse = 1 / _mm512_reduce_add_ps(sum);
    for (int64_t j = 0; j < p_.prompts; j += 16) {
      float* at = scores + j * 16;
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(inverse)));
    }
    return inverse;
  }

  const bool even_;
  BFloat16* packed_;
  float* sums_;
};

inline void forward_group(const DiffusedGroup& group, const DiffusedTiles& tiles, const TokenRows& out, int64_t first,
                          int64_t count, float* scores, BFloat16* weights) {
  const DiffusePrompts& p = group.p_;
  const TokenRows x{p.x, p.tokens}, base{p.base, p.tokens};
  group.multiply_rows(x, first, count, tiles.keys_by_dim(), scores);
  alignas(64) float factors[kGroup];
  for (int64_t r = 0; r < count; ++r) {
    float* row = scores + r / 16 * 2 * group.kp_ * kTileFloats + r % 16 * 16;
    factors[r] = group.activate(row);
    for (int64_t j = 0; j < p.prompts; j += 32) {
      const auto a = group.load(row, j);
      _mm512_store_si512(weights + r * group.kp_ * 32 + j, to_bfloat16(a.low, a.high));
    }
  }
  const __m512 scale = _mm512_set1_ps(p.factor);
  const auto values = [&](int64_t column) { return tiles.values(column); };
  group.read_prompts(weights, count, values, [&](int64_t r, int64_t column, int64_t width, const float* sums) {
    const BFloat16* from = halves(base.at(first + r)) + column;
    BFloat16* to = halves(out.at(first + r)) + column;
    const __m512 factor = _mm512_set1_ps(factors[r]);
    for (int64_t d = 0; d < width; d += 32, sums += 2 * kTileFloats) {
      const __mmask32 kept = first_halves(width - d);
      const __m512i b = _mm512_maskz_loadu_epi16(kept, from + d);
      const __m512 low = _mm512_fmadd_ps(_mm512_load_ps(sums), factor, _mm512_mul_ps(widen_low(b), scale));
      const __m512 high =
          _mm512_fmadd_ps(_mm512_load_ps(sums + kTileFloats), factor, _mm512_mul_ps(widen_high(b), scale));
      _mm512_mask_storeu_epi16(to + d, kept, to_bfloat16(low, high));
    }
  });
}

void diffuse_prompts_forward(const DiffusePrompts& p, const Rows& out, const Threads& threads) {
  if (p.rows() == 0) return;
  DiffusedTiles tiles(p, false, true, false);
  tiles.pack(threads);
  const int64_t kp = tiles_of_32(p.prompts), tasks = (p.rows() + 63) / 64;
  const double work = 4.0 * double(p.rows()) * double(p.prompts + 4) * double(p.width);
  struct Memory {
    Memory(const DiffusePrompts& p, int64_t kp, Cutter cutter)
        : group(p, cutter), scores(cutter.cut<float>(4 * kp * kTileFloats)),
          weights(cutter.cut<BFloat16>(kGroup * kp * 32)), bytes(cutter.used()) {}
    DiffusedGroup group;
    float* scores;
    BFloat16* weights;
    int64_t bytes;
  };
  const int64_t bytes = Memory(p, kp, Cutter()).bytes;
  for_each(threads, tasks, work, [&](int64_t task) {
    const Memory memory(p, kp, Cutter(Scratch::take(bytes)));
    const TileScope scope;
    const int64_t to = first_of_part(p.rows(), task + 1, tasks);
    for (int64_t first = first_of_part(p.rows(), task, tasks); first < to; first += kGroup) {
      forward_group(memory.group, tiles, {out, p.tokens}, first, std::min(to - first, kGroup), memory.scores,
                    memory.weights);
    }
  });
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
