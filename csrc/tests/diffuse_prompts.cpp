// SPDX-License-Identifier: Apache-2.0
// diffuse_prompts against its formula in double, at every level: memory is exactly as large as what lies in it.
#include "diffuse_prompts.h"

#include <algorithm>
#include <cstring>

#include "check.h"
#include "tests.h"

namespace fastprompt::tests {
namespace {

uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

// A matrix in the type of a test, whose rows are `row` >= columns elements apart.
struct Matrix {
  Matrix(int64_t rows, int64_t columns, int64_t apart, DType type, unsigned seed) : dtype(type), row(apart) {
    const auto values = normal(rows ? (rows - 1) * apart + columns : 0, seed);
    bytes.resize(values.size() * static_cast<size_t>(size_of(type)));
    for (size_t i = 0; i < values.size(); ++i) {
      if (type == DType::float32) {
        std::memcpy(&bytes[4 * i], &values[i], 4);
      } else {
        const uint16_t half = narrow(values[i]);
        std::memcpy(&bytes[2 * i], &half, 2);
      }
    }
  }
  double at(int64_t r, int64_t c) const {
    const auto i = static_cast<size_t>(r * row + c);
    float x;
    if (dtype == DType::float32) {
      std::memcpy(&x, &bytes[4 * i], 4);
    } else {
      uint16_t half;
      std::memcpy(&half, &bytes[2 * i], 2);
      x = widen(half);
    }
    return x;
  }
  Rows rows(int64_t tokens) { return {bytes.data(), dtype, tokens * row, 0, row}; }

  DType dtype;
  int64_t row;
  std::vector<char> bytes;
};

struct Case {
  int64_t samples, tokens, width, prompts;
  bool softmax, rowmax;
};

struct Found {
  Matrix out, dx, dbase, dvalues, dkeys;
  float dscale = 0;
};

class Problem {
 public:
  Problem(const Case& c, DType type)
      : c_(c), type_(type), x_(rows(), c.width, c.width + 3, type, 1), base_(rows(), c.width, c.width, type, 2),
        grad_(rows(), c.width, c.width + 1, type, 3), values_(c.prompts, c.width, c.width, DType::float32, 4),
        keys_(c.prompts, c.width, c.width + 5, DType::float32, 5) {}

  int64_t rows() const { return c_.samples * c_.tokens; }

  Found run(Isa isa, int count) {
    Found f{empty(rows(), type_), empty(rows(), type_), empty(rows(), type_), empty(c_.prompts, DType::float32),
            empty(c_.prompts, DType::float32)};
    DiffusePrompts p;
    p.samples = c_.samples, p.tokens = c_.tokens, p.width = c_.width, p.prompts = c_.prompts;
    p.x = x_.rows(c_.tokens), p.base = base_.rows(c_.tokens), p.values = values_.rows(0), p.keys = keys_.rows(0);
    p.factor = 0.5f, p.softmax = c_.softmax, p.rowmax = c_.rowmax;
    diffuse_prompts_forward(p, f.out.rows(c_.tokens), isa, threads(count));
    DiffusePromptsGrads g;
    g.grad_out = grad_.rows(c_.tokens), g.x = f.dx.rows(c_.tokens), g.base = f.dbase.rows(c_.tokens);
    g.values = f.dvalues.rows(0), g.keys = f.dkeys.rows(0), g.log_scale = &f.dscale;
    diffuse_prompts_backward(p, g, isa, threads(count));
    return f;
  }

  // Checks what was found; prompts are rounded as x is.
  void check(const Found& f) const {
    const auto c = static_cast<size_t>(c_.width), n = static_cast<size_t>(c_.prompts);
    std::vector<double> dvalues(n * c), dkeys(n * c);
    double dscale = 0, worst = 0;
    const auto compare = [&](double got, double want, double size) {
      worst = std::max(worst, std::abs(got - want) / (size + std::abs(want)));
    };
    for (int64_t r = 0; r < rows(); ++r) {
      const Row row = activate(r);
      for (int64_t d = 0; d < c_.width; ++d) {
        double read = 0, dx = 0;
        for (size_t j = 0; j < n; ++j) {
          read += row.active[j] * rounded(values_, j, d);
          dx += row.slope[j] * rounded(keys_, j, d);
          dvalues[j * c + static_cast<size_t>(d)] += 0.5 * row.weight * row.active[j] * grad_.at(r, d);
          dkeys[j * c + static_cast<size_t>(d)] += row.slope[j] * x_.at(r, d);
        }
        const double out = 0.5 * (base_.at(r, d) + row.weight * read);
        compare(f.out.at(r, d), out, 100);
        compare(f.dx.at(r, d), dx, 1000);
        compare(f.dbase.at(r, d), 0.5 * grad_.at(r, d), 1);
        dscale += out * grad_.at(r, d);
      }
    }
    for (size_t i = 0; i < n * c; ++i) {
      const auto j = static_cast<int64_t>(i / c), d = static_cast<int64_t>(i % c);
      compare(f.dvalues.at(j, d), dvalues[i], 1000);
      compare(f.dkeys.at(j, d), dkeys[i], 1000);
    }
    compare(f.dscale, dscale, 1e5);
    CHECK(worst < (type_ == DType::float32 ? 1e-5 : 2e-2));
  }

 private:
  struct Row {
    std::vector<double> active, slope;
    double weight = 1;
  };

  Matrix empty(int64_t count, DType type) const { return {count, c_.width, c_.width, type, 6}; }

  double rounded(const Matrix& m, size_t j, int64_t d) const {
    const auto x = static_cast<float>(m.at(static_cast<int64_t>(j), d));
    return type_ == DType::float32 ? x : widen(narrow(x));
  }

  Row activate(int64_t r) const {
    const auto n = static_cast<size_t>(c_.prompts);
    Row row{std::vector<double>(n), std::vector<double>(n)};
    double sum = 0, mean = 0, top = -1e300, most = 0;
    for (size_t j = 0; j < n; ++j) {
      for (int64_t d = 0; d < c_.width; ++d) row.active[j] += x_.at(r, d) * rounded(keys_, j, d);
      top = std::max(top, row.active[j]);
    }
    for (auto& a : row.active) sum += a = c_.softmax ? std::exp(a - top) : std::max(a, 0.0);
    for (auto& a : row.active) most = std::max(most, a = c_.softmax ? a / sum : a);
    if (c_.rowmax && n) row.weight = most;
    for (size_t j = 0; j < n; ++j) {
      for (int64_t d = 0; d < c_.width; ++d) row.slope[j] += 0.5 * row.weight * grad_.at(r, d) * rounded(values_, j, d);
      mean += row.active[j] * row.slope[j];
    }
    for (size_t j = 0; j < n; ++j) {
      row.slope[j] = c_.softmax ? row.active[j] * (row.slope[j] - mean) : row.active[j] > 0 ? row.slope[j] : 0;
    }
    return row;
  }

  const Case c_;
  const DType type_;
  Matrix x_, base_, grad_, values_, keys_;
};

}  // namespace

void diffuse_prompts(bool small) {
  std::vector<Case> cases = {{1, 3, 5, 2, false, true}, {2, 17, 33, 19, true, true}, {1, 5, 7, 0, false, true}};
  if (!small) {
    cases.push_back({2, 40, 64, 33, false, false});
    cases.push_back({3, 220, 35, 40, false, true});
    cases.push_back({0, 5, 7, 3, true, true});
  }
  for (const Case& c : cases) {
    for (const DType type : {DType::float32, DType::bfloat16}) {
      Problem problem(c, type);
      for (const Isa isa : levels()) {
        const Found one = problem.run(isa, 1), many = problem.run(isa, 3);
        problem.check(one);
        CHECK(one.out.bytes == many.out.bytes && one.dx.bytes == many.dx.bytes && one.dkeys.bytes == many.dkeys.bytes);
        CHECK(one.dvalues.bytes == many.dvalues.bytes && one.dscale == many.dscale);
      }
    }
  }
}

}  // namespace fastprompt::tests
