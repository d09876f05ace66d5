// Student-t and Epanechnikov kernels of the distance: against their definitions, and by central differences.
#include <surfattn/terms/kernels.hpp>

#include "support/differences.hpp"

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
  const SurfaceOptions options{.heads = p.heads, .bandwidth = bandwidth};
  const Causal causal{Align::bottom_right};
  const auto loss = [&](const M& q, const M& k, const SurfaceOptions& o) {
    return project(q, k, o, term, causal).cwiseProduct(p.grad_projection).sum();
  };
  const auto forward = project_forward(p.queries, p.keys, options, term, causal);
  const auto g =
      project_backward(p.queries, p.keys, forward, p.grad_projection, options, term, causal);
  check_by_differences(
      "queries", [&](const M& x) { return loss(x, p.keys, options); }, p.queries, g.queries);
  check_by_differences(
      "keys", [&](const M& x) { return loss(p.queries, x, options); }, p.keys, g.keys);
  check_options_by_differences([&](const SurfaceOptions& o) { return loss(p.queries, p.keys, o); },
                               options, p, g.bandwidth, {});
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

TEST_CASE("log-weights of keys come behind a kernel, and Temperature before it is a bandwidth") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({9, 30, 3, 3, 2, 1}, random);
  const RowVector<double> log_weights = p.log_prior.col(0).transpose();
  M expected(9, 6);
  for (Index h = 0; h < 2; ++h) {
    const double squared_bandwidth = 0.49 / double(1 + h);
    for (Index i = 0; i < 9; ++i) {
      RowVector<double> sum = RowVector<double>::Zero(3);
      double total = 0;
      for (Index j = 0; j < 30; ++j) {
        const double squared = (p.queries.row(i).segment(3 * h, 3) - p.keys.row(j)).squaredNorm();
        const double w =
            std::exp(log_weights[j]) / std::pow(1 + squared / (4 * squared_bandwidth), 3.5);
        sum += w * p.keys.row(j);
        total += w;
      }
      expected.row(i).segment(3 * h, 3) = sum / total;
    }
  }
  const RowVector<double> factors = RowVector<double>::LinSpaced(2, 1, 2);
  const auto out = project(p.queries, p.keys, {.heads = p.heads, .bandwidth = 0.7},
                           Temperature{factors}, StudentT{4.0}, AdditiveBias{log_weights});
  CHECK((out - expected).cwiseAbs().maxCoeff() <= 1e-12);
}

TEST_CASE("a kernel of the distance is an error where scores are no distances") {
  const M q = M::Ones(3, 2), k = M::Ones(5, 2), weights = M::Zero(5, 1);
  const auto needs_distances = contains_text("kernels of the distance of query and key");
  M out = M::Constant(3, 2, -7);
  CHECK_THROWS_WITH(attention_into(q, k, k, out, Workspace(workspace_size(Pass::forward, q, k, k)),
                                   {}, StudentT{1.0}),
                    needs_distances);
  CHECK_THROWS_WITH(project_into(q, k, out, Workspace(workspace_size(Pass::forward, q, k)),
                                 {.prior = KeyPrior::sdpa}, Epanechnikov{}),
                    needs_distances);
  CHECK_THROWS_WITH(project_into(q, k, out, Workspace(workspace_size(Pass::forward, q, k)),
                                 {.prior = weights}, StudentT{1.0}, Causal{Align::top_left}),
                    needs_distances);
  CHECK((out.array() == -7).all());
  const auto forward = project_forward(q, k, {}, StudentT{1.0});
  CHECK_THROWS_WITH(project_backward(q, k, forward, q, {.prior = KeyPrior::sdpa}, StudentT{1.0}),
                    needs_distances);
  CHECK_THROWS_WITH(attention_scores(q, k, {}, {}, StudentT{1.0}), needs_distances);
}
