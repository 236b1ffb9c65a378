// SPDX-License-Identifier: Apache-2.0
// Sums of a backward on tiles to the rows of gradients that they are.
#pragma once

#include "attention_amx.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

// Key c of 16 in tile n of a block of `keys`: pairs of rows are interleaved 8 bytes at a time, which scatters columns.
inline int64_t key_of_column(int64_t n, int64_t c, int64_t keys) {
  return keys <= 16 ? c : c / 4 * 8 + n * 4 + c % 4;
}

// dQ of one key head: tiles [rows / 16][dims / 16] to rows.
inline void write_query(const PromptAttention& p, const PromptAttentionGrads& g, int64_t s, int64_t head_kv,
                        const float* sums) {
  const HeadRows to = query_rows(p, g.query, s, head_kv);
  const int64_t lanes = p.queries_of(s) * p.groups(), nd = tiles_of_16(p.dim);
  const __m512 scale = _mm512_set1_ps(p.scale);
  for (int64_t r = 0; r < lanes; ++r) {
    const float* row = sums + r / 16 * nd * kTileFloats + r % 16 * 16;
    auto* at = reinterpret_cast<BFloat16*>(to.at(r));
    for (int64_t d = 0; d < p.dim; d += 16) {
      const __m512 x = _mm512_mul_ps(_mm512_load_ps(row + d * 16), scale);
      _mm256_mask_storeu_epi16(at + d, Vec::first(p.dim - d), to_bfloat16(x));
    }
  }
}

// Transposes one tile or two beside each other: a line of memory is written at once.
inline void write_tiles(const float* tiles, bool two, float scale, char* const (&rows)[16], int64_t d, int64_t dim,
                        const HeadRows& to) {
  const Vec factor(scale);
  Vec low[16], high[16];
  for (int i = 0; i < 16; ++i) low[i] = Vec::load(tiles + i * 16) * factor;
  transpose(low);
  for (int i = 0; i < 16; ++i) high[i] = two ? Vec::load(tiles + kTileFloats + i * 16) * factor : Vec(0.0f);
  if (two) transpose(high);
  for (int i = 0; i < 16; ++i) {
    if (!rows[i]) continue;
    if (to.rows.dtype == DType::bfloat16) {
      auto* at = reinterpret_cast<BFloat16*>(rows[i]) + d;
      _mm512_mask_storeu_epi16(at, first_halves(dim - d), to_bfloat16(low[i].v, high[i].v));
    } else {
      auto* at = reinterpret_cast<float*>(rows[i]) + d;
      low[i].store_first(at, dim - d);
      if (two) high[i].store_first(at + 16, dim - d - 16);
    }
  }
}

// Transposed sums [keys / 16][dims / 16] of keys to rows.
inline void write_keys(const float* sums, int64_t keys, int64_t dim, float scale, const HeadRows& to, int64_t first) {
  const int64_t nd = tiles_of_16(dim);
  for (int64_t x = 0; x < keys; x += 32) {
    const int64_t left = std::min<int64_t>(keys - x, 32);
    for (int64_t n = 0; n < tiles_of_16(left); ++n, sums += nd * kTileFloats) {
      char* rows[16];
      for (int64_t c = 0; c < 16; ++c) {
        const int64_t key = key_of_column(n, c, left);
        rows[c] = key < left ? to.at(first + x + key) : nullptr;
      }
      for (int64_t d = 0; d < nd; d += 2) {
        write_tiles(sums + d * kTileFloats, d + 1 < nd, scale, rows, d * 16, dim, to);
      }
    }
  }
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
