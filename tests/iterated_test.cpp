// Iterated projection: against the definition, gradients by central differences, contraction, masks, storage and errors.
// clang-format off
#include "support/no_allocation.hpp"  // before all that includes Eigen
// clang-format on

#include <surfattn/iterated.hpp>

#include "support/differences.hpp"
#include "support/surfaces.hpp"

using namespace surfattn;
using namespace surfattn::test;

TEST_CASE("project_iterated is the projection repeated") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({9, 30, 3, 3, 4, 2}, random);
  const reference::Heads heads{4, 2};
  const auto mask = dense_mask(MaskKind::dense, 9, 30);
  const SurfaceOptions options{.heads = p.heads, .bandwidth = 1.1, .prior = p.log_prior};
  for (const double step_size : {0.3, 1.0, 1.4}) {
    Matrix<double> expected = p.queries;
    for (int steps = 0; steps < 5; ++steps) {
      CAPTURE(seed(), step_size, steps);
      const Iteration iteration{.steps = steps, .step_size = step_size};
      const auto forward =
          project_iterated_forward(p.queries, p.keys, iteration, options, BoolMask{mask});
      CHECK((forward.out - expected).cwiseAbs().maxCoeff() <= 1e-13);
      CHECK(project_iterated(p.queries, p.keys, iteration, options, BoolMask{mask}) == forward.out);
      const Matrix<double> projected =
          reference::project_forward<double>(expected, p.keys, 1.1, p.log_prior, heads, mask).out;
      expected += step_size * (projected - expected);
    }
  }
}

TEST_CASE("gradients of project_iterated agree with central differences to 1e-8") {
  std::mt19937_64 random = seeded_random();
  for (const Sizes& s : {Sizes{3, 7, 2, 2}, Sizes{5, 6, 3, 3, 4, 2}, Sizes{2, 70, 2, 2}}) {
    for (int prior = 0; prior < 4; ++prior) {
      CAPTURE(seed(), s.queries, s.keys, prior);
      const Problem<double> p(s, random);
      const auto shared_prior = p.log_prior.leftCols(1);
      const KeyPrior priors[] = {KeyPrior::uniform, KeyPrior::sdpa, p.log_prior, shared_prior};
      const SurfaceOptions options{.heads = p.heads, .bandwidth = 1.3, .prior = priors[prior]};
      const Iteration iteration{.steps = 3, .step_size = 0.7};
      const Causal causal{Align::bottom_right};
      const auto loss = [&](const Matrix<double>& q, const Matrix<double>& k, const Iteration& how,
                            const SurfaceOptions& o) {
        return project_iterated(q, k, how, o, causal).cwiseProduct(p.grad_projection).sum();
      };
      const auto forward = project_iterated_forward(p.queries, p.keys, iteration, options, causal);
      const auto g = project_iterated_backward(p.queries, p.keys, iteration, forward,
                                               p.grad_projection, options, causal);
      using M = Matrix<double>;
      check_by_differences(
          "queries", [&](const M& x) { return loss(x, p.keys, iteration, options); }, p.queries,
          g.queries);
      check_by_differences(
          "keys", [&](const M& x) { return loss(p.queries, x, iteration, options); }, p.keys,
          g.keys);
      check_by_differences(
          "step size",
          [&](double x) { return loss(p.queries, p.keys, {.steps = 3, .step_size = x}, options); },
          0.7, g.step_size);
      check_options_by_differences(
          [&](const SurfaceOptions& o) { return loss(p.queries, p.keys, iteration, o); }, options,
          p, g.bandwidth, g.log_prior);
    }
  }
}

TEST_CASE("project_iterated: steps that shrink, and those that do not") {
  // two keys: between them the projection expands along their line, q → tanh(q/σ²), and ends at a fixed point
  Matrix<double> k(2, 1), q(1, 1);
  k << -1, 1;
  q << 0.5;
  const SurfaceOptions narrow{.bandwidth = 0.5};
  const auto settled = project_iterated_forward(q, k, {.steps = 30}, narrow);
  double fixed = 1;
  for (int i = 0; i < 100; ++i) fixed = std::tanh(fixed / 0.25);
  CHECK(settled.out(0, 0) == Approx(fixed));
  CHECK(settled.last_step(0, 0) <= 1e-15);
  q << 1e-4;
  const auto leaving = project_iterated_forward(q, k, {.steps = 2}, narrow);
  CHECK(leaving.contraction(0, 0) == Approx(4).epsilon(1e-4));  // the slope 1/σ² of tanh at 0
  const SurfaceOptions wide{.bandwidth = 2};
  const auto resting = project_iterated_forward(q, k, {.steps = 6}, wide);
  CHECK(resting.contraction(0, 0) == Approx(0.25).epsilon(1e-4));
  CHECK(resting.last_step(0, 0) == Approx(1e-4 * 0.75 * std::pow(0.25, 5)).epsilon(1e-4));
  CHECK(project_iterated_forward(q, k, {.steps = 1}, wide).contraction(0, 0) == 0);
  CHECK(project_iterated_forward(q, k, {.steps = 0}, wide).last_step(0, 0) == 0);
}

TEST_CASE("project_iterated climbs the density of the keys") {
  std::mt19937_64 random = seeded_random();
  const TestSurface surface = arc();
  const NoisyPoints keys = noisy_points(surface, 400, false, random),
                    queries = noisy_points(surface, 50, false, random);
  const auto forward = project_iterated_forward(queries.points, keys.points,
                                                {.steps = 8, .step_size = 0.8}, {.bandwidth = 0.1});
  for (std::size_t t = 1; t < 8; ++t) {
    CHECK((forward.projections[t].log_sum_exp.array() >=
           forward.projections[t - 1].log_sum_exp.array() - 1e-12)
              .all());
  }
}

TEST_CASE("project_iterated: a query that sees no key gets 0 and gives no gradient") {
  std::mt19937_64 random = seeded_random();
  Matrix<double> q = random_matrix<double>(4, 3, random);
  const Matrix<double> k = random_matrix<double>(3, 3, random),
                       g = random_matrix<double>(4, 3, random);
  q.row(0).setConstant(std::numeric_limits<double>::quiet_NaN());
  const Iteration iteration{.steps = 3, .step_size = 0.5};
  const Causal causal{Align::bottom_right};
  const auto forward = project_iterated_forward(q, k, iteration, {}, causal);
  CHECK(forward.out.row(0).isZero(0));
  CHECK(forward.out.allFinite());
  CHECK(forward.contraction(0, 0) == 0);
  const auto gradients = project_iterated_backward(q, k, iteration, forward, g, {}, causal);
  CHECK(gradients.queries.row(0).isZero(0));
  CHECK(gradients.queries.allFinite());
  CHECK(gradients.keys.allFinite());
  CHECK(std::isfinite(gradients.step_size));
}

TEST_CASE(
    "project_iterated: a query out of a kernel's reach stays 0 though keys are in reach of 0") {
  std::mt19937_64 random = seeded_random();
  using M = Matrix<double>;
  // two heads: the first of query 0 and the second of query 1 are far from all keys
  M q = 0.5 * random_matrix<double>(3, 4, random);
  const M k = 0.5 * random_matrix<double>(8, 4, random), g = random_matrix<double>(3, 4, random);
  q.row(0).head(2).setConstant(10);
  q.row(1).tail(2).setConstant(-10);
  const SurfaceOptions options{.heads = {.query = 2}, .bandwidth = 2.0};
  const Iteration iteration{.steps = 3, .step_size = 0.7};
  // weights formed without a log-sum-exp would be exp(100) and not pass for 0
  const Modifier lift{[](auto score, Position) {
    return ValueAndDerivative{score + decltype(score)(100), decltype(score)(1)};
  }};
  const auto forward = project_iterated_forward(q, k, iteration, options, Epanechnikov{}, lift);
  CHECK(forward.out.row(0).head(2).isZero(0));
  CHECK(forward.out.row(1).tail(2).isZero(0));
  CHECK((forward.out.row(2).array() != 0).all());
  for (const auto& projection : forward.projections) {
    CHECK(projection.out.row(0).head(2).isZero(0));
    CHECK(projection.log_sum_exp(0, 0) == -std::numeric_limits<double>::infinity());
    CHECK(std::isfinite(projection.log_sum_exp(0, 1)));
  }
  CHECK(forward.last_step(0, 0) == 0);
  CHECK(forward.contraction(1, 1) == 0);
  CHECK(project_iterated(q, k, iteration, options, Epanechnikov{}, lift) == forward.out);
  M out(3, 4), points(9, 4), projections(9, 4), log_sum_exp(9, 2);
  project_iterated_forward_into(q, k, out, points, projections, log_sum_exp,
                                Workspace(iterated_workspace_size(Pass::forward, q, k, options)),
                                iteration, options, Epanechnikov{}, lift);
  CHECK(out == forward.out);
  const auto of =
      project_iterated_backward(q, k, iteration, forward, g, options, Epanechnikov{}, lift);
  CHECK(of.queries.row(0).head(2).isZero(0));
  CHECK(of.queries.row(1).tail(2).isZero(0));
  const auto loss = [&](const M& keys) {
    return project_iterated(q, keys, iteration, options, Epanechnikov{}, lift)
        .cwiseProduct(g)
        .sum();
  };
  check_by_differences("keys", loss, k, of.keys);
}

TEST_CASE("project_iterated_into allocates nothing and may write over the queries") {
  std::mt19937_64 random = seeded_random();
  const Matrix<float> q = random_matrix<float>(40, 6, random),
                      k = random_matrix<float>(70, 6, random);
  const SurfaceOptions options{.heads = {2}, .bandwidth = 1};
  const Iteration iteration{.steps = 4, .step_size = 0.9};
  const Matrix<float> expected = project_iterated(q, k, iteration, options);
  Eigen::MatrixXf out(40, 6), points = q;
  const Workspace workspace(iterated_workspace_size(q, k, options));
  std::size_t count = 0;
  {
    const NoAllocation watch;
    project_iterated_into(q, k, out, workspace, iteration, options);
    project_iterated_into(points, k, points, workspace, iteration, options);
    count = watch.count();
  }
  CHECK(count == 0);
  CHECK(out == expected);
  CHECK(points == expected);
}

TEST_CASE("project_iterated forward and backward into matrices of any storage allocate nothing") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({9, 30, 3, 3, 4, 2}, random);
  const Iteration iteration{.steps = 3, .step_size = 0.7};
  const SurfaceOptions options{.heads = p.heads, .bandwidth = 1.1, .prior = p.log_prior};
  const Causal causal{Align::bottom_right};
  const auto f = project_iterated_forward(p.queries, p.keys, iteration, options, causal);
  const auto g = project_iterated_backward(p.queries, p.keys, iteration, f, p.grad_projection,
                                           options, causal);
  const Eigen::MatrixXd q = p.queries, k = p.keys, go = p.grad_projection;  // column-major
  Eigen::MatrixXd out(9, 12), points(27, 12), projections(27, 12), log_sum_exp(27, 4),
      grad_q(9, 12), grad_k(30, 6), grad_prior(30, 2);
  double grad_bandwidth = 0, grad_step_size = 0;
  const Workspace workspace(
      std::max(iterated_workspace_size(Pass::forward, q, k, options),
               iterated_workspace_size(Pass::backward, q, k, options, causal)));
  std::size_t count = 0;
  {
    const NoAllocation watch;
    project_iterated_forward_into(q, k, out, points, projections, log_sum_exp, workspace, iteration,
                                  options, causal);
    project_iterated_backward_into(k, points, projections, log_sum_exp, go, grad_q, grad_k,
                                   grad_bandwidth, grad_prior, grad_step_size, workspace, iteration,
                                   options, causal);
    count = watch.count();
  }
  CHECK(count == 0);
  CHECK(out == f.out);
  CHECK(points.bottomRows(9) == f.points[2]);
  CHECK(grad_q == g.queries);
  CHECK(grad_k == g.keys);
  CHECK(grad_prior == g.log_prior);
  CHECK(grad_bandwidth == g.bandwidth);
  CHECK(grad_step_size == g.step_size);
  Eigen::MatrixXd few(18, 12);
  out.setConstant(-7);
  CHECK_THROWS_WITH(project_iterated_forward_into(q, k, out, few, projections, log_sum_exp,
                                                  workspace, iteration, options, causal),
                    contains_text("points is 18×12 but must be 27×12"));
  CHECK_THROWS_WITH(project_iterated_forward_into(q, k, out, points, projections, log_sum_exp,
                                                  Workspace(64), iteration, options, causal),
                    contains_text("workspace has 64 bytes"));
  CHECK((out.array() == -7).all());
}

TEST_CASE("project_iterated names what is wrong before it writes") {
  const Matrix<double> q = Matrix<double>::Ones(3, 4), k = Matrix<double>::Ones(5, 4);
  CHECK_THROWS_WITH(project_iterated(q, k, {.steps = -1}),
                    contains_text("surfattn::project_iterated: steps must not be negative"));
  CHECK_THROWS_WITH(project_iterated(q, k, {.steps = 1, .step_size = 0}),
                    contains_text("step_size must be positive"));
  Matrix<double> out = Matrix<double>::Constant(3, 4, -7), narrow(3, 3);
  CHECK_THROWS_WITH(project_iterated_into(q, k, narrow, Workspace(1 << 20), {.steps = 1}),
                    contains_text("out is 3×3 but must be 3×4"));
  CHECK_THROWS_WITH(project_iterated_into(q, k, out, Workspace(64), {.steps = 1}),
                    contains_text("workspace has 64 bytes"));
  CHECK_THROWS_WITH(
      project_iterated_into(q, k, out, Workspace(1 << 22), {.steps = 1}, {}, KeyLengths{9}),
      contains_text("KeyLengths"));
  CHECK((out.array() == -7).all());
  const SurfaceOptions both{.scale = 1.0, .bandwidth = 1.0};
  for (const Index steps : {0, 1}) {
    CHECK_THROWS_WITH(project_iterated_forward(q, k, {.steps = steps}, both),
                      contains_text("surfattn::project_iterated_forward: "));
    CHECK_THROWS_WITH(project_iterated_forward(q, k, {.steps = steps}, {}, KeyLengths{9}),
                      contains_text("KeyLengths"));
  }
  const auto forward = project_iterated_forward(q, k, {.steps = 2});
  CHECK_THROWS_WITH(project_iterated_backward(q, k, {.steps = 3}, forward, q),
                    contains_text("forward has 2 steps but must have 3"));
}
