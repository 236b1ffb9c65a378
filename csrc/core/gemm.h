// SPDX-License-Identifier: Apache-2.0
// Products of small float matrices that lie in the cache: C [m x n] = or += A [m x depth] B [depth x n].
//
// A tile of C stays in registers while the depth runs; a number of A is broadcast, B is read in whole vectors. So A may
// lie in any order (strides a_row, a_column), rows of B and C are dense and n is a multiple of kWidth. Every sum runs
// in order of depth, one fma a step, and is added to C at its end: an element does not depend on m, n or its place, and
// long sums made of many products lose less.
#pragma once

#include "ahead.h"
#include "vec.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

// What becomes of the numbers in C: C = AB, C += AB, or C = diag(row_scale) C + AB.
enum class Into { overwrite, add, scaled };

struct Product {
  int64_t m, n, depth;
  const float* a;
  int64_t a_row, a_column;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  const float* row_scale = nullptr;
  Ahead* ahead = nullptr;  // what to bring near meanwhile
};

// Tiles that fill the registers: at most kMostVectors vectors of a row, most_rows(vectors) rows.
constexpr int kMostVectors = kWidth == 16 ? 4 : 2;
constexpr int most_rows(int vectors) {
  if (kWidth == 16) return vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
  return kWidth == 8 ? (vectors == 2 ? 6 : 10) : 4;
}

template <int M, int N, Into kInto>
inline void multiply_tile(const Product& p, int64_t row, int64_t column) {
  Vec sums[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) sums[i][j] = Vec(0.0f);
  }
  const float* a = p.a + row * p.a_row;
  const float* b = p.b + column;
  const int64_t a_row = p.a_row, a_column = p.a_column, b_row = p.b_row;
  for (int64_t k = p.depth; k > 0; --k, a += a_column, b += b_row) {
    Vec x[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) x[j] = Vec::load(b + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec y(a[i * a_row]);
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) sums[i][j] = fma(y, x[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    float* c = p.c + (row + i) * p.c_row + column;
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      Vec x = sums[i][j];
      if constexpr (kInto == Into::add) x = Vec::load(c + j * kWidth) + x;
      if constexpr (kInto == Into::scaled) x = fma(Vec::load(c + j * kWidth), Vec(p.row_scale[row + i]), x);
      x.store(c + j * kWidth);
    }
  }
}

template <int N, Into kInto, int M = most_rows(N)>
inline void multiply_rows(const Product& p, int64_t row, int64_t rows, int64_t column) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<N, kInto, M - 1>(p, row, rows, column);
  }
  multiply_tile<M, N, kInto>(p, row, column);
}

// N vectors of every row, in tiles of nearly equal height: low tiles cannot hide the latency of fma.
template <Into kInto, int N = kMostVectors>
void multiply_panel(const Product& p, int64_t vectors, int64_t column) {
  if constexpr (N > 1) {
    if (vectors < N) return multiply_panel<kInto, N - 1>(p, vectors, column);
  }
  const int64_t tiles = (p.m + most_rows(N) - 1) / most_rows(N);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = t * p.m / tiles;
    multiply_rows<N, kInto>(p, row, (t + 1) * p.m / tiles - row, column);
    if (p.ahead) p.ahead->step();
  }
}

template <Into kInto>
void multiply(const Product& p) {
  const int64_t vectors = p.n / kWidth, panels = (vectors + kMostVectors - 1) / kMostVectors;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t first = i * vectors / panels;
    multiply_panel<kInto>(p, (i + 1) * vectors / panels - first, first * kWidth);
  }
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
