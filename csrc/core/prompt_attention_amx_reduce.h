// SPDX-License-Identifier: Apache-2.0
// Tasks of the backward on tiles, and the sums over tasks: of prompt gradients over runs of samples, of dQ over ranges
// of keys, both in order.
#pragma once

#include "prompt_attention_amx_backward.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

class BackwardTasks {
 public:
  BackwardTasks(const PromptAttention& p, const PromptAttentionGrads& g)
      : p_(p), g_(g), want_(p, g), found_(p, 16), ranges_(key_ranges(want_, p.tk)), nd_(tiles_of_16(p.dim)),
        prompt_tiles_(round_up(p.prompts, 32) / 16 * nd_), first_lane_(static_cast<size_t>(p.samples) + 1) {
    for (int64_t s = 0; s < p.samples; ++s) {
      const int64_t lanes = round_up(p.queries_of(s) * p.groups(), 32);
      first_lane_[static_cast<size_t>(s) + 1] = first_lane_[static_cast<size_t>(s)] + lanes;
    }
    const int64_t sums = runs() * p.heads_kv * prompt_tiles_ * (want_.prompt_key + want_.prompt_value);
    const int64_t partial = want_.query && ranges_ > 1 ? ranges_ * p.heads_kv * first_lane_.back() / 16 * nd_ : 0;
    query_sums_ = sums * kTileFloats;
    const auto bytes = static_cast<size_t>((sums + partial) * kTileFloats) * sizeof(float);
    if (bytes == 0) return;
    memory_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, bytes)));
    if (!memory_) throw std::bad_alloc();
  }

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
      const double all = double(ranges_ * p_.heads_kv * first_lane_.back() * nd_ * 16);
      for_each(threads, p_.samples * p_.heads_kv, all,
               [&](int64_t i) { write_query(i / p_.heads_kv, i % p_.heads_kv); });
    }
  }

 private:
  int64_t runs() const { return static_cast<int64_t>(found_.runs.size()); }

  // Sums of keys (which 0) or values (1) of prompts over one run.
  float* prompt_sums(int64_t run, int64_t head_kv, int which) const {
    if (!(which == 0 ? want_.prompt_key : want_.prompt_value)) return nullptr;
    const int64_t plane = which == 1 && want_.prompt_key ? runs() * p_.heads_kv : 0;
    return memory_.get() + (plane + run * p_.heads_kv + head_kv) * prompt_tiles_ * kTileFloats;
  }

  float* query_sums(int64_t s, int64_t head_kv, int64_t range) const {
    const int64_t first = first_lane_[static_cast<size_t>(s)], all = first_lane_.back();
    const int64_t own = first_lane_[static_cast<size_t>(s) + 1] - first;
    return memory_.get() + query_sums_ + ((range * all + first) * p_.heads_kv + head_kv * own) * nd_ * 16;
  }

  void run_task(AttentionBackward& kernel, int64_t task, int64_t stride) const {
    const int64_t range = task % ranges_, head_kv = task / ranges_ % p_.heads_kv, number = task / ranges_ / p_.heads_kv;
    const SampleRun& run = found_.runs[static_cast<size_t>(number)];
    const TileScope tiles;
    if (range == 0) {
      kernel.read_prompt(run.prompt, head_kv, prompt_sums(number, head_kv, 0), prompt_sums(number, head_kv, 1));
    }
    for (int64_t i = run.begin; i < run.end; ++i) {
      const int64_t s = found_.order[static_cast<size_t>(i)], ranges = key_ranges(want_, p_.keys_of(s));
      if (range >= ranges) continue;
      const bool partial = want_.query && ranges > 1;
      if (ranges_ == 1) {
        // The next sample of this run, or the first of the task that this thread is likely to take.
        const int64_t next = i + 1 < run.end ? task : task + stride;
        const bool known = next < runs() * p_.heads_kv;
        const auto later = static_cast<size_t>(next / p_.heads_kv);
        const int64_t place = next == task ? i + 1 : known ? found_.runs[later].begin : 0;
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
        const std::byte* taken = Scratch::take(count * 4);
        auto* sums = reinterpret_cast<float*>(const_cast<std::byte*>(taken));
        std::fill_n(sums, count, 0.0f);
        const auto first = std::lower_bound(found_.runs.begin(), found_.runs.end(), g,
                                            [](const SampleRun& run, int64_t prompt) { return run.prompt < prompt; });
        for (auto run = first; run != found_.runs.end() && run->prompt == g; ++run) {
          const float* part = prompt_sums(run - found_.runs.begin(), head_kv, which) + place;
          for (int64_t i = 0; i < count; i += kWidth) (Vec::load(sums + i) + Vec::load(part + i)).store(sums + i);
        }
        AttentionBackward::write_keys(sums, keys, p_.dim, scale, to, x);
      }
    }
  }

  void write_query(int64_t s, int64_t head_kv) const {
    const int64_t ranges = key_ranges(want_, p_.keys_of(s)), lanes = p_.queries_of(s) * p_.groups();
    if (ranges == 1 || lanes == 0) return;
    float* sums = query_sums(s, head_kv, 0);
    for (int64_t range = 1; range < ranges; ++range) {
      const float* part = query_sums(s, head_kv, range);
      for (int64_t i = 0; i < round_up(lanes, 16) * nd_ * 16; i += kWidth) {
        (Vec::load(sums + i) + Vec::load(part + i)).store(sums + i);
      }
    }
    AttentionBackward::write_query(p_, g_, s, head_kv, sums);
  }

  const PromptAttention& p_;
  const PromptAttentionGrads& g_;
  const Wanted want_;
  const SampleRuns found_;
  const int64_t ranges_, nd_, prompt_tiles_;
  std::vector<int64_t> first_lane_;  // of samples, each padded to 32
  int64_t query_sums_ = 0;
  std::unique_ptr<float, Free> memory_;
};

inline void backward(const PromptAttention& p, const PromptAttentionGrads& grads, const Threads& threads) {
  BackwardTasks(p, grads).run(threads);
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
