// SPDX-License-Identifier: Apache-2.0
// `compress_kv` around a search for the nearest survivors: who is evicted, runs of each survivor, their sums.
//
// A Search packs survivors, kChunk at a time, into memory that its constructor cuts; then it finds the nearest one to
// each of up to kLanes evicted keys. Heads of all samples are numbered through.
#pragma once

#include "compress_kv.h"
#include "vec.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kNormFloor = 1e-12f;  // as torch.nn.functional.normalize has it
constexpr int64_t kChunk = 64;        // survivors of a task

constexpr int64_t parts_of(int64_t count, int64_t most) { return (count + most - 1) / most; }

// A row as floats, zeros up to whole vectors, and its norm in float32.
struct FloatRow {
  float norm;  // at least kNormFloor; NaN if an element is, inf also where only the squares are too large
  bool sound;  // whether no element is NaN or infinite
};

inline FloatRow load_row(const char* from, DType dtype, int64_t dim, float* to) {
  Vec squares(0.0f), zeros(0.0f);
  for (int64_t d = 0; d < dim; d += kWidth) {
    const Vec x = load_first(from, dtype, d, std::min(kWidth, dim - d));
    x.store(to + d);
    squares = fma(x, x, squares);
    zeros = fma(x, Vec(0.0f), zeros);  // NaN from what is not finite
  }
  const float norm = std::sqrt(sum(squares));
  return {norm < kNormFloor ? kNormFloor : norm, sum(zeros) == 0.0f};
}

// The evicted keys of one head that are searched for at once, and what is found.
struct Evicted {
  int64_t count;
  const int32_t* position;
  int32_t* slot;
  float* similarity;
};

template <class Search>
class Compression {
 public:
  Compression(const CompressKv& p, const Rows& key, const Rows& value, Cutter& cutter)
      : p_(p), key_(key), value_(value), search_(p, cutter) {
    const int64_t heads = p.samples * p.heads;
    kept_ = cutter.cut<int64_t>(heads), evicted_ = cutter.cut<int64_t>(heads);
    broken_ = cutter.cut<int32_t>(heads * chunks());
    position_ = cutter.cut<int32_t>(heads * p.length), slot_ = cutter.cut<int32_t>(heads * p.length);
    order_ = cutter.cut<int32_t>(heads * p.length), starts_ = cutter.cut<int32_t>(heads * (p.slots + 1));
    similarity_ = cutter.cut<float>(heads * p.length);
  }

  void run(const Threads& threads) {
    const int64_t heads = p_.samples * p_.heads, blocks = parts_of(p_.length, Search::kLanes);
    const auto length = static_cast<double>(p_.length * heads), slots = static_cast<double>(p_.slots * heads);
    const auto rows = length * static_cast<double>(p_.dim + p_.dim_value);
    if (p_.merge != Merge::drop) {
      for_each(threads, heads, length, [&](int64_t h) { list(h); });
      for_each(threads, heads * chunks(), slots * static_cast<double>(p_.dim),
               [&](int64_t i) { pack(i / chunks(), i % chunks()); });
      for_each(threads, heads * blocks, length * static_cast<double>(p_.slots * p_.dim),
               [&](int64_t i) { find(i / blocks, i % blocks); });
      for_each(threads, heads, length, [&](int64_t h) { sort(h); });
    }
    for_each(threads, heads * chunks(), rows, [&](int64_t i) { merge(i / chunks(), i % chunks()); });
  }

 private:
  int64_t chunks() const { return parts_of(p_.slots, kChunk); }
  const int64_t* index(int64_t h) const { return p_.index + h * p_.slots; }

  // Positions that are valid and do not stay, in order; none where nothing stays.
  void list(int64_t h) {
    const int64_t* index = this->index(h);
    const unsigned char* valid = p_.valid ? p_.valid + h / p_.heads * p_.length : nullptr;
    int64_t kept = 0, evicted = 0;
    for (int32_t t = 0; t < p_.length; ++t) {
      if (kept < p_.slots && index[kept] == t) {
        ++kept;
      } else if (!valid || valid[t]) {
        position_[h * p_.length + evicted++] = t;
      }
    }
    kept_[h] = kept, evicted_[h] = kept > 0 ? evicted : 0;
  }

  // `broken_` gets the first survivor of the chunk that is not finite: no key is nearer to another one.
  void pack(int64_t h, int64_t chunk) {
    const int64_t first = chunk * kChunk, count = std::min(kept_[h] - first, kChunk);
    broken_[h * chunks() + chunk] = count > 0 ? search_.pack(h, index(h), first, count) : -1;
  }

  void find(int64_t h, int64_t block) {
    const int64_t first = block * Search::kLanes, count = std::min(evicted_[h] - first, Search::kLanes);
    if (count <= 0) return;
    const int64_t at = h * p_.length + first;
    search_.find(h, kept_[h], {count, position_ + at, slot_ + at, similarity_ + at});
    int32_t broken = -1;
    for (int64_t i = 0; i < chunks() && broken < 0; ++i) broken = broken_[h * chunks() + i];
    for (int64_t i = 0; i < count; ++i) {
      if (similarity_[at + i] != similarity_[at + i]) {
        slot_[at + i] = 0;  // all its similarities are NaN
      } else if (broken >= 0) {
        slot_[at + i] = broken, similarity_[at + i] = kNan;
      }
    }
  }

  // Evicted keys of slot c, in order of their positions: order[starts[c]] up to order[starts[c + 1]].
  void sort(int64_t h) {
    int32_t* starts = starts_ + h * (p_.slots + 1);
    const int32_t* slot = slot_ + h * p_.length;
    std::memset(starts, 0, static_cast<size_t>(p_.slots + 1) * sizeof(int32_t));
    for (int64_t e = 0; e < evicted_[h]; ++e) ++starts[slot[e]];
    int32_t next = 0;
    for (int64_t c = 0; c <= p_.slots; ++c) {
      const int32_t count = starts[c];
      starts[c] = next;
      next += count;
    }
    // Filling moves every start to its end, the start of the next.
    for (int32_t e = 0; e < evicted_[h]; ++e) order_[h * p_.length + starts[slot[e]]++] = e;
    for (int64_t c = p_.slots; c > 0; --c) starts[c] = starts[c - 1];
    starts[0] = 0;
  }

  void merge(int64_t h, int64_t chunk) {
    for (int64_t c = chunk * kChunk; c < std::min((chunk + 1) * kChunk, p_.slots); ++c) {
      merge_row(p_.key, key_, p_.dim, h, c, p_.merge_keys);
      merge_row(p_.value, value_, p_.dim_value, h, c, true);
    }
  }

  void merge_row(const Rows& rows, const Rows& out, int64_t dim, int64_t h, int64_t c, bool merges) const {
    switch (rows.dtype) {
      case DType::bfloat16: return merge_row<BFloat16>(rows, out, dim, h, c, merges);
      case DType::float16: return merge_row<Float16>(rows, out, dim, h, c, merges);
      default: return merge_row<float>(rows, out, dim, h, c, merges);
    }
  }

  template <class T>
  void merge_row(const Rows& rows, const Rows& out, int64_t dim, int64_t h, int64_t c, bool merges) const {
    const int64_t sample = h / p_.heads, head = h % p_.heads, position = index(h)[c];
    T* to = reinterpret_cast<T*>(out.at(sample, head, c));
    const size_t bytes = static_cast<size_t>(dim) * sizeof(T);
    if (position < 0) {
      std::memset(to, 0, bytes);
      return;
    }
    const int32_t* starts = starts_ + h * (p_.slots + 1) + c;
    const T* own = reinterpret_cast<const T*>(rows.at(sample, head, position));
    if (!merges || p_.merge == Merge::drop || starts[0] == starts[1]) {
      std::memcpy(to, own, bytes);
      return;
    }
    const T* first = reinterpret_cast<const T*>(rows.at(sample, head, 0));
    const int64_t begin = starts[0], end = starts[1], base = h * p_.length;
    const float count = static_cast<float>(end - begin), half = p_.merge == Merge::pivot ? 0.5f : 0.0f;
    const Vec share(1 + half * count), all(count + 1);
    for (int64_t d = 0; d < dim; d += kWidth) {
      const int64_t n = std::min(kWidth, dim - d);
      Vec total(0.0f);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t e = base + order_[base + i];
        const float weight = p_.merge == Merge::weighted ? similarity_[e] : p_.merge == Merge::pivot ? 0.5f : 1.0f;
        total = fma(Vec(weight), Vec::load_first(first + position_[e] * rows.row + d, n), total);
      }
      (fma(share, Vec::load_first(own + d, n), total) / all).store_first(to + d, n);
    }
  }

  const CompressKv& p_;
  const Rows &key_, &value_;
  Search search_;
  int64_t *kept_, *evicted_;             // [heads]: how many
  int32_t *broken_, *starts_;            // [heads, chunks], [heads, slots + 1]
  int32_t *position_, *slot_, *order_;   // [heads, length], of which a head uses `evicted_`
  float* similarity_;                    // likewise
};

template <class Search>
void compress(const CompressKv& p, const Rows& key, const Rows& value, const Threads& threads) {
  Cutter size;
  Compression<Search>(p, key, value, size);
  const CallMemory memory(size.used());
  Cutter cutter(memory.data());
  Compression<Search>(p, key, value, cutter).run(threads);
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
