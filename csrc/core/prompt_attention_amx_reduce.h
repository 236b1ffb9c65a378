// SPDX-License-Identifier: Apache-2.0
// Tasks of the backward on tiles, and the sums over tasks: of prompt gradients over runs of samples, of dQ over ranges
// of keys, both in order.
#pragma once

#include "prompt_attention_amx_backward.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

class BackwardTasks {
 public:
  BackwardTasks(const PromptAttention& p, const PromptAttentionGrads& g)
      : p_(p), g_(g), want_(p, g), found_(p, std::max<int64_t>((p.samples + 15) / 16, 1)),
        ranges_(key_ranges(want_, p.tk)), nd_(tiles_of_16(p.dim)),
        prompt_tiles_(round_up(p.prompts, 32) / 16 * nd_), lanes_memory_((p.samples + 1) * int64_t{sizeof(int64_t)}),
        first_lane_(reinterpret_cast<int64_t*>(lanes_memory_.data())), sums_memory_(lay_out()),
        sums_(reinterpret_cast<float*>(sums_memory_.data())) {}

  void run(const Threads& threads) {
    const int64_t bytes = AttentionBackward(p_, g_, Cutter()).bytes();
    const double keys = double(p_.prompts) + (want_.instance() ? double(p_.tk) : 0);
    const double work = 10.0 * double(p_.samples) * double(p_.heads) * double(p_.tq) * keys * double(p_.dim);
    if (want_.instance() || want_.prompt()) {
      for_each(threads, runs() * p_.heads_kv * ranges_, work, [&](int64_t task) {
        AttentionBackward kernel(p_, g_, Cutter(Scratch::take(bytes)));
        run_task(kernel, task, threads.count);
      });
    }
    const double sums = double(runs() * p_.heads_kv * prompt_tiles_ * kTileFloats);
    for_each(threads, p_.bank * p_.heads_kv, sums, [&](int64_t i) { write_prompt(i / p_.heads_kv, i % p_.heads_kv); });
    if (want_.query && ranges_ > 1) {
      const double all = double(ranges_ * p_.heads_kv * all_lanes() * nd_ * 16);
      for_each(threads, p_.samples * p_.heads_kv, all,
               [&](int64_t i) { sum_query(i / p_.heads_kv, i % p_.heads_kv); });
    }
  }

 private:
  int64_t runs() const { return found_.size(); }

  // Numbers the lanes of all samples; bytes of all sums.
  int64_t lay_out() {
    first_lane_[0] = 0;
    for (int64_t s = 0; s < p_.samples; ++s) {
      first_lane_[s + 1] = first_lane_[s] + round_up(p_.queries_of(s) * p_.groups(), 32);
    }
    query_sums_ = runs() * p_.heads_kv * prompt_tiles_ * (want_.prompt_key + want_.prompt_value) * kTileFloats;
    const int64_t partial = want_.query && ranges_ > 1 ? ranges_ * p_.heads_kv * all_lanes() * nd_ * 16 : 0;
    return (query_sums_ + partial) * int64_t{sizeof(float)};
  }

  int64_t all_lanes() const { return first_lane_[p_.samples]; }

  // Sums of keys (which 0) or values (1) of prompts over one run.
  float* prompt_sums(int64_t run, int64_t head_kv, int which) const {
    if (!(which == 0 ? want_.prompt_key : want_.prompt_value)) return nullptr;
    const int64_t plane = which == 1 && want_.prompt_key ? runs() * p_.heads_kv : 0;
    return sums_ + (plane + run * p_.heads_kv + head_kv) * prompt_tiles_ * kTileFloats;
  }

  float* query_sums(int64_t s, int64_t head_kv, int64_t range) const {
    const int64_t first = first_lane_[s], own = first_lane_[s + 1] - first;
    return sums_ + query_sums_ + ((range * all_lanes() + first) * p_.heads_kv + head_kv * own) * nd_ * 16;
  }

  void run_task(AttentionBackward& kernel, int64_t task, int64_t stride) const {
    const int64_t range = task % ranges_, head_kv = task / ranges_ % p_.heads_kv, number = task / ranges_ / p_.heads_kv;
    const SampleChunk& run = found_.chunks[static_cast<size_t>(number)];
    const TileScope tiles;
    if (range == 0) {
      kernel.read_prompt(run.prompt, head_kv, prompt_sums(number, head_kv, 0), prompt_sums(number, head_kv, 1));
    }
    for (int64_t i = run.first, end = run.first + run.count; i < end; ++i) {
      const int64_t s = found_.order[static_cast<size_t>(i)], ranges = key_ranges(want_, p_.keys_of(s));
      if (range >= ranges) continue;
      const bool partial = want_.query && ranges > 1;
      if (ranges_ == 1) {
        // The next sample of this run, or the first of the task that this thread is likely to take.
        const int64_t next = i + 1 < end ? task : task + stride;
        const bool known = next < runs() * p_.heads_kv;
        const auto later = static_cast<size_t>(next / p_.heads_kv);
        const int64_t place = next == task ? i + 1 : known ? found_.chunks[later].first : 0;
        kernel.look_ahead(s, head_kv, known ? found_.order[static_cast<size_t>(place)] : -1,
                          next == task ? head_kv : next % p_.heads_kv);
      }
      kernel.sample(s, head_kv, range, ranges, partial ? query_sums(s, head_kv, range) : nullptr);
    }
  }

  // A prompt that no sample reads gets zeros.
  void write_prompt(int64_t g, int64_t head_kv) const {
    for (int which = 0; which < 2; ++which) {
      if (!(which == 0 ? want_.prompt_key : want_.prompt_value)) continue;
      const HeadRows to{which == 0 ? g_.prompt_key : g_.prompt_value, g, head_kv, 0, 1};
      const float scale = which == 0 ? p_.scale : 1.0f;
      for (int64_t x = 0; x < p_.prompts; x += 32) {
        const int64_t keys = std::min<int64_t>(p_.prompts - x, 32), count = tiles_of_16(keys) * nd_ * kTileFloats;
        const int64_t place = x / 16 * nd_ * kTileFloats;
        auto* sums = reinterpret_cast<float*>(Scratch::take(count * int64_t{sizeof(float)}));
        std::fill_n(sums, count, 0.0f);
        const auto at = static_cast<size_t>(g);
        for (int64_t run = found_.first_of[at]; run < found_.first_of[at + 1]; ++run) {
          const float* part = prompt_sums(run, head_kv, which) + place;
          for (int64_t i = 0; i < count; i += kWidth) (Vec::load(sums + i) + Vec::load(part + i)).store(sums + i);
        }
        write_keys(sums, keys, p_.dim, scale, to, x);
      }
    }
  }

  void sum_query(int64_t s, int64_t head_kv) const {
    const int64_t ranges = key_ranges(want_, p_.keys_of(s)), lanes = p_.queries_of(s) * p_.groups();
    if (ranges == 1 || lanes == 0) return;
    float* sums = query_sums(s, head_kv, 0);
    for (int64_t range = 1; range < ranges; ++range) {
      const float* part = query_sums(s, head_kv, range);
      for (int64_t i = 0; i < round_up(lanes, 16) * nd_ * 16; i += kWidth) {
        (Vec::load(sums + i) + Vec::load(part + i)).store(sums + i);
      }
    }
    write_query(p_, g_, s, head_kv, sums);
  }

  const PromptAttention& p_;
  const PromptAttentionGrads& g_;
  const Wanted want_;
  const SampleChunks found_;
  const int64_t ranges_, nd_, prompt_tiles_;
  int64_t query_sums_ = 0;           // where sums of dQ begin
  const CallMemory lanes_memory_;
  int64_t* const first_lane_;        // [samples + 1], each padded to 32
  const CallMemory sums_memory_;
  float* const sums_;
};

inline void backward(const PromptAttention& p, const PromptAttentionGrads& grads, const Threads& threads) {
  BackwardTasks(p, grads).run(threads);
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
