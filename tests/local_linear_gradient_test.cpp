// Gradients of the local-linear estimate by central differences, on the fast path itself.
#include <surfattn/local_linear.hpp>

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
