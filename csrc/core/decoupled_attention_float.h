// SPDX-License-Identifier: Apache-2.0
// Forward of decoupled attention in float. The keys of all branches stand one after the other on one axis; scores are
// transposed, [key][lane], so that a softmax is a few rows of vertical operations.
#pragma once

#include "ahead.h"
#include "attention_blocks.h"
#include "decoupled_attention.h"
#include "gemm.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

// Keys and values of all branches of one key head as rows of floats, zeros up to whole vectors.
class BranchRows {
 public:
  BranchRows(const DecoupledAttention& p, Cutter& cutter)
      : keys(cutter.cut<float>(p.keys() * to_vectors(p.rows.dim))),
        values(cutter.cut<float>(p.keys() * to_vectors(p.rows.dim))), p_(p), padded_(to_vectors(p.rows.dim)) {}

  void load(const KeyHead& head) const {
    int64_t first = 0;
    for (int64_t j = 0; j < p_.count; ++j) {
      const KeyBranch& branch = p_.branches[j];
      copy(head, branch, branch.key, keys + first * padded_);
      copy(head, branch, branch.value, values + first * padded_);
      first += branch.keys;
    }
  }

  float *const keys, *const values;

 private:
  void copy(const KeyHead& head, const KeyBranch& branch, const Rows& rows, float* to) const {
    copy_rows(rows.at(branch.shared ? 0 : head.sample, head.head, 0), rows.dtype, rows.row, branch.keys, p_.rows.dim,
              rows.dtype, to, padded_);
  }

  const DecoupledAttention& p_;
  const int64_t padded_;
};

// What a branch counts for in every lane.
inline void load_weights(const KeyHead& head, const Lanes& lanes, const KeyBranch& branch, float* weights) {
  branch.weight ? copy_lane_values(head, lanes, branch.weight, weights)
                : std::fill(weights, weights + lanes.width, branch.factor);
}

// Exponentials of a column of scores [keys][width] relative to their maximum, in place; returns 1 / their sum, 0 where
// nothing is seen. NaN does not enter a maximum, but the sum.
inline Vec exponentials(int64_t keys, int64_t width, float* scores) {
  Vec peak(-kInfinity), total(0.0f);
  for (int64_t i = 0; i < keys; ++i) peak = max(Vec::load(scores + i * width), peak);
  peak = select_less(peak, Vec(kLowest), Vec(0.0f), peak);
  for (int64_t i = 0; i < keys; ++i) {
    const Vec x = exp2(Vec::load(scores + i * width) - peak);
    x.store(scores + i * width);
    total = total + x;
  }
  return select_less(total, Vec(std::numeric_limits<float>::denorm_min()), Vec(0.0f), Vec(1.0f) / total);
}

// Rows that the next block of lanes reads or writes.
inline void bring_lanes_near(Ahead& ahead, const KeyHead& head, const Lanes& lanes, const Rows& rows) {
  head.runs(lanes, [&](int64_t, int64_t h, int64_t query, int64_t count) {
    ahead.add(rows, head.sample, h, head.row + query, count, head.p.dim);
  });
}

class DecoupledForward {
 public:
  DecoupledForward(const DecoupledAttention& p, const Rows& out, Cutter cutter)
      : p_(p), out_(out), keys_(p.keys()), padded_(to_vectors(p.rows.dim)), rows_(p, cutter) {
    queries_ = cutter.cut<float>(p.rows.dim * kLanes);
    scores_ = cutter.cut<float>(keys_ * kLanes);
    sums_ = cutter.cut<float>(kLanes * padded_);
    bytes_ = cutter.used();
  }

  int64_t bytes() const { return bytes_; }

  // Blocks of lanes [first, end) of one key head.
  void run(const KeyHead& head, int64_t first, int64_t end) {
    rows_.load(head);
    for (int64_t b = first; b < end; ++b) {
      ahead_.clear();
      if (b + 1 < end) {
        const Lanes next = lanes_of_block(head.lanes(), b + 1);
        bring_lanes_near(ahead_, head, next, p_.rows.query);
        bring_lanes_near(ahead_, head, next, out_);
        ahead_.spread(next.count * keys_ / 100 + 1);
      }
      run(head, lanes_of_block(head.lanes(), b));
    }
  }

 private:
  void run(const KeyHead& head, const Lanes& lanes) {
    const int64_t width = lanes.width;
    pack_lanes(head, lanes, p_.rows.query, p_.rows.scale * kLog2e, queries_);
    multiply<Into::overwrite>(
        {keys_, width, p_.rows.dim, rows_.keys, padded_, 1, queries_, width, scores_, width, nullptr, &ahead_});
    float* scores = scores_;
    for (int64_t j = 0; j < p_.count; scores += p_.branches[j++].keys * width) {
      const KeyBranch& branch = p_.branches[j];
      load_weights(head, lanes, branch, weights_);
      for (int64_t lane = 0; lane < width; lane += kWidth) {
        const Vec by = exponentials(branch.keys, width, scores + lane) * Vec::load(weights_ + lane);
        for (int64_t i = 0; i < branch.keys; ++i) {
          float* at = scores + i * width + lane;
          (Vec::load(at) * by).store(at);
        }
      }
    }
    multiply<Into::overwrite>(
        {lanes.count, padded_, keys_, scores_, 1, width, rows_.values, padded_, sums_, padded_, nullptr, &ahead_});
    store_lanes(head, lanes, sums_, padded_, 1.0f, out_);
  }

  const DecoupledAttention& p_;
  const Rows& out_;
  const int64_t keys_, padded_;
  const BranchRows rows_;
  int64_t bytes_;
  float *queries_, *scores_, *sums_;
  Ahead ahead_;
  alignas(kAlignment) float weights_[kLanes];
};

void decoupled_attention_forward(const DecoupledAttention& p, const Rows& out, const Threads& threads) {
  const PromptAttention& q = p.rows;
  const int64_t heads = q.samples * q.heads_kv, blocks = blocks_of(q.groups() * q.tq, kLanes);
  if (heads == 0 || blocks == 0) return;
  // Every piece of a head copies its keys again: few pieces, unless threads would have nothing to do.
  const int64_t pieces = std::clamp<int64_t>(blocks_of(8 * threads.count, heads), 1, blocks_of(blocks, 4));
  const double work = 4.0 * double(q.samples * q.heads * q.tq) * double(p.keys() + 4) * double(q.dim);
  const int64_t bytes = DecoupledForward(p, out, Cutter()).bytes();
  for_each(threads, heads * pieces, work, [&](int64_t task) {
    const int64_t i = task / pieces, piece = task % pieces;
    DecoupledForward kernel(p, out, Cutter(Scratch::take(bytes)));
    kernel.run({q, i / q.heads_kv, i % q.heads_kv}, piece * blocks / pieces, (piece + 1) * blocks / pieces);
  });
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
