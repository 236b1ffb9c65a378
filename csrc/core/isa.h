// SPDX-License-Identifier: Apache-2.0
// Instruction sets: what this processor has, and which level a call runs at.
#pragma once

namespace fastprompt {

// Ordered: a processor with one level has every level before it.
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The highest level that this process may use. Asks the kernel for AMX tile state once (thread-safe).
Isa best_isa();

// "scalar", "avx2", "avx512" or "amx".
const char* isa_name(Isa isa);

}  // namespace fastprompt
