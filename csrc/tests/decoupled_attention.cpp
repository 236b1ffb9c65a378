// SPDX-License-Identifier: Apache-2.0
// Several softmaxes added with weights, forward and backward, against plain loops in double.
#include "decoupled_attention.h"

#include <algorithm>

#include "check.h"
#include "numbers.h"
#include "tests.h"

namespace fastprompt::tests {
namespace {

struct Case {
  int64_t samples, heads, heads_kv, tq, dim;
  std::vector<int64_t> keys;  // the odd branches are shared by all samples and have a number for a weight
};

// A branch: its tensors, and the exact gradients in double.
struct Branch {
  bool shared;
  Numbers key, value, weight, dkey, dvalue, dweight;
  std::vector<double> exact_key, exact_value, exact_weight;

  Branch(const Case& c, int64_t j, DType dtype)
      : shared(j % 2), key(numbers(c, j, dtype, 10)), value(numbers(c, j, dtype, 20)), weight(weights(c, 30)),
        dkey(numbers(c, j, dtype, 40)), dvalue(numbers(c, j, dtype, 50)), dweight(weights(c, 60)),
        exact_key(key.floats.size()), exact_value(key.floats.size()), exact_weight(weight.floats.size()) {}

  double factor(int64_t head, int64_t i) const { return shared ? 0.7 : weight.at(head, i, 0); }

 private:
  Numbers numbers(const Case& c, int64_t j, DType dtype, unsigned seed) const {
    return {dtype, shared ? 1 : c.samples, c.heads_kv, c.keys[static_cast<size_t>(j)], c.dim,
            seed + static_cast<unsigned>(j)};
  }
  static Numbers weights(const Case& c, unsigned seed) { return {DType::float32, c.samples, c.heads, c.tq, 1, seed}; }
};

class Problem {
 public:
  Problem(const Case& c, DType dtype)
      : c_(c), query_(rows(dtype, 1)), grad_(rows(dtype, 2)), out_(rows(dtype, 3)), dquery_(rows(dtype, 4)),
        exact_out_(query_.floats.size()), exact_query_(query_.floats.size()) {
    for (size_t j = 0; j < c.keys.size(); ++j) branches_.emplace_back(c, static_cast<int64_t>(j), dtype);
    for (int64_t r = 0; r < c.samples * c.heads * c.tq; ++r) {
      for (Branch& b : branches_) add(b, r);
    }
  }

  void run(Isa isa, int count) {
    std::vector<KeyBranch> branches;
    for (Branch& b : branches_) {
      KeyBranch found;
      found.keys = b.key.length, found.shared = b.shared, found.key = b.key.rows(), found.value = b.value.rows();
      found.factor = 0.7f, found.key_grad = b.dkey.rows(), found.value_grad = b.dvalue.rows();
      if (!b.shared) found.weight = b.weight.rows(), found.weight_grad = b.dweight.rows();
      branches.push_back(found);
    }
    DecoupledAttention p;
    p.rows.samples = c_.samples, p.rows.heads = c_.heads, p.rows.heads_kv = c_.heads_kv, p.rows.tq = c_.tq;
    p.rows.dim = c_.dim, p.rows.scale = kScale, p.rows.query = query_.rows();
    p.branches = branches.data(), p.count = static_cast<int64_t>(branches.size());
    decoupled_attention_forward(p, out_.rows(), isa, threads(count));
    decoupled_attention_backward(p, grad_.rows(), dquery_.rows(), isa, threads(count));
  }

  void check() const {
    double worst = 0;
    const auto compare = [&](const Numbers& got, const std::vector<double>& want) {
      for (size_t i = 0; i < want.size(); ++i) {
        const auto row = static_cast<int64_t>(i) / got.dim, d = static_cast<int64_t>(i) % got.dim;
        const double error = std::abs(got.at(row / got.length, row % got.length, d) - want[i]);
        worst = std::max(worst, error / (10 + std::abs(want[i])));
      }
    };
    compare(out_, exact_out_), compare(dquery_, exact_query_);
    for (const Branch& b : branches_) {
      compare(b.dkey, b.exact_key), compare(b.dvalue, b.exact_value);
      if (!b.shared) compare(b.dweight, b.exact_weight);
    }
    CHECK(worst < (query_.dtype == DType::float32 ? 1e-5 : 1e-2));
  }

  // All that a run wrote.
  std::vector<Numbers> found() const {
    std::vector<Numbers> all = {out_, dquery_};
    for (const Branch& b : branches_) all.insert(all.end(), {b.dkey, b.dvalue, b.dweight});
    return all;
  }

 private:
  static constexpr float kScale = 0.3f;

  Numbers rows(DType dtype, unsigned seed) const { return {dtype, c_.samples, c_.heads, c_.tq, c_.dim, seed}; }

  // What a branch gives query row r, and takes from it.
  void add(Branch& b, int64_t r) {
    const int64_t i = r % c_.tq, head = r / c_.tq, h = head % c_.heads / (c_.heads / c_.heads_kv);
    const int64_t kv = b.shared ? h : head / c_.heads * c_.heads_kv + h;
    const auto n = static_cast<size_t>(b.key.length);
    std::vector<double> p(n), dp(n);
    double top = -1e300, total = 0, delta = 0;
    for (size_t j = 0; j < n; ++j) {
      for (int64_t d = 0; d < c_.dim; ++d) {
        p[j] += kScale * query_.at(head, i, d) * b.key.at(kv, static_cast<int64_t>(j), d);
        dp[j] += grad_.at(head, i, d) * b.value.at(kv, static_cast<int64_t>(j), d);
      }
      top = std::max(top, p[j]);
    }
    for (double& x : p) total += x = std::exp(x - top);
    for (size_t j = 0; j < n; ++j) delta += (p[j] /= total) * dp[j];
    const double w = b.factor(head, i);
    for (size_t j = 0; j < n; ++j) {
      const double slope = kScale * w * p[j] * (dp[j] - delta);
      for (int64_t d = 0; d < c_.dim; ++d) {
        const auto row = static_cast<int64_t>(j), at = (kv * b.key.length + row) * c_.dim + d;
        const auto here = static_cast<size_t>(r * c_.dim + d);
        exact_out_[here] += w * p[j] * b.value.at(kv, row, d);
        exact_query_[here] += slope * b.key.at(kv, row, d);
        b.exact_key[static_cast<size_t>(at)] += slope * query_.at(head, i, d);
        b.exact_value[static_cast<size_t>(at)] += w * p[j] * grad_.at(head, i, d);
      }
    }
    b.exact_weight[static_cast<size_t>(r)] = delta;
  }

  const Case c_;
  Numbers query_, grad_, out_, dquery_;
  std::vector<double> exact_out_, exact_query_;
  std::vector<Branch> branches_;
};

bool same(const std::vector<Numbers>& a, const std::vector<Numbers>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    // Halves are what is written where there are any.
    if (a[i].halves != b[i].halves || (a[i].halves.empty() && a[i].floats != b[i].floats)) return false;
  }
  return true;
}

}  // namespace

void decoupled_attention(bool small) {
  std::vector<Case> cases = {{2, 2, 1, 3, 5, {2, 3}}, {1, 1, 1, 17, 19, {0, 7, 1}}};
  if (!small) {
    cases.push_back({2, 4, 2, 70, 40, {77, 4}});
    cases.push_back({1, 1, 1, 2100, 16, {9, 5}});  // several ranges of rows
    cases.push_back({0, 2, 2, 5, 8, {3, 4}});
    cases.push_back({2, 2, 2, 0, 8, {3, 4}});
  }
  for (const Case& c : cases) {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      for (const Isa isa : levels()) {
        Problem problem(c, dtype);
        problem.run(isa, 1);
        problem.check();
        const auto one = problem.found();
        problem.run(isa, 3);
        CHECK(same(one, problem.found()));
      }
    }
  }
}

}  // namespace fastprompt::tests
