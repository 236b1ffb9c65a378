// SPDX-License-Identifier: Apache-2.0
// Kernels of decode.h, written once with `Vec`: lanes along the head size.
#pragma once

#include "attention_blocks.h"
#include "vec.h"

namespace fastprompt::FASTPROMPT_NAMESPACE {

// Rows at once, so that sums stay in registers; vectors of the head size at once.
constexpr int kRows = kWidth == 16 ? 4 : 2, kVecs = kWidth == 16 ? 4 : 2;
// Keys of a range; keys that are read again for the next rows while they are in the nearest cache.
constexpr int64_t kDecodeRange = 512, kNearKeys = 64;

// Calls f with the number of rows, at most kRows, as a type.
template <class Function>
inline void with_rows(int64_t rows, const Function& f) {
  if constexpr (kRows == 4) {
    if (rows >= 4) return f(std::integral_constant<int, 4>());
    if (rows == 3) return f(std::integral_constant<int, 3>());
  }
  if (rows >= 2) return f(std::integral_constant<int, 2>());
  return f(std::integral_constant<int, 1>());
}

// n rows of keys or values, of `left` up to the end of their range. Rows further on are fetched ahead, which processors
// do not do by themselves for as long a way as memory needs; `left` is 0 where rows are in the nearest cache already.
template <class T>
struct Stream {
  const T* data;
  int64_t stride, n, left;

  // Always inline: GCC 12 drops calls of a function that does nothing but fetch.
  __attribute__((always_inline)) void fetch_ahead(int64_t j, int64_t from, int64_t count) const {
    constexpr int64_t distance = 32, line = 64 / static_cast<int64_t>(sizeof(T));
    if (!left) return;
    const T* row = data + std::min(j + distance, left - 1) * stride + from;
    for (int64_t d = 0; d < count; d += line) __builtin_prefetch(row + d);
  }
};

// Products of M queries (dense rows, zero behind `dim`) and keys: scores[m][j], written up to a whole vector of keys.
template <int M, class T>
inline void score_keys(const float* queries, int64_t width, const Stream<T>& keys, int64_t dim, float* scores,
                       int64_t scores_stride) {
  const int64_t whole = dim / kWidth * kWidth;
  for (int64_t first = 0; first < keys.n; first += kWidth) {
    Vec parts[M][kWidth / 4];
    for (int64_t part = 0; part < kWidth / 4; ++part) {
      const T* rows[4];
      for (int64_t u = 0; u < 4; ++u) {
        const int64_t j = std::min(first + 4 * part + u, keys.n - 1);
        rows[u] = keys.data + j * keys.stride;
        keys.fetch_ahead(j, 0, dim);
      }
      Vec sum[M][4];
      for (int m = 0; m < M; ++m) {
        for (int u = 0; u < 4; ++u) sum[m][u] = Vec(0.0f);
      }
      const auto add = [&](int64_t d, auto load) {
        Vec k[4];
        for (int u = 0; u < 4; ++u) k[u] = load(rows[u] + d);
        for (int m = 0; m < M; ++m) {
          const Vec q = Vec::load(queries + m * width + d);
          for (int u = 0; u < 4; ++u) sum[m][u] = fma(q, k[u], sum[m][u]);
        }
      };
      for (int64_t d = 0; d < whole; d += kWidth) add(d, [](const T* at) { return Vec::load(at); });
      if (whole < dim) add(whole, [&](const T* at) { return Vec::load_first(at, dim - whole); });
      for (int m = 0; m < M; ++m) parts[m][part] = sums_of_four(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
    }
    for (int m = 0; m < M; ++m) sums(parts[m]).store(scores + m * scores_stride + first);
  }
}

// Adds N vectors of weighted values, from element d on, to those of M sums; of the last vector `tail` elements, 0: all.
template <int M, int N, class T>
inline void add_vectors(const float* weights, int64_t weights_stride, const Stream<T>& values, int64_t d, int64_t tail,
                        float* sums, int64_t sums_stride) {
  Vec sum[M][N];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < N; ++v) sum[m][v] = Vec::load(sums + m * sums_stride + d + v * kWidth);
  }
  for (int64_t j = 0; j < values.n; ++j) {
    const T* row = values.data + j * values.stride + d;
    values.fetch_ahead(j, d, N * kWidth);
    Vec x[N];
    for (int v = 0; v < N; ++v) {
      x[v] = v + 1 == N && tail ? Vec::load_first(row + v * kWidth, tail) : Vec::load(row + v * kWidth);
    }
    for (int m = 0; m < M; ++m) {
      const Vec weight(weights[m * weights_stride + j]);
      for (int v = 0; v < N; ++v) sum[m][v] = fma(weight, x[v], sum[m][v]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < N; ++v) sum[m][v].store(sums + m * sums_stride + d + v * kWidth);
  }
}

// Adds weighted values to M sums.
template <int M, class T>
inline void add_values(const float* weights, int64_t weights_stride, const Stream<T>& values, int64_t dim, float* sums,
                       int64_t sums_stride) {
  int64_t d = 0;
  for (; d + kVecs * kWidth <= dim; d += kVecs * kWidth) {
    add_vectors<M, kVecs>(weights, weights_stride, values, d, 0, sums, sums_stride);
  }
  for (; d < dim; d += kWidth) {
    add_vectors<M, 1>(weights, weights_stride, values, d, dim - d < kWidth ? dim - d : 0, sums, sums_stride);
  }
}

// What the keys of one range give to the query rows of a key head.
struct Partial {
  float* max;   // [rows], in units of log2
  float* sum;   // [rows]; 0: the range shows nothing to that row
  float* out;   // [rows][width], not yet divided
};

// One call, its rows and its ranges.
class Decode {
 public:
  Decode(const PromptAttention& p, const int64_t* blocks) : p_(p), blocks_(blocks) {
    rows_ = p.groups() * p.tq;
    width_ = round_up(p.dim, 16);
    int64_t most = blocks ? 0 : p.prompts;
    for (int64_t i = 0; blocks && i < p.samples * p.heads_kv; ++i) most = std::max(most, blocks[i + 1] - blocks[i]);
    prompt_ranges_ = ranges_of(most);
    ranges_ = prompt_ranges_ + ranges_of(p.tk);
    partial_size_ = round_up(rows_ * (2 + width_), 16);
  }

  int64_t ranges() const { return ranges_; }
  int64_t heads() const { return p_.samples * p_.heads_kv; }
  int64_t partials() const { return heads() * ranges_ * partial_size_; }

  // Range `range` of key head `h` of sample `s`, into `partials`.
  void attend(int64_t s, int64_t h, int64_t range, float* partials) const {
    switch (p_.query.dtype) {
      case DType::bfloat16: return attend<BFloat16>(s, h, range, partials);
      case DType::float16: return attend<Float16>(s, h, range, partials);
      default: return attend<float>(s, h, range, partials);
    }
  }

  void merge(int64_t s, int64_t h, float* partials, const Rows& out, const Rows& lse) const;

 private:
  template <class T>
  struct Keys {
    const T *key, *value;
    int64_t key_row, value_row, count;
    int64_t first;  // number of the first instance key; below 0: prompts, which all rows see

    void drop(int64_t n) { key += n * key_row, value += n * value_row, first += n, count -= n; }
  };

  static int64_t ranges_of(int64_t keys) { return (keys + kDecodeRange - 1) / kDecodeRange; }

  Partial partial(int64_t s, int64_t h, int64_t range, float* partials) const {
    float* at = partials + ((s * p_.heads_kv + h) * ranges_ + range) * partial_size_;
    return {at + rows_ * width_, at + rows_ * (width_ + 1), at};
  }

  // Query row r of a key head.
  int64_t head_of(int64_t h, int64_t r) const { return h * p_.groups() + r / p_.tq; }
  int64_t query_of(int64_t r) const { return r % p_.tq; }

  template <class T>
  void attend(int64_t s, int64_t h, int64_t range, float* partials) const;
  template <class T>
  Keys<T> keys_of(int64_t s, int64_t h, int64_t range, T* rounded) const;
  template <class T>
  void softmax_row(int64_t r, const Keys<T>& keys, const float* bias, float* scores, const Partial& to) const;
  int64_t biases() const;
  void read_mask(int64_t s, int64_t h, int64_t row, int64_t first, int64_t count, float* bias) const;

  const PromptAttention& p_;
  const int64_t* blocks_;
  int64_t rows_, width_, prompt_ranges_, ranges_, partial_size_;
};

// The keys of a range, of equal lengths in a segment. `rounded`: room for prompts of another type.
template <class T>
inline Decode::Keys<T> Decode::keys_of(int64_t s, int64_t h, int64_t range, T* rounded) const {
  const bool prompts = range < prompt_ranges_;
  const int64_t i = s * p_.heads_kv + h;
  const int64_t all = !prompts ? p_.tk : blocks_ ? blocks_[i + 1] - blocks_[i] : p_.prompts;
  const int64_t number = prompts ? range : range - prompt_ranges_, ranges = ranges_of(all);
  if (number >= ranges) return {};
  const int64_t each = round_up((all + ranges - 1) / ranges, 16);
  const int64_t begin = std::min(all, number * each), count = std::min(all - begin, each);
  if (!prompts) {
    return {reinterpret_cast<const T*>(p_.key.at(s, h, begin)), reinterpret_cast<const T*>(p_.value.at(s, h, begin)),
            p_.key.row, p_.value.row, count, begin};
  }
  const auto at = [&](const Rows& x, int64_t j) {
    return blocks_ ? x.at(0, 0, blocks_[i] + j) : x.at(p_.prompt_of(s), h, j);
  };
  const auto ready = [&](const Rows& x, T* to) {
    if (x.dtype == p_.query.dtype) return reinterpret_cast<const T*>(at(x, begin));
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t d = 0; d < p_.dim; d += kWidth) {
        load_first(at(x, begin + j), x.dtype, d, p_.dim - d).store_first(to + j * width_ + d, p_.dim - d);
      }
    }
    return static_cast<const T*>(to);
  };
  const auto row = [&](const Rows& x) { return x.dtype == p_.query.dtype ? x.row : width_; };
  return {ready(p_.prompt_key, rounded), ready(p_.prompt_value, rounded + kDecodeRange * width_), row(p_.prompt_key),
          row(p_.prompt_value), count, -kDecodeRange};
}

// How many different rows of a mask a key head has.
inline int64_t Decode::biases() const {
  const bool shared = (p_.mask.head == 0 || p_.groups() == 1) && (p_.mask.query == 0 || p_.tq == 1);
  return shared ? 1 : rows_;
}

// Row `row` of the mask over `count` instance keys, in units of log2.
inline void Decode::read_mask(int64_t s, int64_t h, int64_t row, int64_t first, int64_t count, float* bias) const {
  const Mask& mask = p_.mask;
  const int64_t start = s * mask.sample + head_of(h, row) * mask.head + query_of(row) * mask.query + first * mask.key;
  const char* at = static_cast<const char*>(mask.data) + start * size_of(mask.dtype);
  if (mask.dtype == DType::boolean) {
    for (int64_t j = 0; j < count; ++j) bias[j] = at[j * mask.key] ? 0.0f : -kInfinity;
  } else if (mask.key == 1) {
    for (int64_t j = 0; j < count; j += kWidth) {
      (load_first(at, mask.dtype, j, count - j) * Vec(kLog2e)).store_first(bias + j, count - j);
    }
  } else {
    for (int64_t j = 0; j < count; ++j) {
      (load_first(at, mask.dtype, j * mask.key, 1) * Vec(kLog2e)).store_first(bias + j, 1);
    }
  }
}

// Products of row r become weights, relative to the row's maximum.
template <class T>
inline void Decode::softmax_row(int64_t r, const Keys<T>& keys, const float* bias, float* scores,
                                const Partial& to) const {
  alignas(kAlignment) static constexpr float numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t last = p_.causal && keys.first >= 0 ? query_of(r) + p_.tk - p_.tq - keys.first : keys.count - 1;
  const int64_t visible = std::max<int64_t>(0, std::min(keys.count, last + 1)), end = round_up(keys.count, kWidth);
  const Vec hidden(-kInfinity), scale(p_.scale * kLog2e);
  Vec highest = hidden;
  for (int64_t j = 0; j < end; j += kWidth) {
    Vec x = Vec::load(scores + j) * scale;
    if (bias) x = x + Vec::load_first(bias + j, keys.count - j);
    if (j + kWidth > visible) x = select_less(Vec::load(numbers), Vec(static_cast<float>(visible - j)), x, hidden);
    highest = max(x, highest);
    x.store(scores + j);
  }
  float lanes[kWidth], most = -kInfinity;
  highest.store(lanes);
  for (float x : lanes) most = x > most ? x : most;
  const Vec level(most == -kInfinity ? 0.0f : most);
  Vec total(0.0f);
  for (int64_t j = 0; j < end; j += kWidth) {
    const Vec weight = exp2(Vec::load(scores + j) - level);
    weight.store(scores + j);
    total = total + weight;
  }
  to.max[r] = most, to.sum[r] = sum(total);
}

template <class T>
inline void Decode::attend(int64_t s, int64_t h, int64_t range, float* partials) const {
  struct Room {
    float *queries, *scores, *bias;
    T* rounded;
  } room;
  const bool rounds = range < prompt_ranges_ &&
                      (p_.prompt_key.dtype != p_.query.dtype || p_.prompt_value.dtype != p_.query.dtype);
  const auto cut = [&](Cutter cutter) {
    room.queries = cutter.cut<float>(rows_ * width_);
    room.scores = cutter.cut<float>(rows_ * kDecodeRange);
    room.bias = cutter.cut<float>(p_.mask ? biases() * kDecodeRange : 0);
    room.rounded = cutter.cut<T>(rounds ? 2 * kDecodeRange * width_ : 0);
    return cutter.used();
  };
  cut(Cutter(Scratch::take(cut(Cutter()))));

  const Partial to = partial(s, h, range, partials);
  std::fill_n(to.sum, rows_, 0.0f);
  Keys<T> keys = keys_of<T>(s, h, range, room.rounded);
  const bool masked = p_.mask && keys.first >= 0;
  const int64_t masks = masked ? biases() : 0;
  for (int64_t b = 0; b < masks; ++b) read_mask(s, h, b, keys.first, keys.count, room.bias + b * kDecodeRange);
  const auto hidden = [&](int64_t j) {
    for (int64_t b = 0; b < masks; ++b) {
      if (room.bias[b * kDecodeRange + j] != -kInfinity) return false;
    }
    return masked;
  };
  // Keys at both ends that no row sees, as caches of different lengths have.
  const float* bias = room.bias;
  while (keys.count && hidden(keys.count - 1)) --keys.count;
  if (!keys.count) return;
  int64_t behind = 0;
  while (hidden(behind)) ++behind;
  bias += behind;
  keys.drop(behind);

  for (int64_t r = 0; r < rows_; ++r) {
    const char* at = p_.query.at(s, head_of(h, r), query_of(r));
    for (int64_t d = 0; d < width_; d += kWidth) {
      load_first(at, p_.query.dtype, d, p_.dim - d).store(room.queries + r * width_ + d);
    }
  }
  for (int64_t j = 0; j < keys.count; j += kNearKeys) {
    const int64_t n = std::min(kNearKeys, keys.count - j);
    for (int64_t r = 0; r < rows_; r += kRows) {
      with_rows(rows_ - r, [&](auto m) {
        const Stream<T> near{keys.key + j * keys.key_row, keys.key_row, n, r == 0 ? keys.count - j : 0};
        float* scores = room.scores + r * kDecodeRange + j;
        score_keys<m>(room.queries + r * width_, width_, near, p_.dim, scores, kDecodeRange);
      });
    }
  }
  for (int64_t r = 0; r < rows_; ++r) {
    const float* of_row = !masked ? nullptr : masks == 1 ? bias : bias + r * kDecodeRange;
    softmax_row(r, keys, of_row, room.scores + r * kDecodeRange, to);
  }
  std::fill_n(to.out, rows_ * width_, 0.0f);
  for (int64_t j = 0; j < keys.count; j += kNearKeys) {
    const int64_t n = std::min(kNearKeys, keys.count - j);
    for (int64_t r = 0; r < rows_; r += kRows) {
      with_rows(rows_ - r, [&](auto m) {
        const Stream<T> near{keys.value + j * keys.value_row, keys.value_row, n, r == 0 ? keys.count - j : 0};
        add_values<m>(room.scores + r * kDecodeRange + j, kDecodeRange, near, p_.dim, to.out + r * width_, width_);
      });
    }
  }
}

// The rows of a key head from what its ranges gave, in their order.
inline void Decode::merge(int64_t s, int64_t h, float* partials, const Rows& out, const Rows& lse) const {
  constexpr int64_t step = 4 * kWidth;
  for (int64_t r = 0; r < rows_; ++r) {
    const auto used = [&](int64_t range) { return partial(s, h, range, partials).sum[r] != 0; };
    float most = -kInfinity, total = 0;
    for (int64_t i = 0; i < ranges_; ++i) {
      if (used(i)) most = std::max(most, partial(s, h, i, partials).max[r]);
    }
    for (int64_t i = 0; i < ranges_; ++i) {
      if (!used(i)) continue;
      const Partial part = partial(s, h, i, partials);
      float weights[kWidth];
      exp2(Vec(part.max[r] - most)).store(weights);
      part.max[r] = weights[0];
      total += weights[0] * part.sum[r];
    }
    char* to = out.at(s, head_of(h, r), query_of(r));
    const Vec share(total == 0 ? 0.0f : 1.0f / total);
    for (int64_t d = 0; d < p_.dim; d += step) {
      Vec sum[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
      const int64_t vecs = std::min<int64_t>(4, (p_.dim - d + kWidth - 1) / kWidth);
      for (int64_t i = 0; i < ranges_; ++i) {
        if (!used(i)) continue;
        const Partial part = partial(s, h, i, partials);
        const float* from = part.out + r * width_ + d;
        for (int64_t v = 0; v < vecs; ++v) sum[v] = fma(Vec(part.max[r]), Vec::load(from + v * kWidth), sum[v]);
      }
      for (int64_t v = 0; v < vecs; ++v) {
        store_first(sum[v] * share, to, out.dtype, d + v * kWidth, p_.dim - d - v * kWidth);
      }
    }
    const float level = total == 0 ? -kInfinity : most * kLn2 + std::log(total);
    std::memcpy(lse.at(s, head_of(h, r), query_of(r)), &level, sizeof level);
  }
}

void decode(const PromptAttention& p, const int64_t* blocks, const Rows& out, const Rows& lse, const Threads& threads) {
  const Decode call(p, blocks);
  const CallMemory partials(call.partials() * static_cast<int64_t>(sizeof(float)));
  auto* shared = reinterpret_cast<float*>(partials.data());
  const int64_t prompts = blocks ? blocks[call.heads()] - blocks[0] : p.prompts * call.heads();
  const double rows = static_cast<double>(p.groups() * p.tq);
  const double work = 4.0 * rows * static_cast<double>(p.dim * (prompts + p.tk * call.heads()));
  for_each(threads, call.heads() * call.ranges(), work, [&](int64_t task) {
    const int64_t i = task / call.ranges();
    call.attend(i / p.heads_kv, i % p.heads_kv, task % call.ranges(), shared);
  });
  for_each(threads, call.heads(), 2.0 * static_cast<double>(call.partials()), [&](int64_t i) {
    call.merge(i / p.heads_kv, i % p.heads_kv, shared, out, lse);
  });
}

}  // namespace fastprompt::FASTPROMPT_NAMESPACE
