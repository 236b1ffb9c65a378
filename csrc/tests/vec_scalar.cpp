// SPDX-License-Identifier: Apache-2.0
#define FASTPROMPT_LEVEL 0
#include "level.h"
#include "tests.h"
#include "vec_levels.h"

void fastprompt::tests::vec_scalar() { scalar::test_vec(); }
