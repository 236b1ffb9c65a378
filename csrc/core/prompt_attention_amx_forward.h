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

  // What the next call will want, if it is known, and how many blocks of 32 rows this one has.
  void look_ahead(int64_t s, int64_t head_kv, int64_t blocks) {
    ahead_.clear();
    bring_keys_near(ahead_, p_, p_.key, s, head_kv);
    bring_keys_near(ahead_, p_, p_.value, s, head_kv);
    bring_near(ahead_, p_, p_.query, s, head_kv);
    ahead_.spread(std::max<int64_t>(blocks, 1));
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
  static constexpr float kNone = -std::numeric_limits<float>::infinity();

  // Tiles of 16 keys of a block: scores in [first, last), zero weights from there to `end`; first and end are even.
  struct Span {
    int64_t first, last, end;
  };

  void attend_block(const HeadRows& queries, const Causal& causal, int64_t first, int64_t rows) {
    const int64_t tiles = tiles_of_16(rows), limit = causal.limit(first + rows - 1);
    const int64_t keys = limit ? padded_ + limit : padded_;
    const HeadRows out = lanes_of(queries, out_);
    for (int64_t r = 0; r < rows; ++r) prefetch_row(out.at(first + r));
    ahead_.step();
    pack_rows([&](int64_t r) { return queries(first + r); }, rows, p_.dim, query_);
    for (int64_t r = 0; r < 32; ++r) peak_[r] = kNone, total_[r] = 0;
    if (keys == 0) std::fill_n(sums_, 2 * nd_ * kTileFloats, 0.0f);
    for (int64_t from = 0; from < keys; from += block_) {
      const int64_t to = std::min(from + block_, round_up(keys, 32)), wide = block_ / 32;
      const int64_t columns = tiles_of_16(std::min(to, keys) - from);
      multiply({query_, kd_, 1}, {key_ + from / 16 * kd_ * kTileHalves, kd_, 1}, tiles, columns, kd_,
               {scores_, block_ / 16, 1}, false);
      weigh({queries, causal, first, rows, from, to, limit});
      multiply({weights_, wide, 1}, {value_ + from / 32 * nd_ * kTileHalves, 1, nd_}, tiles, nd_, (to - from) / 32,
               {sums_, nd_, 1}, from > 0);
    }
    finish(queries, first, rows);
  }

  static HeadRows lanes_of(const HeadRows& queries, const Rows& rows) {
    return {rows, queries.sample, queries.head, queries.first, queries.groups};
  }

  void prefetch_row(const char* row) const {
    for (int64_t i = 0; i < p_.dim * 2; i += 64) __builtin_prefetch(row + i, 1, 3);
  }

  // Query rows [first, first + rows), which see up to `limit` instance keys, against keys [from, to) of the axis.
  struct Block {
    const HeadRows& queries;
    const Causal& causal;
    int64_t first, rows, from, to, limit;
  };

  // Softmax over a block, with the running maximum and sum of each row.
  void weigh(const Block& block) {
    const int64_t middle = std::clamp(padded_, block.from, block.to);
    const int64_t prompts = std::clamp<int64_t>(p_.prompts - block.from, 0, middle - block.from);
    const int64_t seen = std::clamp<int64_t>(padded_ + block.limit - middle, 0, block.to - middle);
    const int64_t start = (middle - block.from) / 16, end = (block.to - block.from) / 16;
    const Span spans[2] = {{0, tiles_of_16(prompts), start}, {start, start + tiles_of_16(seen), end}};
    if (!plain_) {
      for (int64_t r = 0; r < block.rows; ++r) scale_row(block, r, prompts, start, seen, middle - padded_);
    }
    for (int64_t r = 0; r < block.rows; ++r) {
      hide(scores_of(r), prompts, spans[0].last);
      const int64_t own = block.causal.on ? padded_ + block.causal.limit(block.first + r) - middle : seen;
      hide(scores_of(r) + start * kTileFloats, std::clamp<int64_t>(own, 0, seen), spans[1].last - start);
    }
    const float factor = plain_ ? p_.scale * kLog2e : 1;
    for (int64_t r = 0; r < block.rows; r += 16) weigh_tile(spans, factor, r, std::min<int64_t>(block.rows - r, 16));
  }

  float* scores_of(int64_t r) const { return scores_ + r / 16 * (block_ / 16) * kTileFloats + r % 16 * 16; }
  BFloat16* weights_of(int64_t r) const { return weights_ + r / 16 * (block_ / 32) * kTileHalves + r % 16 * 32; }

  // Scores in units of log2, with what a mask adds to instance keys from `key`.
  void scale_row(const Block& block, int64_t r, int64_t prompts, int64_t start, int64_t seen, int64_t key) const {
    const __m512 factor = _mm512_set1_ps(p_.scale * kLog2e);
    float* at = scores_of(r);
    for (int64_t j = 0; j < prompts; j += 16) {
      _mm512_store_ps(at + j * 16, _mm512_mul_ps(_mm512_load_ps(at + j * 16), factor));
    }
    at += start * kTileFloats;
    if (!p_.mask) {
      for (int64_t j = 0; j < seen; j += 16) {
        _mm512_store_ps(at + j * 16, _mm512_mul_ps(_mm512_load_ps(at + j * 16), factor));
      }
      return;
    }
    const MaskRow mask(p_.mask, block.queries, block.first + r);
    for (int64_t j = 0; j < seen; j += 16) {
      const __m512 x = _mm512_load_ps(at + j * 16);
      _mm512_store_ps(at + j * 16, _mm512_fmadd_ps(x, factor, mask.load(key + j, seen - j)));
    }
  }

  // Scores of one row that are not of the first `seen` keys, to the end of its tiles.
  static void hide(float* scores, int64_t seen, int64_t tiles) {
    for (int64_t tile = seen / 16; tile < tiles; ++tile) {
      const __mmask16 hidden = _mm512_knot(Vec::first(seen - tile * 16));
      _mm512_mask_store_ps(scores + tile * kTileFloats, hidden, _mm512_set1_ps(kNone));
    }
  }

  // Rows [r, r + rows) of one tile. Steps on 16 rows at once where they are short, one by one where they are long.
  void weigh_tile(const Span (&spans)[2], float factor, int64_t r, int64_t rows) {
    const __m512 none = _mm512_set1_ps(kNone), before = _mm512_load_ps(peak_ + r);
    const __m512 peak = _mm512_max_ps(before, _mm512_mul_ps(largest(scores_of(r), spans), _mm512_set1_ps(factor)));
    // Where nothing is seen yet, anything but -inf will do: -inf - -inf is NaN.
    const __m512 shift = _mm512_mask_mov_ps(peak, _mm512_cmp_ps_mask(peak, none, _CMP_EQ_OQ), _mm512_setzero_ps());
    alignas(64) float shifts[16], changes[16];
    _mm512_store_ps(shifts, shift);
    const __m512 change = exp2_to_round(_mm512_sub_ps(before, shift));
    _mm512_store_ps(changes, change);
    // A first block has no sums to change.
    unsigned changed = _mm512_cmp_ps_mask(peak, before, _CMP_NEQ_UQ) & _mm512_cmp_ps_mask(before, none, _CMP_NEQ_UQ);
    for (; changed; changed &= changed - 1) rescale(r + __builtin_ctz(changed), changes[__builtin_ctz(changed)]);
    Vec sums[16];
    for (int i = 0; i < 16; ++i) sums[i] = Vec(0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      sums[i] = Vec(exponentials(scores_of(r + i), weights_of(r + i), spans, factor, shifts[i]));
    }
    transpose(sums);
    for (int step = 8; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i) sums[i] = sums[i] + sums[i + step];
    }
    _mm512_store_ps(total_ + r, _mm512_fmadd_ps(_mm512_load_ps(total_ + r), change, sums[0].v));
    _mm512_store_ps(peak_ + r, peak);
  }

  // Maxima of the 16 rows of tiles.
  static __m512 largest(const float* scores, const Span (&spans)[2]) {
    Vec most[16];
    for (int i = 0; i < 16; ++i) most[i] = Vec(kNone);
    for (const Span& span : spans) {
      for (int64_t tile = span.first; tile < span.last; ++tile) {
        for (int i = 0; i < 16; ++i) most[i] = max(most[i], Vec::load(scores + tile * kTileFloats + i * 16));
      }
    }
    transpose(most);
    for (int step = 8; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i) most[i] = max(most[i], most[i + step]);
    }
    return most[0].v;
  }

  static __m512 exponentials(const float* scores, BFloat16* weights, const Span (&spans)[2], float factor,
                             float shift) {
    const __m512 c = _mm512_set1_ps(factor), down = _mm512_set1_ps(-shift), zero = _mm512_setzero_ps();
    __m512 sum = zero, other = zero;
    for (const Span& span : spans) {
      const float* at = scores + span.first * kTileFloats;
      BFloat16* to = weights + span.first / 2 * kTileHalves;
      int64_t left = span.last - span.first;
      for (; left >= 2; left -= 2, at += 2 * kTileFloats, to += kTileHalves) {
        const __m512 x = exp2_to_round(_mm512_fmadd_ps(_mm512_load_ps(at), c, down));
        const __m512 y = exp2_to_round(_mm512_fmadd_ps(_mm512_load_ps(at + kTileFloats), c, down));
        sum = _mm512_add_ps(sum, x);
        other = _mm512_add_ps(other, y);
        _mm512_store_si512(to, to_bfloat16(x, y));
      }
      if (left > 0) {
        const __m512 x = exp2_to_round(_mm512_fmadd_ps(_mm512_load_ps(at), c, down));
        sum = _mm512_add_ps(sum, x);
        _mm512_store_si512(to, to_bfloat16(x, zero));
        to += kTileHalves;
      }
      for (const BFloat16* end = weights + span.end / 2 * kTileHalves; to < end; to += kTileHalves) {
        _mm512_store_si512(to, _mm512_setzero_si512());
      }
    }
    return _mm512_add_ps(sum, other);
  }

  // The sums of row r so far belong to another maximum.
  void rescale(int64_t r, float change) const {
    const __m512 by = _mm512_set1_ps(change);
    float* at = sums_ + r / 16 * nd_ * kTileFloats + r % 16 * 16;
    for (int64_t n = 0; n < nd_; ++n, at += kTileFloats) _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), by));
  }

  void finish(const HeadRows& queries, int64_t first, int64_t rows) {
    const HeadRows out = lanes_of(queries, out_), lse = lanes_of(queries, lse_);
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
  Ahead ahead_;
  BFloat16 *rounded_, *query_, *key_, *value_, *weights_;
  float *scores_, *sums_;
  alignas(64) float peak_[32], total_[32];
};

inline void forward(const PromptAttention& p, const Rows& out, const Rows& lse, const Threads& threads) {
  if (p.samples == 0 || p.heads == 0 || p.tq == 0) return;
  const SampleChunks found(p, std::max<int64_t>((p.samples + 63) / 64, 1));
  const int64_t lanes = p.tq * p.groups(), runs = found.size();
  // Every piece of a head packs its keys again: few pieces, unless threads would have nothing to do.
  const int64_t pieces = std::clamp<int64_t>(4 * threads.count / (runs * p.heads_kv), 1, (lanes + 255) / 256);
  const double work = 4.0 * double(p.samples) * double(p.heads) * double(p.tq) * double(p.tk + p.prompts) *
                      double(p.dim);
  const int64_t bytes = AttentionForward(p, out, lse, Cutter()).bytes();
  const int64_t tasks = runs * p.heads_kv * pieces;
  for_each(threads, tasks, work, [&](int64_t task) {
    const int64_t piece = task % pieces, head_kv = task / pieces % p.heads_kv;
    const SampleChunk& run = found.chunks[static_cast<size_t>(task / pieces / p.heads_kv)];
    AttentionForward kernel(p, out, lse, Cutter(Scratch::take(bytes)));
    const TileScope tiles;
    kernel.read_prompt(run.prompt, head_kv);
    for (int64_t i = run.first, end = run.first + run.count; i < end; ++i) {
      const int64_t s = found.order[static_cast<size_t>(i)], rows = p.queries_of(s) * p.groups();
      const int64_t blocks = (rows + 31) / 32;
      const int64_t from = 32 * (blocks * piece / pieces), to = std::min(32 * (blocks * (piece + 1) / pieces), rows);
      if (from >= to) continue;
      if (pieces == 1) {
        // The next sample of this run, or the first of the task that this thread is likely to take.
        const int64_t later = i + 1 < end ? task : task + threads.count;
        if (later < tasks) {
          const int64_t place = later == task ? i + 1 : found.chunks[static_cast<size_t>(later / p.heads_kv)].first;
          kernel.look_ahead(found.order[static_cast<size_t>(place)], later % p.heads_kv, blocks);
        }
      }
      kernel.attend(s, head_kv, from, to);
    }
  });
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
