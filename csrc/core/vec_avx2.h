// SPDX-License-Identifier: Apache-2.0
// Eight floats in an AVX register.
#pragma once

#include "types.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

constexpr int64_t kWidth = 8;

struct Vec {
  __m256 v;

  Vec() = default;
  explicit Vec(__m256 x) : v(x) {}
  explicit Vec(float x) : v(_mm256_set1_ps(x)) {}

  static __m256i first(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n > 8 ? 8 : n)), lane);
  }
  static __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }

  // AVX2 has no masked access to 16-bit elements: the first n go through a small array.
  template <class T>
  static __m128i first_halves(const T* p, int64_t n) {
    alignas(16) uint16_t kept[8] = {};
    for (int64_t i = 0; i < n && i < 8; ++i) kept[i] = p[i].bits;
    return _mm_load_si128(reinterpret_cast<const __m128i*>(kept));
  }
  template <class T>
  static void store_halves(__m128i x, T* p, int64_t n) {
    alignas(16) uint16_t kept[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(kept), x);
    for (int64_t i = 0; i < n && i < 8; ++i) p[i].bits = kept[i];
  }

  static Vec load(const float* p) { return Vec(_mm256_loadu_ps(p)); }
  static Vec load(const BFloat16* p) { return Vec(widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
  static Vec load(const Float16* p) {
    return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Vec load_first(const float* p, int64_t n) { return Vec(_mm256_maskload_ps(p, first(n))); }
  static Vec load_first(const BFloat16* p, int64_t n) { return n >= 8 ? load(p) : Vec(widen(first_halves(p, n))); }
  static Vec load_first(const Float16* p, int64_t n) {
    return n >= 8 ? load(p) : Vec(_mm256_cvtph_ps(first_halves(p, n)));
  }

  // To nearest even; NaN becomes a quiet NaN.
  __m128i to_bfloat16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
  }
  __m128i to_float16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_first(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  void store_first(BFloat16* p, int64_t n) const { store_halves(to_bfloat16(), p, n); }
  void store_first(Float16* p, int64_t n) const { store_halves(to_float16(), p, n); }
};

inline Vec operator+(Vec a, Vec b) { return Vec(_mm256_add_ps(a.v, b.v)); }
inline Vec operator-(Vec a, Vec b) { return Vec(_mm256_sub_ps(a.v, b.v)); }
inline Vec operator*(Vec a, Vec b) { return Vec(_mm256_mul_ps(a.v, b.v)); }
inline Vec operator/(Vec a, Vec b) { return Vec(_mm256_div_ps(a.v, b.v)); }

// a * b + c, rounded once.
inline Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(a.v, b.v, c.v)); }

// The larger of x and bound; x where x is NaN.
inline Vec max(Vec x, Vec bound) { return Vec(_mm256_max_ps(bound.v, x.v)); }

// To the nearest whole number.
inline Vec round(Vec x) { return Vec(_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }

// x * 2^n for whole n in [-252, 254], denormal results included: in two steps, each a normal power.
inline __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline Vec scale_by_power(Vec x, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(254.0f), n.v));
  const __m256i half = _mm256_srai_epi32(whole, 1);
  return Vec(_mm256_mul_ps(_mm256_mul_ps(x.v, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half))));
}

// a where condition < bound, else b.
inline Vec select_less(Vec condition, Vec bound, Vec a, Vec b) {
  return Vec(_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(condition.v, bound.v, _CMP_LT_OQ)));
}

// Lanes in a fixed order of pairs.
inline float sum(Vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// Lane i of the result is the sum of the lanes of the i-th of 8 vectors, in a fixed order. They come four at a time:
// `sums_of_four` of each four, then `sums` of those.
inline Vec sums_of_four(Vec a, Vec b, Vec c, Vec d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
  return Vec(_mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee)));
}
inline Vec sums(const Vec (&x)[2]) {
  const __m256 low = _mm256_permute2f128_ps(x[0].v, x[1].v, 0x20), high = _mm256_permute2f128_ps(x[0].v, x[1].v, 0x31);
  return Vec(_mm256_add_ps(low, high));
}

// Square of kWidth x kWidth floats, in place: row i becomes column i.
inline void transpose(Vec (&x)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
      u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    x[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    x[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
