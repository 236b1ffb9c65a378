// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <cstring>

#include "check.h"
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
  scratch_is_a_threads_own();
  cuts_are_aligned();
}

}  // namespace fastprompt::tests
