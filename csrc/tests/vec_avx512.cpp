// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define FASTPROMPT_LEVEL 2
#include "level.h"
#include "tests.h"
#include "vec_levels.h"

void fastprompt::tests::vec_avx512() { avx512::test_vec(); }

#include "level_end.h"
#endif
