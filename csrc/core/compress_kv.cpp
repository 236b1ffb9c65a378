// SPDX-License-Identifier: Apache-2.0
#include "compress_kv.h"

#include "compress_kv_levels.h"

namespace fastprompt {

void compress_kv(const CompressKv& p, const Rows& key, const Rows& value, Isa isa, const Threads& threads) {
  switch (isa) {
#if defined(__x86_64__)
#if defined(__linux__)
    case Isa::amx:
      // Tiles count slots in floats.
      if (p.key.dtype == DType::bfloat16 && p.slots <= 1 << 24) return amx::compress_kv(p, key, value, threads);
      [[fallthrough]];
#else
    case Isa::amx:
#endif
    case Isa::avx512: return avx512::compress_kv(p, key, value, threads);
    case Isa::avx2: return avx2::compress_kv(p, key, value, threads);
#endif
    default: return scalar::compress_kv(p, key, value, threads);
  }
}

}  // namespace fastprompt
