// SPDX-License-Identifier: Apache-2.0
// What a backward of attention has to visit: by the gradients that are wanted and the shape of one sample.
#pragma once

#include "attention_blocks.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

struct BackwardWants {
  bool query, key, value, prompt_key, prompt_value;

  explicit BackwardWants(const PromptAttentionGrads& g)
      : query(g.query), key(g.key), value(g.value), prompt_key(g.prompt_key), prompt_value(g.prompt_value) {}

  bool any_key() const { return key || prompt_key; }
  bool any_value() const { return value || prompt_value; }
  bool scores() const { return query || any_key(); }  // dS
  bool prompts() const { return query || prompt_key || prompt_value; }
  bool instance() const { return query || key || value; }

  // The part of a block that has to be visited.
  KeyBlock clip(KeyBlock block) const {
    if (!instance()) block.count = block.prompts;
    if (!prompts()) block = {block.first + block.prompts, block.count - block.prompts, 0};
    return block;
  }
};

// Ranges of keys of one head are tasks of their own where keys are many: their number depends on one sample alone.
constexpr int64_t kRangeKeys = 1024, kMostRanges = 4;
inline int64_t ranges_of(int64_t keys) { return std::clamp<int64_t>(blocks_of(keys, kRangeKeys), 1, kMostRanges); }

// Blocks [begin, end), keys [first_key, end_key).
struct KeyRange {
  int64_t begin, end, first_key, end_key;

  int64_t keys() const { return end_key - first_key; }
};

// Range `r` of the blocks to visit. All prompts are in the first, where they are summed over samples.
inline KeyRange key_range(const KeyBlocks& blocks, const BackwardWants& wants, int64_t r) {
  const int64_t first = wants.prompts() || blocks.joined ? 0 : blocks.of_prompts;
  const int64_t last = wants.instance() || blocks.joined ? blocks.count : blocks.of_prompts;
  const int64_t ranges = ranges_of(blocks.keys);
  const auto cut = [&](int64_t i) {
    return i == 0 ? first : i == ranges ? last : std::min(std::max(i * last / ranges, blocks.of_prompts), last);
  };
  const int64_t begin = cut(r), end = cut(r + 1);
  if (begin >= end) return {begin, begin, 0, 0};
  return {begin, end, blocks[begin].first, blocks[end - 1].first + blocks[end - 1].count};
}

// Most keys of a range, whatever the length of a packed sequence.
inline int64_t most_keys_of_range(const PromptAttention& p) {
  const int64_t keys = p.prompts + p.tk, even = std::max(kRangeKeys, blocks_of(keys, kMostRanges));
  return std::min(keys, p.prompts + even + 2 * kKeys);
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
