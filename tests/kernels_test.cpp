// Student-t and Epanechnikov kernels of the distance: against their definitions, and by central differences.
#include <surfattn/gradcheck.hpp>
#include <surfattn/terms/kernels.hpp>

#include "support/problem.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

using M = Matrix<double>;

/// Σ w k/Σ w from the definition, 0 where every weight is 0.
template <class Kernel>
M plain(const M& q, const M& k, const Kernel& kernel) {
  M out = M::Zero(q.rows(), q.cols());
  for (Index i = 0; i < q.rows(); ++i) {
    double total = 0;
    for (Index j = 0; j < k.rows(); ++j) {
      const double w = kernel((q.row(i) - k.row(j)).squaredNorm());
      out.row(i) += w * k.row(j);
      total += w;
    }
    if (total > 0) out.row(i) /= total;
  }
  return out;
}

template <class Term>
void check_gradients(const Problem<double>& p, double bandwidth, const Term& term) {
  const auto loss = [&](const M& q, const M& k, double sigma) {
    return project(q, k, {.heads = p.heads, .bandwidth = sigma}, term, Causal{Align::bottom_right})
        .cwiseProduct(p.grad_projection)
        .sum();
  };
  const SurfaceOptions options{.heads = p.heads, .bandwidth = bandwidth};
  const Causal causal{Align::bottom_right};
  const auto forward = project_forward(p.queries, p.keys, options, term, causal);
  const auto g =
      project_backward(p.queries, p.keys, forward, p.grad_projection, options, term, causal);
  const GradientCheckOptions<double> how{.tolerance = 1e-8, .step = 1e-3};
  const auto check = [](const char* name, const auto& result) {
    INFO(name << ": " << result);
    CHECK(result.passed());
  };
  check("queries", check_gradient([&](const M& x) { return loss(x, p.keys, bandwidth); }, p.queries,
                                  g.queries, how));
  check("keys", check_gradient([&](const M& x) { return loss(p.queries, x, bandwidth); }, p.keys,
                               g.keys, how));
  check("bandwidth", check_gradient([&](double x) { return loss(p.queries, p.keys, x); }, bandwidth,
                                    g.bandwidth, how));
}

}  // namespace

TEST_CASE("StudentT is Student's t of the distance") {
  std::mt19937_64 random = seeded_random();
  const auto q = random_matrix<double>(20, 3, random), k = random_matrix<double>(70, 3, random);
  for (const double nu : {0.5, 1.0, 4.0}) {
    const M expected = plain(
        q, k, [&](double squared) { return std::pow(1 + squared / (nu * 0.49), -(nu + 3) / 2); });
    CHECK((project(q, k, {.bandwidth = 0.7}, StudentT{nu}) - expected).cwiseAbs().maxCoeff() <=
          1e-12);
  }
  const M gaussian = project(q, k, {.bandwidth = 0.7});
  CHECK((project(q, k, {.bandwidth = 0.7}, StudentT{1e8}) - gaussian).cwiseAbs().maxCoeff() <=
        1e-6);
  CHECK((project(q, k, {.bandwidth = 0.7}, StudentT{1.0}) - gaussian).cwiseAbs().maxCoeff() > 0.1);
  CHECK_THROWS_WITH(project(q, k, {}, StudentT{0.0}),
                    contains_text("degrees of freedom of StudentT"));
}

TEST_CASE(
    "Epanechnikov has the support of its radius, and a query without a key in reach gives 0") {
  std::mt19937_64 random = seeded_random();
  M q = random_matrix<double>(20, 2, random);
  const auto k = random_matrix<double>(90, 2, random);
  q.row(3).setConstant(50);
  const auto forward = project_forward(q, k, {.bandwidth = 0.8}, Epanechnikov{});
  const M expected = plain(q, k, [](double squared) { return std::max(0.0, 1 - squared / 0.64); });
  CHECK((forward.out - expected).cwiseAbs().maxCoeff() <= 1e-12);
  CHECK(forward.out.row(3).isZero(0));
  CHECK(forward.log_sum_exp(3, 0) == -std::numeric_limits<double>::infinity());
  const auto g =
      project_backward(q, k, forward, M::Ones(20, 2), {.bandwidth = 0.8}, Epanechnikov{});
  CHECK(g.queries.row(3).isZero(0));
  CHECK(g.keys.allFinite());
  CHECK(std::isfinite(g.bandwidth));
}

TEST_CASE("gradients through the kernels agree with central differences to 1e-8") {
  std::mt19937_64 random = seeded_random();
  for (const Sizes& s : {Sizes{3, 7, 2, 2}, Sizes{5, 6, 3, 3, 4, 2}, Sizes{2, 40, 3, 3, 2, 1}}) {
    CAPTURE(seed(), s.queries, s.keys);
    const Problem<double> p(s, random);
    check_gradients(p, 1.2, StudentT{2.0});
    check_gradients(p, 9.0, Epanechnikov{});  // all in reach
    // some in reach and some not, and none so near the edge that a difference would cross it
    Problem<double> spread(s, random);
    for (Index i = 0; i < spread.keys.rows(); ++i) {
      if (i % 2) spread.keys.row(i).array() += 30;
    }
    check_gradients(spread, 9.0, Epanechnikov{});
  }
}
