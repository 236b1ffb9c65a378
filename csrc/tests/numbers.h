// SPDX-License-Identifier: Apache-2.0
// Random tensors of the core's unit tests.
#pragma once

#include <cstring>

#include "check.h"
#include "types.h"

namespace fastprompt::tests {

// Rows of one element type in memory that is exactly as large.
struct Numbers {
  std::vector<uint16_t> halves;
  std::vector<float> floats;
  DType dtype;
  int64_t heads, length, dim;

  Numbers(DType type, int64_t samples, int64_t h, int64_t t, int64_t d, unsigned seed)
      : floats(normal(samples * h * t * d, seed)), dtype(type), heads(h), length(t), dim(d) {
    if (dtype == DType::float32) return;
    // bfloat16 by truncation.
    for (const float x : floats) {
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      halves.push_back(static_cast<uint16_t>(bits >> 16));
    }
  }
  Rows rows() {
    void* data = dtype == DType::float32 ? static_cast<void*>(floats.data()) : halves.data();
    return {data, dtype, heads * length * dim, length * dim, dim};
  }
  // `head`: of all samples, one after the other.
  double at(int64_t head, int64_t row, int64_t d) const {
    const auto i = static_cast<size_t>((head * length + row) * dim + d);
    if (dtype == DType::float32) return floats[i];
    const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
};

}  // namespace fastprompt::tests
