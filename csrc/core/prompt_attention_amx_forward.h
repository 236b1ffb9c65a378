// SPDX-License-Identifier: Apache-2.0
// Forward of prompt attention on tiles. Keys are [prompt, to a multiple of 32; instance keys, likewise].
//
// 32 query rows at a time: S = Q K^T, then a softmax along the rows, then O (+)= P V. P is rounded to bfloat16 for the
// product, its sum is of what it was before. Rows do not touch each other: how they are cut into tasks changes no bit.
#pragma once

#include "attention_amx.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

class AttentionForward {
 public:
  AttentionForward(const PromptAttention& p, const Rows& out, const Rows& lse, Cutter cutter)
      : p_(p), out_(out), lse_(lse), kd_(tiles_of_32(p.dim)), nd_(tiles_of_16(p.dim)),
        padded_(round_up(p.prompts, 32)), plain_(!p.mask && p.scale > 0) {
    const int64_t keys = padded_ + round_up(p.tk, 32);
    // Few keys: all scores first. More: blocks that stay in the nearest cache, and a running maximum.
    block_ = keys <= 576 ? keys : 256;
    rounded_ = cutter.cut<BFloat16>(std::max(rounded_prompt(p, p.prompt_key), rounded_prompt(p, p.prompt_value)));
    query_ = cutter.cut<BFloat16>(2 * kd_ * kTileHalves);
    key_ = cutter.cut<BFloat16>(keys / 16 * kd_ * kTileHalves);
    value_ = cutter.cut<BFloat16>(keys / 32 * nd_ * kTileHalves);
    scores_ = cutter.cut<float>(2 * block_ / 16 * kTileFloats);
    weights_ = cutter.cut<BFloat16>(2 * block_ / 32 * kTileHalves);
    sums_ = cutter.cut<float>(2 * nd_ * kTileFloats);
    bytes_ = cutter.used();
  }

  int64_t bytes() const { return bytes_; }

  void read_prompt(int64_t g, int64_t head_kv) {
    if (p_.prompts == 0) return;
    pack_dim_pairs(prompt_rows(p_, p_.prompt_key, g, head_kv, rounded_), p_.prompts, p_.dim, key_);
    pack_row_pairs<false>(prompt_rows(p_, p_.prompt_value, g, head_kv, rounded_), p_.prompts, p_.dim, value_);
  }

  // Query rows [from, to) of one key head of a sample.
  void attend(int64_t s, int64_t head_kv, int64_t from, int64_t to) {
    const Causal causal(p_, s);
    const int64_t keys = causal.limit(to - 1);
    pack_dim_pairs(key_rows(p_, p_.key, s, head_kv), keys, p_.dim, key_ + padded_ / 16 * kd_ * kTileHalves);
    pack_row_pairs<false>(key_rows(p_, p_.value, s, head_kv), keys, p_.dim, value_ + padded_ / 32 * nd_ * kTileHalves);
    const HeadRows queries = query_rows(p_, p_.query, s, head_kv);
    for (int64_t r = from; r < to; r += 32) attend_block(queries, causal, r, std::min<int64_t>(to - r, 32));
  }

 private:
  // Keys [first, first + count) of the axis, zero weights from there to `end`; first and end are multiples of 32.
  struct Span {
    int64_t first, count, end;
  };

  void attend_block(const HeadRows& queries, const Causal& causal, int64_t first, int64_t rows) {
    const int64_t tiles = tiles_of_16(rows), limit = causal.limit(first + rows - 1);
    const int64_t keys = limit ? padded_ + limit : padded_;
    pack_rows([&](int64_t r) { return queries(first + r); }, rows, p_.dim, query_);
    for (int64_t r = 0; r < 32; ++r) peak_[r] = -std::numeric_limits<float>::infinity(), total_[r] = 0;
    if (keys == 0) std::fill_n(sums_, 2 * nd_ * kTileFloats, 0.0f);
    for (int64_t from = 0; from < keys; from += block_) {
      const int64_t to = std::min(from + block_, round_up(keys, 32)), wide = block_ / 32;
      const int64_t columns = tiles_of_16(std::min(to, keys) - from);
      multiply({query_, kd_, 1}, {key_ + from / 16 * kd_ * kTileHalves, kd_, 1}, tiles, columns, kd_,
               {scores_, block_ / 16, 1}, false);
      for (int64_t r = 0; r < rows; ++r) weigh_row(queries, causal.limit(first + r), first + r, r, from, to);
      multiply({weights_, wide, 1}, {value_ + from / 32 * nd_ * kTileHalves, 1, nd_}, tiles, nd_, (to - from) / 32,
               {sums_, nd_, 1}, from > 0);
    }
    finish(queries, first, rows);
  }

  float* scores_of(int64_t r) const { return scores_ + r / 16 * (block_ / 16) * kTileFloats + r % 16 * 16; }
  BFloat16* weights_of(int64_t r) const { return weights_ + r / 16 * (block_ / 32) * kTileHalves + r % 16 * 32; }

  // Softmax of one row over the block [from, to) of keys, of which it sees `limit` instance keys.
  void weigh_row(const HeadRows& queries, int64_t limit, int64_t row, int64_t r, int64_t from, int64_t to) {
    const int64_t middle = std::clamp(padded_, from, to);
    const Span spans[2] = {{0, std::clamp<int64_t>(p_.prompts - from, 0, middle - from), middle - from},
                           {middle - from, std::clamp<int64_t>(padded_ + limit - middle, 0, to - middle), to - from}};
    float* scores = scores_of(r);
    float factor = p_.scale * kLog2e;
    if (!plain_) {
      scale_row(scores, spans[0], nullptr, 0);
      const MaskRow mask(p_.mask, queries, row);
      scale_row(scores, spans[1], p_.mask ? &mask : nullptr, middle - padded_);
      factor = 1;
    }
    const float seen = std::max(largest(scores, spans[0]), largest(scores, spans[1])) * factor;
    const float before = peak_[r], peak = std::max(before, seen);
    // Where nothing is seen yet, anything but -inf will do: -inf - -inf is NaN.
    const float shift = peak == -std::numeric_limits<float>::infinity() ? 0 : peak;
    if (from > 0 && peak != before) rescale(r, before - shift);
    peak_[r] = peak;
    __m512 sum = _mm512_setzero_ps();
    for (const Span& span : spans) sum = exponentials(scores, weights_of(r), span, factor, shift, sum);
    total_[r] += _mm512_reduce_add_ps(sum);
  }

  // Scores in units of log2, with what a mask adds to instance keys from `key`.
  void scale_row(float* scores, const Span& span, const MaskRow* mask, int64_t key) const {
    const __m512 factor = _mm512_set1_ps(p_.scale * kLog2e);
    for (int64_t j = 0; j < span.count; j += 16) {
      float* at = scores + (span.first + j) * 16;
      const __m512 add = mask ? mask->load(key + j, span.count - j) : _mm512_setzero_ps();
      _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_load_ps(at), factor, add));
    }
  }

  static float largest(const float* scores, const Span& span) {
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 a = none, b = none;
    const float* at = scores + span.first * 16;
    int64_t left = span.count;
    for (; left >= 32; left -= 32, at += 2 * kTileFloats) {
      a = _mm512_max_ps(a, _mm512_load_ps(at));
      b = _mm512_max_ps(b, _mm512_load_ps(at + kTileFloats));
    }
    if (left > 0) a = _mm512_max_ps(a, _mm512_mask_load_ps(none, Vec::first(left), at));
    if (left > 16) b = _mm512_max_ps(b, _mm512_mask_load_ps(none, Vec::first(left - 16), at + kTileFloats));
    return _mm512_reduce_max_ps(_mm512_max_ps(a, b));
  }

  static __m512 exponentials(const float* scores, BFloat16* weights, const Span& span, float factor, float shift,
                             __m512 sum) {
    const __m512 c = _mm512_set1_ps(factor), down = _mm512_set1_ps(-shift);
    const float* at = scores + span.first * 16;
    BFloat16* to = weights + span.first * 16;
    int64_t left = span.count;
    __m512 other = _mm512_setzero_ps();
    for (; left >= 32; left -= 32, at += 2 * kTileFloats, to += kTileHalves) {
      const __m512 x = exp2_to_round(_mm512_fmadd_ps(_mm512_load_ps(at), c, down));
      const __m512 y = exp2_to_round(_mm512_fmadd_ps(_mm512_load_ps(at + kTileFloats), c, down));
      sum = _mm512_add_ps(sum, x);
      other = _mm512_add_ps(other, y);
      _mm512_store_si512(to, to_bfloat16(x, y));
    }
    if (left > 0) {
      // The second tile may not have been computed: what stands there must not get out.
      const __mmask16 first = Vec::first(left), second = Vec::first(left - 16);
      const __m512 x = exp2_to_round(_mm512_fmadd_ps(_mm512_maskz_load_ps(first, at), c, down));
      const __m512 y = exp2_to_round(_mm512_fmadd_ps(_mm512_maskz_load_ps(second, at + kTileFloats), c, down));
      sum = _mm512_mask_add_ps(sum, first, sum, x);
      other = _mm512_mask_add_ps(other, second, other, y);
      _mm512_store_si512(to, to_bfloat16(_mm512_maskz_mov_ps(first, x), _mm512_maskz_mov_ps(second, y)));
      to += kTileHalves;
    }
    for (const BFloat16* end = weights + span.end * 16; to < end; to += kTileHalves) {
      _mm512_store_si512(to, _mm512_setzero_si512());
    }
    return _mm512_add_ps(sum, other);
  }

  // The sums of row r so far belong to another maximum.
  void rescale(int64_t r, float difference) {
    const __m512 by = exp2_to_round(_mm512_set1_ps(difference));
    total_[r] *= _mm512_cvtss_f32(by);
    float* at = sums_ + r / 16 * nd_ * kTileFloats + r % 16 * 16;
    for (int64_t n = 0; n < nd_; ++n, at += kTileFloats) _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), by));
  }

  void finish(const HeadRows& queries, int64_t first, int64_t rows) {
    const HeadRows out{out_, queries.sample, queries.head, queries.first, queries.groups};
    const HeadRows lse{lse_, queries.sample, queries.head, queries.first, queries.groups};
    for (int64_t from = 0; from < rows; from += 16) {
      const __m512 total = _mm512_load_ps(total_ + from);
      const __mmask16 some = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      alignas(64) float inverse[16], logs[16];
      _mm512_store_ps(inverse, _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), total));
      const __m512 in_log2 = _mm512_add_ps(_mm512_load_ps(peak_ + from), log2(total));
      _mm512_store_ps(logs, _mm512_mul_ps(in_log2, _mm512_set1_ps(kLn2)));
      for (int64_t r = 0; r < std::min<int64_t>(rows - from, 16); ++r) {
        *reinterpret_cast<float*>(lse.at(first + from + r)) = logs[r];
        write_row(sums_ + from / 16 * nd_ * kTileFloats + r * 16, inverse[r],
                  reinterpret_cast<BFloat16*>(out.at(first + from + r)));
      }
    }
  }

  void write_row(const float* sums, float by, BFloat16* to) const {
    const __m512 factor = _mm512_set1_ps(by);
    for (int64_t d = 0; d < p_.dim; d += 16) {
      const __m512 x = _mm512_mul_ps(_mm512_load_ps(sums + d * 16), factor);
      _mm256_mask_storeu_epi16(to + d, Vec::first(p_.dim - d), to_bfloat16(x));
    }
  }

  const PromptAttention& p_;
  const Rows &out_, &lse_;
  const int64_t kd_, nd_;   // tiles of dims, by 32 and by 16
  const int64_t padded_;    // where instance keys begin
  const bool plain_;        // scores need no preparation
  int64_t block_, bytes_;
  BFloat16 *rounded_, *query_, *key_, *value_, *weights_;
  float *scores_, *sums_;
  alignas(64) float peak_[32], total_[32];
};

inline void forward(const PromptAttention& p, const Rows& out, const Rows& lse, const Threads& threads) {
  if (p.samples == 0 || p.heads == 0 || p.tq == 0) return;
  const SampleRuns found(p, 64);
  const int64_t lanes = p.tq * p.groups(), runs = static_cast<int64_t>(found.runs.size());
  // Every piece of a head packs its keys again: few pieces, unless threads would have nothing to do.
  const int64_t pieces = std::clamp<int64_t>(4 * threads.count / (runs * p.heads_kv), 1, (lanes + 255) / 256);
  const double work = 4.0 * double(p.samples) * double(p.heads) * double(p.tq) * double(p.tk + p.prompts) *
                      double(p.dim);
  const int64_t bytes = AttentionForward(p, out, lse, Cutter()).bytes();
  for_each(threads, runs * p.heads_kv * pieces, work, [&](int64_t task) {
    const int64_t piece = task % pieces, head_kv = task / pieces % p.heads_kv;
    const SampleRun& run = found.runs[static_cast<size_t>(task / pieces / p.heads_kv)];
    AttentionForward kernel(p, out, lse, Cutter(Scratch::take(bytes)));
    const TileScope tiles;
    kernel.read_prompt(run.prompt, head_kv);
    for (int64_t i = run.begin; i < run.end; ++i) {
      const int64_t s = found.order[static_cast<size_t>(i)], rows = p.queries_of(s) * p.groups();
      const int64_t blocks = (rows + 31) / 32;
      const int64_t from = 32 * (blocks * piece / pieces), to = std::min(32 * (blocks * (piece + 1) / pieces), rows);
      if (from < to) kernel.attend(s, head_kv, from, to);
    }
  });
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
