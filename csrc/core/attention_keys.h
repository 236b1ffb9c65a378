// SPDX-License-Identifier: Apache-2.0
// Keys and values of a key head as rows of floats: read where they lie if that is as good, else copied once a head.
#pragma once

#include "attention_blocks.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

// Rows of floats, zeros from the head size up to whole vectors.
struct FloatRows {
  const float* at;
  int64_t row;

  const float* operator[](int64_t r) const { return at + r * row; }
};

// Whether products may read rows in place: floats in whole vectors. Rows far apart share few sets of the cache, so they
// are copied: that costs 1 % of the products.
inline bool in_place(const Rows& rows, int64_t dim) {
  return rows.dtype == DType::float32 && dim % kWidth == 0 && rows.row >= 0 && rows.row <= 2 * dim;
}

// Keys or values of one key head, prompts and instance keys.
class KeyRows {
 public:
  // `copies` has the room that `room` says.
  KeyRows(const PromptAttention& p, const Rows& prompt, const Rows& instance, float* copies)
      : p_(p), prompt_(prompt), instance_(instance), copies_(copies), padded_(to_vectors(p.dim)) {}

  // Floats of copies, for at most `prompts` and `keys` (without prompts) rows at once.
  static int64_t room(const PromptAttention& p, const Rows& prompt, const Rows& instance, int64_t prompts,
                      int64_t keys) {
    const int64_t apart = (reads_prompts(p, prompt) ? 0 : prompts) + (in_place(instance, p.dim) ? 0 : keys);
    return std::max(apart, std::min(prompts + keys, kKeys)) * to_vectors(p.dim);
  }

  // Makes keys [begin, end) of the head ready, prompts counted first.
  void load(const KeyHead& head, int64_t begin, int64_t end) {
    joined_ = head.keys() <= kKeys;
    first_ = begin;
    if (begin == end) return;
    const bool copies_prompts = joined_ || !reads_prompts(p_, prompt_);
    const int64_t prompts = std::clamp<int64_t>(p_.prompts - begin, 0, end - begin);
    if (prompts > 0) load_prompts(head, begin, prompts, copies_prompts);
    prompts_ = prompts;
    if (prompts == end - begin) return;
    float* to = copies_ + (copies_prompts ? prompts * padded_ : 0);
    const int64_t first = begin + prompts - p_.prompts, count = end - begin - prompts;
    const char* from = instance_.at(head.sample, head.head, head.row + first);
    if (!joined_ && in_place(instance_, p_.dim)) {
      keys_rows_ = {reinterpret_cast<const float*>(from), instance_.row};
    } else {
      copy_rows(from, instance_.dtype, instance_.row, count, p_.dim, instance_.dtype, to, padded_);
      keys_rows_ = {to, padded_};
    }
  }

  // The rows of a block that is loaded.
  FloatRows operator[](const KeyBlock& block) const {
    const int64_t r = block.first - first_;
    const FloatRows& rows = r < prompts_ ? prompt_rows_ : keys_rows_;
    return {rows[r < prompts_ ? r : r - prompts_], rows.row};
  }

 private:
  static bool reads_prompts(const PromptAttention& p, const Rows& prompt) {
    return p.query.dtype == DType::float32 && in_place(prompt, p.dim);
  }

  // Samples that follow each other often read one prompt: its copy is kept.
  void load_prompts(const KeyHead& head, int64_t begin, int64_t prompts, bool copies) {
    const char* from = prompt_.at(p_.prompt_of(head.sample), head.head, begin);
    if (!copies) {
      prompt_rows_ = {reinterpret_cast<const float*>(from), prompt_.row};
      copied_ = nullptr;
      return;
    }
    if (from == copied_ && prompts == prompts_) return;
    copy_rows(from, prompt_.dtype, prompt_.row, prompts, p_.dim, p_.query.dtype, copies_, padded_);
    copied_ = from;
    prompt_rows_ = {copies_, padded_};
  }

  const PromptAttention& p_;
  const Rows &prompt_, &instance_;
  float* copies_;
  int64_t padded_, first_ = 0, prompts_ = 0;
  bool joined_ = false;
  const char* copied_ = nullptr;
  FloatRows prompt_rows_{}, keys_rows_{};
};

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
