// Diagonal metrics and bandwidths for each head or query: against the reference, by central differences, and errors.
// clang-format off
#include "support/no_allocation.hpp"  // before all that includes Eigen
// clang-format on

#include <surfattn/adaptive.hpp>

#include "support/differences.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

using M = Matrix<double>;
using Row = RowVector<double>;

const Sizes adaptive_sizes[] = {{3, 7, 2, 2}, {5, 6, 3, 3, 4, 2}, {2, 40, 3, 3, 2, 1}};

double difference(const M& a, const M& b) { return (a - b).cwiseAbs().maxCoeff(); }

/// One query of one head at a time through the reference, with its own bandwidth.
M plain_bandwidths(const Problem<double>& p, const M& bandwidths, const reference::Mask& mask) {
  M out = M::Zero(p.queries.rows(), p.queries.cols());
  const Index heads = p.sizes.query_heads, d = p.sizes.head_dim;
  for (Index h = 0; h < heads; ++h) {
    const Index shared = h / (heads / p.sizes.key_value_heads);
    for (Index i = 0; i < p.queries.rows(); ++i) {
      const M q = p.queries.row(i).segment(h * d, d), k = p.keys.middleCols(shared * d, d),
              prior = p.log_prior.col(shared);
      const reference::Mask row = mask.row(i);
      out.row(i).segment(h * d, d) =
          reference::project_forward<double>(q, k, bandwidths(bandwidths.rows() == 1 ? 0 : i, h),
                                             prior, {}, row)
              .out;
    }
  }
  return out;
}

M random_positive(Index rows, Index cols, std::mt19937_64& random) {
  return random_matrix<double>(rows, cols, random).array().tanh() * 0.5 + 1;
}

}  // namespace

TEST_CASE("project_metric: the metric weighs the squares of the coordinates") {
  std::mt19937_64 random = seeded_random();
  const M q = random_matrix<double>(4, 3, random), k = random_matrix<double>(9, 3, random);
  const Row metric = random_positive(1, 3, random);
  const auto forward = project_metric_forward(q, k, metric, {.bandwidth = 0.8});
  for (Index i = 0; i < 4; ++i) {
    Row sum = Row::Zero(3);
    double total = 0;
    for (Index j = 0; j < 9; ++j) {
      const double w =
          std::exp(-(metric.array() * (q.row(i) - k.row(j)).array().square()).sum() / (2 * 0.64));
      sum += w * k.row(j);
      total += w;
    }
    CHECK(forward.out.row(i).isApprox(sum / total, 1e-13));
    CHECK(forward.log_sum_exp(i, 0) == Approx(std::log(total)));
  }
  // m = 1 is the projection, and a metric of c is a bandwidth 1/√c times as large
  CHECK(difference(project_metric(q, k, Row::Ones(3), {.bandwidth = 0.8}),
                   project(q, k, {.bandwidth = 0.8})) == 0);
  CHECK(difference(project_metric(q, k, Row::Constant(3, 4.0), {.bandwidth = 0.8}),
                   project(q, k, {.bandwidth = 0.4})) <= 1e-14);
}

TEST_CASE("gradients of project_metric agree with central differences to 1e-8") {
  std::mt19937_64 random = seeded_random();
  for (const Sizes& s : adaptive_sizes) {
    for (int kind = 0; kind < 4; ++kind) {
      CAPTURE(seed(), s.queries, s.keys, s.query_heads, kind);
      const Problem<double> p(s, random);
      const Row metric =
          random_positive(1, (kind % 2 ? s.key_value_heads : 1) * s.head_dim, random);
      const SurfaceOptions options{.heads = p.heads,
                                   .bandwidth = 1.2,
                                   .prior = kind < 2 ? KeyPrior(p.log_prior) : KeyPrior::sdpa};
      const Causal causal{Align::bottom_right};
      const auto loss = [&](const M& q, const M& k, const Row& m, const SurfaceOptions& o) {
        return project_metric(q, k, m, o, causal).cwiseProduct(p.grad_projection).sum();
      };
      const auto forward = project_metric_forward(p.queries, p.keys, metric, options, causal);
      const auto g = project_metric_backward(p.queries, p.keys, metric, forward, p.grad_projection,
                                             options, causal);
      check_by_differences(
          "queries", [&](const M& x) { return loss(x, p.keys, metric, options); }, p.queries,
          g.queries);
      check_by_differences(
          "keys", [&](const M& x) { return loss(p.queries, x, metric, options); }, p.keys, g.keys);
      check_by_differences(
          "metric", [&](const Row& x) { return loss(p.queries, p.keys, x, options); }, metric,
          g.metric);
      check_options_by_differences(
          [&](const SurfaceOptions& o) { return loss(p.queries, p.keys, metric, o); }, options, p,
          g.bandwidth, g.log_prior);
    }
  }
}

TEST_CASE("project_bandwidths: every query of every head has its own bandwidth") {
  std::mt19937_64 random = seeded_random();
  for (const Sizes& s : adaptive_sizes) {
    for (const bool each_query : {false, true}) {
      CAPTURE(seed(), s.queries, s.keys, s.query_heads, each_query);
      const Problem<double> p(s, random);
      const M bandwidths = random_positive(each_query ? s.queries : 1, s.query_heads, random);
      const auto mask = dense_mask(MaskKind::dense, s.queries, s.keys);
      const SurfaceOptions options{.heads = p.heads, .prior = p.log_prior};
      const M fast = project_bandwidths(p.queries, p.keys, bandwidths, options, BoolMask{mask});
      CHECK(difference(fast, plain_bandwidths(p, bandwidths, mask)) <= 1e-12);
    }
  }
  const Problem<double> p({6, 8, 3, 3, 2, 2}, random);
  CHECK(difference(project_bandwidths(p.queries, p.keys, M::Constant(1, 2, 0.7), {.heads = {2}}),
                   project(p.queries, p.keys, {.heads = {2}, .bandwidth = 0.7})) <= 1e-13);
}

TEST_CASE("gradients of project_bandwidths agree with central differences to 1e-8") {
  std::mt19937_64 random = seeded_random();
  for (const Sizes& s : adaptive_sizes) {
    for (int kind = 0; kind < 4; ++kind) {
      CAPTURE(seed(), s.queries, s.keys, s.query_heads, kind);
      const Problem<double> p(s, random);
      const M bandwidths = random_positive(kind % 2 ? s.queries : 1, s.query_heads, random);
      const M prior = kind < 2 ? p.log_prior : M(p.log_prior.leftCols(1));
      const SurfaceOptions options{.heads = p.heads, .prior = prior};
      const Causal causal{Align::bottom_right};
      const auto loss = [&](const M& q, const M& k, const M& b, const SurfaceOptions& o) {
        return project_bandwidths(q, k, b, o, causal).cwiseProduct(p.grad_projection).sum();
      };
      const auto forward =
          project_bandwidths_forward(p.queries, p.keys, bandwidths, options, causal);
      const auto g = project_bandwidths_backward(p.queries, p.keys, bandwidths, forward,
                                                 p.grad_projection, options, causal);
      check_by_differences(
          "queries", [&](const M& x) { return loss(x, p.keys, bandwidths, options); }, p.queries,
          g.queries);
      check_by_differences(
          "keys", [&](const M& x) { return loss(p.queries, x, bandwidths, options); }, p.keys,
          g.keys);
      check_by_differences(
          "bandwidths", [&](const M& x) { return loss(p.queries, p.keys, x, options); }, bandwidths,
          g.bandwidths);
      check_options_by_differences(
          [&](const SurfaceOptions& o) { return loss(p.queries, p.keys, bandwidths, o); }, options,
          p, 0, g.log_prior);
    }
  }
}

TEST_CASE("project_metric and project_bandwidths give the gradients of terms with parameters") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({5, 6, 3, 3, 4, 2}, random);
  const M bias = random_matrix<double>(5, 6, random);
  const Row metric = random_positive(1, 3, random);
  const M bandwidths = random_positive(1, 4, random);
  const SurfaceOptions options{.heads = p.heads};
  const AdditiveBias term(bias);
  const auto loss = [&](const M& out) { return out.cwiseProduct(p.grad_projection).sum(); };
  const auto of_metric = project_metric_backward(
      p.queries, p.keys, metric, project_metric_forward(p.queries, p.keys, metric, options, term),
      p.grad_projection, options, term);
  check_by_differences(
      "bias beside a metric",
      [&](const M& x) {
        return loss(project_metric(p.queries, p.keys, metric, options, AdditiveBias(x)));
      },
      bias, std::get<0>(of_metric.terms));
  const auto of_bandwidths = project_bandwidths_backward(
      p.queries, p.keys, bandwidths,
      project_bandwidths_forward(p.queries, p.keys, bandwidths, options, term), p.grad_projection,
      options, term);
  check_by_differences(
      "bias beside bandwidths",
      [&](const M& x) {
        return loss(project_bandwidths(p.queries, p.keys, bandwidths, options, AdditiveBias(x)));
      },
      bias, std::get<0>(of_bandwidths.terms));
}

TEST_CASE("project_metric and project_bandwidths into matrices of any storage allocate nothing") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({40, 70, 3, 3, 4, 2}, random);
  const SurfaceOptions options{.heads = p.heads, .bandwidth = 1.1}, without{.heads = p.heads};
  const Causal causal{Align::bottom_right};
  const Row metric = random_positive(1, 6, random);
  const M bandwidths = random_positive(40, 4, random);
  const auto f = project_metric_forward(p.queries, p.keys, metric, options, causal);
  const auto g =
      project_metric_backward(p.queries, p.keys, metric, f, p.grad_projection, options, causal);
  const auto fb = project_bandwidths_forward(p.queries, p.keys, bandwidths, without, causal);
  const auto gb = project_bandwidths_backward(p.queries, p.keys, bandwidths, fb, p.grad_projection,
                                              without, causal);
  const Eigen::MatrixXd q = p.queries, k = p.keys, go = p.grad_projection;  // column-major
  Eigen::MatrixXd out(40, 12), log_sum_exp(40, 4), grad_q(40, 12), grad_k(70, 6), grad_prior(70, 2),
      out_b(40, 12), log_sum_exp_b(40, 4), grad_q_b(40, 12), grad_k_b(70, 6), grad_prior_b(70, 2),
      grad_bandwidths(40, 4);
  Row grad_metric(6);
  double grad_bandwidth = 0;
  const Workspace workspace(
      std::max({metric_workspace_size(Pass::forward, q, k, options),
                metric_workspace_size(Pass::backward, q, k, options, causal),
                bandwidths_workspace_size(Pass::forward, q, k, without),
                bandwidths_workspace_size(Pass::backward, q, k, without, causal)}));
  std::size_t count = 0;
  {
    const NoAllocation watch;
    project_metric_forward_into(q, k, metric, out, log_sum_exp, workspace, options, causal);
    project_metric_backward_into(q, k, metric, out, log_sum_exp, go, grad_q, grad_k, grad_metric,
                                 grad_bandwidth, grad_prior, workspace, options, causal);
    project_bandwidths_forward_into(q, k, bandwidths, out_b, log_sum_exp_b, workspace, without,
                                    causal);
    project_bandwidths_backward_into(q, k, bandwidths, out_b, log_sum_exp_b, go, grad_q_b, grad_k_b,
                                     grad_bandwidths, grad_prior_b, workspace, without, causal);
    count = watch.count();
  }
  CHECK(count == 0);
  CHECK(out == f.out);
  CHECK(log_sum_exp == f.log_sum_exp);
  CHECK(grad_q == g.queries);
  CHECK(grad_k == g.keys);
  CHECK(grad_metric == g.metric);
  CHECK(grad_bandwidth == g.bandwidth);
  CHECK(grad_prior == g.log_prior);
  CHECK(out_b == fb.out);
  CHECK(grad_q_b == gb.queries);
  CHECK(grad_k_b == gb.keys);
  CHECK(grad_bandwidths == gb.bandwidths);
  CHECK(grad_prior_b == gb.log_prior);
}

TEST_CASE("project_metric and project_bandwidths: what stands behind a mask reaches nothing") {
  std::mt19937_64 random = seeded_random();
  Problem<double> p({5, 8, 2, 2, 2, 1}, random);
  const SurfaceOptions options{.heads = p.heads};
  const Row metric = random_positive(1, 2, random);
  const M bandwidths = random_positive(5, 2, random);
  const auto run = [&] {
    const auto f = project_metric_forward(p.queries, p.keys, metric, options, KeyLengths{6});
    const auto g = project_metric_backward(p.queries, p.keys, metric, f, p.grad_projection, options,
                                           KeyLengths{6});
    const auto fb =
        project_bandwidths_forward(p.queries, p.keys, bandwidths, options, KeyLengths{6});
    const auto gb = project_bandwidths_backward(p.queries, p.keys, bandwidths, fb,
                                                p.grad_projection, options, KeyLengths{6});
    return std::vector<M>{f.out,  g.queries,  g.keys,  g.metric,
                          fb.out, gb.queries, gb.keys, gb.bandwidths};
  };
  const auto clean = run();
  p.keys.bottomRows(2).setConstant(std::numeric_limits<double>::quiet_NaN());
  const auto masked = run();
  for (std::size_t n = 0; n < clean.size(); ++n) CHECK(masked[n] == clean[n]);
}

TEST_CASE("project_metric and project_bandwidths name what is wrong") {
  const M q = M::Ones(3, 4), k = M::Ones(5, 4);
  CHECK_THROWS_WITH(project_metric(q, k, Row::Ones(3), {.heads = {2}}),
                    contains_text("metric is 1×3 but must be 1×2 or 1×4"));
  CHECK_THROWS_WITH(project_metric(q, k, Row::Zero(4)), contains_text("metric must be positive"));
  CHECK_THROWS_WITH(project_bandwidths(q, k, M::Ones(2, 1)),
                    contains_text("bandwidths is 2×1 but must be 3×1"));
  CHECK_THROWS_WITH(project_bandwidths(q, k, M::Ones(1, 3)),
                    contains_text("bandwidths is 1×3 but must be 1×1"));
  CHECK_THROWS_WITH(project_bandwidths(q, k, M::Constant(1, 1, -1.0)),
                    contains_text("bandwidths must be positive"));
  CHECK_THROWS_WITH(project_bandwidths(q, k, M::Ones(1, 1), {.bandwidth = 2}),
                    contains_text("give bandwidths alone"));
  CHECK_THROWS_WITH(project_bandwidths(q, k, M::Ones(1, 1), {.prior = KeyPrior::sdpa}),
                    contains_text("the sdpa prior belongs to one bandwidth"));
  M out = M::Constant(3, 4, -7), sums(3, 1), grad(3, 4);
  Row narrow(3);
  double sigma = -7;
  const Workspace small(64), large(1 << 20);
  CHECK_THROWS_WITH(project_metric_forward_into(q, k, Row::Ones(4), out, sums, small),
                    contains_text("project_metric_forward: workspace has 64 bytes"));
  CHECK_THROWS_WITH(project_bandwidths_forward_into(q, k, M::Ones(1, 1), out, sums, small),
                    contains_text("project_bandwidths_forward: workspace has 64 bytes"));
  CHECK_THROWS_WITH(project_metric_backward_into(q, k, Row::Ones(4), q, sums, q, out, grad, narrow,
                                                 sigma, sums, large),
                    contains_text("grad_metric is 1×3 but must be 1×4"));
  CHECK_THROWS_WITH(project_bandwidths_backward_into(q, k, M::Ones(1, 1), q, sums, q, out, out,
                                                     narrow, sums, large),
                    contains_text("grad_bandwidths is 1×3 but must be 1×1"));
  CHECK((out.array() == -7).all());
  CHECK(sigma == -7);
}
