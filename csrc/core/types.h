// SPDX-License-Identifier: Apache-2.0
// Tensors as kernels see them: a pointer, an element type, strides in elements.
#pragma once

#include <cstdint>

namespace fastprompt {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, boolean = 3 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : dtype == DType::boolean ? 1 : 2; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Rows of `dim` neighbouring elements: element d of row r of head h of sample s is at s*sample + h*head + r*row + d.
// A stride may be 0 (shared by samples, say). Packed sequences have sample = 0 and count rows from the first sequence.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t sample = 0, head = 0, row = 0;

  explicit operator bool() const { return data != nullptr; }
  char* at(int64_t s, int64_t h, int64_t r) const {
    return static_cast<char*>(data) + (s * sample + h * head + r * row) * size_of(dtype);
  }
};

}  // namespace fastprompt
