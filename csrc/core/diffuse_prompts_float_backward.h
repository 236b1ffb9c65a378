// SPDX-License-Identifier: Apache-2.0
// Backward of diffuse_prompts on vectors of floats.
#pragma once

#include "diffuse_prompts_float.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

class DiffusedBackward {
 public:
  DiffusedBackward(const DiffusePrompts& p, const DiffusePromptsGrads& g, const DiffusedMatrices& matrices,
                   Cutter cutter)
      : p_(p), g_(g), matrices_(matrices), block_(p, matrices, cutter), x_(p.x, p), base_(p.base, p),
        grad_(g.grad_out, p), dx_(g.x, p), dbase_(g.base, p) {
    scores_ = cutter.cut<float>(kTokens * matrices.wide);
    reached_ = cutter.cut<float>(kTokens * matrices.wide);
    x_copy_ = cutter.cut<float>(block_.in_place(x_, bool(g.keys)) ? 0 : kTokens * matrices.row);
    grad_copy_ = cutter.cut<float>(block_.in_place(grad_, bool(g.values)) ? 0 : kTokens * matrices.row);
    bytes_ = cutter.used();
  }

  int64_t bytes() const { return bytes_; }

  // Tokens [first, to); adds to sums of gradients [prompts, columns]. Returns that of log_scale.
  double run(int64_t first, int64_t to, float* values, float* keys) {
    total_ = 0;
    const int64_t blocks = blocks_of(to - first, kTokens);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t from = first + first_of_part(to - first, b, blocks);
      run_block(from, first + first_of_part(to - first, b + 1, blocks) - from, values, keys);
    }
    return total_;
  }

 private:
  void run_block(int64_t first, int64_t count, float* values, float* keys) {
    const int64_t wide = matrices_.wide;
    if (g_.values || g_.slopes()) {
      const FloatRows x = block_.read(x_, first, count, bool(g_.keys), x_copy_);
      const FloatRows grad = block_.read(grad_, first, count, bool(g_.values), grad_copy_);
      block_.multiply_rows(x, count, matrices_.keys_by_dim, scores_);
      if (g_.slopes()) block_.multiply_rows(grad, count, matrices_.values_by_dim, reached_);
      for (int64_t r = 0; r < count; ++r) {
        float* scores = scores_ + r * wide;
        const float factor = block_.activate(scores);
        if (g_.slopes()) to_slopes(scores, factor, reached_ + r * wide);
        for (int64_t j = 0; g_.values && j < wide; j += kWidth) (Vec::load(scores + j) * Vec(factor)).store(scores + j);
      }
      if (g_.values) add_over_tokens(scores_, grad, count, values);
      if (g_.keys) add_over_tokens(reached_, x, count, keys);
    }
    for (int64_t r = 0; (g_.base || g_.log_scale) && r < count; ++r) pass_base(first + r);
    if (!g_.x) return;
    block_.read_prompts(reached_, count, matrices_.keys,
                        [&](int64_t r, int64_t column, int64_t width, const float* sums) {
                          char* to = dx_.at(first + r);
                          for (int64_t d = 0; d < width; d += kWidth) {
                            const int64_t n = std::min(width - d, kWidth);
                            store_first(Vec::load(sums + d), to, p_.x.dtype, column + d, n);
                          }
                        });
  }

  // Gradients of the scores of a row, in place of what reached its activations; adds to the gradient of log_scale.
  void to_slopes(const float* active, float by, float* reached) {
    const Vec factor(by), zero(0.0f), least(std::numeric_limits<float>::denorm_min());
    for (int64_t j = p_.prompts; j < matrices_.wide; ++j) reached[j] = 0;
    float read = 0;
    if (p_.softmax || g_.log_scale) {
      Vec total = zero;
      for (int64_t j = 0; j < matrices_.wide; j += kWidth) {
        total = fma(Vec::load(active + j), Vec::load(reached + j), total);
      }
      read = sum(total);
      total_ += double(by) * double(read);
    }
    for (int64_t j = 0; j < matrices_.wide; j += kWidth) {
      const Vec a = Vec::load(active + j), d = Vec::load(reached + j);
      // ReLU: nothing where the activation is 0; not where it is NaN.
      const Vec slope = p_.softmax ? (d - Vec(read)) * factor * a : select_less(a, least, zero, d * factor);
      slope.store(reached + j);
    }
  }

  // The gradient of base of one row, and what base adds to that of log_scale.
  void pass_base(int64_t r) {
    const DType dtype = p_.x.dtype;
    const char* grad = grad_.at(r);
    const char* base = g_.log_scale ? base_.at(r) : nullptr;
    char* to = g_.base ? dbase_.at(r) : nullptr;
    const Vec factor(p_.factor);
    Vec total(0.0f);
    for (int64_t d = 0; d < p_.width; d += kWidth) {
      const int64_t n = std::min(p_.width - d, kWidth);
      const bool whole = n == kWidth;
      const Vec x = whole ? load(grad, dtype, d) : load_first(grad, dtype, d, n);
      if (base) total = fma(x, whole ? load(base, dtype, d) : load_first(base, dtype, d, n), total);
      if (to) store_first(x * factor, to, dtype, d, n);
    }
    if (base) total_ += double(p_.factor) * double(sum(total));
  }

  // sums [prompts, columns] += weights^T rows.
  void add_over_tokens(const float* weights, const FloatRows& rows, int64_t count, float* sums) const {
    const int64_t columns = matrices_.columns;
    multiply<Into::add>(
        {p_.prompts, columns, count, weights, 1, matrices_.wide, rows.data, rows.row, sums, columns});
  }

  const DiffusePrompts& p_;
  const DiffusePromptsGrads& g_;
  const DiffusedMatrices& matrices_;
  const DiffusedBlock block_;
  const TokenRows x_, base_, grad_, dx_, dbase_;
  double total_ = 0;
  int64_t bytes_;
  float *scores_, *reached_, *x_copy_, *grad_copy_;
};

// A row of the gradient of prompts' values or keys: `ranges` sums, `stride` floats apart, added in order.
inline void write_prompt_gradient(const float* sums, int64_t stride, int64_t ranges, int64_t width, const Rows& to,
                                  int64_t row) {
  for (int64_t d = 0; d < width; d += kWidth) {
    Vec total(0.0f);
    for (int64_t i = 0; i < ranges; ++i) total = total + Vec::load(sums + i * stride + d);
    store_first(total, to.at(0, 0, row), to.dtype, d, std::min(kWidth, width - d));
  }
}

void diffuse_prompts_backward(const DiffusePrompts& p, const DiffusePromptsGrads& g, const Threads& threads) {
  DiffusedMatrices matrices(p, g.slopes());
  const int64_t ranges = p.rows() ? token_ranges(p) : 0, size = p.prompts * matrices.columns;
  const int64_t planes = int64_t(bool(g.values)) + int64_t(bool(g.keys)), stride = planes * size;
  const CallMemory memory(std::max(round_up(stride * ranges * 4, kAlignment) + 8 * ranges, kAlignment));
  Cutter cutter(memory.data());
  float* sums = cutter.cut<float>(stride * ranges);
  double* totals = cutter.cut<double>(ranges);
  if (ranges && (g.values || g.slopes())) matrices.pack(threads);
  const double products = 10.0 * double(p.rows()) * double(p.prompts) * double(p.width);
  const int64_t bytes = DiffusedBackward(p, g, matrices, Cutter()).bytes();
  for_each(threads, ranges, products + 4.0 * double(p.rows()) * double(p.width), [&](int64_t i) {
    DiffusedBackward kernel(p, g, matrices, Cutter(Scratch::take(bytes)));
    float* mine = sums + i * stride;
    std::fill_n(mine, stride, 0.0f);
    totals[i] = kernel.run(first_of_part(p.rows(), i, ranges), first_of_part(p.rows(), i + 1, ranges), mine,
                           g.values ? mine + size : mine);
  });
  const float* of_keys = sums + (g.values ? size : 0);
  for_each(threads, p.prompts, double(stride * (ranges + 1)), [&](int64_t j) {
    if (g.values) write_prompt_gradient(sums + j * matrices.columns, stride, ranges, p.width, g.values, j);
    if (g.keys) write_prompt_gradient(of_keys + j * matrices.columns, stride, ranges, p.width, g.keys, j);
  });
  if (g.log_scale) {
    double total = 0;
    for (int64_t i = 0; i < ranges; ++i) total += totals[i];
    *g.log_scale = static_cast<float>(total);
  }
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
