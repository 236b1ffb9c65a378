// SPDX-License-Identifier: Apache-2.0
// Every kernel in AVX2 and FMA.
#if defined(__x86_64__)
#define FASTPROMPT_LEVEL 1
#include "level.h"

#include "decode_kernels.h"
#endif
