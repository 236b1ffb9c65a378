// SPDX-License-Identifier: Apache-2.0
// Runs the unit tests of the core at every level of this processor: tests [small]
#include <cstring>

#include "check.h"
#include "tests.h"

int main(int argc, char** argv) {
  using namespace fastprompt;
  const bool small = argc > 1 && !std::strcmp(argv[1], "small");
  std::printf("best level: %s\n", isa_name(best_isa()));
  tests::vec_scalar();
#if defined(__x86_64__)
  if (best_isa() >= Isa::avx2) tests::vec_avx2();
  if (best_isa() >= Isa::avx512) tests::vec_avx512();
#endif
  tests::parallel();
  tests::prompt_attention(small);
  tests::compress_kv(small);
  tests::decoupled_attention(small);
  tests::diffuse_prompts(small);
  std::printf(tests::failures ? "%d checks failed\n" : "all checks passed\n", tests::failures);
  return tests::failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
