// SPDX-License-Identifier: Apache-2.0
// Every kernel in plain C++.
#define FASTPROMPT_LEVEL 0
#include "level.h"

#include "decode_kernels.h"
