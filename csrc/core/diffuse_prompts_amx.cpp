// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__) && defined(__linux__)
#define FASTPROMPT_LEVEL 3
#include "level.h"

// After level.h, whose target holds for what follows.
#include "diffuse_prompts_levels.h"

#include "diffuse_prompts_amx_backward.h"

#include "level_end.h"
#endif
