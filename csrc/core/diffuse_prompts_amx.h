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

// Row of 32 bfloat16: all of them, or those that a mask keeps; the others are zeros.
struct Whole {};
inline __m512i load_32(const BFloat16* at, Whole) { return _mm512_loadu_si512(at); }
inline __m512i load_32(const BFloat16* at, __mmask32 kept) { return _mm512_maskz_loadu_epi16(kept, at); }
inline void store_32(BFloat16* at, Whole, __m512i x) { _mm512_storeu_si512(at, x); }
inline void store_32(BFloat16* at, __mmask32 kept, __m512i x) { _mm512_mask_storeu_epi16(at, kept, x); }
inline __m512 widen_low(__m512i x) { return Vec::widen(_mm512_castsi512_si256(x)); }
inline __m512 widen_high(__m512i x) { return Vec::widen(_mm512_extracti64x4_epi64(x, 1)); }

// f(d, Whole or mask) for every 32 of `width` columns.
template <class Function>
inline void each_32(int64_t width, const Function& f) {
  int64_t d = 0;
  for (; d + 32 <= width; d += 32) f(d, Whole());
  if (d < width) f(d, first_halves(width - d));
}

// C = A B where B does not fit in the nearest cache: in parts that do, of at most 8 x 4 tiles, for all rows of A.
inline void multiply_deep(const Operand& a, const Operand& b, int64_t rows, int64_t columns, int64_t depth,
                          const Result& c) {
  constexpr int64_t kWide = 8, kDeep = 6;
  for (int64_t n = 0; n < columns; n += kWide) {
    for (int64_t k = 0; k == 0 || k < depth; k += kDeep) {
      Operand left = a, right = b;
      left.data += k * a.along * a.unit;
      right.data += (n * b.across + k * b.along) * b.unit;
      multiply(left, right, rows, std::min(columns - n, kWide), std::min(depth - k, kDeep),
               {c.data + n * c.column * kTileFloats, c.row, c.column}, k > 0);
    }
  }
}

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
        even_(p.width % 32 == 0), pad_low_(pads(p.prompts % 32)), pad_high_(pads(p.prompts % 32 - 16)) {
    packed_ = cutter.cut<BFloat16>(2 * kd_ * kTileHalves);
    sums_ = cutter.cut<float>(2 * kChunk * kTileFloats);
  }

  // scores [tiles of tokens, 2 * kp_] = the rows' product with keys or values.
  void multiply_rows(const TokenRows& rows, int64_t first, int64_t count, const Operand& b, float* scores) const {
    const int64_t tiles = tiles_of_16(count);
    multiply_deep(operand(rows, first, count), b, tiles, tiles_of_16(p_.prompts), kd_, {scores, 2 * kp_, 1});
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

  // Activations of a row, in place of its scores; returns its weight times `factor`.
  float activate(float* scores) const {
    clear_pads(scores, p_.softmax ? -std::numeric_limits<float>::infinity() : 0.0f);
    const __m512 low = _mm512_set1_ps(p_.softmax ? -std::numeric_limits<float>::infinity() : 0.0f);
    __m512 top = low, other = low;
    __mmask16 nan = 0;
    for (int64_t j = 0; j < kp_; ++j) {
      float* at = scores + j * 2 * kTileFloats;
      const __m512 x = _mm512_max_ps(low, _mm512_load_ps(at));  // NaN stays NaN
      const __m512 y = _mm512_max_ps(low, _mm512_load_ps(at + kTileFloats));
      nan |= _mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q);
      top = _mm512_max_ps(top, x), other = _mm512_max_ps(other, y);
      _mm512_store_ps(at, x);
      _mm512_store_ps(at + kTileFloats, y);
    }
    float peak = _mm512_reduce_max_ps(_mm512_max_ps(top, other));
    if (nan) peak = std::numeric_limits<float>::quiet_NaN();
    if (p_.softmax) peak = normalize(scores, peak);
    return p_.rowmax && p_.prompts ? p_.factor * peak : p_.factor;
  }

  // What stands past the last prompt may be anything, NaN too.
  void clear_pads(float* row, float to) const {
    const __m512 x = _mm512_set1_ps(to);
    row += p_.prompts / 32 * 2 * kTileFloats;
    _mm512_mask_store_ps(row, pad_low_, x);
    _mm512_mask_store_ps(row + kTileFloats, pad_high_, x);
  }

  const DiffusePrompts& p_;
  const int64_t kd_, nd_, kp_;  // tiles of dims, by 32 and by 16; tiles of 32 prompts

 private:
  // Rows of whole tiles are read where they are, others are copied.
  Operand operand(const TokenRows& rows, int64_t first, int64_t count) const {
    if (even_ && count % 16 == 0 && rows.even) {
      return {halves(rows.at(first)), rows.rows.row, 2, 16, rows.rows.row * 2};
    }
    pack_rows([&](int64_t r) { return halves(rows.at(first + r)); }, count, p_.width, packed_);
    return {packed_, kd_, 1};
  }

  // Past the first n of 16, if these are not all.
  __mmask16 pads(int64_t n) const { return p_.prompts % 32 == 0 ? 0 : static_cast<__mmask16>(~Vec::first(n)); }

  // Softmax; returns its largest weight. Pads become zeros.
  float normalize(float* scores, float peak) const {
    const __m512 down = _mm512_set1_ps(peak), log2e = _mm512_set1_ps(1.44269504f);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < 2 * kp_; ++j) {
      float* at = scores + j * kTileFloats;
      const __m512 x = exp2_to_round(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(at), down), log2e));
      sum = _mm512_add_ps(sum, x);
      _mm512_store_ps(at, x);
    }
    const float inverse = 1 / _mm512_reduce_add_ps(sum);
    for (int64_t j = 0; j < 2 * kp_; ++j) {
      float* at = scores + j * kTileFloats;
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(inverse)));
    }
    clear_pads(scores, 0);
    return inverse;
  }

  const bool even_;
  const __mmask16 pad_low_, pad_high_;  // of the last two tiles of a row
  BFloat16* packed_;
  float* sums_;
};

inline void forward_group(const DiffusedGroup& group, const DiffusedTiles& tiles, const TokenRows& out, int64_t first,
                          int64_t count, float* scores, BFloat16* weights) {
  const DiffusePrompts& p = group.p_;
  const TokenRows x(p.x, p), base(p.base, p);
  group.multiply_rows(x, first, count, tiles.keys_by_dim(), scores);
  alignas(64) float factors[kGroup];
  for (int64_t r = 0; r < count; ++r) {
    float* row = scores + r / 16 * 2 * group.kp_ * kTileFloats + r % 16 * 16;
    factors[r] = group.activate(row);
    BFloat16* to = weights + r * group.kp_ * 32;
    for (int64_t j = 0; j < group.kp_; ++j, row += 2 * kTileFloats) {
      _mm512_store_si512(to + j * 32, to_bfloat16(_mm512_load_ps(row), _mm512_load_ps(row + kTileFloats)));
    }
  }
  const __m512 scale = _mm512_set1_ps(p.factor);
  const auto values = [&](int64_t column) { return tiles.values(column); };
  group.read_prompts(weights, count, values, [&](int64_t r, int64_t column, int64_t width, const float* sums) {
    const BFloat16* from = halves(base.at(first + r)) + column;
    BFloat16* to = halves(out.at(first + r)) + column;
    const __m512 factor = _mm512_set1_ps(factors[r]);
    each_32(width, [&](int64_t d, auto kept) {
      const __m512i b = load_32(from + d, kept);
      const float* at = sums + d * 16;
      const __m512 low = _mm512_fmadd_ps(_mm512_load_ps(at), factor, _mm512_mul_ps(widen_low(b), scale));
      const __m512 high =
          _mm512_fmadd_ps(_mm512_load_ps(at + kTileFloats), factor, _mm512_mul_ps(widen_high(b), scale));
      store_32(to + d, kept, to_bfloat16(low, high));
    });
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
      forward_group(memory.group, tiles, {out, p}, first, std::min(to - first, kGroup), memory.scores,
                    memory.weights);
    }
  });
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
