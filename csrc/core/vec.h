// SPDX-License-Identifier: Apache-2.0
// `Vec`: kWidth floats of the level that the including file is compiled for. Kernels are written once, with it.
//
// A file of one level defines FASTPROMPT_LEVEL (0 scalar, 1 AVX2+FMA, 2 AVX-512, 3 AMX) and, for what follows its
// system headers, the target (level.h does both). Everything here lives in that level's namespace: the same inline
// function compiled for two instruction sets must never become one.
#pragma once

#include "types.h"

#if FASTPROMPT_LEVEL >= 2
#include "vec_avx512.h"
#elif FASTPROMPT_LEVEL == 1
#include "vec_avx2.h"
#else
#include "vec_scalar.h"
#endif

namespace fastprompt::FASTPROMPT_NAMESPACE {

// 2^x, at most 1.5 units in the last place off: -inf and what is below the smallest denormal give 0, NaN stays NaN.
#if FASTPROMPT_LEVEL >= 2
inline Vec exp2(Vec x) {
  // On [0, 1): two instructions do all the rest, the infinities included.
  const Vec f = fraction(x);
  Vec p(0x1.c72118c6c4887p-13f);
  p = fma(p, f, Vec(0x1.461954f55e16ap-10f));
  p = fma(p, f, Vec(0x1.3d2800c54393fp-7f));
  p = fma(p, f, Vec(0x1.c68500697d991p-5f));
  p = fma(p, f, Vec(0x1.ebfd9ed28f975p-3f));
  p = fma(p, f, Vec(0x1.62e42955d53f2p-1f));
  p = fma(p, f, Vec(1.0f));
  return scale_by_power(p, x);
}
#else
inline Vec exp2(Vec x) {
  x = max(x, Vec(-200.0f));  // max(x, bound) is x where x is NaN
  const Vec whole = round(x), f = x - whole;
  Vec p(0x1.41d3336b92292p-13f);
  p = fma(p, f, Vec(0x1.5f456a8aecb43p-10f));
  p = fma(p, f, Vec(0x1.3b2dbbc0fd725p-7f));
  p = fma(p, f, Vec(0x1.c6aed4b9507cdp-5f));
  p = fma(p, f, Vec(0x1.ebfbdadcb0bc7p-3f));
  p = fma(p, f, Vec(0x1.62e430c7e9242p-1f));
  p = fma(p, f, Vec(1.0f));
  return scale_by_power(p, whole);
}
#endif

// Elements of any storage type, as float.
inline Vec load(const void* at, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::bfloat16: return Vec::load(static_cast<const BFloat16*>(at) + offset);
    case DType::float16: return Vec::load(static_cast<const Float16*>(at) + offset);
    default: return Vec::load(static_cast<const float*>(at) + offset);
  }
}

// The first n of kWidth; the rest are 0, and nothing past them is read.
inline Vec load_first(const void* at, DType dtype, int64_t offset, int64_t n) {
  switch (dtype) {
    case DType::bfloat16: return Vec::load_first(static_cast<const BFloat16*>(at) + offset, n);
    case DType::float16: return Vec::load_first(static_cast<const Float16*>(at) + offset, n);
    default: return Vec::load_first(static_cast<const float*>(at) + offset, n);
  }
}

// Rounded once, to nearest even; NaN stays NaN. For x < inf.
inline void store_first(Vec x, void* at, DType dtype, int64_t offset, int64_t n) {
  switch (dtype) {
    case DType::bfloat16: return x.store_first(static_cast<BFloat16*>(at) + offset, n);
    case DType::float16: return x.store_first(static_cast<Float16*>(at) + offset, n);
    default: return x.store_first(static_cast<float*>(at) + offset, n);
  }
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
