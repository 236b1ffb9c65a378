// SPDX-License-Identifier: Apache-2.0
// Attention forward and backward, a step of generation, and column sums, against plain loops in double.
#include "prompt_attention.h"

#include <algorithm>
#include <limits>

#include "check.h"
#include "key_scores.h"
#include "numbers.h"
#include "tests.h"

namespace fastprompt::tests {
namespace {

struct Case {
  int64_t samples, heads, heads_kv, tq, tk, prompts, dim;
  bool causal, masked;
};

struct Inputs {
  Case c;
  Numbers query, key, value, prompt_key, prompt_value, grad;
  std::vector<uint8_t> mask;  // [tq, tk], as bools

  Inputs(const Case& of, DType dtype)
      : c(of), query(dtype, c.samples, c.heads, c.tq, c.dim, 1), key(dtype, c.samples, c.heads_kv, c.tk, c.dim, 2),
        value(dtype, c.samples, c.heads_kv, c.tk, c.dim, 3), prompt_key(dtype, 1, c.heads_kv, c.prompts, c.dim, 4),
        prompt_value(dtype, 1, c.heads_kv, c.prompts, c.dim, 5), grad(dtype, c.samples, c.heads, c.tq, c.dim, 6) {
    for (int64_t i = 0; i < c.tq * c.tk; ++i) mask.push_back(i * 7 % 5 != 0);
  }

  PromptAttention problem() {
    PromptAttention p;
    p.samples = c.samples, p.heads = c.heads, p.heads_kv = c.heads_kv, p.tq = c.tq, p.tk = c.tk, p.dim = c.dim;
    p.prompts = c.prompts, p.causal = c.causal, p.scale = 0.3f;
    p.query = query.rows(), p.key = key.rows(), p.value = value.rows();
    p.prompt_key = prompt_key.rows(), p.prompt_value = prompt_value.rows();
    if (c.masked) p.mask = {mask.data(), DType::boolean, 0, 0, c.tk, 1};
    return p;
  }

  // Key or value j of query head h of sample s; prompts are counted first.
  double of(const Numbers& prompt, const Numbers& instance, int64_t s, int64_t h, int64_t j, int64_t d) const {
    const int64_t kv = h / (c.heads / c.heads_kv);
    return j < c.prompts ? prompt.at(kv, j, d) : instance.at(s * c.heads_kv + kv, j - c.prompts, d);
  }
  bool hidden(int64_t i, int64_t j) const {
    const int64_t k = j - c.prompts;
    return k >= 0 && ((c.causal && k > i + c.tk - c.tq) || (c.masked && !mask[static_cast<size_t>(i * c.tk + k)]));
  }
};

// What plain loops give: output, lse, and the gradients of all keys of every sample, prompts first.
struct Exact {
  std::vector<double> out, lse, query, key, value;
  const Case& c;
  int64_t keys;

  explicit Exact(const Inputs& in) : c(in.c), keys(c.prompts + c.tk) {
    const int64_t rows = c.samples * c.heads * c.tq, own = c.samples * c.heads_kv * keys * c.dim;
    out.resize(static_cast<size_t>(rows * c.dim)), query.resize(out.size()), lse.resize(static_cast<size_t>(rows));
    key.resize(static_cast<size_t>(own)), value.resize(key.size());
    for (int64_t r = 0; r < rows; ++r) row(in, r);
  }

  double& of_key(std::vector<double>& x, int64_t s, int64_t h, int64_t j, int64_t d) const {
    const int64_t kv = h / (c.heads / c.heads_kv);
    return x[static_cast<size_t>(((s * c.heads_kv + kv) * keys + j) * c.dim + d)];
  }

 private:
  void row(const Inputs& in, int64_t r) {
    const int64_t i = r % c.tq, h = r / c.tq % c.heads, s = r / c.tq / c.heads, head = s * c.heads + h;
    const auto at = [&](std::vector<double>& x, int64_t d) -> double& { return x[static_cast<size_t>(r * c.dim + d)]; };
    std::vector<double> p(static_cast<size_t>(keys)), dp(p.size());
    double total = 0, delta = 0;
    for (int64_t j = 0; j < keys; ++j) {
      double score = 0;
      for (int64_t d = 0; d < c.dim; ++d) {
        score += 0.3f * in.query.at(head, i, d) * in.of(in.prompt_key, in.key, s, h, j, d);
      }
      total += p[static_cast<size_t>(j)] = in.hidden(i, j) ? 0 : std::exp(score);
    }
    lse[static_cast<size_t>(r)] = std::log(total);
    for (int64_t j = 0; j < keys; ++j) {
      double& weight = p[static_cast<size_t>(j)];
      weight = total > 0 ? weight / total : 0;
      for (int64_t d = 0; d < c.dim; ++d) {
        const double v = in.of(in.prompt_value, in.value, s, h, j, d), g = in.grad.at(head, i, d);
        at(out, d) += weight * v;
        dp[static_cast<size_t>(j)] += g * v;
        of_key(value, s, h, j, d) += weight * g;
      }
      delta += weight * dp[static_cast<size_t>(j)];
    }
    for (int64_t j = 0; j < keys; ++j) {
      const double ds = 0.3f * p[static_cast<size_t>(j)] * (dp[static_cast<size_t>(j)] - delta);
      for (int64_t d = 0; d < c.dim; ++d) {
        at(query, d) += ds * in.of(in.prompt_key, in.key, s, h, j, d);
        of_key(key, s, h, j, d) += ds * in.query.at(head, i, d);
      }
    }
  }
};

// Room for a result, as large as `like`, filled with NaN.
Numbers blank(const Numbers& like) {
  Numbers x = like;
  std::fill(x.floats.begin(), x.floats.end(), std::numeric_limits<float>::quiet_NaN());
  std::fill(x.halves.begin(), x.halves.end(), uint16_t{0x7fc0});
  return x;
}

void check_case(const Case& c, DType dtype, Isa isa) {
  Inputs in(c, dtype);
  Exact want(in);
  const auto p = in.problem();
  const double allowed = dtype == DType::float32 ? 2e-5 : 4e-2;
  Numbers out = blank(in.query), dq = out, dk = blank(in.key), dv = dk, dpk = blank(in.prompt_key), dpv = dpk;
  std::vector<float> lse(want.lse.size());
  const Rows lse_rows{lse.data(), DType::float32, c.heads * c.tq, c.tq, 1};
  prompt_attention_forward(p, out.rows(), lse_rows, isa, threads(3));
  PromptAttentionGrads g;
  g.grad_out = in.grad.rows(), g.out = out.rows(), g.lse = lse_rows;
  g.query = dq.rows(), g.key = dk.rows(), g.value = dv.rows();
  g.prompt_key = dpk.rows(), g.prompt_value = dpv.rows();
  prompt_attention_backward(p, g, isa, threads(3));
  bool right = true;
  for (int64_t r = 0; r < c.samples * c.heads * c.tq; ++r) {
    const double level = want.lse[static_cast<size_t>(r)], found = lse[static_cast<size_t>(r)];
    right &= level == found || close(found, level, allowed);
    for (int64_t d = 0; d < c.dim; ++d) {
      right &= close(out.at(0, r, d), want.out[static_cast<size_t>(r * c.dim + d)], allowed);
      right &= close(dq.at(0, r, d), want.query[static_cast<size_t>(r * c.dim + d)], 4 * allowed);
    }
  }
  for (int64_t kv = 0; kv < c.heads_kv; ++kv) {
    const int64_t h = kv * (c.heads / c.heads_kv);
    for (int64_t j = 0; j < want.keys; ++j) {
      for (int64_t d = 0; d < c.dim; ++d) {
        double sum_key = 0, sum_value = 0;
        for (int64_t s = 0; s < c.samples; ++s) {
          const double key = want.of_key(want.key, s, h, j, d), value = want.of_key(want.value, s, h, j, d);
          sum_key += key, sum_value += value;
          if (j < c.prompts) continue;
          right &= close(dk.at(s * c.heads_kv + kv, j - c.prompts, d), key, 8 * allowed);
          right &= close(dv.at(s * c.heads_kv + kv, j - c.prompts, d), value, 8 * allowed);
        }
        if (j >= c.prompts) continue;
        right &= close(dpk.at(kv, j, d), sum_key, 16 * allowed);
        right &= close(dpv.at(kv, j, d), sum_value, 16 * allowed);
      }
    }
  }
  if (!right) std::printf("level %s, dtype %d, %d queries, %d keys\n", isa_name(isa), int(dtype), int(c.tq), int(c.tk));
  CHECK(right);
}

// Column sums over all rows: the softmax weights that every key receives.
void check_key_scores(DType dtype, Isa isa) {
  const Case c{2, 4, 2, 37, 41, 0, 24, true, false};
  Inputs in(c, dtype);
  Exact want(in);
  std::vector<float> lse(want.lse.begin(), want.lse.end());
  std::vector<float> scores(static_cast<size_t>(c.samples * c.heads_kv * c.tk), std::nanf(""));
  KeyScores p;
  p.samples = c.samples, p.heads = c.heads, p.heads_kv = c.heads_kv, p.tq = c.tq, p.tk = c.tk, p.dim = c.dim;
  p.query = in.query.rows(), p.key = in.key.rows(), p.scale = 0.3f, p.reduce = GroupReduce::sum;
  p.lse = {lse.data(), DType::float32, c.heads * c.tq, c.tq, 1};
  key_scores(p, {scores.data(), DType::float32, c.heads_kv * c.tk, c.tk, 1}, isa, threads(3));
  // All rows see a key, so what they give away adds up to their number.
  for (int64_t s = 0; s < c.samples; ++s) {
    double total = 0;
    for (int64_t i = 0; i < c.heads_kv * c.tk; ++i) total += scores[static_cast<size_t>(s * c.heads_kv * c.tk + i)];
    CHECK(close(total, static_cast<double>(c.heads * c.tq), 1e-3 * static_cast<double>(c.heads * c.tq)));
  }
}

}  // namespace

void prompt_attention(bool small) {
  const std::vector<Case> cases = {
      {2, 4, 2, 19, 23, 5, 20, false, false},
      {1, 2, 1, 33, 40, 3, 16, true, true},
      {1, 4, 2, 1, 70, 2, 24, false, true},
      {2, 2, 2, 5, 0, 3, 7, false, false},
      {1, 2, 2, 65, 90, 0, 64, true, false},
  };
  for (const Isa isa : levels()) {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      for (const Case& c : cases) {
        if (!small || c.tq < 60) check_case(c, dtype, isa);
      }
      check_key_scores(dtype, isa);
    }
  }
}

}  // namespace fastprompt::tests
