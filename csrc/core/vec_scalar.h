// SPDX-License-Identifier: Apache-2.0
// Four floats in plain C++: what runs on every processor, and what the other levels are compared with.
#pragma once

#include "types.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

constexpr int64_t kWidth = 4;

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity and NaN
  // As a float its exponent is 112 too small; the product is exact, for denormals too.
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}

// To nearest even; NaN becomes a quiet NaN.
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {
  const uint32_t bits = to_bits(x);
  to->bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, Float16* to) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65,520 and more round to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // denormal: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

struct Vec {
  float v[4];

  Vec() = default;
  explicit Vec(float x) : v{x, x, x, x} {}

  template <class T>
  static Vec load(const T* p) {
    return load_first(p, kWidth);
  }
  template <class T>
  static Vec load_first(const T* p, int64_t n) {
    Vec x(0.0f);
    for (int64_t i = 0; i < n && i < kWidth; ++i) x.v[i] = widen(p[i]);
    return x;
  }
  void store(float* p) const { store_first(p, kWidth); }
  template <class T>
  void store_first(T* p, int64_t n) const {
    for (int64_t i = 0; i < n && i < kWidth; ++i) narrow(v[i], p + i);
  }
};

template <class Function>
inline Vec lanes(Function f) {
  Vec x;
  for (int i = 0; i < kWidth; ++i) x.v[i] = f(i);
  return x;
}

inline Vec operator+(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] + b.v[i]; }); }
inline Vec operator-(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] - b.v[i]; }); }
inline Vec operator*(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] * b.v[i]; }); }
inline Vec operator/(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] / b.v[i]; }); }

// a * b + c, rounded twice here.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// The larger of x and bound; x where x is NaN.
inline Vec max(Vec x, Vec bound) { return lanes([&](int i) { return bound.v[i] > x.v[i] ? bound.v[i] : x.v[i]; }); }

// To the nearest whole number: beyond 2^23 floats are whole.
inline Vec round(Vec x) {
  return lanes([&](int i) {
    const float magic = x.v[i] < 0 ? -0x1p23f : 0x1p23f;
    return x.v[i] > -0x1p23f && x.v[i] < 0x1p23f ? (x.v[i] + magic) - magic : x.v[i];
  });
}

// x * 2^n for whole n in [-252, 254], denormal results included: in two steps, each a normal power.
inline Vec scale_by_power(Vec x, Vec n) {
  return lanes([&](int i) {
    if (n.v[i] != n.v[i]) return n.v[i];
    const int whole = n.v[i] > 254 ? 254 : static_cast<int>(n.v[i]), half = whole >> 1;
    const auto power = [](int e) { return from_bits(static_cast<uint32_t>(e + 127) << 23); };
    return x.v[i] * power(half) * power(whole - half);
  });
}

// a where condition < bound, else b.
inline Vec select_less(Vec condition, Vec bound, Vec a, Vec b) {
  return lanes([&](int i) { return condition.v[i] < bound.v[i] ? a.v[i] : b.v[i]; });
}

// Lanes in a fixed order of pairs.
inline float sum(Vec x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); }

// Lane i of the result is the sum of the lanes of the i-th of 4 vectors; other levels have more than one four.
inline Vec sums_of_four(Vec a, Vec b, Vec c, Vec d) {
  Vec x;
  x.v[0] = sum(a), x.v[1] = sum(b), x.v[2] = sum(c), x.v[3] = sum(d);
  return x;
}
inline Vec sums(const Vec (&x)[1]) { return x[0]; }

// Square of kWidth x kWidth floats, in place: row i becomes column i.
inline void transpose(Vec (&x)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) std::swap(x[i].v[j], x[j].v[i]);
  }
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
