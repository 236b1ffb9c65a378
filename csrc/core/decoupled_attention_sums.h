// SPDX-License-Identifier: Apache-2.0
// Tasks of a backward of decoupled attention: ranges of the lanes of a key head, each with sums over its lanes of its
// own; then the gradients of keys and values from those, in order.
#pragma once

#include "attention_blocks.h"
#include "decoupled_attention.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

// What is computed for the gradients that are wanted.
struct DecoupledWants {
  bool key = false, value = false, slopes;

  DecoupledWants(const DecoupledAttention& p, const Rows& query_grad) : slopes(query_grad) {
    for (int64_t j = 0; j < p.count; ++j) {
      key |= bool(p.branches[j].key_grad);
      value |= bool(p.branches[j].value_grad);
      slopes |= p.branches[j].key_grad || p.branches[j].weight_grad;
    }
  }
};

// Sums of tasks, float32 rows of whole vectors: the keys of all branches, then their values, where they are wanted.
class DecoupledSums {
 public:
  static constexpr int64_t kMostBytes = int64_t{64} << 20;  // of samples at a time

  // Ranges depend on one sample alone: so do the bits of its gradients.
  DecoupledSums(const DecoupledAttention& p, const DecoupledWants& wants)
      : ranges(blocks_of(p.rows.groups() * p.rows.tq, 1024)), padded(to_vectors(p.rows.dim)), p_(p), wants_(wants),
        plane_(p.keys() * padded), size_((int64_t(wants.key) + int64_t(wants.value)) * plane_),
        at_once_(std::clamp<int64_t>(kMostBytes / std::max<int64_t>(of_sample() * 4, 1), 1,
                                     std::max<int64_t>(p.rows.samples, 1))),
        tasks_(std::max(at_once_ * of_sample() * 4, kAlignment)),
        shared_(std::max(p.rows.heads_kv * size_ * 4, kAlignment)) {
    std::memset(shared_.data(), 0, static_cast<size_t>(p.rows.heads_kv * size_) * sizeof(float));
  }

  int64_t samples_at_once() const { return at_once_; }
  // `sample`: its number among those at work.
  float* keys(int64_t sample, int64_t head, int64_t range) const {
    return floats(tasks_) + ((sample * p_.rows.heads_kv + head) * ranges + range) * size_;
  }
  float* values(int64_t sample, int64_t head, int64_t range) const {
    return keys(sample, head, range) + (wants_.key ? plane_ : 0);
  }

  // Gradients of a head's own keys and values from the tasks of samples [first, first + count); what samples share is
  // added up.
  void add(int64_t first, int64_t count, int64_t head) const {
    int64_t row = 0;
    for (int64_t j = 0; j < p_.count; row += p_.branches[j++].keys) {
      const KeyBranch& branch = p_.branches[j];
      for (int64_t s = 0; s < count; ++s) {
        add(branch, branch.key_grad, keys(s, head, 0) + row * padded, shared_keys(head) + row * padded,
            p_.rows.scale, first + s, head);
        add(branch, branch.value_grad, values(s, head, 0) + row * padded, shared_values(head) + row * padded, 1.0f,
            first + s, head);
      }
    }
  }

  // What samples share, once all are added.
  void write_shared(int64_t head) const {
    int64_t row = 0;
    for (int64_t j = 0; j < p_.count; row += p_.branches[j++].keys) {
      const KeyBranch& branch = p_.branches[j];
      if (!branch.shared) continue;
      write(branch, branch.key_grad, shared_keys(head) + row * padded, p_.rows.scale, 0, head);
      write(branch, branch.value_grad, shared_values(head) + row * padded, 1.0f, 0, head);
    }
  }

  const int64_t ranges, padded;

 private:
  static float* floats(const CallMemory& memory) { return reinterpret_cast<float*>(memory.data()); }
  int64_t of_sample() const { return p_.rows.heads_kv * ranges * size_; }
  float* shared_keys(int64_t head) const { return floats(shared_) + head * size_; }
  float* shared_values(int64_t head) const { return shared_keys(head) + (wants_.key ? plane_ : 0); }

  void add(const KeyBranch& branch, const Rows& to, float* from, float* shared, float scale, int64_t sample,
           int64_t head) const {
    if (!to) return;
    // The first range of a sample takes the others; ranges of what is shared go where it is kept.
    float* total = branch.shared ? shared : from;
    for (int64_t r = branch.shared ? 0 : 1; r < ranges; ++r) {
      for (int64_t i = 0; i < branch.keys * padded; i += kWidth) {
        (Vec::load(total + i) + Vec::load(from + r * size_ + i)).store(total + i);
      }
    }
    if (!branch.shared) write(branch, to, ranges ? total : nullptr, scale, sample, head);
  }

  // Without queries there are no ranges, and gradients are zeros.
  void write(const KeyBranch& branch, const Rows& to, const float* from, float scale, int64_t sample,
             int64_t head) const {
    if (!to) return;
    if (from) {
      return store_rows(from, padded, branch.keys, p_.rows.dim, scale, to.at(sample, head, 0), to.dtype, to.row);
    }
    for (int64_t r = 0; r < branch.keys; ++r) {
      std::memset(to.at(sample, head, r), 0, static_cast<size_t>(p_.rows.dim * size_of(to.dtype)));
    }
  }

  const DecoupledAttention& p_;
  const DecoupledWants& wants_;
  const int64_t plane_, size_, at_once_;
  CallMemory tasks_, shared_;
};

// Kernel(p, grad_out, query_grad, cutter).run(head, first block, end, sums of keys, of values) does one range.
template <class Kernel>
void decoupled_backward(const DecoupledAttention& p, const Rows& grad_out, const Rows& query_grad,
                        const Threads& threads) {
  const PromptAttention& q = p.rows;
  const DecoupledWants wants(p, query_grad);
  if (!wants.slopes && !wants.value) return;
  const DecoupledSums sums(p, wants);
  const int64_t blocks = blocks_of(q.groups() * q.tq, kLanes), ranges = sums.ranges;
  const double work = 10.0 * double(q.samples * q.heads * q.tq) * double(p.keys() + 4) * double(q.dim);
  const int64_t bytes = Kernel(p, grad_out, query_grad, Cutter()).bytes();
  for (int64_t first = 0; first < q.samples; first += sums.samples_at_once()) {
    const int64_t count = std::min(sums.samples_at_once(), q.samples - first);
    for_each(threads, count * q.heads_kv * ranges, work, [&](int64_t task) {
      const int64_t range = task % ranges, head = task / ranges % q.heads_kv, s = task / ranges / q.heads_kv;
      Kernel kernel(p, grad_out, query_grad, Cutter(Scratch::take(bytes)));
      kernel.run({q, first + s, head}, range * blocks / ranges, (range + 1) * blocks / ranges,
                 sums.keys(s, head, range), sums.values(s, head, range));
    });
    for_each(threads, q.heads_kv, work / 100, [&](int64_t head) { sums.add(first, count, head); });
  }
  for_each(threads, q.heads_kv, work / 100, [&](int64_t head) { sums.write_shared(head); });
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
