// SPDX-License-Identifier: Apache-2.0
// AMX: products of bfloat16 tiles, and rows packed into the tiles that they read. Only level 3 includes this.
//
// A tile is 16 rows of 64 bytes and lies dense in memory (1 KB); matrices are arrays of tiles. One product step is
// C [16 x 16 floats] += A [16 x 32] * B [32 x 16], where B holds pairs of rows: word (k, n) is B[2k][n], B[2k+1][n].
// The hardware takes denormal bfloat16 inputs for zeros and flushes denormal sums; infinities and NaN propagate.
#pragma once

#include "vec.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

constexpr int64_t kTileHalves = 512, kTileFloats = 256;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig{};

// The shape of all eight tiles while it lives. Released at the end: whoever uses tiles next sets a shape of its own.
class TileScope {
 public:
  TileScope() { _tile_loadconfig(&kTileConfig); }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// Tiles of a product's operand. `across`: from one tile of rows of A (columns of B) to the next, `along` the sum; both
// in `unit` halves. Rows of a tile of A may lie `a_stride` bytes apart: rows of a matrix are read where they are.
struct Operand {
  const BFloat16* data;
  int64_t across, along;
  int64_t unit = kTileHalves, a_stride = 64;
};

// Tiles of C and the way between them.
struct Result {
  float* data;
  int64_t row, column;
};

// M x N tiles of C (+)= A B over `depth` tiles: at most 2 x 2, which read as many tiles as they multiply.
template <int M, int N>
inline void multiply_block(const Operand& a, const Operand& b, int64_t depth, const Result& c, bool add) {
  static_assert(M <= 2 && N <= 2);
  float *c00 = c.data, *c01 = c00 + c.column * kTileFloats;
  float *c10 = c00 + c.row * kTileFloats, *c11 = c10 + c.column * kTileFloats;
  // GCC does not know that tile loads read memory.
  __asm__ volatile("" ::: "memory");
  if (add) {
    _tile_loadd(0, c00, 64);
    if constexpr (N == 2) _tile_loadd(1, c01, 64);
    if constexpr (M == 2) _tile_loadd(2, c10, 64);
    if constexpr (M == 2 && N == 2) _tile_loadd(3, c11, 64);
  } else {
    _tile_zero(0);
    if constexpr (N == 2) _tile_zero(1);
    if constexpr (M == 2) _tile_zero(2);
    if constexpr (M == 2 && N == 2) _tile_zero(3);
  }
  const BFloat16 *a0 = a.data, *a1 = a0 + a.across * a.unit;
  const BFloat16 *b0 = b.data, *b1 = b0 + b.across * kTileHalves;
  const int64_t step_a = a.along * a.unit, step_b = b.along * kTileHalves;
  for (int64_t k = 0; k < depth; ++k) {
    _tile_loadd(6, b0 + k * step_b, 64);
    _tile_loadd(4, a0 + k * step_a, a.a_stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, b1 + k * step_b, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M == 2) {
      _tile_loadd(5, a1 + k * step_a, a.a_stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c00, 64);
  if constexpr (N == 2) _tile_stored(1, c01, 64);
  if constexpr (M == 2) _tile_stored(2, c10, 64);
  if constexpr (M == 2 && N == 2) _tile_stored(3, c11, 64);
}

// rows x columns tiles of C (+)= A B.
inline void multiply(Operand a, const Operand& b, int64_t rows, int64_t columns, int64_t depth, Result c, bool add) {
  for (int64_t m = 0; m < rows; m += 2) {
    Operand right = b;
    Result out = c;
    for (int64_t n = 0; n < columns; n += 2) {
      const bool tall = m + 1 < rows, wide = n + 1 < columns;
      if (tall && wide) {
        multiply_block<2, 2>(a, right, depth, out, add);
      } else if (tall) {
        multiply_block<2, 1>(a, right, depth, out, add);
      } else if (wide) {
        multiply_block<1, 2>(a, right, depth, out, add);
      } else {
        multiply_block<1, 1>(a, right, depth, out, add);
      }
      right.data += 2 * b.across * kTileHalves;
      out.data += 2 * c.column * kTileFloats;
    }
    a.data += 2 * a.across * a.unit;
    c.data += 2 * c.row * kTileFloats;
  }
}

// ---- packing: row(r) gives the `dim` neighbouring bfloat16 of row r; what lies past the last row or dim is zero ----

constexpr int64_t tiles_of_16(int64_t n) { return (n + 15) / 16; }
constexpr int64_t tiles_of_32(int64_t n) { return (n + 31) / 32; }

inline __mmask32 first_halves(int64_t n) { return n >= 32 ? ~__mmask32(0) : (__mmask32(1) << (n > 0 ? n : 0)) - 1; }

inline void transpose_words(__m512i (&x)[16]) {
  Vec y[16];
  for (int i = 0; i < 16; ++i) y[i] = Vec(_mm512_castsi512_ps(x[i]));
  transpose(y);
  for (int i = 0; i < 16; ++i) x[i] = _mm512_castps_si512(y[i].v);
}

inline void store_tile(const __m512i (&x)[16], BFloat16* tile) {
  for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 32, x[i]);
}

template <class Row>
inline void pointers_of_16(const Row& row, int64_t from, int64_t rows, const BFloat16* (&found)[16]) {
  for (int64_t i = 0; i < 16; ++i) found[i] = from + i < rows ? row(from + i) : nullptr;
}

inline __m512i load_halves(const BFloat16* row, int64_t offset, __mmask32 kept) {
  return row ? _mm512_maskz_loadu_epi16(kept, row + offset) : _mm512_setzero_si512();
}

// A of a product that sums over dims: tile (rows / 16, dims / 32), along dims first.
template <class Row>
inline void pack_rows(const Row& row, int64_t rows, int64_t dim, BFloat16* tiles) {
  const int64_t depth = tiles_of_32(dim);
  for (int64_t from = 0; from < rows; from += 16) {
    const BFloat16* at[16];
    pointers_of_16(row, from, rows, at);
    for (int64_t k = 0; k < depth; ++k, tiles += kTileHalves) {
      const __mmask32 kept = first_halves(dim - k * 32);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(tiles + i * 32, load_halves(at[i], k * 32, kept));
    }
  }
}

// B of a product that sums over dims: tile (dims / 32, rows / 16), along dims first.
template <class Row>
inline void pack_dim_pairs(const Row& row, int64_t rows, int64_t dim, BFloat16* tiles) {
  const int64_t depth = tiles_of_32(dim);
  for (int64_t from = 0; from < rows; from += 16) {
    const BFloat16* at[16];
    pointers_of_16(row, from, rows, at);
    for (int64_t k = 0; k < depth; ++k, tiles += kTileHalves) {
      const __mmask32 kept = first_halves(dim - k * 32);
      __m512i x[16];
      for (int i = 0; i < 16; ++i) x[i] = load_halves(at[i], k * 32, kept);
      transpose_words(x);
      store_tile(x, tiles);
    }
  }
}

// Words (a[i], b[i]).
inline __m512i join(__m256i a, __m256i b) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

// Pairs of rows of 32 rows, 16 dims from `offset`.
inline void load_row_pairs(const BFloat16* const (&at)[32], int64_t offset, int64_t dim, __m512i (&x)[16]) {
  const auto kept = static_cast<__mmask16>(first_halves(std::min<int64_t>(dim - offset, 16)));
  for (int i = 0; i < 16; ++i) {
    const BFloat16 *a = at[2 * i], *b = at[2 * i + 1];
    const __m256i none = _mm256_setzero_si256();
    x[i] = join(a ? _mm256_maskz_loadu_epi16(kept, a + offset) : none,
                b ? _mm256_maskz_loadu_epi16(kept, b + offset) : none);
  }
}

// Operands of products that sum over rows, tile (rows / 32, dims / 16), dims first. B: pairs of rows as they are;
// A (kTransposed): its rows are dims.
template <bool kTransposed, class Row>
inline void pack_row_pairs(const Row& row, int64_t rows, int64_t dim, BFloat16* tiles) {
  for (int64_t from = 0; from < rows; from += 32) {
    const BFloat16* at[32];
    for (int64_t i = 0; i < 32; ++i) at[i] = from + i < rows ? row(from + i) : nullptr;
    for (int64_t offset = 0; offset < dim; offset += 16, tiles += kTileHalves) {
      __m512i x[16];
      load_row_pairs(at, offset, dim, x);
      if constexpr (kTransposed) transpose_words(x);
      store_tile(x, tiles);
    }
  }
}

// ---- arithmetic where results are rounded to bfloat16 ----

// 2^min(x, 0), 2.6e-6 off: below what bfloat16 sees. -inf and what is below the smallest normal number give 0.
inline __m512 exp2_to_round(__m512 x) {
  const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  x = _mm512_min_ps(_mm512_setzero_ps(), x);  // x where it is NaN
  // Adding 1.5 * 2^23 leaves the nearest whole number in the last bits; 23 places up they add to the exponent. The last
  // bits of a NaN that comes of bfloat16 or of arithmetic are 0: it stays NaN.
  const __m512 magic = _mm512_set1_ps(0x1.8p23f), moved = _mm512_add_ps(x, magic);
  const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(moved, magic));
  __m512 p = _mm512_set1_ps(0.0095701019112f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055917860319f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24024744828f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69312181474f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99999926145f));
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(moved), 23);
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(some, _mm512_castps_si512(p), power));
}

// 2^x for any x, as far off; the largest and smallest results are infinity and denormal numbers.
inline __m512 exp2_of_any_to_round(__m512 x) {
  const __m512 f = fraction(Vec(x)).v;
  __m512 p = _mm512_set1_ps(0x1.bb7cd44797bbep-7f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.aa13f04c08388p-5f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ee798a4575502p-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62d1660a1c93ap-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.00002b827133ap+0f));
  return _mm512_scalef_ps(p, x);
}

// log2(x) for x >= 0 to about one unit in the last place of max(1, result): 0 gives -inf, NaN stays NaN.
inline __m512 log2(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  __m512 exponent = _mm512_getexp_ps(x);
  exponent = _mm512_mask_add_ps(exponent, _mm512_cmp_ps_mask(m, one, _CMP_LT_OQ), exponent, one);
  // log(m) = 2 atanh(t), |t| <= 0.2
  const __m512 t = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), square = _mm512_mul_ps(t, t);
  __m512 p = _mm512_set1_ps(0.32059889f);  // 2 / (9 ln 2)
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(0.41219858f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(0.57707802f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(0.96179669f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.88539008f));
  return _mm512_fmadd_ps(p, t, exponent);
}

// Two vectors as 32 bfloat16 in order, to nearest even.
inline __m512i to_bfloat16(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}
inline __m256i to_bfloat16(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
