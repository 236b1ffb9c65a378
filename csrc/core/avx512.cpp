// SPDX-License-Identifier: Apache-2.0
// Every kernel in AVX-512.
#if defined(__x86_64__)
#define FASTPROMPT_LEVEL 2
#include "level.h"

#include "decode_kernels.h"
#endif
