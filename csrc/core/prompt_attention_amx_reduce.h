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
    const bool visits = want_.instance() || want_.prompt();
    for (int64_t begin = 0, end; visits && begin < runs(); begin = end) {
      end = last_run(begin);
      const int64_t before = begin * p_.heads_kv * ranges_;
      for_each(threads, end * p_.heads_kv * ranges_ - before, work, [&](int64_t task) {
        AttentionBackward kernel(p_, g_, Cutter(Scratch::take(bytes)));
        run_task(kernel, before + task, threads.count, place_of(begin));
      });
      if (parts_query()) sum_queries(threads, begin, end);
    }
    const double sums = double(runs() * p_.heads_kv * prompt_tiles_ * kTileFloats);
    for_each(threads, p_.bank * p_.heads_kv, sums, [&](int64_t i) { write_prompt(i / p_.heads_kv, i % p_.heads_kv); });
  }

 private:
  static constexpr int64_t kMostQueries = int64_t{64} << 20;  // bytes of partial dQ at a time

  int64_t runs() const { return found_.size(); }
  // Place of a run's first sample in the order of all.
  int64_t place_of(int64_t run) const {
    return run == runs() ? p_.samples : found_.chunks[static_cast<size_t>(run)].first;
  }

  // Whether ranges of keys leave parts of dQ, and the floats of one lane's.
  bool parts_query() const { return want_.query && ranges_ > 1; }
  int64_t lane_floats() const { return ranges_ * p_.heads_kv * nd_ * 16; }

  // Numbers the lanes of all samples in the order of runs; bytes of all sums.
  int64_t lay_out() {
    first_lane_[0] = 0;
    for (int64_t i = 0; i < p_.samples; ++i) {
      const int64_t lanes = p_.queries_of(found_.order[static_cast<size_t>(i)]) * p_.groups();
      first_lane_[i + 1] = first_lane_[i] + round_up(lanes, 32);
    }
    query_sums_ = runs() * p_.heads_kv * prompt_tiles_ * (want_.prompt_key + want_.prompt_value) * kTileFloats;
    int64_t most = 0;
    for (int64_t begin = 0, end; parts_query() && begin < runs(); begin = end) {
      end = last_run(begin);
      most = std::max(most, first_lane_[place_of(end)] - first_lane_[place_of(begin)]);
    }
    return (query_sums_ + most * lane_floats()) * int64_t{sizeof(float)};
  }

  // Runs [begin, last) are at work together: all, or as many as parts of dQ have room for.
  int64_t last_run(int64_t begin) const {
    if (!parts_query()) return runs();
    const int64_t room = kMostQueries / std::max(lane_floats() * int64_t{sizeof(float)}, int64_t{1});
    int64_t end = begin + 1;
    while (end < runs() && first_lane_[place_of(end + 1)] - first_lane_[place_of(begin)] <= room) ++end;
    return end;
  }

  void sum_queries(const Threads& threads, int64_t begin, int64_t end) const {
    const int64_t first = place_of(begin), lanes = first_lane_[place_of(end)] - first_lane_[first];
    for_each(threads, (place_of(end) - first) * p_.heads_kv, double(lanes * lane_floats()),
             [&](int64_t i) { sum_query(first, first + i / p_.heads_kv, i % p_.heads_kv); });
  }

  // Sums of keys (which 0) or values (1) of prompts over one run.
  float* prompt_sums(int64_t run, int64_t head_kv, int which) const {
    if (!(which == 0 ? want_.prompt_key : want_.prompt_value)) return nullptr;
    const int64_t plane = which == 1 && want_.prompt_key ? runs() * p_.heads_kv : 0;
    return sums_ + (plane + run * p_.heads_kv + head_kv) * prompt_tiles_ * kTileFloats;
  }

  // dQ of the sample at place i, where those from place `first` on are at work.
  float* query_sums(int64_t first, int64_t i, int64_t head_kv, int64_t range) const {
    const int64_t before = first_lane_[i] - first_lane_[first], own = first_lane_[i + 1] - first_lane_[i];
    return sums_ + query_sums_ + (before * p_.heads_kv * ranges_ + (head_kv * ranges_ + range) * own) * nd_ * 16;
  }

  // `at_work`: place of the first sample that is at work.
  void run_task(AttentionBackward& kernel, int64_t task, int64_t stride, int64_t at_work) const {
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
      kernel.sample(s, head_kv, range, ranges, partial ? query_sums(at_work, i, head_kv, range) : nullptr);
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

  void sum_query(int64_t first, int64_t place, int64_t head_kv) const {
    const int64_t s = found_.order[static_cast<size_t>(place)];
    const int64_t ranges = key_ranges(want_, p_.keys_of(s)), lanes = p_.queries_of(s) * p_.groups();
    if (ranges == 1 || lanes == 0) return;
    float* sums = query_sums(first, place, head_kv, 0);
    for (int64_t range = 1; range < ranges; ++range) {
      const float* part = query_sums(first, place, head_kv, range);
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
  int64_t* const first_lane_;        // [samples + 1], by place in the order of runs, each padded to 32
  const CallMemory sums_memory_;
  float* const sums_;
};

inline void backward(const PromptAttention& p, const PromptAttentionGrads& grads, const Threads& threads) {
  BackwardTasks(p, grads).run(threads);
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
