// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define FASTPROMPT_LEVEL 2
#include "level.h"

// After level.h, whose target holds for what follows.
#include "decoupled_attention_levels.h"

#include "decoupled_attention_float_backward.h"

#include "level_end.h"
#endif
