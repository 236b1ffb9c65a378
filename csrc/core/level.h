// SPDX-License-Identifier: Apache-2.0
// First include of a file of one level, after FASTPROMPT_LEVEL: system headers, then the target for all that follows.
//
// System headers come first, so that no inline function of the library is compiled for more than every processor has.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#if FASTPROMPT_LEVEL >= 1
// GCC before 13 warns of its own intrinsics (bug 105593).
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

// Own headers whose inline functions are shared by all levels.
#include "compress_kv.h"
#include "decoupled_attention.h"
#include "diffuse_prompts.h"
#include "isa.h"
#include "parallel.h"
#include "prompt_attention.h"
#include "sample_chunks.h"
#include "scratch.h"
#include "types.h"

#if FASTPROMPT_LEVEL == 3
#define FASTPROMPT_NAMESPACE amx
#define FASTPROMPT_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16"
#elif FASTPROMPT_LEVEL == 2
#define FASTPROMPT_NAMESPACE avx512
#define FASTPROMPT_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"
#elif FASTPROMPT_LEVEL == 1
#define FASTPROMPT_NAMESPACE avx2
#define FASTPROMPT_TARGET "avx2,fma,f16c"
#else
#define FASTPROMPT_NAMESPACE scalar
#endif

#ifdef FASTPROMPT_TARGET
#define FASTPROMPT_PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define FASTPROMPT_PUSH_TARGET(t) \
  FASTPROMPT_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#else
#define FASTPROMPT_PUSH_TARGET(t) FASTPROMPT_PRAGMA(GCC target(t))
#endif
FASTPROMPT_PUSH_TARGET(FASTPROMPT_TARGET)
#endif
