// SPDX-License-Identifier: Apache-2.0
// Backward of prompt attention in float. With p = exp(score - lse), delta = sum_d dO O - d lse, dS = p (dP - delta):
//
//   dV = P^T dO    dP = dO V^T    dK = scale dS^T Q    dQ = scale dS K
//
// A block of lanes runs over the blocks of keys: its dQ stays in the cache, dK and dV of the keys are added up in the
// task's memory, prompts over all samples of a chunk. Only products that a wanted gradient needs are computed.
#pragma once

#include "attention_hiding.h"
#include "attention_keys.h"
#include "backward_tasks.h"
#include "gemm.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

// Memory of one task. The columns are packed lanes, [dim][width].
struct BackwardScratch {
  float *queries, *grads, *query_rows, *grad_rows, *scores, *dscores, *mask, *dq, *dk, *dv, *keys, *values;

  BackwardScratch(const PromptAttention& p, const BackwardWants& wants, Cutter& cutter) {
    const int64_t padded = to_vectors(p.dim), rows = most_keys_of_range(p);
    queries = cutter.cut<float>(p.dim * kLanes);
    grads = cutter.cut<float>(p.dim * kLanes);
    query_rows = cutter.cut<float>(kLanes * padded);
    grad_rows = cutter.cut<float>(kLanes * padded);
    scores = cutter.cut<float>(kKeys * kLanes);
    dscores = cutter.cut<float>(kKeys * kLanes);
    mask = cutter.cut<float>(p.mask ? kKeys * kLanes : 0);
    dq = cutter.cut<float>(kLanes * padded);
    dk = cutter.cut<float>(wants.any_key() ? rows * padded : 0);
    dv = cutter.cut<float>(wants.any_value() ? rows * padded : 0);
    keys = cutter.cut<float>(KeyRows::room(p, p.prompt_key, p.key, p.prompts, rows));
    values = cutter.cut<float>(KeyRows::room(p, p.prompt_value, p.value, p.prompts, rows));
  }
};

// One task: a range of the keys of one key head, for all samples of a chunk.
class Backward {
 public:
  Backward(const PromptAttention& p, const PromptAttentionGrads& g, const BackwardScratch& scratch)
      : p_(p), g_(g), wants_(g), scratch_(scratch), padded_(to_vectors(p.dim)),
        keys_(p, p.prompt_key, p.key, scratch.keys), values_(p, p.prompt_value, p.value, scratch.values) {
    // What every sample adds to starts at 0.
    if (wants_.any_key()) clear(scratch_.dk, p.prompts);
    if (wants_.any_value()) clear(scratch_.dv, p.prompts);
  }

  // `partial`: where dQ of this range goes, rows of whole vectors for all lanes, or null: it is the only range.
  // `next`: the head that follows, if it is known.
  void run(const KeyHead& head, int64_t range, float* partial, const KeyHead* next) {
    bring_near(next);
    const KeyBlocks blocks{p_.prompts, head.keys()};
    range_ = key_range(blocks, wants_, range);
    keys_.load(head, range_.first_key, range_.end_key);
    if (wants_.scores()) values_.load(head, range_.first_key, range_.end_key);
    const int64_t prompts = std::clamp<int64_t>(p_.prompts - range_.first_key, 0, range_.keys());
    if (wants_.key) clear(scratch_.dk + prompts * padded_, range_.keys() - prompts);
    if (wants_.value) clear(scratch_.dv + prompts * padded_, range_.keys() - prompts);
    for (int64_t b = 0; b < blocks_of(head.lanes(), kLanes); ++b) {
      const Lanes lanes = lanes_of_block(head.lanes(), b);
      run(head, blocks, lanes, partial ? partial + lanes.first * padded_ : nullptr);
    }
    const int64_t first = range_.first_key + prompts - p_.prompts, count = range_.keys() - prompts;
    if (wants_.key) store_keys(head, first, count, scratch_.dk + prompts * padded_, p_.scale, g_.key);
    if (wants_.value) store_keys(head, first, count, scratch_.dv + prompts * padded_, 1.0f, g_.value);
  }

  // Sums of the prompt's rows, of all samples so far.
  const float* prompt_keys() const { return scratch_.dk; }
  const float* prompt_values() const { return scratch_.dv; }

 private:
  void bring_near(const KeyHead* next) {
    ahead_.clear();
    if (!next) return;
    for (const Rows* rows : {&p_.key, &p_.value, &g_.key, &g_.value}) {
      ahead_.add(*rows, next->sample, next->head, next->row, next->tk, p_.dim);
    }
    for (int64_t g = 0; g < p_.groups(); ++g) {
      for (const Rows* rows : {&p_.query, &g_.grad_out, &g_.out, &g_.query}) {
        ahead_.add(*rows, next->sample, next->head * p_.groups() + g, next->row, next->tq, p_.dim);
      }
    }
  }

  void clear(float* rows, int64_t count) const {
    if (count > 0) std::memset(rows, 0, static_cast<size_t>(count * padded_) * sizeof(float));
  }

  void store_keys(const KeyHead& head, int64_t first, int64_t count, const float* from, float scale,
                  const Rows& to) const {
    if (count <= 0) return;
    store_rows(from, padded_, count, p_.dim, scale, to.at(head.sample, head.head, head.row + first), to.dtype, to.row);
  }

  void run(const KeyHead& head, const KeyBlocks& blocks, const Lanes& lanes, float* partial) {
    const Hiding hiding(head, lanes);
    float* dq = partial ? partial : scratch_.dq;
    prepare(head, lanes);
    bool first = true;
    for (int64_t b = range_.begin; b < range_.end; ++b) {
      const KeyBlock block = wants_.clip(blocks[b]);
      if (block.count == 0 || hiding.whole(block)) continue;
      probabilities(block, lanes, hiding);
      add_to_keys(block, lanes);
      if (wants_.query) {
        const FloatRows key = keys_[block];
        const Product product{lanes.count, padded_, block.count, scratch_.dscores, 1, lanes.width,
                              key.at, key.row, dq, padded_, nullptr, &ahead_};
        first ? multiply<Into::overwrite>(product) : multiply<Into::add>(product);
        first = false;
      }
    }
    if (!wants_.query) return;
    if (first) clear(dq, lanes.count);
    if (!partial) store_lanes(head, lanes, dq, padded_, p_.scale, g_.query);
  }

  // What all blocks of keys need of the lanes.
  void prepare(const KeyHead& head, const Lanes& lanes) {
    pack_lanes(head, lanes, p_.query, p_.scale * kLog2e, scratch_.queries);
    copy_lane_values(head, lanes, g_.lse, lse_);
    for (int64_t i = 0; i < lanes.width; ++i) {
      // A row that sees nothing has no probabilities: exp2(score - inf) = 0.
      lse_[i] = lse_[i] == -kInfinity ? kInfinity : lse_[i] * kLog2e;
    }
    if (wants_.any_value()) grad_rows_ = lane_rows(head, lanes, g_.grad_out, scratch_.grad_rows);
    if (!wants_.scores()) return;
    if (wants_.any_key()) query_rows_ = lane_rows(head, lanes, p_.query, scratch_.query_rows);
    pack_lanes(head, lanes, g_.grad_out, 1.0f, scratch_.grads);
    set_delta(head, lanes);
  }

  void set_delta(const KeyHead& head, const Lanes& lanes) {
    if (g_.grad_lse) {
      copy_lane_values(head, lanes, g_.grad_lse, delta_);
    } else {
      std::fill(delta_, delta_ + lanes.width, 0.0f);
    }
    head.runs(lanes, [&](int64_t lane, int64_t h, int64_t query, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const char* out = g_.out.at(head.sample, h, head.row + query + i);
        const char* grad = g_.grad_out.at(head.sample, h, head.row + query + i);
        Vec sums(0.0f);
        for (int64_t d = 0; d < p_.dim; d += kWidth) {
          const int64_t n = std::min(kWidth, p_.dim - d);
          sums = fma(load_first(out, g_.out.dtype, d, n), load_first(grad, g_.grad_out.dtype, d, n), sums);
        }
        delta_[lane + i] = sum(sums) - delta_[lane + i];
      }
    });
  }

  // Rows of the lanes as products read them: in place where they are rows of one head.
  FloatRows lane_rows(const KeyHead& head, const Lanes& lanes, const Rows& rows, float* copies) const {
    const int64_t query = lanes.first % head.tq;
    if (in_place(rows, p_.dim) && query + lanes.count <= head.tq) {
      const int64_t h = head.head * p_.groups() + lanes.first / head.tq;
      return {reinterpret_cast<const float*>(rows.at(head.sample, h, head.row + query)), rows.row};
    }
    copy_lanes(head, lanes, rows, copies, padded_);
    return {copies, padded_};
  }

  // P in `scores`, dS in `dscores`.
  void probabilities(const KeyBlock& block, const Lanes& lanes, const Hiding& hiding) {
    const int64_t width = lanes.width;
    const FloatRows key = keys_[block];
    multiply<Into::overwrite>({block.count, width, p_.dim, key.at, key.row, 1, scratch_.queries, width,
                               scratch_.scores, width, nullptr, &ahead_});
    hiding.apply(block, scratch_.scores, scratch_.mask);
    if (!wants_.scores()) {
      for (int64_t j = 0; j < block.count; ++j) {
        for (int64_t lane = 0; lane < width; lane += kWidth) {
          float* at = scratch_.scores + j * width + lane;
          exp2(Vec::load(at) - Vec::load(lse_ + lane)).store(at);
        }
      }
      return;
    }
    const FloatRows value = values_[block];
    multiply<Into::overwrite>({block.count, width, p_.dim, value.at, value.row, 1, scratch_.grads, width,
                               scratch_.dscores, width, nullptr, &ahead_});
    int64_t lane = 0;
    for (; lane + 2 * kWidth <= width; lane += 2 * kWidth) score_gradients<2>(block.count, width, lane);
    if (lane < width) score_gradients<1>(block.count, width, lane);
  }

  template <int kVectors>
  void score_gradients(int64_t keys, int64_t width, int64_t lane) {
    Vec lse[kVectors], delta[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      lse[v] = Vec::load(lse_ + lane + v * kWidth), delta[v] = Vec::load(delta_ + lane + v * kWidth);
    }
    for (int64_t j = 0; j < keys; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = j * width + lane + v * kWidth;
        const Vec x = exp2(Vec::load(scratch_.scores + at) - lse[v]);
        x.store(scratch_.scores + at);
        (x * (Vec::load(scratch_.dscores + at) - delta[v])).store(scratch_.dscores + at);
      }
    }
  }

  // dV and dK of the rows of a block whose gradients are wanted.
  void add_to_keys(const KeyBlock& block, const Lanes& lanes) {
    const auto add = [&](bool prompt, bool instance, const float* a, const FloatRows& b, float* to) {
      const int64_t first = prompt ? 0 : block.prompts, end = instance ? block.count : block.prompts;
      if (first >= end) return;
      multiply<Into::add>({end - first, padded_, lanes.count, a + first * lanes.width, lanes.width, 1, b.at, b.row,
                           to + (block.first + first - range_.first_key) * padded_, padded_, nullptr, &ahead_});
    };
    add(wants_.prompt_value, wants_.value, scratch_.scores, grad_rows_, scratch_.dv);
    add(wants_.prompt_key, wants_.key, scratch_.dscores, query_rows_, scratch_.dk);
  }

  const PromptAttention& p_;
  const PromptAttentionGrads& g_;
  BackwardWants wants_;
  BackwardScratch scratch_;
  int64_t padded_;
  KeyRows keys_, values_;
  KeyRange range_{};
  FloatRows query_rows_{}, grad_rows_{};
  Ahead ahead_;
  alignas(kAlignment) float lse_[kLanes];
  alignas(kAlignment) float delta_[kLanes];
};

void prompt_attention_backward(const PromptAttention& p, const PromptAttentionGrads& grads, const Threads& threads) {
  backward_tasks<Backward, BackwardScratch>(p, grads, threads);
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
