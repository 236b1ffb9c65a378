// SPDX-License-Identifier: Apache-2.0
// Samples in runs that read the same prompt: a task packs it once, and sums its gradients over the run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "prompt_attention.h"

namespace fastprompt {

struct SampleRun {
  int64_t begin, end;  // in SampleRuns::order
  int64_t prompt;
};

// Decided by the number of samples and prompt_index alone; samples of a prompt keep their order.
struct SampleRuns {
  std::vector<int64_t> order;
  std::vector<SampleRun> runs;  // by prompt, ascending

  // About `wanted` runs, where as many samples share a prompt.
  SampleRuns(const PromptAttention& p, int64_t wanted) : order(static_cast<size_t>(p.samples)) {
    // Without keys of prompts it makes no difference which one a sample reads.
    const auto prompt_of = [&](int64_t s) { return p.prompts ? p.prompt_of(s) : 0; };
    std::vector<int64_t> first(static_cast<size_t>(p.bank) + 2);
    for (int64_t s = 0; s < p.samples; ++s) ++first[static_cast<size_t>(prompt_of(s)) + 2];
    for (size_t g = 2; g < first.size(); ++g) first[g] += first[g - 1];
    for (int64_t s = 0; s < p.samples; ++s) {
      order[static_cast<size_t>(first[static_cast<size_t>(prompt_of(s)) + 1]++)] = s;
    }
    const int64_t length = std::max<int64_t>((p.samples + wanted - 1) / wanted, 1);
    for (int64_t g = 0; g < p.bank; ++g) {
      const int64_t end = first[static_cast<size_t>(g) + 1];
      for (int64_t i = first[static_cast<size_t>(g)]; i < end; i += length) {
        runs.push_back({i, std::min(i + length, end), g});
      }
    }
  }
};

}  // namespace fastprompt
