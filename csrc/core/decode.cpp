// SPDX-License-Identifier: Apache-2.0
#include "decode.h"

namespace fastprompt {

namespace scalar {
void decode(const PromptAttention& p, const int64_t* blocks, const Rows& out, const Rows& lse, const Threads& threads);
}
namespace avx2 {
void decode(const PromptAttention& p, const int64_t* blocks, const Rows& out, const Rows& lse, const Threads& threads);
}
namespace avx512 {
void decode(const PromptAttention& p, const int64_t* blocks, const Rows& out, const Rows& lse, const Threads& threads);
}

bool suits_decode(const PromptAttention& p) {
  constexpr int64_t most_rows = 16;
  return !p.cu_seqlens && p.groups() * p.tq <= most_rows;
}

void decode(const PromptAttention& p, const int64_t* blocks, const Rows& out, const Rows& lse, Isa isa,
            const Threads& threads) {
#if defined(__x86_64__)
  // Tiles of 16 rows would be mostly empty: AMX has nothing to add.
  if (isa >= Isa::avx512) return avx512::decode(p, blocks, out, lse, threads);
  if (isa == Isa::avx2) return avx2::decode(p, blocks, out, lse, threads);
#endif
  static_cast<void>(isa);
  scalar::decode(p, blocks, out, lse, threads);
}

}  // namespace fastprompt
