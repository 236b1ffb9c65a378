// SPDX-License-Identifier: Apache-2.0
// Sixteen floats in an AVX-512 register.
#pragma once

#include "types.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

constexpr int64_t kWidth = 16;

struct Vec {
  __m512 v;

  Vec() = default;
  explicit Vec(__m512 x) : v(x) {}
  explicit Vec(float x) : v(_mm512_set1_ps(x)) {}

  static __mmask16 first(int64_t n) {
    return n >= 16 ? __mmask16(0xffff) : static_cast<__mmask16>((1u << (n > 0 ? n : 0)) - 1);
  }
  static __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

  static Vec load(const float* p) { return Vec(_mm512_loadu_ps(p)); }
  static Vec load(const BFloat16* p) {
    return Vec(widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  static Vec load(const Float16* p) {
    return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  static Vec load_first(const float* p, int64_t n) { return Vec(_mm512_maskz_loadu_ps(first(n), p)); }
  static Vec load_first(const BFloat16* p, int64_t n) { return Vec(widen(_mm256_maskz_loadu_epi16(first(n), p))); }
  static Vec load_first(const Float16* p, int64_t n) {
    return Vec(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)));
  }

  // To nearest even; NaN becomes a quiet NaN.
  __m256i to_bfloat16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
  }
  __m256i to_float16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_first(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store_first(BFloat16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), to_bfloat16()); }
  void store_first(Float16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), to_float16()); }
};

inline Vec operator+(Vec a, Vec b) { return Vec(_mm512_add_ps(a.v, b.v)); }
inline Vec operator-(Vec a, Vec b) { return Vec(_mm512_sub_ps(a.v, b.v)); }
inline Vec operator*(Vec a, Vec b) { return Vec(_mm512_mul_ps(a.v, b.v)); }
inline Vec operator/(Vec a, Vec b) { return Vec(_mm512_div_ps(a.v, b.v)); }

// a * b + c, rounded once.
inline Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(a.v, b.v, c.v)); }

// The larger of x and bound; x where x is NaN.
inline Vec max(Vec x, Vec bound) { return Vec(_mm512_max_ps(bound.v, x.v)); }

// To the nearest whole number.
inline Vec round(Vec x) { return Vec(_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }

// What the next lower whole number leaves of x: in [0, 1), 0 for infinities.
inline Vec fraction(Vec x) { return Vec(_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)); }

// x * 2^floor(n), denormal results included.
inline Vec scale_by_power(Vec x, Vec n) { return Vec(_mm512_scalef_ps(x.v, n.v)); }

// a where condition < bound, else b.
inline Vec select_less(Vec condition, Vec bound, Vec a, Vec b) {
  return Vec(_mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(condition.v, bound.v, _CMP_LT_OQ), a.v));
}

// Lanes in a fixed order of pairs.
inline float sum(Vec x) { return _mm512_reduce_add_ps(x.v); }

// Lane i of the result is the sum of the lanes of the i-th of 16 vectors, in a fixed order. They come four at a time:
// `sums_of_four` of each four, then `sums` of those.
inline Vec sums_of_four(Vec a, Vec b, Vec c, Vec d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  return Vec(_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y))));
}
inline __m512 sums_of_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
inline Vec sums(const Vec (&x)[4]) {
  return Vec(sums_of_pairs(sums_of_pairs(x[0].v, x[1].v), sums_of_pairs(x[2].v, x[3].v)));
}

// Square of kWidth x kWidth floats, in place: row i becomes column i.
inline void transpose(Vec (&x)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  __m512 u[16];
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    x[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
    x[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    x[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88);
    x[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
