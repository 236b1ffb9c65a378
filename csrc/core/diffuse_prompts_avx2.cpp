// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define FASTPROMPT_LEVEL 1
#include "level.h"

// After level.h, whose target holds for what follows.
#include "diffuse_prompts_levels.h"

#include "diffuse_prompts_float_backward.h"

#include "level_end.h"
#endif
