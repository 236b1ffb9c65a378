// SPDX-License-Identifier: Apache-2.0
// The tests that main.cpp runs. `small` asks for sizes that an interpreter such as valgrind can run.
#pragma once

namespace fastprompt::tests {

void vec_scalar();
void vec_avx2();
void vec_avx512();
void parallel();
void prompt_attention(bool small);
void compress_kv(bool small);
void decoupled_attention(bool small);
void diffuse_prompts(bool small);

}  // namespace fastprompt::tests
