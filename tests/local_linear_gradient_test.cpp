// Gradients of the local-linear estimate by central differences, on the fast path itself.
#include <surfattn/local_linear.hpp>
#include <surfattn/terms/kernels.hpp>

#include "support/differences.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

const Sizes gradient_sizes[] = {{1, 1, 1, 1},        {3, 7, 2, 5},   {9, 5, 4, 3, 2, 1},
                                {7, 19, 3, 2, 4, 2}, {2, 131, 2, 2}, {70, 4, 2, 1}};

/// `estimate(q, k, v, ridge, options)` gives f, `g` its gradients for the upstream gradient `grad_out`.
template <class Estimate>
void check_gradients(const Problem<double>& p, double ridge, const SurfaceOptions& options,
                     const Matrix<double>& grad_out, const Estimate& estimate,
                     const LocalLinearGradients<double>& g) {
  const auto loss = [&](const Matrix<double>& q, const Matrix<double>& k, const Matrix<double>& v,
                        double lambda, const SurfaceOptions& o) {
    return estimate(q, k, v, lambda, o).cwiseProduct(grad_out).sum();
  };
  using M = Matrix<double>;
  check_by_differences(
      "queries", [&](const M& x) { return loss(x, p.keys, p.values, ridge, options); }, p.queries,
      g.queries);
  check_by_differences(
      "keys", [&](const M& x) { return loss(p.queries, x, p.values, ridge, options); }, p.keys,
      g.keys);
  if (g.values.size() > 0) {
    check_by_differences(
        "values", [&](const M& x) { return loss(p.queries, p.keys, x, ridge, options); }, p.values,
        g.values);
  }
  check_by_differences(
      "ridge", [&](double x) { return loss(p.queries, p.keys, p.values, x, options); }, ridge,
      g.ridge);
  check_options_by_differences(
      [&](const SurfaceOptions& o) { return loss(p.queries, p.keys, p.values, ridge, o); }, options,
      p, g.bandwidth, g.log_prior);
}

template <class... Terms>
void check_both(const Problem<double>& p, double ridge, const SurfaceOptions& options,
                const Terms&... terms) {
  const auto f = local_linear_forward(p.queries, p.keys, ridge, options, terms...);
  check_gradients(
      p, ridge, options, p.grad_projection,
      [&](const auto& q, const auto& k, const auto&, double lambda, const SurfaceOptions& o) {
        return local_linear(q, k, lambda, o, terms...);
      },
      local_linear_backward(p.queries, p.keys, ridge, f, p.grad_projection, options, terms...));
  const auto fv = local_linear_forward(p.queries, p.keys, p.values, ridge, options, terms...);
  check_gradients(
      p, ridge, options, p.grad_out,
      [&](const auto& q, const auto& k, const auto& v, double lambda, const SurfaceOptions& o) {
        return local_linear(q, k, v, lambda, o, terms...);
      },
      local_linear_backward(p.queries, p.keys, p.values, ridge, fv, p.grad_out, options, terms...));
}

}  // namespace

TEST_CASE("gradients of local_linear agree with central differences to 1e-8") {
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
      if (mask == MaskKind::none) {
        check_both(p, 0.4, options);
      } else if (mask == MaskKind::causal_bottom_right) {
        check_both(p, 0.4, options, Causal{Align::bottom_right});
      } else {
        const auto dense = dense_mask(mask, s.queries, s.keys);
        check_both(p, 0.4, options, BoolMask{dense});
      }
    }
  }
}

TEST_CASE("local_linear of values that are the keys has the gradients of the projection") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({9, 30, 3, 3, 4, 2}, random);
  const SurfaceOptions options{.heads = p.heads, .bandwidth = 1.1};
  const auto f = local_linear_forward(p.queries, p.keys, 0.2, options);
  const auto g = local_linear_backward(p.queries, p.keys, 0.2, f, p.grad_projection, options);
  const auto fv = local_linear_forward(p.queries, p.keys, p.keys, 0.2, options);
  const auto gv =
      local_linear_backward(p.queries, p.keys, p.keys, 0.2, fv, p.grad_projection, options);
  CHECK((f.out - fv.out).cwiseAbs().maxCoeff() <= 1e-13);
  CHECK((g.queries - gv.queries).cwiseAbs().maxCoeff() <= 1e-12);
  CHECK((g.keys - gv.keys - gv.values).cwiseAbs().maxCoeff() <= 1e-12);
  CHECK(g.ridge == Approx(gv.ridge));
  CHECK(g.bandwidth == Approx(gv.bandwidth));
}

TEST_CASE("gradients of local_linear go through modifiers and biases") {
  std::mt19937_64 random = seeded_random();
  for (const Sizes& s : {Sizes{3, 7, 2, 5}, Sizes{7, 19, 3, 2, 4, 2}, Sizes{70, 9, 2, 1}}) {
    CAPTURE(seed(), s.queries, s.keys, s.query_heads);
    const Problem<double> p(s, random);
    const Matrix<double> bias = random_matrix<double>(1, s.keys, random);
    const RowVector<double> factors =
        random_matrix<double>(1, s.query_heads, random).array() * 0.1 + 1;
    const SurfaceOptions options{.heads = p.heads, .bandwidth = 1.3, .prior = p.log_prior},
        uniform{.heads = p.heads, .bandwidth = 1.3};
    check_both(p, 0.4, uniform, Temperature{factors}, StudentT{3}, AdditiveBias{bias},
               Causal{Align::bottom_right});
    check_both(p, 0.4, options, SoftCap{2}, KeyLengths{s.keys - 1});
  }
}

TEST_CASE("local_linear of any kernel is the estimate with its weights") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({6, 40, 3, 2}, random);
  const Matrix<double> bias = random_matrix<double>(1, 40, random);
  const SurfaceOptions options{.bandwidth = 0.9};
  const Matrix<double> fast =
      local_linear(p.queries, p.keys, p.values, 0.3, options, StudentT{2}, AdditiveBias{bias});
  for (Index i = 0; i < 6; ++i) {
    // the Gaussian's weights, if its log-prior makes up the difference
    Matrix<double> log_prior(40, 1);
    for (Index j = 0; j < 40; ++j) {
      const double squared = (p.queries.row(i) - p.keys.row(j)).squaredNorm() / 0.81;
      log_prior(j, 0) = bias(0, j) - 2.5 * std::log1p(squared / 2) + squared / 2;
    }
    const Matrix<double> plain = reference::local_linear<double>(p.queries.row(i), p.keys, p.values,
                                                                 0.9, 0.3, log_prior, {}, {});
    CHECK((fast.row(i) - plain).cwiseAbs().maxCoeff() <= 1e-11);
  }
}

TEST_CASE("local_linear_backward gives no gradients of terms with parameters, and says so") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({3, 5, 2, 2}, random);
  const Matrix<double> bias = random_matrix<double>(3, 5, random);
  Matrix<double> grad(3, 5);
  const AdditiveBias term(bias);
  const auto f = local_linear_forward(p.queries, p.keys, 0.1, {}, term);
  CHECK_THROWS_WITH(local_linear_backward(p.queries, p.keys, 0.1, f, p.grad_projection, {},
                                          term.gradient_into(grad)),
                    contains_text("the gradient of a term's parameters is not formed"));
}
