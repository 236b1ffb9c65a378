// SPDX-License-Identifier: Apache-2.0
// Attention of few query rows over many keys, the step of generation: forward, bound by the bandwidth of memory.
//
// Keys and values are read once for all query heads that share them, where they lie. Keys are cut into ranges by the
// shapes of one sample alone; what ranges give is merged in their order.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"
#include "prompt_attention.h"

namespace fastprompt {

// Whether `decode` is the path of prompt_attention_forward for p: batched, few query rows a key head.
bool suits_decode(const PromptAttention& p);

// prompt_attention_forward for any p that is batched; `suits_decode` tells where it is the fast path.
//
// With `blocks` ([samples * heads_kv + 1], ascending), every key head has a prompt of its own length: head h of sample
// s reads the rows from blocks[i] to blocks[i + 1], i = s * heads_kv + h, of prompt_key and prompt_value, whose sample
// and head strides, and p.prompts, p.bank and p.prompt_index, are not used. Caches whose heads keep different numbers
// of keys are that.
void decode(const PromptAttention& p, const int64_t* blocks, const Rows& out, const Rows& lse, Isa isa,
            const Threads& threads);

}  // namespace fastprompt
