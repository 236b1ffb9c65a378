// SPDX-License-Identifier: Apache-2.0
#include "sample_chunks.h"

#include <algorithm>

namespace fastprompt {
namespace {

int64_t of_equal_work(const PromptAttention& p) {
  constexpr double tasks = 256, worth = 2e6;
  const double work = 10.0 * static_cast<double>(p.groups() * p.tq * (p.prompts + p.tk) * p.dim) + 1e4;
  const double most = std::max(static_cast<double>(p.samples * p.heads_kv) / tasks, worth / work);
  return std::clamp<int64_t>(static_cast<int64_t>(most), 1, std::max<int64_t>(p.samples, 1));
}

}  // namespace

SampleChunks::SampleChunks(const PromptAttention& p) : SampleChunks(p, of_equal_work(p)) {}

SampleChunks::SampleChunks(const PromptAttention& p, int64_t most) : order(static_cast<size_t>(p.samples)) {
  // Without keys of prompts it makes no difference which one a sample reads.
  const auto prompt_of = [&](int64_t s) { return static_cast<size_t>(p.prompts ? p.prompt_of(s) : 0); };
  const size_t bank = static_cast<size_t>(std::max<int64_t>(p.bank, 1));
  std::vector<int64_t> start(bank + 1);
  for (int64_t s = 0; s < p.samples; ++s) ++start[prompt_of(s) + 1];
  for (size_t g = 1; g < start.size(); ++g) start[g] += start[g - 1];
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t s = 0; s < p.samples; ++s) order[static_cast<size_t>(next[prompt_of(s)]++)] = s;
  for (size_t g = 0; g < bank; ++g) {
    first_of.push_back(size());
    const int64_t begin = start[g], count = start[g + 1] - begin, cuts = (count + most - 1) / most;
    for (int64_t c = 0; c < cuts; ++c) {
      const int64_t first = c * count / cuts, length = (c + 1) * count / cuts - first;
      chunks.push_back({static_cast<int64_t>(g), begin + first, length, cuts > 1 ? partials++ : -1});
    }
  }
  first_of.push_back(size());
}

SampleChunks::~SampleChunks() = default;

}  // namespace fastprompt
