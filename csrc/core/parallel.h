// SPDX-License-Identifier: Apache-2.0
// Threads come from the caller; tasks are handed out one by one, so that an uneven one does not hold up the rest.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fastprompt {

// Runs body(context) `threads` times at once, and returns when all have returned.
struct Threads {
  int count = 1;
  void (*run)(int threads, void (*body)(void* context), void* context) = nullptr;
};

// task(i) for every i in [0, count), on as many threads as `work` operations are worth. Which thread runs a task, and
// how many there are, must not change what it writes.
template <class Task>
void for_each(const Threads& threads, int64_t count, double work, const Task& task) {
  constexpr double least = 1e5;  // operations that pay for waking a thread
  const auto wanted = static_cast<int64_t>(std::min(work / least + 1, 1e6));
  const auto used = static_cast<int>(std::min<int64_t>({threads.count, count, wanted}));
  if (used <= 1 || !threads.run) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct Context {
    const Task& task;
    int64_t count;
    std::atomic<int64_t> next{0};
  } context{task, count};
  threads.run(
      used,
      [](void* pointer) {
        auto& shared = *static_cast<Context*>(pointer);
        for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) shared.task(i);
      },
      &context);
}

// The same for tasks that want to know what their thread does next: task(i, following), -1 where that is open. A thread
// claims its next task as it starts one, but for the last ones.
template <class Task>
void for_each_ahead(const Threads& threads, int64_t count, double work, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t slots = std::min<int64_t>(threads.count, count);
  for_each(threads, slots, work, [&](int64_t) {
    for (int64_t i = next.fetch_add(1), following; i < count; i = following) {
      following = i + 2 * slots < count ? next.fetch_add(1) : -1;
      task(i, following < count ? following : -1);
      if (following < 0) following = next.fetch_add(1);
    }
  });
}

}  // namespace fastprompt
