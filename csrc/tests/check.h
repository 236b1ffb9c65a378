// SPDX-License-Identifier: Apache-2.0
// Checks of the core's unit tests, and the inputs they share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace fastprompt::tests {

inline int failures = 0;

// Counts a failed check and says where.
#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);       \
      ++fastprompt::tests::failures;                                            \
    }                                                                           \
  } while (false)

// |got - want| <= allowed, NaN nowhere.
inline bool close(double got, double want, double allowed) { return std::abs(got - want) <= allowed; }

// The levels that this processor has.
inline std::vector<Isa> levels() {
  std::vector<Isa> found;
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) found.push_back(static_cast<Isa>(i));
  return found;
}

// `count` threads of the standard library.
inline Threads threads(int count) {
  return {count, [](int used, void (*body)(void*), void* context) {
            std::vector<std::thread> others;
            for (int i = 1; i < used; ++i) others.emplace_back(body, context);
            body(context);
            for (auto& t : others) t.join();
          }};
}

// Standard normal numbers from a seed. The memory is exactly as large as they are, so that tools see what is outside.
inline std::vector<float> normal(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> draw;
  std::vector<float> x(static_cast<size_t>(count));
  for (auto& value : x) value = draw(generator);
  return x;
}

}  // namespace fastprompt::tests
