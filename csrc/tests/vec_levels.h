// SPDX-License-Identifier: Apache-2.0
// Tests of `Vec`, compiled once a level: include level.h first, as kernels do.
#pragma once

#include "check.h"
#include "vec.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

inline void test_exp2() {
  double worst = 0;
  for (float x = -160; x < 127.9f; x += 0.0371f) {
    float found[kWidth];
    exp2(Vec(x)).store(found);
    const double want = std::exp2(static_cast<double>(x)), ulp = std::max(want * 0x1p-23, 0x1p-149);
    worst = std::max(worst, std::abs(found[kWidth - 1] - want) / ulp);
  }
  CHECK(worst < 1.5);
  const float inf = std::numeric_limits<float>::infinity();
  const float given[] = {-inf, -1e30f, -200.0f, 0.0f, 128.0f}, want[] = {0, 0, 0, 1, inf};
  for (int i = 0; i < 5; ++i) CHECK(sum(exp2(Vec(given[i]))) == want[i] * static_cast<float>(kWidth));
  CHECK(std::isnan(sum(exp2(Vec(std::nanf(""))))));
}

inline void test_transpose() {
  Vec rows[kWidth];
  float row[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < kWidth; ++j) row[j] = static_cast<float>(100 * i + j);
    rows[i] = Vec::load(row);
  }
  transpose(rows);
  for (int i = 0; i < kWidth; ++i) {
    rows[i].store(row);
    for (int j = 0; j < kWidth; ++j) CHECK(row[j] == static_cast<float>(100 * j + i));
  }
}

// Every bit pattern of 16 bits survives a load and a store, but for signalling NaNs, which become quiet.
template <class T>
void test_halves(DType dtype, unsigned infinity) {
  int wrong = 0;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const T given{static_cast<uint16_t>(bits)};
    T found{};
    store_first(load_first(&given, dtype, 0, 1), &found, dtype, 0, 1);
    const bool nan = (bits & 0x7fff) > infinity;
    wrong += nan ? (found.bits & 0x7fff) <= infinity : found.bits != bits;
  }
  CHECK(wrong == 0);
}

// Ties go to the even neighbour, and what is too large to infinity.
inline void test_rounding() {
  const auto rounded = [](float x, DType dtype) {
    uint16_t bits;
    store_first(Vec(x), &bits, dtype, 0, 1);
    return bits;
  };
  CHECK(rounded(1.00390625f, DType::bfloat16) == 0x3f80);  // halfway between 1 and 1.0078125
  CHECK(rounded(1.01171875f, DType::bfloat16) == 0x3f82);
  CHECK(rounded(3.4e38f, DType::bfloat16) == 0x7f80);
  CHECK(rounded(1.00048828125f, DType::float16) == 0x3c00);
  CHECK(rounded(1.00146484375f, DType::float16) == 0x3c02);
  CHECK(rounded(65519.0f, DType::float16) == 0x7bff && rounded(65520.0f, DType::float16) == 0x7c00);
  CHECK(rounded(0x1p-25f, DType::float16) == 0 && rounded(0x1.8p-24f, DType::float16) == 2);
}

// A first part of n elements: the rest are zeros, memory after it is neither read nor written.
inline void test_first() {
  for (int64_t n = 0; n <= kWidth; ++n) {
    std::vector<float> x(static_cast<size_t>(n), 1.0f);
    CHECK(sum(load_first(x.data(), DType::float32, 0, n)) == static_cast<float>(n));
    std::vector<BFloat16> y(static_cast<size_t>(n));
    store_first(Vec(2.0f), y.data(), DType::bfloat16, 0, n);
    CHECK(sum(load_first(y.data(), DType::bfloat16, 0, n)) == 2 * static_cast<float>(n));
  }
}

inline void test_vec() {
  test_exp2();
  test_transpose();
  test_halves<BFloat16>(DType::bfloat16, 0x7f80);
  test_halves<Float16>(DType::float16, 0x7c00);
  test_rounding();
  test_first();
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
