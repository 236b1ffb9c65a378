// SPDX-License-Identifier: Apache-2.0
// Backward of decoupled attention in float. With p = softmax of a branch, dP = dO V^T and delta = sum p dP over its
// keys, which is dO O of the branch:
//
//   dw = delta    dS = w p (dP - delta)    dV = (w p)^T dO    dK = scale dS^T Q    dQ = scale dS K
#pragma once

#include "decoupled_attention_float.h"
#include "decoupled_attention_sums.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

class DecoupledBackward {
 public:
  DecoupledBackward(const DecoupledAttention& p, const Rows& grad_out, const Rows& query_grad, Cutter cutter)
      : p_(p), wants_(p, query_grad), grad_out_(grad_out), query_grad_(query_grad), keys_(p.keys()),
        padded_(to_vectors(p.rows.dim)), rows_(p, cutter) {
    queries_ = cutter.cut<float>(p.rows.dim * kLanes);
    grads_ = cutter.cut<float>(p.rows.dim * kLanes);
    query_rows_ = cutter.cut<float>(kLanes * padded_);
    grad_rows_ = cutter.cut<float>(kLanes * padded_);
    scores_ = cutter.cut<float>(keys_ * kLanes);
    slopes_ = cutter.cut<float>(keys_ * kLanes);
    bytes_ = cutter.used();
  }

  int64_t bytes() const { return bytes_; }

  // Blocks of lanes [first, end) of one key head. Sums [keys, padded] over lanes are overwritten, where wanted.
  void run(const KeyHead& head, int64_t first, int64_t end, float* key_sums, float* value_sums) {
    rows_.load(head);
    if (wants_.key) std::fill_n(key_sums, keys_ * padded_, 0.0f);
    if (wants_.value) std::fill_n(value_sums, keys_ * padded_, 0.0f);
    for (int64_t b = first; b < end; ++b) {
      ahead_.clear();
      if (b + 1 < end) {
        const Lanes next = lanes_of_block(head.lanes(), b + 1);
        for (const Rows* rows : {&p_.rows.query, &grad_out_, &query_grad_}) {
          bring_lanes_near(ahead_, head, next, *rows);
        }
        ahead_.spread(next.count * keys_ / 50 + 1);
      }
      run(head, lanes_of_block(head.lanes(), b), key_sums, value_sums);
    }
  }

 private:
  void run(const KeyHead& head, const Lanes& lanes, float* key_sums, float* value_sums) {
    const int64_t width = lanes.width, dim = p_.rows.dim;
    pack_lanes(head, lanes, p_.rows.query, p_.rows.scale * kLog2e, queries_);
    multiply<Into::overwrite>(
        {keys_, width, dim, rows_.keys, padded_, 1, queries_, width, scores_, width, nullptr, &ahead_});
    if (wants_.slopes) {
      pack_lanes(head, lanes, grad_out_, 1.0f, grads_);
      multiply<Into::overwrite>(
          {keys_, width, dim, rows_.values, padded_, 1, grads_, width, slopes_, width, nullptr, &ahead_});
    }
    int64_t first = 0;
    for (int64_t j = 0; j < p_.count; first += p_.branches[j++].keys) {
      weigh(head, lanes, p_.branches[j], scores_ + first * width, slopes_ + first * width);
    }
    if (wants_.value) {
      copy_lanes(head, lanes, grad_out_, grad_rows_, padded_);
      add_over_lanes(lanes, scores_, grad_rows_, value_sums);
    }
    if (wants_.key) {
      copy_lanes(head, lanes, p_.rows.query, query_rows_, padded_);
      add_over_lanes(lanes, slopes_, query_rows_, key_sums);
    }
    if (!query_grad_) return;
    multiply<Into::overwrite>(
        {lanes.count, padded_, keys_, slopes_, 1, width, rows_.keys, padded_, query_rows_, padded_, nullptr, &ahead_});
    store_lanes(head, lanes, query_rows_, padded_, p_.rows.scale, query_grad_);
  }

  // w p in place of the scores of a branch, dS in place of its dP; the gradient of its weight.
  void weigh(const KeyHead& head, const Lanes& lanes, const KeyBranch& branch, float* scores, float* slopes) {
    const int64_t width = lanes.width;
    load_weights(head, lanes, branch, weights_);
    for (int64_t lane = 0; lane < width; lane += kWidth) {
      const Vec inverse = exponentials(branch.keys, width, scores + lane);
      const Vec by = inverse * Vec::load(weights_ + lane);
      Vec delta(0.0f);
      for (int64_t i = 0; wants_.slopes && i < branch.keys; ++i) {
        const int64_t at = i * width + lane;
        delta = fma(Vec::load(scores + at), Vec::load(slopes + at), delta);
      }
      delta = delta * inverse;
      for (int64_t i = 0; i < branch.keys; ++i) {
        const int64_t at = i * width + lane;
        const Vec x = Vec::load(scores + at) * by;
        x.store(scores + at);
        if (wants_.slopes) (x * (Vec::load(slopes + at) - delta)).store(slopes + at);
      }
      delta.store(weights_ + lane);
    }
    if (branch.weight_grad) store_lane_values(head, lanes, weights_, branch.weight_grad);
  }

  // sums [keys, padded] += weights^T rows.
  void add_over_lanes(const Lanes& lanes, const float* weights, const float* rows, float* sums) {
    multiply<Into::add>(
        {keys_, padded_, lanes.count, weights, lanes.width, 1, rows, padded_, sums, padded_, nullptr, &ahead_});
  }

  const DecoupledAttention& p_;
  const DecoupledWants wants_;
  const Rows &grad_out_, &query_grad_;
  const int64_t keys_, padded_;
  const BranchRows rows_;
  int64_t bytes_;
  float *queries_, *grads_, *query_rows_, *grad_rows_, *scores_, *slopes_;
  Ahead ahead_;
  alignas(kAlignment) float weights_[kLanes];
};

void decoupled_attention_backward(const DecoupledAttention& p, const Rows& grad_out, const Rows& query_grad,
                                  const Threads& threads) {
  decoupled_backward<DecoupledBackward>(p, grad_out, query_grad, threads);
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
