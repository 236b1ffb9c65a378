// SPDX-License-Identifier: Apache-2.0
// diffuse_prompts on vectors of floats. Tokens are rows, vectors run along prompts or along the width.
//
// Arrays over prompts are `wide` long, whole vectors; products never read what stands past the last prompt. The sums
// over tokens belong to ranges of tokens and are added in order.
#pragma once

#include "attention_blocks.h"
#include "diffuse_prompts.h"
#include "gemm.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

constexpr int64_t kTokens = 96;   // most tokens of a block, whole groups of 32
constexpr int64_t kColumns = 256;  // columns of one product that is written out

// Floats from one row of `columns` to the next: an odd number of cache lines, so that the rows of a product's panel
// spread over all sets of the nearest cache.
constexpr int64_t odd_lines(int64_t columns) {
  const int64_t lines = (columns + 15) / 16;
  return (lines + 1 - lines % 2) * 16;
}

// Keys and values of a call as floats, rounded to the type of x: rows [prompts, columns], `row` apart, and, transposed,
// [width, wide], all with zeros up to whole vectors.
class DiffusedMatrices {
 public:
  DiffusedMatrices(const DiffusePrompts& p, bool slopes)
      : wide(to_vectors(p.prompts)), columns(to_vectors(p.width)), row(odd_lines(columns)), p_(p),
        memory_(size(Cutter(), slopes)) {
    size(Cutter(memory_.data()), slopes);
  }

  void pack(const Threads& threads) {
    for_each(threads, wide / kWidth * 2, 8.0 * double(p_.prompts) * double(p_.width), [&](int64_t task) {
      const int64_t first = task / 2 * kWidth, count = std::min(p_.prompts - first, kWidth);
      const Rows& rows = task % 2 ? p_.values : p_.keys;
      float* to = (task % 2 ? values : keys) + first * row;
      float* by_dim = task % 2 ? values_by_dim : keys_by_dim;
      copy_rows(rows.at(0, 0, first), rows.dtype, rows.row, count, p_.width, p_.x.dtype, to, row);
      if (!by_dim) return;
      for (int64_t d = 0; d < p_.width; d += kWidth) {
        Vec x[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) x[i] = i < count ? Vec::load(to + i * row + d) : Vec(0.0f);
        transpose(x);
        for (int64_t i = 0; i < std::min(p_.width - d, kWidth); ++i) x[i].store(by_dim + (d + i) * wide + first);
      }
    });
  }

  const int64_t wide, columns, row;
  float *values = nullptr, *keys = nullptr, *keys_by_dim = nullptr, *values_by_dim = nullptr;

 private:
  int64_t size(Cutter cutter, bool slopes) {
    values = cutter.cut<float>(p_.prompts * row);
    keys = cutter.cut<float>(p_.prompts * row);
    keys_by_dim = cutter.cut<float>(p_.width * wide);
    if (slopes) values_by_dim = cutter.cut<float>(p_.width * wide);
    return std::max(cutter.used(), kAlignment);
  }

  const DiffusePrompts& p_;
  CallMemory memory_;
};

// C = AB, in parts of the depth: what is read of B stays in the nearest cache, and long sums lose less.
inline void multiply_in_parts(Product part) {
  const int64_t depth = part.depth, parts = std::max<int64_t>(blocks_of(depth, 128), 1);
  for (int64_t i = 0, first = 0; i < parts; ++i) {
    part.depth = (i + 1) * depth / parts - first;
    i == 0 ? multiply<Into::overwrite>(part) : multiply<Into::add>(part);
    part.a += part.depth * part.a_column, part.b += part.depth * part.b_row, first += part.depth;
  }
}

struct FloatRows {
  const float* data;
  int64_t row;
};

// What a task does with a block of tokens.
class DiffusedBlock {
 public:
  DiffusedBlock(const DiffusePrompts& p, const DiffusedMatrices& matrices, Cutter& cutter)
      : p_(p), matrices_(matrices), sums_(cutter.cut<float>(kTokens * kColumns)) {}

  // Rows as floats: where they are, or in `copy` [kTokens, row]. `summed`: by a product over tokens, whose panels want
  // rows as far apart as those.
  FloatRows read(const TokenRows& rows, int64_t first, int64_t count, bool summed, float* copy) const {
    if (in_place(rows, summed)) return {reinterpret_cast<const float*>(rows.at(first)), rows.rows.row};
    for (int64_t r = 0; r < count; ++r) {
      copy_rows(rows.at(first + r), p_.x.dtype, 0, 1, p_.width, p_.x.dtype, copy + r * matrices_.row, 0);
    }
    return {copy, matrices_.row};
  }
  bool in_place(const TokenRows& rows, bool summed) const {
    return p_.x.dtype == DType::float32 && rows.even && !summed;
  }

  // scores [count, wide] = the rows' product with keys or values by dim.
  void multiply_rows(const FloatRows& rows, int64_t count, const float* by_dim, float* scores) const {
    const int64_t wide = matrices_.wide;
    multiply_in_parts({count, wide, p_.width, rows.data, rows.row, 1, by_dim, wide, scores, wide});
  }

  // write(r, first column, columns, their sums) for every row of weights [count, wide] times prompts.
  template <class Write>
  void read_prompts(const float* weights, int64_t count, const float* prompts, const Write& write) const {
    const int64_t wide = matrices_.wide, columns = matrices_.columns, row = matrices_.row;
    for (int64_t column = 0; column < columns; column += kColumns) {
      const int64_t n = std::min(columns - column, kColumns);
      multiply_in_parts({count, n, p_.prompts, weights, wide, 1, prompts + column, row, sums_, kColumns});
      for (int64_t r = 0; r < count; ++r) {
        write(r, column, std::min(p_.width - column, n), sums_ + r * kColumns);
      }
    }
  }

  // Activations of a row, in place of its scores; returns its weight times `factor`.
  float activate(float* row) const {
    const int64_t wide = matrices_.wide;
    for (int64_t j = p_.prompts; j < wide; ++j) row[j] = p_.softmax ? -kInfinity : 0;
    const float peak = p_.softmax ? normalize(row, largest(row, -kInfinity)) : rectify(row);
    return p_.rowmax && p_.prompts ? p_.factor * peak : p_.factor;
  }

  const DiffusePrompts& p_;
  const DiffusedMatrices& matrices_;

 private:
  // NaN does not count.
  float largest(const float* row, float least) const {
    Vec top(least);
    for (int64_t j = 0; j < matrices_.wide; j += kWidth) top = max(top, Vec::load(row + j));
    float lanes[kWidth], found = least;
    top.store(lanes);
    for (const float x : lanes) found = std::max(found, x);
    return found;
  }

  float rectify(float* row) const {
    // NaN does not enter a maximum, so it is carried beside it: 0 - NaN is less than nothing.
    const Vec zero(0.0f), one(1.0f), none(std::numeric_limits<float>::quiet_NaN());
    Vec poison = zero;
    for (int64_t j = 0; j < matrices_.wide; j += kWidth) {
      const Vec a = max(Vec::load(row + j), zero);
      poison = poison + select_less(zero - a, one, zero, none);
      a.store(row + j);
    }
    return largest(row, 0) + sum(poison);
  }

  // Softmax; returns its largest weight.
  float normalize(float* row, float peak) const {
    const Vec down(peak), log2e(kLog2e);
    Vec total(0.0f);
    for (int64_t j = 0; j < matrices_.wide; j += kWidth) {
      const Vec x = exp2((Vec::load(row + j) - down) * log2e);
      total = total + x;
      x.store(row + j);
    }
    const float inverse = 1 / sum(total);
    for (int64_t j = 0; j < matrices_.wide; j += kWidth) (Vec::load(row + j) * Vec(inverse)).store(row + j);
    return inverse;
  }

  float* sums_;
};

class DiffusedForward {
 public:
  DiffusedForward(const DiffusePrompts& p, const DiffusedMatrices& matrices, const Rows& out, Cutter cutter)
      : p_(p), matrices_(matrices), block_(p, matrices, cutter), x_(p.x, p), base_(p.base, p),
        out_(out, p) {
    scores_ = cutter.cut<float>(kTokens * matrices.wide);
    copy_ = cutter.cut<float>(block_.in_place(x_, false) ? 0 : kTokens * matrices.row);
    bytes_ = cutter.used();
  }

  int64_t bytes() const { return bytes_; }

  void run(int64_t first, int64_t count) const {
    block_.multiply_rows(block_.read(x_, first, count, false, copy_), count, matrices_.keys_by_dim, scores_);
    float factors[kTokens];
    for (int64_t r = 0; r < count; ++r) factors[r] = block_.activate(scores_ + r * matrices_.wide);
    const Vec scale(p_.factor);
    const DType dtype = p_.x.dtype;
    block_.read_prompts(scores_, count, matrices_.values,
                        [&](int64_t r, int64_t column, int64_t width, const float* sums) {
                          const char* base = base_.at(first + r);
                          char* to = out_.at(first + r);
                          const Vec factor(factors[r]);
                          for (int64_t d = 0; d < width; d += kWidth) {
                            const int64_t n = std::min(width - d, kWidth);
                            const Vec b = n == kWidth ? load(base, dtype, column + d)
                                                      : load_first(base, dtype, column + d, n);
                            store_first(fma(Vec::load(sums + d), factor, b * scale), to, dtype, column + d, n);
                          }
                        });
  }

 private:
  const DiffusePrompts& p_;
  const DiffusedMatrices& matrices_;
  const DiffusedBlock block_;
  const TokenRows x_, base_, out_;
  int64_t bytes_;
  float *scores_, *copy_;
};

void diffuse_prompts_forward(const DiffusePrompts& p, const Rows& out, const Threads& threads) {
  if (p.rows() == 0) return;
  DiffusedMatrices matrices(p, false);
  matrices.pack(threads);
  const int64_t tasks = blocks_of(p.rows(), kTokens), bytes = DiffusedForward(p, matrices, out, Cutter()).bytes();
  const double work = 4.0 * double(p.rows()) * double(p.prompts + 4) * double(p.width);
  for_each(threads, tasks, work, [&](int64_t task) {
    const int64_t first = first_of_part(p.rows(), task, tasks), to = first_of_part(p.rows(), task + 1, tasks);
    DiffusedForward(p, matrices, out, Cutter(Scratch::take(bytes))).run(first, to - first);
  });
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
