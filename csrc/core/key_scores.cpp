// SPDX-License-Identifier: Apache-2.0
#include "key_scores.h"

namespace fastprompt {

namespace scalar {
void key_scores(const KeyScores& p, const Rows& scores, const Threads& threads);
}
namespace avx2 {
void key_scores(const KeyScores& p, const Rows& scores, const Threads& threads);
}
namespace avx512 {
void key_scores(const KeyScores& p, const Rows& scores, const Threads& threads);
}
namespace amx {
void key_scores(const KeyScores& p, const Rows& scores, const Threads& threads);
}

void key_scores(const KeyScores& p, const Rows& scores, Isa isa, const Threads& threads) {
#if defined(__x86_64__)
#if defined(__linux__)
  if (isa == Isa::amx && p.query.dtype == DType::bfloat16) return amx::key_scores(p, scores, threads);
#endif
  if (isa >= Isa::avx512) return avx512::key_scores(p, scores, threads);
  if (isa == Isa::avx2) return avx2::key_scores(p, scores, threads);
#endif
  static_cast<void>(isa);
  scalar::key_scores(p, scores, threads);
}

}  // namespace fastprompt
