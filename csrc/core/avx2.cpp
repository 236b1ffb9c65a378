// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define FASTPROMPT_LEVEL 1
#include "level.h"

// After level.h, whose target holds for what follows.
#include "compress_kv_levels.h"
#include "prompt_attention_levels.h"

#include "compress_kv_float.h"
#include "decode_kernels.h"
#include "key_scores_kernels.h"
#include "prompt_attention_backward.h"
#include "prompt_attention_forward.h"

#include "level_end.h"
#endif
