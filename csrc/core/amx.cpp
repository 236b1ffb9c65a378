// SPDX-License-Identifier: Apache-2.0
// Kernels on AMX tiles.
#if defined(__x86_64__) && defined(__linux__)

#define FASTPROMPT_LEVEL 3
#include "level.h"

#include "amx.h"
#include "compress_kv_amx.h"
#include "compress_kv_levels.h"
#include "key_scores_amx.h"
#include "prompt_attention_amx_forward.h"
#include "prompt_attention_amx_reduce.h"

namespace fastprompt::amx {

void prompt_attention_forward(const PromptAttention& p, const Rows& out, const Rows& lse, const Threads& threads) {
  forward(p, out, lse, threads);
}

void prompt_attention_backward(const PromptAttention& p, const PromptAttentionGrads& grads, const Threads& threads) {
  backward(p, grads, threads);
}

void compress_kv(const CompressKv& p, const Rows& key, const Rows& value, const Threads& threads) {
  compress<TileSearch>(p, key, value, threads);
}

}  // namespace fastprompt::amx

#include "level_end.h"

#endif
