// SPDX-License-Identifier: Apache-2.0
// The common part of key_scores.h for all engines: which rows count, what becomes of the sums of the heads of a group.
//
// A task is a block of keys of one key head. Its engine packs the keys once and sums over the rows of a head at a time.
#pragma once

#include "key_scores.h"
#include "vec.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

// Rows of one query head that give something, ascending.
struct ScoredRows {
  const KeyScores& p;
  int64_t sample, head, count;
  const int32_t* rows;
  const float* levels;  // -lse, in units of log2

  const char* at(int64_t i) const { return p.query.at(sample, head, rows[i]); }
  // How many come before the first that sees `key`.
  int64_t before(int64_t key) const {
    if (!p.causal) return 0;
    return std::lower_bound(rows, rows + count, key - (p.tk - p.tq)) - rows;
  }
  ScoredRows from(int64_t i) const { return {p, sample, head, count - i, rows + i, levels + i}; }
  ScoredRows first(int64_t n) const { return {p, sample, head, std::min(n, count), rows, levels}; }
};

struct ScoredKeys {
  int64_t sample, head, first, count;
};

// An engine has a number of keys kKeys, cut(p, Cutter&) for its room, pack(p, keys), and add(rows, keys, sums), which
// writes a sum for every key.
template <class Engine>
inline void score_block(const KeyScores& p, const ScoredKeys& keys, const Rows& scores) {
  constexpr float log2e = 1.44269504088896340736f;
  int32_t *counted, *live;
  float *levels, *sums, *found;
  Engine engine;
  const auto cut = [&](Cutter cutter) {
    counted = cutter.cut<int32_t>(p.tq), live = cutter.cut<int32_t>(p.tq), levels = cutter.cut<float>(p.tq);
    sums = cutter.cut<float>(Engine::kKeys), found = cutter.cut<float>(Engine::kKeys);
    engine.cut(p, cutter);
    return cutter.used();
  };
  cut(Cutter(Scratch::take(cut(Cutter()))));

  int64_t all = 0;
  const auto* mask = reinterpret_cast<const char*>(p.query_mask.at(keys.sample, 0, 0));
  for (int64_t i = p.query_start; i < p.tq; ++i) {
    if (!p.query_mask || mask[i * p.query_mask.row]) counted[all++] = static_cast<int32_t>(i);
  }
  std::fill_n(found, keys.count, 0.0f);
  if (all) engine.pack(p, keys);
  for (int64_t g = 0; all && g < p.groups(); ++g) {
    const int64_t head = keys.head * p.groups() + g;
    int64_t n = 0;
    for (int64_t i = 0; i < all; ++i) {
      const float lse = *reinterpret_cast<const float*>(p.lse.at(keys.sample, head, counted[i]));
      if (lse == -std::numeric_limits<float>::infinity()) continue;
      live[n] = counted[i], levels[n++] = -lse * log2e;
    }
    const ScoredRows rows{p, keys.sample, head, n, live, levels};
    engine.add(rows.from(rows.before(keys.first)), keys, sums);
    const bool highest = p.reduce == GroupReduce::max && g > 0;
    for (int64_t j = 0; j < keys.count; ++j) {
      const bool keep = highest && !(sums[j] > found[j] || sums[j] != sums[j]);
      found[j] = p.reduce != GroupReduce::max ? found[j] + sums[j] : keep ? found[j] : sums[j];
    }
  }
  const ScoredRows rows{p, keys.sample, 0, all, counted, nullptr};
  for (int64_t j = 0; j < keys.count; ++j) {
    const int64_t key = keys.first + j, seen = p.visible ? std::max<int64_t>(all - rows.before(key), 1) : 1;
    const float parts = p.reduce == GroupReduce::mean ? static_cast<float>(p.groups()) : 1.0f;
    const bool kept = !p.key_mask || *p.key_mask.at(keys.sample, 0, key);
    const float score = kept ? found[j] / static_cast<float>(seen) / parts : 0.0f;
    std::memcpy(scores.at(keys.sample, keys.head, key), &score, sizeof score);
  }
}

template <class Engine>
inline void score_all(const KeyScores& p, const Rows& scores, const Threads& threads) {
  const int64_t heads = p.samples * p.heads_kv, blocks = (p.tk + Engine::kKeys - 1) / Engine::kKeys;
  const double pairs = static_cast<double>(p.tq - p.query_start) * static_cast<double>(p.tk);
  const double work = pairs * static_cast<double>(p.samples * p.heads * (2 * p.dim + 16));
  // The first keys are seen by most rows: the longest tasks first.
  for_each(threads, heads * blocks, work, [&](int64_t task) {
    const int64_t first = task / heads * Engine::kKeys, i = task % heads;
    score_block<Engine>(p, {i / p.heads_kv, i % p.heads_kv, first, std::min(Engine::kKeys, p.tk - first)}, scores);
  });
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
