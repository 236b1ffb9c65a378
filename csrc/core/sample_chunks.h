// SPDX-License-Identifier: Apache-2.0
// Which samples one task of a backward takes: gradients of a prompt are summed over its samples in a fixed order.
//
// A task adds up the samples of its chunk one after the other; sums of chunks are added in order. Shapes and
// prompt_index alone decide the chunks.
#pragma once

#include <algorithm>
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

  explicit SampleChunks(const PromptAttention& p) : order(static_cast<size_t>(p.samples)) {
    const int64_t most = most_samples(p), bank = std::max<int64_t>(p.bank, 1);
    std::vector<int64_t> start(static_cast<size_t>(bank + 1));
    for (int64_t s = 0; s < p.samples; ++s) ++start[static_cast<size_t>(p.prompt_of(s) + 1)];
    for (size_t g = 1; g < start.size(); ++g) start[g] += start[g - 1];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t s = 0; s < p.samples; ++s) order[static_cast<size_t>(next[static_cast<size_t>(p.prompt_of(s))]++)] = s;
    for (int64_t g = 0; g < bank; ++g) {
      first_of.push_back(static_cast<int64_t>(chunks.size()));
      const int64_t begin = start[static_cast<size_t>(g)], count = start[static_cast<size_t>(g + 1)] - begin;
      const int64_t cuts = (count + most - 1) / most;
      for (int64_t c = 0; c < cuts; ++c) {
        const int64_t first = c * count / cuts;
        chunks.push_back({g, begin + first, (c + 1) * count / cuts - first, cuts > 1 ? partials++ : -1});
      }
    }
    first_of.push_back(static_cast<int64_t>(chunks.size()));
  }

 private:
  // Some hundreds of tasks at most, none of them too small.
  static int64_t most_samples(const PromptAttention& p) {
    constexpr double tasks = 256, worth = 2e6;
    const double work = 10.0 * static_cast<double>(p.groups() * p.tq * (p.prompts + p.tk) * p.dim) + 1e4;
    const double most = std::max(static_cast<double>(p.samples * p.heads_kv) / tasks, worth / work);
    return std::clamp<int64_t>(static_cast<int64_t>(most), 1, std::max<int64_t>(p.samples, 1));
  }
};

}  // namespace fastprompt
