// Gradients of the engine's own path: by central differences, and by automatic differentiation of the reference.
#include <Eigen/Core>
#include <unsupported/Eigen/AutoDiff>

#include "support/differences.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

const Sizes gradient_sizes[] = {{1, 1, 1, 1},         {3, 7, 2, 5},   {9, 5, 4, 3, 2, 1},
                                {17, 19, 3, 2, 4, 2}, {2, 131, 2, 2}, {133, 3, 2, 1}};

double product(const Matrix<double>& a, const Matrix<double>& b) { return a.cwiseProduct(b).sum(); }

template <class... Terms>
void check_standard_gradients(const Problem<double>& p, const Terms&... terms) {
  const Options options{.scale = 0.7, .heads = p.heads};
  const auto loss = [&](const auto& q, const auto& k, const auto& v) {
    return product(attention(q, k, v, options, terms...), p.grad_out);
  };
  const auto forward = attention_forward(p.queries, p.keys, p.values, options, terms...);
  const auto g =
      attention_backward(p.queries, p.keys, p.values, forward, p.grad_out, options, terms...);
  check_by_differences(
      "queries", [&](const auto& x) { return loss(x, p.keys, p.values); }, p.queries, g.queries);
  check_by_differences(
      "keys", [&](const auto& x) { return loss(p.queries, x, p.values); }, p.keys, g.keys);
  check_by_differences(
      "values", [&](const auto& x) { return loss(p.queries, p.keys, x); }, p.values, g.values);
}

template <class... Terms>
void check_surface_gradients(const Problem<double>& p, const SurfaceOptions& options,
                             const Terms&... terms) {
  const auto loss = [&](const auto& q, const auto& k, const SurfaceOptions& o) {
    return product(project(q, k, o, terms...), p.grad_projection);
  };
  const auto forward = project_forward(p.queries, p.keys, options, terms...);
  const auto g = project_backward(p.queries, p.keys, forward, p.grad_projection, options, terms...);
  check_by_differences(
      "queries", [&](const auto& x) { return loss(x, p.keys, options); }, p.queries, g.queries);
  check_by_differences(
      "keys", [&](const auto& x) { return loss(p.queries, x, options); }, p.keys, g.keys);
  check_options_by_differences([&](const SurfaceOptions& o) { return loss(p.queries, p.keys, o); },
                               options, p, g.bandwidth, g.log_prior);
}

}  // namespace

TEST_CASE("gradients of attention agree with central differences to 1e-8") {
  std::mt19937_64 random = seeded_random();
  int turn = 0;
  for (const Sizes& s : gradient_sizes) {
    for (int repeat = 0; repeat < 3; ++repeat) {
      const MaskKind mask = all_masks[turn++ % std::size(all_masks)];
      CAPTURE(seed(), s.queries, s.keys, s.query_heads, int(mask));
      const Problem<double> p(s, random);
      with_terms(mask, s.queries, s.keys,
                 [&](const auto&... terms) { check_standard_gradients(p, terms...); });
    }
  }
}

TEST_CASE("gradients of project agree with central differences to 1e-8") {
  std::mt19937_64 random = seeded_random();
  int turn = 0;
  for (const Sizes& s : gradient_sizes) {
    for (int prior = 0; prior < 4; ++prior) {
      const MaskKind mask = all_masks[turn++ % std::size(all_masks)];
      CAPTURE(seed(), s.queries, s.keys, s.query_heads, int(mask), prior);
      const Problem<double> p(s, random);
      const auto shared_prior = p.log_prior.leftCols(1);
      const KeyPrior priors[] = {KeyPrior::uniform, KeyPrior::sdpa, p.log_prior, shared_prior};
      const SurfaceOptions options{.heads = p.heads, .bandwidth = 1.3, .prior = priors[prior]};
      with_terms(mask, s.queries, s.keys,
                 [&](const auto&... terms) { check_surface_gradients(p, options, terms...); });
    }
  }
}

namespace {

using Dual = Eigen::AutoDiffScalar<Eigen::VectorXd>;

/// Variables numbered from `first` on, of `count` in all.
Matrix<Dual> variables(const Matrix<double>& values, Index first, Index count) {
  Matrix<Dual> duals(values.rows(), values.cols());
  for (Index i = 0; i < values.size(); ++i)
    duals.data()[i] = Dual(values.data()[i], static_cast<int>(count), static_cast<int>(first + i));
  return duals;
}

/// Derivatives of Σ upstream∘out with respect to every variable.
Eigen::VectorXd derivatives(const Matrix<Dual>& out, const Matrix<double>& upstream, Index count) {
  Eigen::VectorXd sum = Eigen::VectorXd::Zero(count);
  for (Index i = 0; i < out.size(); ++i) {
    if (out.data()[i].derivatives().size()) sum += upstream.data()[i] * out.data()[i].derivatives();
  }
  return sum;
}

void check_entries(const char* name, const Matrix<double>& gradient,
                   const Eigen::VectorXd& expected, Index first) {
  const auto segment = expected.segment(first, gradient.size());
  const Eigen::Map<const Eigen::VectorXd> flat(gradient.data(), gradient.size());
  const double error = (flat - segment).cwiseAbs().maxCoeff();
  INFO(name << " differs by " << error);
  CHECK(error <= 1e-13 * std::max(1.0, segment.cwiseAbs().maxCoeff()));
}

}  // namespace

TEST_CASE("gradients of the engine agree with automatic differentiation of the reference") {
  std::mt19937_64 random = seeded_random();
  const Sizes s{6, 5, 3, 2, 2, 1};
  const Problem<double> p(s, random);
  const reference::Heads heads{2, 1};
  for (const MaskKind mask : all_masks) {
    CAPTURE(seed(), int(mask));
    const auto dense = dense_mask(mask, s.queries, s.keys);
    const Index q0 = 0, k0 = p.queries.size(), v0 = k0 + p.keys.size();
    with_terms(mask, s.queries, s.keys, [&](const auto&... terms) {
      const Index n = v0 + p.values.size();
      const auto dual =
          reference::attention_forward<Dual>(variables(p.queries, q0, n), variables(p.keys, k0, n),
                                             variables(p.values, v0, n), Dual(0.7), heads, dense);
      const auto expected = derivatives(dual.out, p.grad_out, n);
      const Options options{.scale = 0.7, .heads = p.heads};
      const auto g =
          attention_backward(p.queries, p.keys, p.values,
                             attention_forward(p.queries, p.keys, p.values, options, terms...),
                             p.grad_out, options, terms...);
      check_entries("queries", g.queries, expected, q0);
      check_entries("keys", g.keys, expected, k0);
      check_entries("values", g.values, expected, v0);
    });
    with_terms(mask, s.queries, s.keys, [&](const auto&... terms) {
      const Index b0 = v0, l0 = v0 + 1, n = l0 + p.log_prior.size();
      const auto dual =
          reference::project_forward<Dual>(variables(p.queries, q0, n), variables(p.keys, k0, n),
                                           Dual(1.3, static_cast<int>(n), static_cast<int>(b0)),
                                           variables(p.log_prior, l0, n), heads, dense);
      const auto expected = derivatives(dual.out, p.grad_projection, n);
      const SurfaceOptions options{.heads = p.heads, .bandwidth = 1.3, .prior = p.log_prior};
      const auto g =
          project_backward(p.queries, p.keys, project_forward(p.queries, p.keys, options, terms...),
                           p.grad_projection, options, terms...);
      check_entries("queries", g.queries, expected, q0);
      check_entries("keys", g.keys, expected, k0);
      check_entries("bandwidth", Matrix<double>::Constant(1, 1, g.bandwidth), expected, b0);
      check_entries("log prior", g.log_prior, expected, l0);
    });
  }
}

TEST_CASE("the bandwidth's gradient in float survives an offset of all points") {
  std::mt19937_64 random = seeded_random();
  const auto q = random_matrix<double>(200, 8, random), k = random_matrix<double>(300, 8, random);
  const auto gradient = [&]<class Scalar>(Scalar offset) {
    const Matrix<Scalar> shifted_q = q.cast<Scalar>().array() + offset,
                         shifted_k = k.cast<Scalar>().array() + offset;
    const SurfaceOptions options{.bandwidth = 0.5};
    // a loss that moves with the points
    const Matrix<Scalar> grad_out = q.cast<Scalar>();
    return double(project_backward(shifted_q, shifted_k,
                                   project_forward(shifted_q, shifted_k, options), grad_out,
                                   options)
                      .bandwidth);
  };
  const double exact = gradient(0.0);
  CAPTURE(seed(), exact);
  CHECK(std::abs(gradient(10.0) - exact) <= 1e-10 * std::abs(exact));
  // scores of the size β·100·d lose their last digits: u·3200 ≈ 2e-4 each
  CHECK(std::abs(gradient(10.0f) - exact) <= 1e-2 * std::abs(exact));
}
