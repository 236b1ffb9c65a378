// SPDX-License-Identifier: Apache-2.0
// Backward of prompt attention on tiles.
//
// Panels of keys against panels of query rows, both up to kPanel. In a panel, 32 keys at a time: S = Q K^T and
// dP = dO V^T of 32 rows at once, then P and dS while they are near; when all rows of the panel are done,
// dV^T += dO^T P and dK^T += Q^T dS of these keys; when all keys are, dQ += dS K.
#pragma once

#include "prompt_attention_amx_write.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

constexpr int64_t kPanel = 320;

// Which gradients there are to compute.
struct Wanted {
  bool query, key, value, prompt_key, prompt_value;

  Wanted(const PromptAttention& p, const PromptAttentionGrads& g)
      : query(g.query), key(g.key), value(g.value), prompt_key(g.prompt_key && p.prompts),
        prompt_value(g.prompt_value && p.prompts) {}
  bool instance() const { return query || key || value; }
  bool prompt() const { return p_grads() || query; }
  bool p_grads() const { return prompt_key || prompt_value; }
  bool values() const { return value || prompt_value; }
  bool keys() const { return key || prompt_key; }
  bool scores() const { return query || keys(); }
};

// How many pieces the instance keys of a sample are cut into, each with a dQ of its own. A matter of shape alone.
inline int64_t key_ranges(const Wanted& wanted, int64_t keys) {
  return wanted.instance() ? std::clamp<int64_t>((keys + 1023) / 1024, 1, 4) : 1;
}

class AttentionBackward {
 public:
  AttentionBackward(const PromptAttention& p, const PromptAttentionGrads& g, Cutter cutter)
      : p_(p), g_(g), want_(p, g), kd_(tiles_of_32(p.dim)), nd_(tiles_of_16(p.dim)), padded_(round_up(p.prompts, 32)),
        factor_(p.scale * kLog2e) {
    const int64_t lanes = round_up(p.tq * p.groups(), 32), keys = padded_ + round_up(p.tk, 32);
    const int64_t wide = std::min(std::max(padded_, round_up(p.tk, 32)), kPanel), tall = std::min(lanes, kPanel);
    rounded_ = cutter.cut<BFloat16>(std::max(rounded_prompt(p, p.prompt_key), rounded_prompt(p, p.prompt_value)));
    key_ = cutter.cut<BFloat16>(keys / 16 * kd_ * kTileHalves);
    value_ = cutter.cut<BFloat16>(want_.scores() ? keys / 16 * kd_ * kTileHalves : 0);
    key_pairs_ = cutter.cut<BFloat16>(want_.query ? keys / 32 * nd_ * kTileHalves : 0);
    query_ = cutter.cut<BFloat16>(lanes / 16 * kd_ * kTileHalves);
    grad_ = cutter.cut<BFloat16>(want_.scores() ? lanes / 16 * kd_ * kTileHalves : 0);
    query_columns_ = cutter.cut<BFloat16>(want_.keys() ? lanes / 32 * nd_ * kTileHalves : 0);
    grad_columns_ = cutter.cut<BFloat16>(want_.values() ? lanes / 32 * nd_ * kTileHalves : 0);
    lse_ = cutter.cut<float>(lanes);
    delta_ = cutter.cut<float>(lanes);
    weights_ = cutter.cut<BFloat16>(tall / 32 * 2 * kTileHalves);
    slopes_ = cutter.cut<BFloat16>(tall / 32 * 2 * kTileHalves);
    slope_rows_ = cutter.cut<BFloat16>(want_.query ? tall / 16 * (wide / 32) * kTileHalves : 0);
    grad_query_ = cutter.cut<float>(want_.query ? lanes / 16 * nd_ * kTileFloats : 0);
    grad_key_ = cutter.cut<float>(want_.key ? wide / 16 * nd_ * kTileFloats : 0);
    grad_value_ = cutter.cut<float>(want_.value ? wide / 16 * nd_ * kTileFloats : 0);
    bytes_ = cutter.used();
  }

  int64_t bytes() const { return bytes_; }

  // Sums of a run of samples go to tiles [keys / 16][dims / 16]; null where none are wanted.
  void read_prompt(int64_t g, int64_t head_kv, float* grad_key, float* grad_value) {
    prompt_grad_key_ = grad_key, prompt_grad_value_ = grad_value;
    if (p_.prompts == 0 || !want_.prompt()) return;
    const HeadRows keys = prompt_rows(p_, p_.prompt_key, g, head_kv, rounded_);
    pack_keys(keys, 0, p_.prompts);
    if (want_.scores()) pack_values(prompt_rows(p_, p_.prompt_value, g, head_kv, rounded_), 0, p_.prompts);
    for (float* sums : {grad_key, grad_value}) {
      if (sums) std::fill_n(sums, padded_ / 16 * nd_ * kTileFloats, 0.0f);
    }
  }

  // Gradients that sample(s, head_kv) will write and, unless next_s is negative, what the call after it will read.
  void look_ahead(int64_t s, int64_t head_kv, int64_t next_s, int64_t next_head_kv) {
    ahead_.clear();
    bring_keys_near(ahead_, p_, g_.key, s, head_kv);
    bring_keys_near(ahead_, p_, g_.value, s, head_kv);
    bring_near(ahead_, p_, g_.query, s, head_kv);
    if (next_s >= 0) {
      bring_keys_near(ahead_, p_, p_.key, next_s, next_head_kv);
      bring_keys_near(ahead_, p_, p_.value, next_s, next_head_kv);
      bring_near(ahead_, p_, p_.query, next_s, next_head_kv);
      bring_near(ahead_, p_, g_.grad_out, next_s, next_head_kv);
      if (want_.scores()) bring_near(ahead_, p_, g_.out, next_s, next_head_kv);
    }
    ahead_.spread(std::max<int64_t>(tiles_of_32(p_.keys_of(s)), 1));
  }

  // One key head of a sample: piece `range` of `ranges` of its instance keys, prompts with the first. dQ goes to
  // `grad_query`, tiles [rows / 16][dims / 16], or, if that is null, to where it belongs.
  void sample(int64_t s, int64_t head_kv, int64_t range, int64_t ranges, float* grad_query) {
    queries_ = query_rows(p_, p_.query, s, head_kv);
    lanes_ = p_.queries_of(s) * p_.groups();
    pack_lanes();
    const bool whole = !grad_query;
    sums_query_ = whole ? grad_query_ : grad_query;
    first_panel_ = true;
    if (range == 0 && want_.prompt()) prompt_panels();
    if (want_.instance()) instance_panels(s, head_kv, range, ranges);
    if (want_.query && first_panel_) std::fill_n(sums_query_, round_up(lanes_, 32) * nd_ * 16, 0.0f);
    if (want_.query && whole) write_query(p_, g_, s, head_kv, sums_query_);
  }

 private:
  // Keys of one segment: `first` on the axis of packed keys, the number of its first instance key or -1.
  struct Panel {
    int64_t first, count, instance;
    float *grad_key, *grad_value;
    bool add;
    bool scores(const Wanted& want) const { return want.query || grad_key; }
  };

  // 32 query rows against 32 keys.
  struct Block {
    int64_t lane, rows, key, count;
    const Panel* panel;
    const Causal* causal;
    const Mask* mask;
    BFloat16 *weights, *slopes, *slope_rows;
    int64_t slope_stride;  // halves from one tile of rows to the next
  };

  void pack_keys(const HeadRows& rows, int64_t first, int64_t count) {
    pack_dim_pairs(rows, count, p_.dim, key_ + first / 16 * kd_ * kTileHalves);
    if (want_.query) pack_row_pairs<false>(rows, count, p_.dim, key_pairs_ + first / 32 * nd_ * kTileHalves);
  }
  void pack_values(const HeadRows& rows, int64_t first, int64_t count) {
    pack_dim_pairs(rows, count, p_.dim, value_ + first / 16 * kd_ * kTileHalves);
  }

  HeadRows lanes_of(const Rows& rows) const {
    return {rows, queries_.sample, queries_.head, queries_.first, queries_.groups};
  }

  void pack_lanes() {
    const HeadRows grad = lanes_of(g_.grad_out);
    pack_rows(queries_, lanes_, p_.dim, query_);
    if (want_.scores()) pack_rows(grad, lanes_, p_.dim, grad_);
    if (want_.keys()) pack_row_pairs<true>(queries_, lanes_, p_.dim, query_columns_);
    if (want_.values()) pack_row_pairs<true>(grad, lanes_, p_.dim, grad_columns_);
    const HeadRows lse = lanes_of(g_.lse), out = lanes_of(g_.out), grad_lse = lanes_of(g_.grad_lse);
    for (int64_t r = 0; r < lanes_; ++r) {
      const float x = *reinterpret_cast<const float*>(lse.at(r)) * kLog2e;
      // Rows that see nothing: every exponential is 0.
      lse_[r] = x == -std::numeric_limits<float>::infinity() ? -x : x;
      if (!want_.scores()) continue;
      Vec sum(0.0f);
      for (int64_t d = 0; d < p_.dim; d += 16) {
        sum = fma(Vec::load_first(out(r) + d, p_.dim - d), Vec::load_first(grad(r) + d, p_.dim - d), sum);
      }
      const float down = g_.grad_lse ? *reinterpret_cast<const float*>(grad_lse.at(r)) : 0;
      delta_[r] = fastprompt::FASTPROMPT_NAMESPACE::sum(sum) - down;
    }
  }

  void prompt_panels() {
    const Causal free(p_, queries_.sample);
    for (int64_t from = 0; from < p_.prompts; from += kPanel) {
      const int64_t skipped = from / 16 * nd_ * kTileFloats;
      run({from, std::min(p_.prompts - from, kPanel), -1, prompt_grad_key_ ? prompt_grad_key_ + skipped : nullptr,
           prompt_grad_value_ ? prompt_grad_value_ + skipped : nullptr, true},
          free);
    }
  }

  void instance_panels(int64_t s, int64_t head_kv, int64_t range, int64_t ranges) {
    const int64_t keys = p_.keys_of(s), panels = (keys + kPanel - 1) / kPanel;
    const int64_t size = panels ? round_up((keys + panels - 1) / panels, 32) : 0;
    const HeadRows key = key_rows(p_, p_.key, s, head_kv), value = key_rows(p_, p_.value, s, head_kv);
    const Causal causal(p_, s);
    for (int64_t i = panels * range / ranges; i < panels * (range + 1) / ranges; ++i) {
      const int64_t from = i * size, count = std::min(keys - from, size);
      if (count <= 0) continue;
      const auto part = [from](const HeadRows& rows) {
        HeadRows moved = rows;
        moved.first += from;
        return moved;
      };
      pack_keys(part(key), padded_, count);
      if (want_.scores()) pack_values(part(value), padded_, count);
      run({padded_, count, from, want_.key ? grad_key_ : nullptr, want_.value ? grad_value_ : nullptr, false}, causal);
      if (want_.key) write_keys(grad_key_, count, p_.dim, p_.scale, key_rows(p_, g_.key, s, head_kv), from);
      if (want_.value) write_keys(grad_value_, count, p_.dim, 1.0f, key_rows(p_, g_.value, s, head_kv), from);
    }
  }

  // The first row, a multiple of 32, that sees any of the keys from x on.
  static int64_t first_lane(const Panel& panel, const Causal& causal, int64_t x) {
    if (panel.instance < 0 || !causal.on) return 0;
    return std::max<int64_t>(panel.instance + x - causal.offset, 0) * causal.groups / 32 * 32;
  }

  // One panel of keys, all rows.
  void run(const Panel& panel, const Causal& causal) {
    if (lanes_ == 0) clear(panel);
    const int64_t wide = tiles_of_32(panel.count);
    for (int64_t from = 0; from < lanes_; from += kPanel) {
      const int64_t to = std::min(from + kPanel, lanes_);
      for (int64_t x = 0; x < panel.count; x += 32) {
        const int64_t begin = first_lane(panel, causal, x), first = std::max(from, begin);
        if (first >= to) continue;
        ahead_.step();
        for (int64_t lane = first; lane < to; lane += 32) scores_block(panel, causal, x, from, lane, wide);
        sum_keys(panel, x, from, first, to, panel.add || first > begin);
      }
      if (want_.query) sum_query(panel, causal, from, to, wide);
    }
    if (want_.query) first_panel_ = false;
  }

  void clear(const Panel& panel) const {
    for (float* sums : {panel.grad_key, panel.grad_value}) {
      if (sums && !panel.add) std::fill_n(sums, tiles_of_16(panel.count) * nd_ * kTileFloats, 0.0f);
    }
  }

  void scores_block(const Panel& panel, const Causal& causal, int64_t x, int64_t from, int64_t lane, int64_t wide) {
    const int64_t rows = std::min<int64_t>(lanes_ - lane, 32), count = std::min<int64_t>(panel.count - x, 32);
    const int64_t tall = tiles_of_16(rows), columns = tiles_of_16(count), at = (panel.first + x) / 16 * kd_;
    multiply({query_ + lane / 16 * kd_ * kTileHalves, kd_, 1}, {key_ + at * kTileHalves, kd_, 1}, tall, columns, kd_,
             {scores_, 2, 1}, false);
    const bool sloped = panel.scores(want_);
    if (sloped) {
      multiply({grad_ + lane / 16 * kd_ * kTileHalves, kd_, 1}, {value_ + at * kTileHalves, kd_, 1}, tall, columns, kd_,
               {dots_, 2, 1}, false);
    }
    const bool instance = panel.instance >= 0, masked = instance && p_.mask;
    const bool partly = instance && causal.on && causal.limit(lane) < panel.instance + x + count;
    const int64_t place = (lane - from) / 32 * 2 * kTileHalves;
    const Block block{lane, rows, panel.instance + x, count, &panel, partly ? &causal : nullptr,
                      masked ? &p_.mask : nullptr, panel.grad_value ? weights_ + place : nullptr,
                      panel.grad_key ? slopes_ + place : nullptr,
                      want_.query ? slope_rows_ + ((lane - from) / 16 * wide + x / 32) * kTileHalves : nullptr,
                      wide * kTileHalves};
    if (count <= 16) {
      weigh<1, true>(block, sloped);
    } else if (masked || partly || count < 32) {
      weigh<2, true>(block, sloped);
    } else {
      weigh<2, false>(block, sloped);
    }
  }

  template <int N, bool kEdge>
  void weigh(const Block& block, bool sloped) const {
    int64_t r = 0;
    for (; r < block.rows; r += 2) {
      __m512i p[2] = {}, d[2] = {};
      weigh_row<N, kEdge>(block, sloped, r, p[0], d[0]);
      if (r + 1 < block.rows) weigh_row<N, kEdge>(block, sloped, r + 1, p[1], d[1]);
      if (block.weights) store_pair<N>(p, block.weights + r * 16);
      if (block.slopes) store_pair<N>(d, block.slopes + r * 16);
      if (block.slope_rows) {
        BFloat16* to = block.slope_rows + r / 16 * block.slope_stride + r % 16 * 32;
        _mm512_store_si512(to, d[0]);
        _mm512_store_si512(to + 32, d[1]);
      }
    }
    const __m512i none[2] = {};
    for (; r < 32; r += 2) {
      if (block.weights) store_pair<N>(none, block.weights + r * 16);
      if (block.slopes) store_pair<N>(none, block.slopes + r * 16);
    }
  }

  // P and dS of one row and 32 keys.
  template <int N, bool kEdge>
  void weigh_row(const Block& block, bool sloped, int64_t r, __m512i& p, __m512i& d) const {
    const int64_t lane = block.lane + r, place = r / 16 * 2 * kTileFloats + r % 16 * 16;
    const __m512 factor = _mm512_set1_ps(factor_), lse = _mm512_set1_ps(lse_[lane]);
    const __m512 delta = _mm512_set1_ps(delta_[lane]);
    const int64_t seen = block.causal ? std::min(block.causal->limit(lane) - block.key, block.count) : block.count;
    __m512 x[2] = {}, y[2] = {};
    for (int n = 0; n < N; ++n) {
      const __m512 s = _mm512_load_ps(scores_ + place + n * kTileFloats);
      const __mmask16 kept = kEdge ? Vec::first(seen - n * 16) : __mmask16(0xffff);
      if (kEdge && block.mask) {
        const __m512 add = MaskRow(*block.mask, queries_, lane).load(block.key + n * 16, seen - n * 16);
        x[n] = exp2_to_round(_mm512_sub_ps(_mm512_fmadd_ps(s, factor, add), lse));
      } else {
        x[n] = exp2_to_round(_mm512_fmsub_ps(s, factor, lse));
      }
      if (kEdge) x[n] = _mm512_maskz_mov_ps(kept, x[n]);
      if (!sloped) continue;
      y[n] = _mm512_mul_ps(x[n], _mm512_sub_ps(_mm512_load_ps(dots_ + place + n * kTileFloats), delta));
      if (kEdge) y[n] = _mm512_maskz_mov_ps(kept, y[n]);
    }
    p = to_bfloat16(x[0], x[1]);
    d = to_bfloat16(y[0], y[1]);
  }

  // Two rows of 32 keys as pairs: a word of each tile holds one key's. See key_of_column.
  template <int N>
  static void store_pair(const __m512i (&rows)[2], BFloat16* to) {
    if constexpr (N == 1) {
      _mm512_store_si512(to, join(_mm512_castsi512_si256(rows[0]), _mm512_castsi512_si256(rows[1])));
    } else {
      _mm512_store_si512(to, _mm512_unpacklo_epi16(rows[0], rows[1]));
      _mm512_store_si512(to + kTileHalves, _mm512_unpackhi_epi16(rows[0], rows[1]));
    }
  }

  // dV^T and dK^T of 32 keys, from rows [first, to) of the panel of rows that begins at `from`.
  void sum_keys(const Panel& panel, int64_t x, int64_t from, int64_t first, int64_t to, bool add) const {
    const int64_t depth = tiles_of_32(to - first), columns = tiles_of_16(std::min<int64_t>(panel.count - x, 32));
    const int64_t left = first / 32 * nd_ * kTileHalves, right = (first - from) / 32 * 2 * kTileHalves;
    const int64_t place = x / 16 * nd_ * kTileFloats;
    if (panel.grad_value) {
      multiply({grad_columns_ + left, 1, nd_}, {weights_ + right, 1, 2}, nd_, columns, depth,
               {panel.grad_value + place, 1, nd_}, add);
    }
    if (panel.grad_key) {
      multiply({query_columns_ + left, 1, nd_}, {slopes_ + right, 1, 2}, nd_, columns, depth,
               {panel.grad_key + place, 1, nd_}, add);
    }
  }

  // dQ of a panel of rows from a panel of keys.
  void sum_query(const Panel& panel, const Causal& causal, int64_t from, int64_t to, int64_t wide) const {
    for (int64_t lane = from; lane < to; lane += 32) {
      int64_t depth = wide;
      while (depth > 0 && first_lane(panel, causal, (depth - 1) * 32) > lane) --depth;
      const int64_t rows = tiles_of_16(std::min<int64_t>(to - lane, 32));
      float* sums = sums_query_ + lane / 16 * nd_ * kTileFloats;
      if (depth == 0) {
        if (first_panel_) std::fill_n(sums, rows * nd_ * kTileFloats, 0.0f);
        continue;
      }
      multiply({slope_rows_ + (lane - from) / 16 * wide * kTileHalves, wide, 1},
               {key_pairs_ + panel.first / 32 * nd_ * kTileHalves, 1, nd_}, rows, nd_, depth, {sums, nd_, 1},
               !first_panel_);
    }
  }

  const PromptAttention& p_;
  const PromptAttentionGrads& g_;
  const Wanted want_;
  const int64_t kd_, nd_;  // tiles of dims, by 32 and by 16
  const int64_t padded_;   // where instance keys begin
  const float factor_;
  int64_t bytes_;
  BFloat16 *rounded_, *key_, *value_, *key_pairs_, *query_, *grad_, *query_columns_, *grad_columns_;
  BFloat16 *weights_, *slopes_, *slope_rows_;
  float *lse_, *delta_, *grad_query_, *grad_key_, *grad_value_;
  float *prompt_grad_key_ = nullptr, *prompt_grad_value_ = nullptr, *sums_query_ = nullptr;
  Ahead ahead_;
  HeadRows queries_{};
  int64_t lanes_ = 0;
  bool first_panel_ = true;
  alignas(64) float scores_[4 * kTileFloats], dots_[4 * kTileFloats];
};

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
