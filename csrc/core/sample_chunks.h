// SPDX-License-Identifier: Apache-2.0
// Which samples one task takes: they read one prompt. In a backward, gradients of a prompt are summed over its samples
// in a fixed order.
//
// A task adds up the samples of its chunk one after the other; sums of chunks are added in order. Shapes and
// prompt_index alone decide the chunks. The functions are out of line: none of the library's templates that they need
// may be compiled for one level.
#pragma once

#include <cstdint>
#include <vector>

#include "prompt_attention.h"

namespace fastprompt {

// Samples order[first .. first + count) read one prompt. `partial`: where their sum is kept; -1: it is the only one.
struct SampleChunk {
  int64_t prompt, first, count, partial;
};

struct SampleChunks {
  std::vector<int64_t> order;       // samples, by prompt
  std::vector<SampleChunk> chunks;  // by prompt
  std::vector<int64_t> first_of;    // [bank + 1]: the first chunk of a prompt
  int64_t partials = 0;

  // Of about equal work: some hundreds of tasks at most, none of them too small.
  explicit SampleChunks(const PromptAttention& p);
  // Of at most `most` samples.
  SampleChunks(const PromptAttention& p, int64_t most);
  ~SampleChunks();
  SampleChunks(const SampleChunks&) = delete;
  SampleChunks& operator=(const SampleChunks&) = delete;

  int64_t size() const { return static_cast<int64_t>(chunks.size()); }
};

}  // namespace fastprompt
