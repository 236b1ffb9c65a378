// SPDX-License-Identifier: Apache-2.0
// Forward of prompt attention in float: a block of lanes runs over all blocks of keys with an online softmax.
//
// Scores are kept transposed, [key][lane], so that maxima, exponentials and sums of all lanes are vertical operations.
#pragma once

#include "attention_hiding.h"
#include "attention_keys.h"
#include "gemm.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

// State of the lanes of one block: the largest score so far (units of log 2), the sum of exponentials relative to it,
// and by how much the last block of keys scales down what came before.
struct LaneState {
  alignas(kAlignment) float peak[kLanes], sum[kLanes], rescale[kLanes];
};

// Turns scores [keys][width] into exponentials in place. A row that has seen nothing yet is relative to 0.
template <int kVectors>
inline void softmax_columns(int64_t keys, int64_t width, float* scores, bool first, LaneState& state, int64_t lane) {
  Vec peak[kVectors], shift[kVectors], sum[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    peak[v] = first ? Vec(-kInfinity) : Vec::load(state.peak + lane + v * kWidth);
    sum[v] = Vec(0.0f);
  }
  for (int64_t j = 0; j < keys; ++j) {
    for (int v = 0; v < kVectors; ++v) peak[v] = max(Vec::load(scores + j * width + lane + v * kWidth), peak[v]);
  }
  for (int v = 0; v < kVectors; ++v) shift[v] = select_less(peak[v], Vec(kLowest), Vec(0.0f), peak[v]);
  for (int64_t j = 0; j < keys; ++j) {
    for (int v = 0; v < kVectors; ++v) {
      float* at = scores + j * width + lane + v * kWidth;
      const Vec x = exp2(Vec::load(at) - shift[v]);
      x.store(at);
      sum[v] = sum[v] + x;
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = lane + v * kWidth;
    if (!first) {
      const Vec rescale = exp2(Vec::load(state.peak + at) - shift[v]);
      rescale.store(state.rescale + at);
      sum[v] = fma(Vec::load(state.sum + at), rescale, sum[v]);
    }
    peak[v].store(state.peak + at);
    sum[v].store(state.sum + at);
  }
}

inline void softmax_block(int64_t keys, int64_t width, float* scores, bool first, LaneState& state) {
  int64_t lane = 0;
  for (; lane + 2 * kWidth <= width; lane += 2 * kWidth) softmax_columns<2>(keys, width, scores, first, state, lane);
  if (lane < width) softmax_columns<1>(keys, width, scores, first, state, lane);
}

// Memory of one task.
struct ForwardScratch {
  float *queries, *scores, *mask, *out, *keys, *values;

  ForwardScratch(const PromptAttention& p, Cutter& cutter) {
    queries = cutter.cut<float>(p.dim * kLanes);
    scores = cutter.cut<float>(kKeys * kLanes);
    mask = cutter.cut<float>(p.mask ? kKeys * kLanes : 0);
    out = cutter.cut<float>(kLanes * to_vectors(p.dim));
    keys = cutter.cut<float>(KeyRows::room(p, p.prompt_key, p.key, p.prompts, p.tk));
    values = cutter.cut<float>(KeyRows::room(p, p.prompt_value, p.value, p.prompts, p.tk));
  }
};

class Forward {
 public:
  Forward(const PromptAttention& p, const Rows& out, const Rows& lse, const ForwardScratch& scratch)
      : p_(p), out_(out), lse_(lse), scratch_(scratch),
        keys_(p, p.prompt_key, p.key, scratch.keys), values_(p, p.prompt_value, p.value, scratch.values) {}

  // Blocks of lanes [first, end) of one key head; `next`: the head that follows, if it is known.
  void run(const KeyHead& head, int64_t first, int64_t end, const KeyHead* next) {
    bring_near(next);
    const KeyBlocks blocks{p_.prompts, head.keys()};
    keys_.load(head, 0, head.keys());
    values_.load(head, 0, head.keys());
    for (int64_t b = first; b < end; ++b) run(head, blocks, lanes_of_block(head.lanes(), b));
  }

 private:
  void bring_near(const KeyHead* next) {
    ahead_.clear();
    if (!next) return;
    ahead_.add(p_.key, next->sample, next->head, next->row, next->tk, p_.dim);
    ahead_.add(p_.value, next->sample, next->head, next->row, next->tk, p_.dim);
    for (int64_t g = 0; g < p_.groups(); ++g) {
      const int64_t h = next->head * p_.groups() + g;
      ahead_.add(p_.query, next->sample, h, next->row, next->tq, p_.dim);
      ahead_.add(out_, next->sample, h, next->row, next->tq, p_.dim);
    }
  }

  void run(const KeyHead& head, const KeyBlocks& blocks, const Lanes& lanes) {
    const Hiding hiding(head, lanes);
    const int64_t width = lanes.width, padded = to_vectors(p_.dim);
    float *scores = scratch_.scores, *out = scratch_.out;
    pack_lanes(head, lanes, p_.query, p_.scale * kLog2e, scratch_.queries);
    LaneState state;
    bool first = true;
    for (int64_t b = 0; b < blocks.count; ++b) {
      const KeyBlock block = blocks[b];
      if (hiding.whole(block)) continue;
      const FloatRows key = keys_[block], value = values_[block];
      multiply<Into::overwrite>(
          {block.count, width, p_.dim, key.at, key.row, 1, scratch_.queries, width, scores, width, nullptr, &ahead_});
      hiding.apply(block, scores, scratch_.mask);
      softmax_block(block.count, width, scores, first, state);
      const Product product{
          lanes.count, padded, block.count, scores, 1, width, value.at, value.row, out, padded, state.rescale, &ahead_};
      first ? multiply<Into::overwrite>(product) : multiply<Into::scaled>(product);
      first = false;
    }
    finish(head, lanes, first, state);
  }

  void finish(const KeyHead& head, const Lanes& lanes, bool nothing, LaneState& state) {
    const int64_t padded = to_vectors(p_.dim);
    for (int64_t i = 0; i < lanes.count; ++i) {
      float* row = scratch_.out + i * padded;
      const bool dead = nothing || state.sum[i] == 0;
      const Vec factor(dead ? 0.0f : 1.0f / state.sum[i]);
      for (int64_t d = 0; d < padded; d += kWidth) {
        (dead ? Vec(0.0f) : Vec::load(row + d) * factor).store(row + d);
      }
      state.peak[i] = dead ? -kInfinity : state.peak[i] * kLn2 + std::log(state.sum[i]);
    }
    store_lanes(head, lanes, scratch_.out, padded, 1.0f, out_);
    store_lane_values(head, lanes, state.peak, lse_);
  }

  const PromptAttention& p_;
  const Rows &out_, &lse_;
  ForwardScratch scratch_;
  KeyRows keys_, values_;
  Ahead ahead_;
};

// Tasks are runs of blocks of lanes of one key head, or runs of samples where those are short.
struct ForwardTasks {
  int64_t lane_blocks, blocks_a_task, tasks_a_sample, samples_a_task;

  explicit ForwardTasks(const PromptAttention& p) {
    constexpr double worth = 4e6;  // operations of a task
    const double lanes = static_cast<double>(p.groups() * p.tq), keys = static_cast<double>(p.prompts + p.tk);
    const double work = 4.0 * static_cast<double>(p.dim) * keys;
    lane_blocks = blocks_of(p.groups() * p.tq, kLanes);
    // Copies of keys are made once a task, so a task has some blocks of lanes even where keys are many.
    const double wanted = std::max(worth / (work * static_cast<double>(kLanes) + 1), 5.0);
    blocks_a_task = static_cast<int64_t>(std::min(wanted, static_cast<double>(std::max<int64_t>(lane_blocks, 1))));
    tasks_a_sample = blocks_of(lane_blocks, blocks_a_task);
    const double samples = worth / (work * lanes + 1e4);
    samples_a_task = tasks_a_sample > 1 ? 1 : std::clamp<int64_t>(static_cast<int64_t>(samples), 1, 64);
  }

  int64_t part(int64_t task) const { return task % tasks_a_sample; }
  int64_t head(int64_t task, const PromptAttention& p) const { return task / tasks_a_sample % p.heads_kv; }
  int64_t sample(int64_t task, const PromptAttention& p) const {
    return task / tasks_a_sample / p.heads_kv * samples_a_task;
  }
};

void prompt_attention_forward(const PromptAttention& p, const Rows& out, const Rows& lse, const Threads& threads) {
  const ForwardTasks cut(p);
  const int64_t tasks = blocks_of(p.samples, cut.samples_a_task) * p.heads_kv * cut.tasks_a_sample;
  const double work = 4.0 * static_cast<double>(p.samples * p.heads * p.tq * (p.prompts + p.tk) * p.dim);
  for_each_ahead(threads, tasks, work, [&](int64_t task, int64_t following) {
    const int64_t head = cut.head(task, p), end = std::min(cut.sample(task, p) + cut.samples_a_task, p.samples);
    Cutter count;
    ForwardScratch(p, count);
    Cutter cutter(Scratch::take(count.used()));
    Forward forward(p, out, lse, ForwardScratch(p, cutter));
    for (int64_t s = cut.sample(task, p); s < end; ++s) {
      const KeyHead key_head{p, s, head};
      const int64_t blocks = blocks_of(key_head.lanes(), kLanes), begin = cut.part(task) * cut.blocks_a_task;
      if (begin >= blocks) continue;
      const bool same = s + 1 < end, known = cut.tasks_a_sample == 1 && (same || following >= 0);
      const int64_t next_head = same || !known ? head : cut.head(following, p);
      const KeyHead next{p, same ? s + 1 : known ? cut.sample(following, p) : s, next_head};
      forward.run(key_head, begin, std::min(begin + cut.blocks_a_task, blocks), known ? &next : nullptr);
    }
  });
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
