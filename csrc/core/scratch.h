// SPDX-License-Identifier: Apache-2.0
// Memory that a task needs while it runs; kept by its thread, because fresh pages cost more than small kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastprompt {

constexpr int64_t kAlignment = 64;  // bytes: a cache line, an AVX-512 register, a row of an AMX tile

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// One thread's buffer, grown to the largest use so far. One user at a time: a task takes all it needs at its start.
class Scratch {
 public:
  // At least `bytes` aligned bytes, uninitialised, until the next call in this thread.
  static std::byte* take(int64_t bytes);

 private:
  Scratch() = default;
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::byte* data_ = nullptr;
  int64_t size_ = 0;
};

// Memory of one call, shared by its tasks; uninitialised.
class CallMemory {
 public:
  explicit CallMemory(int64_t bytes);
  ~CallMemory();
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;

  std::byte* data() const { return data_; }

 private:
  std::byte* data_ = nullptr;
};

// Cuts a buffer into aligned arrays. Without a buffer it only counts: run the same cuts once to learn the size.
class Cutter {
 public:
  explicit Cutter(std::byte* data = nullptr) : data_(data) {}

  template <class T>
  T* cut(int64_t count) {
    T* found = data_ ? reinterpret_cast<T*>(data_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return found;
  }

  int64_t used() const { return used_; }

 private:
  std::byte* data_;
  int64_t used_ = 0;
};

}  // namespace fastprompt
