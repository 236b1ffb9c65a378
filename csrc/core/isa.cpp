// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastprompt {
namespace {

#if defined(__x86_64__)

#if defined(__linux__)
// A process must ask for the 8 KB of tile state before the first tile instruction, or that instruction faults.
bool may_use_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tiles = d >> 24 & 1;
  return bf16 && tiles && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#else
bool may_use_tiles() { return false; }
bool has_avx512_bf16() { return false; }
#endif

Isa detect() {
  // __builtin_cpu_supports also asks whether the system saves the wide registers.
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return Isa::scalar;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return Isa::avx2;
  }
  return has_avx512_bf16() && may_use_tiles() ? Isa::amx : Isa::avx512;
}
#else
Isa detect() { return Isa::scalar; }
#endif

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"scalar", "avx2", "avx512", "amx"};
  return names[static_cast<int>(isa)];
}

}  // namespace fastprompt
