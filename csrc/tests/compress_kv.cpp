// SPDX-License-Identifier: Apache-2.0
#include "compress_kv.h"

#include <algorithm>

#include "check.h"
#include "numbers.h"
#include "tests.h"

namespace fastprompt::tests {
namespace {

struct Case {
  int64_t samples, heads, length, slots, dim, dim_value;
};

// Every stride-th position stays; every head has an empty slot more than the one before.
std::vector<int64_t> some_positions(const Case& c) {
  std::vector<int64_t> index;
  const int64_t stride = std::max<int64_t>(c.length / c.slots, 1);
  for (int64_t h = 0; h < c.samples * c.heads; ++h) {
    const int64_t kept = std::max<int64_t>(c.slots - h, 0);
    for (int64_t i = 0; i < c.slots; ++i) index.push_back(i < kept ? i * stride : -1);
  }
  return index;
}

double similarity(const Numbers& key, int64_t head, int64_t a, int64_t b) {
  double dot = 0, aa = 0, bb = 0;
  for (int64_t d = 0; d < key.dim; ++d) {
    dot += key.at(head, a, d) * key.at(head, b, d);
    aa += key.at(head, a, d) * key.at(head, a, d), bb += key.at(head, b, d) * key.at(head, b, d);
  }
  return dot / std::sqrt(aa) / std::sqrt(bb);
}

void check_head(const CompressKv& p, int64_t head, const Numbers& key, const Numbers& x, const Numbers& found) {
  const int64_t* index = p.index + head * p.slots;
  std::vector<double> sums(static_cast<size_t>(p.slots * x.dim)), count(static_cast<size_t>(p.slots), 1.0);
  std::vector<double> own(static_cast<size_t>(p.slots), 1.0);
  const bool merges = p.merge != Merge::drop && index[0] >= 0;
  for (int64_t t = 0; merges && t < p.length; ++t) {
    if (!p.valid[head / p.heads * p.length + t] || std::find(index, index + p.slots, t) != index + p.slots) continue;
    int64_t best = 0;
    for (int64_t c = 1; c < p.slots && index[c] >= 0; ++c) {
      if (similarity(key, head, index[c], t) > similarity(key, head, index[best], t)) best = c;
    }
    const auto slot = static_cast<size_t>(best);
    const bool pivot = p.merge == Merge::pivot;
    const double weight = p.merge == Merge::weighted ? similarity(key, head, index[best], t) : pivot ? 0.5 : 1.0;
    count[slot] += 1, own[slot] += pivot ? 0.5 : 0.0;
    for (int64_t d = 0; d < x.dim; ++d) sums[static_cast<size_t>(best * x.dim + d)] += weight * x.at(head, t, d);
  }
  const double eps = x.dtype == DType::float32 ? 1e-5 : 0.02;
  int wrong = 0;
  for (int64_t c = 0; c < p.slots; ++c) {
    for (int64_t d = 0; d < x.dim; ++d) {
      const auto slot = static_cast<size_t>(c);
      const double before = index[c] < 0 ? 0 : own[slot] * x.at(head, index[c], d);
      const double want = (before + sums[static_cast<size_t>(c * x.dim + d)]) / count[slot];
      wrong += !close(found.at(head, c, d), want, eps * std::max(1.0, std::abs(want)));
    }
  }
  CHECK(wrong == 0);
}

void check_case(const Case& c, DType dtype, Merge merge, Isa isa) {
  Numbers key(dtype, c.samples, c.heads, c.length, c.dim, 1);
  Numbers value(dtype, c.samples, c.heads, c.length, c.dim_value, 2);
  Numbers kept_key(dtype, c.samples, c.heads, c.slots, c.dim, 3);
  Numbers kept_value(dtype, c.samples, c.heads, c.slots, c.dim_value, 4);
  const std::vector<int64_t> index = some_positions(c);
  std::vector<unsigned char> valid(static_cast<size_t>(c.samples * c.length), 1);  // but every seventh
  for (size_t i = 3; i < valid.size(); i += 7) valid[i] = 0;
  const CompressKv p{c.samples,    c.heads,      c.length,     c.slots, c.dim, c.dim_value, key.rows(),
                     value.rows(), index.data(), valid.data(), merge,   true};
  fastprompt::compress_kv(p, kept_key.rows(), kept_value.rows(), isa, threads(3));
  for (int64_t h = 0; h < c.samples * c.heads; ++h) {
    check_head(p, h, key, key, kept_key);
    check_head(p, h, key, value, kept_value);
  }
}

}  // namespace

// Sizes around vectors, tiles and blocks; memory ends where rows do.
void compress_kv(bool small) {
  const Case cases[] = {{1, 1, 1, 1, 5, 3},    {1, 2, 40, 7, 16, 16}, {2, 2, 130, 33, 33, 7},
                        {1, 1, 300, 90, 64, 64}, {1, 3, 150, 150, 9, 9}, {1, 1, 200, 2, 130, 17}};
  for (const Isa isa : levels()) {
    for (const Case& c : cases) {
      if (small && c.length > 130) continue;
      for (const DType dtype : {DType::float32, DType::bfloat16}) {
        for (const Merge merge : {Merge::drop, Merge::average, Merge::pivot, Merge::weighted}) {
          check_case(c, dtype, merge, isa);
        }
      }
    }
  }
}

}  // namespace fastprompt::tests
