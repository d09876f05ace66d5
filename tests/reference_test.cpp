// Tests of the reference forms and of the gradient check, by hand-worked cases, by automatic
// differentiation of the forward pass and by central differences.
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <surfattn/gradcheck.hpp>
#include <surfattn/reference.hpp>
#include <unsupported/Eigen/AutoDiff>
#include <vector>

#include "support/catch.hpp"

namespace {

namespace reference = surfattn::reference;
using reference::Heads;
using reference::Index;
using reference::Mask;
using reference::Matrix;
using surfattn::gradient_error;

using Dual = Eigen::AutoDiffScalar<Eigen::VectorXd>;
using Matrices = std::vector<Matrix<double>>;

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();
const Mask no_mask;

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}

  Matrix<double> matrix(Index rows, Index cols) {
    Matrix<double> result(rows, cols);
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < cols; ++j) result(i, j) = normal_(engine_);
    }
    return result;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<double> normal_;
};

Matrix<double> entry(double value) { return Matrix<double>::Constant(1, 1, value); }

template <class S>
Matrix<S> column(S first, S second) {
  Matrix<S> result(2, 1);
  result << first, second;
  return result;
}

/// Equal bits, where NaN equals NaN.
bool identical(const Matrix<double>& a, const Matrix<double>& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return false;
  for (Index i = 0; i < a.size(); ++i) {
    const double x = a.data()[i], y = b.data()[i];
    if (!(x == y || (std::isnan(x) && std::isnan(y)))) return false;
  }
  return true;
}

/// sum dO * O + sum dL * L over the rows that have a key left.
template <class S>
S weighted_loss(const reference::Forward<S>& forward, const Matrix<double>& grad_out,
                const Matrix<double>& grad_log_sum_exp) {
  S loss(0);
  for (Index i = 0; i < forward.out.rows(); ++i) {
    for (Index c = 0; c < forward.out.cols(); ++c) {
      const S term = forward.out(i, c) * grad_out(i, c);
      loss += term;
    }
    for (Index h = 0; h < grad_log_sum_exp.cols(); ++h) {
      if (!(forward.log_sum_exp(i, h) > -1e300)) continue;
      const S term = forward.log_sum_exp(i, h) * grad_log_sum_exp(i, h);
      loss += term;
    }
  }
  return loss;
}

/// Gradients of loss (a function of a vector of matrices of any scalar) by forward-mode automatic
/// differentiation, with one derivative for every entry of every input.
template <class Loss>
Matrices automatic_gradients(const Loss& loss, const Matrices& inputs) {
  int total = 0;
  for (const auto& input : inputs) total += static_cast<int>(input.size());
  std::vector<Matrix<Dual>> duals;
  int next = 0;
  for (const auto& input : inputs) {
    duals.emplace_back(input.rows(), input.cols());
    for (Index i = 0; i < input.size(); ++i) {
      duals.back().data()[i] = Dual(input.data()[i], total, next++);
    }
  }
  const Dual value = loss(duals);
  Matrices gradients;
  next = 0;
  for (const auto& input : inputs) {
    gradients.push_back(Matrix<double>::Zero(input.rows(), input.cols()));
    if (value.derivatives().size() == 0) continue;  // the loss depends on no input
    for (Index i = 0; i < input.size(); ++i)
      gradients.back().data()[i] = value.derivatives()(next++);
  }
  return gradients;
}

/// Checks hand-written gradients both ways.
template <class Loss>
void check_gradients(const Loss& loss, const Matrices& inputs, const Matrices& analytic) {
  const Matrices automatic = automatic_gradients(loss, inputs);
  REQUIRE(analytic.size() == inputs.size());
  for (std::size_t n = 0; n < inputs.size(); ++n) {
    CAPTURE(n, analytic[n], automatic[n]);
    CHECK(gradient_error(analytic[n], automatic[n]) <= 1e-12);
    const auto of_one_input = [&](const Matrix<double>& x) {
      Matrices moved = inputs;
      moved[n] = x;
      return loss(moved);
    };
    const auto check = surfattn::check_gradient(of_one_input, inputs[n], analytic[n]);
    CAPTURE(check);
    CHECK(check.tolerance <= 1e-9);
    CHECK(check.passed());
  }
}

struct Problem {
  const char* name;
  Index query_count, key_count, width, value_width;
  Heads heads;
  bool masked;
};

/// A mask with holes, a fully masked row (1) and a key that no query attends to (2).
Mask example_mask(const Problem& problem) {
  if (!problem.masked) return {};
  Mask mask(problem.query_count, problem.key_count);
  for (Index i = 0; i < mask.rows(); ++i) {
    for (Index j = 0; j < mask.cols(); ++j) mask(i, j) = (i * i + 3 * j) % 4 != 1;
  }
  mask.row(1).setConstant(false);
  mask.col(2).setConstant(false);
  return mask;
}

const Problem problems[] = {
    {"one head", 3, 4, 2, 3, {}, false},
    {"one query, one key", 1, 1, 3, 2, {}, false},
    {"two heads", 4, 3, 2, 3, {.query = 2}, false},
    {"grouped heads", 3, 4, 2, 1, {.query = 6, .key_value = 2}, false},
    {"one head, masked", 5, 6, 3, 2, {}, true},
    {"grouped heads, masked", 5, 4, 2, 3, {.query = 4, .key_value = 2}, true},
    {"no keys", 3, 0, 2, 3, {.query = 2}, false},
    {"no queries", 0, 3, 2, 3, {.query = 2}, false},
    {"heads without columns", 3, 4, 0, 2, {.query = 2, .key_value = 1}, false},
};

struct Inputs {
  Matrix<double> q, k, v;
  Mask mask;
};

Inputs example_inputs(const Problem& p, Random& random) {
  return {random.matrix(p.query_count, p.heads.query * p.width),
          random.matrix(p.key_count, p.heads.key_value * p.width),
          random.matrix(p.key_count, p.heads.key_value * p.value_width), example_mask(p)};
}

template <class Matrices>
using scalar_of = typename Matrices::value_type::Scalar;

}  // namespace

TEMPLATE_TEST_CASE("standard form: a case worked out by hand", "[reference]", float, double,
                   long double) {
  // beta = 2, q = 1/2, k = (0, ln 3), v = (1, 5): S = (0, ln 3), W = (1/4, 3/4),
  // O = 1/4 + 15/4 = 4, L = ln(1 + 3).
  // dO = 1: dW = v = (1, 5), sum W dW = 4, dS = (1/4 (1 - 4), 3/4 (5 - 4)) = (-3/4, 3/4),
  // dq = 2 * 3/4 ln 3, dk = dS * 2 * 1/2, dv = W.
  // dL = 1 adds W to dS: dS = (-1/2, 3/2), dq = 2 * 3/2 ln 3.
  using S = TestType;
  const S ln3 = std::log(S(3));
  const Matrix<S> q = Matrix<S>::Constant(1, 1, S(0.5)), one = Matrix<S>::Ones(1, 1);
  const Matrix<S> k = column<S>(0, ln3), v = column<S>(1, 5);
  const S tolerance = 8 * std::numeric_limits<S>::epsilon();

  const auto forward = reference::attention_forward(q, k, v, 2);
  CHECK(gradient_error(forward.weights.at(0), column<S>(S(0.25), S(0.75)).transpose()) <=
        tolerance);
  CHECK(std::abs(forward.out(0, 0) - 4) <= 4 * tolerance);
  CHECK(std::abs(forward.log_sum_exp(0, 0) - std::log(S(4))) <= tolerance);

  const auto grad = reference::attention_backward(q, k, v, 2, {}, no_mask, one);
  CHECK(std::abs(grad.queries(0, 0) - S(1.5) * ln3) <= 4 * tolerance);
  CHECK(gradient_error(grad.keys, column<S>(S(-0.75), S(0.75))) <= 4 * tolerance);
  CHECK(gradient_error(grad.values, column<S>(S(0.25), S(0.75))) <= tolerance);

  const auto both = reference::attention_backward(q, k, v, 2, {}, no_mask, one, one);
  CHECK(std::abs(both.queries(0, 0) - 3 * ln3) <= 4 * tolerance);
  CHECK(gradient_error(both.keys, column<S>(S(-0.5), S(1.5))) <= 4 * tolerance);
  CHECK(gradient_error(both.values, grad.values) == 0);
}

TEMPLATE_TEST_CASE("surface form: a case worked out by hand", "[reference]", float, double,
                   long double) {
  // sigma = 2, q = 0, k = (0, a) with a^2 = 8 ln 3: S = (0, -a^2 / 8) = (0, -ln 3), W = (3/4, 1/4),
  // P = a/4, L = ln(4/3).
  // dP = 1: dW = k = (0, a), sum W dW = a/4, dS = (3/4 (-a/4), 1/4 (3a/4)) = (-3a/16, 3a/16).
  // dq = 3a/16 * (a - 0) / 4 = 3a^2/64,  dk = W + dS (q - k) / 4 = (3/4, 1/4 - 3a^2/64),
  // dsigma = 3a/16 * a^2 / 8 = 3a^3/128,  dlog pi = dS.
  using S = TestType;
  const S a = std::sqrt(8 * std::log(S(3)));
  const Matrix<S> q = Matrix<S>::Zero(1, 1), one = Matrix<S>::Ones(1, 1);
  const Matrix<S> k = column<S>(0, a);
  const S tolerance = 8 * std::numeric_limits<S>::epsilon();

  const auto forward = reference::project_forward(q, k, 2);
  CHECK(gradient_error(forward.weights.at(0), column<S>(S(0.75), S(0.25)).transpose()) <=
        tolerance);
  CHECK(std::abs(forward.out(0, 0) - a / 4) <= tolerance);
  CHECK(std::abs(forward.log_sum_exp(0, 0) - std::log(S(4) / 3)) <= tolerance);

  const auto grad = reference::project_backward(q, k, 2, {}, {}, no_mask, one);
  const S slope = 3 * a * a / 64;
  CHECK(std::abs(grad.queries(0, 0) - slope) <= tolerance);
  CHECK(gradient_error(grad.keys, column<S>(S(0.75), S(0.25) - slope)) <= tolerance);
  CHECK(std::abs(grad.bandwidth - a * slope / 2) <= tolerance);
  CHECK(gradient_error(grad.log_prior, column<S>(-3 * a / 16, 3 * a / 16)) <= tolerance);
}

TEST_CASE("a log prior weighs the keys", "[reference]") {
  // Both keys at distance 1 from q = 0: S differs by the prior alone, which has odds 1 : 3.
  const Matrix<double> q = entry(0), k = column(-1., 1.), prior = column(0., std::log(3.));
  const auto forward = reference::project_forward(q, k, 0.5, prior);
  CHECK(forward.out(0, 0) == Approx(0.5));
  CHECK(forward.log_sum_exp(0, 0) == Approx(std::log(4.) - 1 / (2 * 0.25)));
}

TEST_CASE("scores far from zero neither overflow nor vanish", "[reference]") {
  const double offset = GENERATE(-1e4, 1e4);
  // S = (offset, offset + ln 3)
  const Matrix<double> q = entry(1), k = column(offset, offset + std::log(3.));
  const auto forward = reference::attention_forward(q, k, column(1., 5.), 1);
  CHECK(forward.out(0, 0) == Approx(4).epsilon(1e-11));
  CHECK(forward.log_sum_exp(0, 0) == Approx(offset + std::log(4.)).epsilon(1e-14));
  // S = (0, offset) and (offset, 0): the larger one takes all.
  for (const auto& keys : {column(0., offset), column(offset, 0.)}) {
    const auto apart = reference::attention_forward(q, keys, keys, 1);
    CHECK(apart.out(0, 0) == std::max(offset, 0.));
    CHECK(apart.log_sum_exp(0, 0) == std::max(offset, 0.));
  }
}

TEST_CASE("sdpa prior: the surface form has the weights of standard attention", "[reference]") {
  Random random(20);
  const Heads heads{.query = 4, .key_value = 2};
  const double bandwidth = 1.3, scale = 1 / (bandwidth * bandwidth);
  const Matrix<double> q = random.matrix(5, 12), k = random.matrix(6, 6);
  const Mask mask = example_mask({"", 5, 6, 3, 3, heads, true});

  const auto surface = reference::project_forward(
      q, k, bandwidth, reference::sdpa_log_prior(k, bandwidth, heads), heads, mask);
  const auto standard = reference::attention_forward(q, k, k, scale, heads, mask);
  for (std::size_t h = 0; h < 4; ++h) {
    CHECK(gradient_error(surface.weights.at(h), standard.weights.at(h)) <= 1e-14);
  }
  CHECK(gradient_error(surface.out, standard.out) <= 1e-14);

  const Matrix<double> grad_out = random.matrix(5, 12);
  const auto grad_surface =
      reference::project_backward_sdpa(q, k, bandwidth, heads, mask, grad_out);
  const auto grad_standard = reference::attention_backward(q, k, k, scale, heads, mask, grad_out);
  CHECK(gradient_error(grad_surface.queries, grad_standard.queries) <= 1e-13);
  CHECK(gradient_error(grad_surface.keys, grad_standard.keys + grad_standard.values) <= 1e-13);
}

TEST_CASE("keys of equal norm: the uniform prior has the weights of standard attention",
          "[reference]") {
  Random random(21);
  const Matrix<double> q = random.matrix(4, 3), v = random.matrix(5, 2);
  Matrix<double> k = random.matrix(5, 3);
  k.rowwise().normalize();
  const auto surface = reference::project_forward(q, k, 0.7);
  const auto standard = reference::attention_forward(q, k, v, 1 / 0.49);
  CHECK(gradient_error(surface.weights.at(0), standard.weights.at(0)) <= 1e-14);
}

TEST_CASE("query head h reads key head h / (Hq / Hkv)", "[reference]") {
  Random random(22);
  const Heads heads{.query = 6, .key_value = 3};
  const Matrix<double> q = random.matrix(4, 12), k = random.matrix(5, 6), v = random.matrix(5, 9);
  const Matrix<double> prior = random.matrix(5, 3);
  const auto standard = reference::attention_forward(q, k, v, 0.6, heads);
  const auto surface = reference::project_forward(q, k, 0.8, prior, heads);
  for (Index h = 0; h < 6; ++h) {
    const Matrix<double> q_h = q.middleCols(2 * h, 2);
    const Matrix<double> k_h = k.middleCols(2 * (h / 2), 2), v_h = v.middleCols(3 * (h / 2), 3);
    const Matrix<double> prior_h = prior.col(h / 2);
    const auto standard_h = reference::attention_forward(q_h, k_h, v_h, 0.6);
    const auto surface_h = reference::project_forward(q_h, k_h, 0.8, prior_h);
    CHECK(identical(standard.out.middleCols(3 * h, 3), standard_h.out));
    CHECK(identical(standard.log_sum_exp.col(h), standard_h.log_sum_exp));
    CHECK(identical(surface.out.middleCols(2 * h, 2), surface_h.out));
    CHECK(identical(surface.log_sum_exp.col(h), surface_h.log_sum_exp));
  }
  CHECK(Heads{.query = 8}.key_value == 8);
}

TEST_CASE("standard form: gradients equal those of automatic and numerical differentiation",
          "[reference][gradient]") {
  const unsigned seed = GENERATE(1u, 2u);
  const bool with_log_sum_exp = GENERATE(false, true);
  for (const Problem& problem : problems) {
    CAPTURE(problem.name, seed, with_log_sum_exp);
    Random random(seed);
    const Inputs in = example_inputs(problem, random);
    const double scale = 0.7;
    const Matrix<double> grad_out =
        random.matrix(problem.query_count, problem.heads.query * problem.value_width);
    const Matrix<double> grad_log_sum_exp =
        with_log_sum_exp ? random.matrix(problem.query_count, problem.heads.query)
                         : Matrix<double>();
    const auto loss = [&](const auto& x) {
      using S = scalar_of<std::decay_t<decltype(x)>>;
      const auto forward =
          reference::attention_forward(x[0], x[1], x[2], S(scale), problem.heads, in.mask);
      return weighted_loss(forward, grad_out, grad_log_sum_exp);
    };
    const auto grad = reference::attention_backward(in.q, in.k, in.v, scale, problem.heads, in.mask,
                                                    grad_out, grad_log_sum_exp);
    check_gradients(loss, {in.q, in.k, in.v}, {grad.queries, grad.keys, grad.values});
  }
}

TEST_CASE("surface form: gradients equal those of automatic and numerical differentiation",
          "[reference][gradient]") {
  enum class Prior { uniform, per_head, shared, sdpa };
  const auto prior = GENERATE(Prior::uniform, Prior::per_head, Prior::shared, Prior::sdpa);
  const bool with_log_sum_exp = GENERATE(false, true);
  const unsigned seed = 3;
  for (const Problem& problem : problems) {
    CAPTURE(problem.name, static_cast<int>(prior), seed, with_log_sum_exp);
    Random random(seed);
    const Inputs in = example_inputs(problem, random);
    const double bandwidth = 1.2;
    const Matrix<double> grad_out = random.matrix(in.q.rows(), in.q.cols());
    const Matrix<double> grad_log_sum_exp =
        with_log_sum_exp ? random.matrix(problem.query_count, problem.heads.query)
                         : Matrix<double>();
    // What is differentiated by: an explicit prior, or zeros added to a uniform or sdpa prior.
    const Index columns = prior == Prior::shared ? 1 : problem.heads.key_value;
    Matrix<double> log_prior = Matrix<double>::Zero(in.k.rows(), columns);
    if (prior == Prior::per_head || prior == Prior::shared) {
      log_prior = random.matrix(in.k.rows(), columns);
    }
    const auto loss = [&](const auto& x) {
      using S = scalar_of<std::decay_t<decltype(x)>>;
      const S sigma = x[2](0, 0);
      Matrix<S> total = x[3];
      if (prior == Prior::sdpa) total += reference::sdpa_log_prior(x[1], sigma, problem.heads);
      const auto forward =
          reference::project_forward(x[0], x[1], sigma, total, problem.heads, in.mask);
      return weighted_loss(forward, grad_out, grad_log_sum_exp);
    };
    const auto grad =
        prior == Prior::sdpa
            ? reference::project_backward_sdpa(in.q, in.k, bandwidth, problem.heads, in.mask,
                                               grad_out, grad_log_sum_exp)
            : reference::project_backward(in.q, in.k, bandwidth,
                                          prior == Prior::uniform ? Matrix<double>() : log_prior,
                                          problem.heads, in.mask, grad_out, grad_log_sum_exp);
    check_gradients(loss, {in.q, in.k, entry(bandwidth), log_prior},
                    {grad.queries, grad.keys, entry(grad.bandwidth), grad.log_prior});
  }
}

TEST_CASE("second derivatives: the backward pass itself can be differentiated", "[reference]") {
  Random random(5);
  const Matrix<double> q = random.matrix(2, 2), k = random.matrix(3, 2);
  const Matrix<double> grad_out = random.matrix(2, 2), direction = random.matrix(2, 2);
  // g(t) = (gradient by q at q + t direction) . direction; g'(0) by both means.
  const auto slope = [&](const auto& x) {
    using S = scalar_of<std::decay_t<decltype(x)>>;
    const Matrix<S> moved = q.cast<S>() + x[0](0, 0) * direction.cast<S>();
    const auto grad = reference::project_backward(moved, Matrix<S>(k.cast<S>()), S(0.9), {}, {},
                                                  no_mask, Matrix<S>(grad_out.cast<S>()));
    S sum(0);
    for (Index i = 0; i < 4; ++i) sum += grad.queries.data()[i] * direction.data()[i];
    return sum;
  };
  const Matrices automatic = automatic_gradients(slope, {entry(0)});
  const auto at = [&](double t) { return slope(Matrices{entry(t)}); };
  CHECK(surfattn::check_gradient(at, 0.0, automatic[0](0, 0)).passed());
}

TEST_CASE("rows without keys: output 0, log-sum-exp -infinity, gradients 0", "[reference]") {
  Random random(6);
  const bool without_keys = GENERATE(false, true);
  const Index key_count = without_keys ? 0 : 3;
  const Mask mask = Mask::Constant(2, key_count, false);
  const Matrix<double> q = random.matrix(2, 4), k = random.matrix(key_count, 4);
  const Matrix<double> grad_out = random.matrix(2, 4), grad_log_sum_exp = random.matrix(2, 2);
  const Heads heads{.query = 2};

  for (const auto& forward : {reference::attention_forward(q, k, k, 0.5, heads, mask),
                              reference::project_forward(q, k, 0.5, {}, heads, mask)}) {
    CHECK(identical(forward.out, Matrix<double>::Zero(2, 4)));
    CHECK(identical(forward.log_sum_exp, Matrix<double>::Constant(2, 2, -infinity)));
    CHECK(identical(forward.weights.at(1), Matrix<double>::Zero(2, key_count)));
  }
  const auto standard =
      reference::attention_backward(q, k, k, 0.5, heads, mask, grad_out, grad_log_sum_exp);
  const auto surface =
      reference::project_backward(q, k, 0.5, {}, heads, mask, grad_out, grad_log_sum_exp);
  const Matrix<double> zero_q = Matrix<double>::Zero(2, 4);
  const Matrix<double> zero_k = Matrix<double>::Zero(key_count, 4);
  CHECK(identical(standard.queries, zero_q));
  CHECK(identical(standard.keys, zero_k));
  CHECK(identical(standard.values, zero_k));
  CHECK(identical(surface.queries, zero_q));
  CHECK(identical(surface.keys, zero_k));
  CHECK(surface.bandwidth == 0);
  CHECK(identical(surface.log_prior, Matrix<double>::Zero(key_count, 2)));
}

TEST_CASE("heads without columns weigh all keys alike", "[reference]") {
  const Matrix<double> q(2, 0), k(4, 0), v = Matrix<double>::Identity(4, 4);
  const auto forward = reference::attention_forward(q, k, v, 1);
  CHECK(identical(forward.out, Matrix<double>::Constant(2, 4, 0.25)));
  CHECK(forward.log_sum_exp(1, 0) == Approx(std::log(4.)));
}

TEST_CASE("NaN behind a mask changes no bit", "[reference][mask]") {
  Random random(7);
  const Heads heads{.query = 4, .key_value = 2};
  const Mask mask = example_mask({"", 5, 4, 2, 2, heads, true});
  const double poison = GENERATE(as<double>{}, not_a_number, infinity);
  const Matrix<double> q = random.matrix(5, 8), k = random.matrix(4, 4), v = random.matrix(4, 4);
  const Matrix<double> grad_out = random.matrix(5, 8), grad_log_sum_exp = random.matrix(5, 4);
  const Matrix<double> prior = random.matrix(4, 2);
  // Row 1 has no key, key 2 no query.
  Matrix<double> q_bad = q, k_bad = k, v_bad = v, out_bad = grad_out, sum_bad = grad_log_sum_exp;
  Matrix<double> prior_bad = prior;
  for (auto* matrix : {&q_bad, &out_bad, &sum_bad}) matrix->row(1).setConstant(poison);
  for (auto* matrix : {&k_bad, &v_bad, &prior_bad}) matrix->row(2).setConstant(poison);

  const auto forward = reference::attention_forward(q, k, v, 0.5, heads, mask);
  const auto forward_bad = reference::attention_forward(q_bad, k_bad, v_bad, 0.5, heads, mask);
  CHECK(identical(forward.out, forward_bad.out));
  CHECK(identical(forward.log_sum_exp, forward_bad.log_sum_exp));
  CHECK(identical(forward.weights.at(3), forward_bad.weights.at(3)));

  const auto grad =
      reference::attention_backward(q, k, v, 0.5, heads, mask, grad_out, grad_log_sum_exp);
  const auto grad_bad =
      reference::attention_backward(q_bad, k_bad, v_bad, 0.5, heads, mask, out_bad, sum_bad);
  CHECK(identical(grad.queries, grad_bad.queries));
  CHECK(identical(grad.keys, grad_bad.keys));
  CHECK(identical(grad.values, grad_bad.values));

  const auto surface = reference::project_forward(q, k, 0.5, prior, heads, mask);
  const auto surface_bad = reference::project_forward(q_bad, k_bad, 0.5, prior_bad, heads, mask);
  CHECK(identical(surface.out, surface_bad.out));
  CHECK(identical(surface.log_sum_exp, surface_bad.log_sum_exp));

  const auto check_surface = [](const auto& a, const auto& b) {
    CHECK(identical(a.queries, b.queries));
    CHECK(identical(a.keys, b.keys));
    CHECK(a.bandwidth == b.bandwidth);
    CHECK(identical(a.log_prior, b.log_prior));
  };
  check_surface(
      reference::project_backward(q, k, 0.5, prior, heads, mask, grad_out, grad_log_sum_exp),
      reference::project_backward(q_bad, k_bad, 0.5, prior_bad, heads, mask, out_bad, sum_bad));
  check_surface(
      reference::project_backward_sdpa(q, k, 0.5, heads, mask, grad_out, grad_log_sum_exp),
      reference::project_backward_sdpa(q_bad, k_bad, 0.5, heads, mask, out_bad, sum_bad));
}

TEST_CASE("NaN in a key reaches exactly the rows that attend to it", "[reference][mask]") {
  Random random(8);
  const Mask mask = example_mask({"", 5, 6, 2, 2, {}, true});
  const Matrix<double> q = random.matrix(5, 2);
  Matrix<double> k = random.matrix(6, 2);
  k(3, 1) = not_a_number;
  for (const auto& forward : {reference::attention_forward(q, k, k, 0.5, {}, mask),
                              reference::project_forward(q, k, 0.5, {}, {}, mask)}) {
    for (Index i = 0; i < 5; ++i) {
      CHECK(std::isnan(forward.out(i, 0)) == mask(i, 3));
      CHECK(std::isnan(forward.log_sum_exp(i, 0)) == mask(i, 3));
    }
  }
}

TEST_CASE("shape mistakes are named in words", "[reference]") {
  using surfattn::test::contains_text;
  const Matrix<double> m23 = Matrix<double>::Ones(2, 3), m43 = Matrix<double>::Ones(4, 3);
  CHECK_THROWS_WITH(reference::attention_forward(m23, m43, m23, 1),
                    contains_text("values is 2 x 3, expected 4 x 3"));
  CHECK_THROWS_WITH(reference::attention_forward(m23, m43, m43, 1, {.query = 2}),
                    contains_text("queries has 3 columns, no multiple of its 2 heads"));
  CHECK_THROWS_WITH(reference::attention_forward(m23, m43, m43, 1, {.query = 3, .key_value = 2}),
                    contains_text("3 query heads are no multiple of 2 key heads"));
  CHECK_THROWS_WITH(reference::attention_forward(m23, m43, m43, 1, {}, Mask::Constant(4, 2, true)),
                    contains_text("mask is 4 x 2, expected 2 x 4"));
  CHECK_THROWS_WITH(reference::project_forward(m23, m43, 1, m43),
                    contains_text("log_prior is 4 x 3, expected 4 x 1"));
  CHECK_THROWS_WITH(reference::project_backward(m23, m43, 1, {}, {}, no_mask, m43),
                    contains_text("grad_out is 4 x 3, expected 2 x 3"));
  CHECK_THROWS_WITH(reference::project_backward(m23, m43, 1, {}, {}, no_mask, m23, m23),
                    contains_text("grad_log_sum_exp is 2 x 3, expected 2 x 1"));
  CHECK_THROWS_AS(reference::attention_forward(m23, m43, m23, 1), std::invalid_argument);
}

namespace {

/// Inputs 4 x 3 and 5 x 2, 4 query heads on 2 key heads, each 2 wide (values 1), output width 3.
reference::LayerWeights<double> example_layer(Random& random) {
  return {random.matrix(3, 8), random.matrix(2, 4), random.matrix(2, 2), random.matrix(4, 3),
          random.matrix(1, 8), random.matrix(1, 4), random.matrix(1, 2), random.matrix(1, 3)};
}

}  // namespace

TEST_CASE("layer: projections, attention, output", "[reference][layer]") {
  Random random(9);
  const Heads heads{.query = 4, .key_value = 2};
  const Matrix<double> x = random.matrix(4, 3), y = random.matrix(5, 2);
  const auto weights = example_layer(random);
  Mask mask = Mask::Constant(4, 5, true);
  mask.row(2).setConstant(false);
  const Matrix<double> out = reference::layer_forward(x, y, weights, 0.7, heads, mask);

  const Matrix<double> q = (x * weights.query).rowwise() + weights.query_bias;
  const Matrix<double> k = (y * weights.key).rowwise() + weights.key_bias;
  const Matrix<double> v = (y * weights.value).rowwise() + weights.value_bias;
  const Matrix<double> attended = reference::attention_forward(q, k, v, 0.7, heads, mask).out;
  const Matrix<double> expected = (attended * weights.output).rowwise() + weights.output_bias;
  CHECK(gradient_error(out, expected) <= 1e-14);
  CHECK(identical(out.row(2), weights.output_bias));

  auto without = weights;
  without.query_bias = without.value_bias = without.output_bias = {};
  const Matrix<double> plain = reference::layer_forward(x, y, without, 0.7, heads);
  without.key_bias = {};
  CHECK(gradient_error(plain, reference::layer_forward(x, y, without, 0.7, heads)) <= 1e-14);
}

TEST_CASE("layer: the value bias adds one constant row, the key bias nothing",
          "[reference][layer]") {
  Random random(10);
  const Heads heads{.query = 4, .key_value = 2};
  const Matrix<double> x = random.matrix(4, 3), y = random.matrix(5, 2);
  auto weights = example_layer(random);
  const Matrix<double> with = reference::layer_forward(x, y, weights, 0.7, heads);
  Eigen::RowVector4d per_query_head;
  per_query_head << weights.value_bias(0), weights.value_bias(0), weights.value_bias(1),
      weights.value_bias(1);
  weights.key_bias.setZero();
  weights.value_bias.setZero();
  const Matrix<double> without = reference::layer_forward(x, y, weights, 0.7, heads);
  const Matrix<double> expected = without.rowwise() + per_query_head * weights.output;
  CHECK(gradient_error(with, expected) <= 1e-14);
}

TEST_CASE("layer: differentiable automatically by inputs and weights", "[reference][layer]") {
  Random random(11);
  const auto weights = example_layer(random);
  const Matrices inputs{random.matrix(4, 3), random.matrix(5, 2), weights.query,
                        weights.key,         weights.value,       weights.output};
  const Matrix<double> grad_out = random.matrix(4, 3);
  const auto loss = [&](const auto& x) {
    using S = scalar_of<std::decay_t<decltype(x)>>;
    const reference::LayerWeights<S> moved{x[2], x[3], x[4], x[5], {}, {}, {}, {}};
    const Matrix<S> out =
        reference::layer_forward(x[0], x[1], moved, S(0.7), {.query = 4, .key_value = 2});
    S sum(0);
    for (Index i = 0; i < out.size(); ++i) sum += out.data()[i] * grad_out.data()[i];
    return sum;
  };
  check_gradients(loss, inputs, automatic_gradients(loss, inputs));
}

TEMPLATE_TEST_CASE("central difference of a scalar function", "[gradcheck]", float, double,
                   long double) {
  using S = TestType;
  const S reachable = 20 * std::pow(std::numeric_limits<S>::epsilon(), S(6) / 7);
  const auto wave = [](S x) { return std::sin(x); };
  for (const S x : {S(-1.3), S(0), S(0.4), S(2)}) {
    CHECK(std::abs(surfattn::central_difference(wave, x) - std::cos(x)) <= reachable);
    CHECK(surfattn::check_gradient(wave, x, std::cos(x)).passed());
    CHECK_FALSE(surfattn::check_gradient(wave, x, std::cos(x) + S(0.01)).passed());
  }
  // Far from 0 the step grows with x.
  const auto square = [](S x) { return x * x; };
  CHECK(std::abs(surfattn::central_difference(square, S(1e5)) / S(2e5) - 1) <= reachable);
}

TEST_CASE("central difference: the error falls with the sixth power of the step", "[gradcheck]") {
  const auto error = [](long double step) {
    const auto f = [](long double x) { return std::exp(x); };
    return std::abs(surfattn::central_difference(f, 0.5L, step) - std::exp(0.5L));
  };
  const long double order = std::log2(error(0.4L) / error(0.2L));
  CHECK(static_cast<double>(order) == Approx(6).margin(0.1));
}

namespace {

/// sum_ij (i + 2j + 1) sin x_ij + x_00 x_last, whose gradient is known.
template <class Derived>
double test_function(const Eigen::MatrixBase<Derived>& x) {
  double sum = x(0, 0) * x(x.rows() - 1, x.cols() - 1);
  for (Index i = 0; i < x.rows(); ++i) {
    for (Index j = 0; j < x.cols(); ++j) sum += double(i + 2 * j + 1) * std::sin(x(i, j));
  }
  return sum;
}

template <class Derived>
typename Derived::PlainObject test_gradient(const Eigen::MatrixBase<Derived>& x) {
  typename Derived::PlainObject gradient = x;
  for (Index i = 0; i < x.rows(); ++i) {
    for (Index j = 0; j < x.cols(); ++j) gradient(i, j) = double(i + 2 * j + 1) * std::cos(x(i, j));
  }
  gradient(0, 0) += x(x.rows() - 1, x.cols() - 1);
  gradient(x.rows() - 1, x.cols() - 1) += x(0, 0);
  return gradient;
}

const auto call = [](const auto& x) { return test_function(x); };

}  // namespace

TEST_CASE("gradient check: a correct gradient passes", "[gradcheck]") {
  Random random(12);
  const Matrix<double> x = random.matrix(4, 5);
  const auto check = surfattn::check_gradient(call, x, test_gradient(x));
  CAPTURE(check);
  CHECK(check);
  CHECK(check.error <= 1e-11);

  const Eigen::MatrixXd column_major = x;
  CHECK(surfattn::check_gradient(call, column_major, test_gradient(x)));
  CHECK(surfattn::check_gradient(call, x.block(1, 1, 2, 3), test_gradient(x.block(1, 1, 2, 3))));
  const Eigen::VectorXd vector = x.col(0);
  CHECK(surfattn::check_gradient(call, vector, test_gradient(vector)));
  const Eigen::Matrix2d fixed = x.topLeftCorner<2, 2>();
  CHECK(surfattn::check_gradient(call, fixed, test_gradient(fixed)));
}

TEST_CASE("gradient check: an entry wrong by 1e-6 of the largest is found", "[gradcheck]") {
  Random random(13);
  const Matrix<double> x = random.matrix(4, 5);
  Matrix<double> gradient = test_gradient(x);
  const double wrong = gradient.cwiseAbs().maxCoeff() * 1e-6;
  const double exact = gradient(2, 3);
  gradient(2, 3) += wrong;
  const auto check = surfattn::check_gradient(call, x, gradient);
  CHECK_FALSE(check);
  CHECK(check.error == Approx(1e-6).epsilon(0.01));
  CHECK(check.row == 2);
  CHECK(check.column == 3);
  CHECK(check.analytic == gradient(2, 3));
  CHECK(check.numeric == Approx(exact).epsilon(1e-10));
  CHECK(surfattn::check_gradient(call, x, gradient, {.tolerance = 2e-6}));

  gradient = test_gradient(x) * (1 + 1e-6);
  CHECK_FALSE(surfattn::check_gradient(call, x, gradient));
}

TEST_CASE("gradient check: what is not finite fails", "[gradcheck]") {
  Random random(14);
  const Matrix<double> x = random.matrix(3, 2);
  const double bad = GENERATE(as<double>{}, not_a_number, infinity, -infinity);
  Matrix<double> gradient = test_gradient(x);
  gradient(1, 1) = bad;
  const auto check = surfattn::check_gradient(call, x, gradient, {.tolerance = 1e300});
  CHECK_FALSE(check);
  CHECK(check.error == infinity);
  CHECK(check.row == 1);
  CHECK(check.column == 1);
  CHECK(gradient_error(gradient, gradient) == infinity);
  CHECK(gradient_error(test_gradient(x), gradient) == infinity);

  const auto broken = [&](const Matrix<double>& y) { return y(2, 0) == x(2, 0) ? 0 : bad; };
  CHECK_FALSE(surfattn::check_gradient(broken, x, Matrix<double>::Zero(3, 2)));
  CHECK_FALSE(surfattn::check_gradient([&](double) { return bad; }, 1.0, 0.0));
}

TEST_CASE("gradient check: shapes", "[gradcheck]") {
  const Matrix<double> x = Matrix<double>::Ones(2, 3), other = Matrix<double>::Zero(3, 2);
  const auto zero = [](const Matrix<double>&) { return 0.0; };
  CHECK_FALSE(surfattn::check_gradient(zero, x, other));
  CHECK(gradient_error(x, other) == infinity);
  CHECK(surfattn::check_gradient(zero, x, Matrix<double>::Zero(2, 3)));
  const Matrix<double> empty(0, 3);
  CHECK(surfattn::central_difference(zero, empty).cols() == 3);
  CHECK(surfattn::check_gradient(zero, empty, empty));
  CHECK_FALSE(surfattn::check_gradient(zero, empty, x));
}

TEST_CASE("gradient check: the error is relative to the largest entry", "[gradcheck]") {
  // |3 - 4| / (max(1, 3, 4) + floor)
  const Matrix<double> a = column(1., 3.), b = column(1., 4.);
  CHECK(gradient_error(a, b, 0.0) == Approx(0.25));
  CHECK(gradient_error(b, a, 0.0) == Approx(0.25));
  CHECK(gradient_error(a, b, 1.0) == Approx(0.2));
  CHECK(gradient_error(a, a) == 0);
}

TEST_CASE("gradient check: its result can be read", "[gradcheck]") {
  using surfattn::test::contains_text;
  const auto text = [](const auto& check) {
    std::ostringstream stream;
    stream << check;
    return stream.str();
  };
  const Matrix<double> a = column(1., 0.5), b = column(1., 0.25);
  CHECK_THAT(text(surfattn::compare_gradients(a, b)),
             contains_text("failed: error 0.25 > 1e-09 at (1, 0): analytic 0.5, numeric 0.25"));
  CHECK_THAT(text(surfattn::compare_gradients(a, a)), contains_text("passed: error 0 <= 1e-09"));
  CHECK_THAT(text(surfattn::compare_gradients(a, entry(1))), contains_text("shape"));
}
