// SPDX-License-Identifier: Apache-2.0
// `compress_kv` as compiled once a level; on AMX tiles for keys in bfloat16.
#pragma once

#include "compress_kv.h"

namespace fastprompt {

namespace scalar {
void compress_kv(const CompressKv& p, const Rows& key, const Rows& value, const Threads& threads);
}
namespace avx2 {
void compress_kv(const CompressKv& p, const Rows& key, const Rows& value, const Threads& threads);
}
namespace avx512 {
void compress_kv(const CompressKv& p, const Rows& key, const Rows& value, const Threads& threads);
}
namespace amx {
void compress_kv(const CompressKv& p, const Rows& key, const Rows& value, const Threads& threads);
}

}  // namespace fastprompt
