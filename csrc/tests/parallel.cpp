// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <cstring>

#include "check.h"
#include "sample_chunks.h"
#include "scratch.h"
#include "tests.h"

namespace fastprompt::tests {
namespace {

void every_task_runs_once() {
  for (const int count : {1, 2, 7, 64}) {
    std::vector<int> seen(1000);
    for_each(threads(count), 1000, 1e9, [&](int64_t i) { ++seen[static_cast<size_t>(i)]; });
    for (const int n : seen) CHECK(n == 1);
  }
  for_each(threads(4), 0, 1e9, [](int64_t) { CHECK(false); });
}

// Also where threads claim tasks ahead; a task that is foretold comes next.
void tasks_ahead_run_once() {
  for (const int count : {1, 2, 7}) {
    std::vector<int> seen(1000);
    for_each_ahead(threads(count), 1000, 1e9, [&](int64_t i, int64_t following) {
      static thread_local int64_t foretold = -1;
      CHECK(foretold < 0 || foretold == i);
      foretold = following;
      ++seen[static_cast<size_t>(i)];
    });
    for (const int n : seen) CHECK(n == 1);
  }
}

// Chunks hold every sample once, in order, with its own prompt.
void chunks_hold_every_sample() {
  const std::vector<int64_t> index{2, 0, 2, 2, 0, 2};
  PromptAttention p;
  p.samples = 6, p.heads = p.heads_kv = 300, p.tq = p.tk = 100, p.dim = 64, p.prompts = 1, p.bank = 4;
  p.prompt_index = index.data();
  const SampleChunks found(p);
  CHECK((found.order == std::vector<int64_t>{1, 4, 0, 2, 3, 5}));
  CHECK((found.first_of.size() == 5 && found.first_of[4] == static_cast<int64_t>(found.chunks.size())));
  int64_t next = 0;
  for (const SampleChunk& chunk : found.chunks) {
    CHECK(chunk.first == next);
    for (next = chunk.first; next < chunk.first + chunk.count; ++next) {
      CHECK(index[static_cast<size_t>(found.order[static_cast<size_t>(next)])] == chunk.prompt);
    }
  }
  CHECK(next == p.samples);
}

// Every thread has its own memory, aligned, that grows and keeps nothing beyond a task.
void scratch_is_a_threads_own() {
  for_each(threads(8), 64, 1e9, [](int64_t i) {
    const int64_t bytes = 1000 * (i % 7 + 1);
    std::byte* mine = Scratch::take(bytes);
    CHECK(reinterpret_cast<uintptr_t>(mine) % kAlignment == 0);
    std::memset(mine, static_cast<int>(i), static_cast<size_t>(bytes));
    for (int64_t j = 0; j < bytes; ++j) CHECK(mine[j] == static_cast<std::byte>(i));
  });
}

void cuts_are_aligned() {
  Cutter size;
  size.cut<float>(3), size.cut<double>(0), size.cut<char>(65);
  CHECK(size.used() == 64 + 128);
  Cutter cutter(Scratch::take(size.used()));
  CHECK(reinterpret_cast<char*>(cutter.cut<float>(3)) + 64 == cutter.cut<char>(65));
}

}  // namespace

void parallel() {
  every_task_runs_once();
  tasks_ahead_run_once();
  chunks_hold_every_sample();
  scratch_is_a_threads_own();
  cuts_are_aligned();
}

}  // namespace fastprompt::tests
