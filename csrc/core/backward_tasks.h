// SPDX-License-Identifier: Apache-2.0
// Tasks of a backward of attention: chunks of samples x key heads x ranges of keys, then the sums over tasks in order.
#pragma once

#include "backward_plan.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

// What tasks leave behind for each other, float32 in rows of whole vectors.
struct BackwardPartials {
  static constexpr int64_t kMostQueries = int64_t{64} << 20;  // bytes of partial dQ at a time

  const PromptAttention& p;
  const SampleChunks& chunks;
  const BackwardWants& wants;
  int64_t padded = to_vectors(p.dim), ranges = ranges_of(p.prompts + p.tk);
  int64_t lanes = p.groups() * p.tq;
  int64_t samples_at_once = most_samples();
  CallMemory keys{wants.prompt_key ? prompt_bytes() : 0}, values{wants.prompt_value ? prompt_bytes() : 0};
  CallMemory queries{wants.query && ranges > 1 ? samples_at_once * query_bytes() : 0};

  float* of_prompt(const CallMemory& of, int64_t partial, int64_t head) const {
    return reinterpret_cast<float*>(of.data()) + (partial * p.heads_kv + head) * p.prompts * padded;
  }
  // `sample`: its number among those at work.
  float* of_queries(int64_t sample, int64_t head, int64_t range) const {
    return reinterpret_cast<float*>(queries.data()) + ((sample * p.heads_kv + head) * ranges + range) * lanes * padded;
  }

 private:
  int64_t prompt_bytes() const { return chunks.partials * p.heads_kv * p.prompts * padded * 4; }
  int64_t query_bytes() const { return p.heads_kv * ranges * lanes * padded * 4; }
  int64_t most_samples() const {
    if (!wants.query || ranges == 1) return p.samples;
    int64_t longest = 1;
    for (const SampleChunk& chunk : chunks.chunks) longest = std::max(longest, chunk.count);
    return std::max(longest, std::min(p.samples, kMostQueries / std::max<int64_t>(query_bytes(), 1)));
  }
};

// The sums of one chunk's prompt: where they belong if there is no other chunk, else kept.
template <class Engine>
void keep_prompt(const BackwardPartials& partials, const PromptAttentionGrads& g, const Engine& engine,
                 const SampleChunk& chunk, int64_t head) {
  const PromptAttention& p = partials.p;
  const auto keep = [&](const Rows& to, const CallMemory& memory, const float* from, float scale) {
    if (!to || p.prompts == 0) return;
    if (chunk.partial < 0) {
      store_rows(from, partials.padded, p.prompts, p.dim, scale, to.at(chunk.prompt, head, 0), to.dtype, to.row);
    } else {
      std::memcpy(partials.of_prompt(memory, chunk.partial, head), from,
                  static_cast<size_t>(p.prompts * partials.padded) * sizeof(float));
    }
  };
  keep(g.prompt_key, partials.keys, engine.prompt_keys(), p.scale);
  keep(g.prompt_value, partials.values, engine.prompt_values(), 1.0f);
}

// The gradient of one prompt of one head from its chunks; a prompt that nobody reads gets zeros.
inline void sum_prompt(const BackwardPartials& partials, const CallMemory& memory, int64_t prompt, int64_t head,
                       float scale, const Rows& to) {
  const PromptAttention& p = partials.p;
  const auto begin = static_cast<size_t>(partials.chunks.first_of[static_cast<size_t>(prompt)]);
  const auto end = static_cast<size_t>(partials.chunks.first_of[static_cast<size_t>(prompt + 1)]);
  if (!to || end == begin + 1) return;
  for (int64_t row = 0; row < p.prompts; ++row) {
    for (int64_t d = 0; d < p.dim; d += kWidth) {
      Vec total(0.0f);
      for (size_t c = begin; c < end; ++c) {
        const float* from = partials.of_prompt(memory, partials.chunks.chunks[c].partial, head);
        total = total + Vec::load(from + row * partials.padded + d);
      }
      store_first(total * Vec(scale), to.at(prompt, head, row), to.dtype, d, std::min(kWidth, p.dim - d));
    }
  }
}

// dQ of one key head from its ranges, in their order.
inline void sum_queries(const BackwardPartials& partials, const KeyHead& head, int64_t sample, const Rows& to) {
  const int64_t ranges = ranges_of(head.keys()), padded = partials.padded;
  if (ranges == 1) return;
  float* total = partials.of_queries(sample, head.head, 0);
  for (int64_t r = 1; r < ranges; ++r) {
    const float* from = partials.of_queries(sample, head.head, r);
    for (int64_t i = 0; i < head.lanes() * padded; i += kWidth) {
      (Vec::load(total + i) + Vec::load(from + i)).store(total + i);
    }
  }
  for (int64_t b = 0; b < blocks_of(head.lanes(), kLanes); ++b) {
    const Lanes lanes = lanes_of_block(head.lanes(), b);
    store_lanes(head, lanes, total + lanes.first * padded, padded, head.p.scale, to);
  }
}

// Engine(p, grads, scratch) does one chunk of samples: run(head, range, partial dQ or null) for each, then
// prompt_keys() and prompt_values() are its sums, rows of whole vectors.
template <class Engine, class EngineScratch>
void backward_tasks(const PromptAttention& p, const PromptAttentionGrads& grads, const Threads& threads) {
  const SampleChunks chunks(p);
  const BackwardWants wants(grads);
  const BackwardPartials partials{p, chunks, wants};
  const int64_t all = static_cast<int64_t>(chunks.chunks.size());
  const double work = 10.0 * static_cast<double>(p.samples * p.heads * p.tq * (p.prompts + p.tk) * p.dim);
  for (int64_t begin = 0, end; begin < all; begin = end) {
    // As many chunks as partial dQ has room for.
    const int64_t first = chunks.chunks[static_cast<size_t>(begin)].first;
    int64_t samples = 0;
    for (end = begin; end < all && samples + chunks.chunks[static_cast<size_t>(end)].count <= partials.samples_at_once;
         ++end) {
      samples += chunks.chunks[static_cast<size_t>(end)].count;
    }
    const auto range_of = [&](int64_t task) { return task % partials.ranges; };
    const auto head_of = [&](int64_t task) { return task / partials.ranges % p.heads_kv; };
    const auto chunk_of = [&](int64_t task) -> const SampleChunk& {
      return chunks.chunks[static_cast<size_t>(begin + task / partials.ranges / p.heads_kv)];
    };
    for_each_ahead(threads, (end - begin) * p.heads_kv * partials.ranges, work, [&](int64_t task, int64_t following) {
      const int64_t range = range_of(task), head = head_of(task);
      const SampleChunk& chunk = chunk_of(task);
      Cutter count;
      EngineScratch(p, wants, count);
      Cutter cutter(Scratch::take(count.used()));
      Engine engine(p, grads, EngineScratch(p, wants, cutter));
      for (int64_t i = chunk.first; i < chunk.first + chunk.count; ++i) {
        const KeyHead key_head{p, chunks.order[static_cast<size_t>(i)], head};
        const int64_t ranges = ranges_of(key_head.keys());
        if (range >= ranges) continue;
        const bool same = i + 1 < chunk.first + chunk.count, known = same || following >= 0;
        const int64_t next = same ? i + 1 : known ? chunk_of(following).first : i;
        const KeyHead next_head{p, chunks.order[static_cast<size_t>(next)], same || !known ? head : head_of(following)};
        engine.run(key_head, range, wants.query && ranges > 1 ? partials.of_queries(i - first, head, range) : nullptr,
                   known && partials.ranges == 1 ? &next_head : nullptr);
      }
      if (range == 0) keep_prompt(partials, grads, engine, chunk, head);
    });
    if (!wants.query || partials.ranges == 1) continue;
    for_each(threads, samples * p.heads_kv, work, [&](int64_t task) {
      const int64_t i = task / p.heads_kv;
      sum_queries(partials, {p, chunks.order[static_cast<size_t>(first + i)], task % p.heads_kv}, i, grads.query);
    });
  }
  if (p.prompts == 0 || !(wants.prompt_key || wants.prompt_value)) return;
  for_each(threads, p.bank * p.heads_kv, work, [&](int64_t task) {
    sum_prompt(partials, partials.keys, task / p.heads_kv, task % p.heads_kv, p.scale, grads.prompt_key);
    sum_prompt(partials, partials.values, task / p.heads_kv, task % p.heads_kv, 1.0f, grads.prompt_value);
  });
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
