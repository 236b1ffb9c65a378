// SPDX-License-Identifier: Apache-2.0
#include "scratch.h"

#include <cstdlib>
#include <new>

namespace fastprompt {
namespace {

std::byte* allocate(int64_t bytes) {
  void* found = std::aligned_alloc(kAlignment, static_cast<size_t>(round_up(bytes, kAlignment)));
  if (!found) throw std::bad_alloc();
  return static_cast<std::byte*>(found);
}

}  // namespace

std::byte* Scratch::take(int64_t bytes) {
  static thread_local Scratch mine;
  if (bytes > mine.size_) {
    std::free(mine.data_);
    mine.data_ = nullptr, mine.size_ = 0;
    const int64_t size = round_up(bytes, 4096);
    mine.data_ = allocate(size);
    mine.size_ = size;
  }
  return mine.data_;
}

Scratch::~Scratch() { std::free(data_); }

CallMemory::CallMemory(int64_t bytes) : data_(bytes > 0 ? allocate(bytes) : nullptr) {}

CallMemory::~CallMemory() { std::free(data_); }

}  // namespace fastprompt
