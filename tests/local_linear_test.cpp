// The local-linear estimate: against the reference, with bounds on rounding errors; limits, masks, storage and threads.
// clang-format off
#include "support/no_allocation.hpp"  // before all that includes Eigen
// clang-format on

#include <Eigen/LU>
#include <surfattn/executors/thread_pool.hpp>
#include <surfattn/local_linear.hpp>

#include "support/accuracy.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

const Sizes local_sizes[] = {{1, 1, 1, 1},           {3, 7, 2, 5},    {9, 5, 4, 3, 2, 1},
                             {17, 19, 3, 2, 4, 2},   {2, 531, 2, 2},  {133, 30, 2, 1},
                             {5, 300, 37, 33, 2, 2}, {70, 65, 16, 16}};

/// First-order bound on the error of f = v̄ + Sᵀ·C⁻¹(q − μ), one head. With u, g(n) and E_W as in bounds.hpp, absolute values
/// entry by entry, A = |C⁻¹|, δ and ν the keys and values about their means:
///
///     E_μ = E_W·|K| + g(Tk)·W·|K| + 4u|μ|,   E_v̄ likewise,
///     E_C = Σ (E_W + g(Tk)·W)|δ||δ|ᵀ + 2u·Σ W|δ|·(|k| + |μ|)ᵀ + g(3d)·√(C_aa·C_bb)     (the last from factorising)
///     E_S = Σ (E_W + g(Tk)·W)|δ||ν|ᵀ + E_μ·|Σ w ν|… = 0, and u·|δ|·|v| for the difference
///     E_z = A·(E_μ + u(|q| + |μ|) + E_C·|z|)
///     E_f = E_v̄ + E_Sᵀ·|z| + |S|ᵀ·E_z + g(d)·|S|ᵀ|z| + 4u|f|.
template <class Scalar>
Doubles local_linear_bound(const ExactHead& head, const Doubles& values, double ridge) {
  const double u = double(std::numeric_limits<Scalar>::epsilon()) / 2;
  const auto g = [&](double n) { return 4 * std::sqrt(n) * u; };
  const Index tk = head.keys.rows(), d = head.keys.cols();
  const Doubles& w = head.weights;
  Doubles e_s = head.scale * head.queries.cwiseAbs() * head.keys.cwiseAbs().transpose();
  e_s.colwise() += head.query_bias.cwiseAbs().col(0);
  e_s.rowwise() += head.key_bias_magnitude.transpose().row(0);
  e_s *= g(double(d + 4));
  Doubles relative = e_s;
  relative.colwise() += (w.cwiseProduct(e_s).rowwise().sum().array() + g(double(tk)) + 16 * u +
                         4 * u * head.log_sum_exp.array().abs().min(1e30))
                            .matrix()
                            .col(0);
  const Doubles e_w = w.cwiseProduct((relative.array() + 16 * u + g(double(tk))).matrix());
  Doubles bound = Doubles::Zero(head.queries.rows(), values.cols());
  for (Index i = 0; i < w.rows(); ++i) {
    if (w.row(i).sum() == 0) continue;
    const Doubles mean = w.row(i) * head.keys, mean_value = w.row(i) * values;
    const Doubles delta = head.keys.rowwise() - mean.row(0),
                  nu = values.rowwise() - mean_value.row(0);
    const Doubles a = delta.cwiseAbs(), n = nu.cwiseAbs();
    const Doubles wi = w.row(i).transpose().asDiagonal() * a;
    const Doubles ei = e_w.row(i).transpose().asDiagonal() * a;
    const Doubles c = (w.row(i).transpose().asDiagonal() * delta).transpose() * delta +
                      ridge * Doubles::Identity(d, d);
    const Doubles s = (w.row(i).transpose().asDiagonal() * delta).transpose() * nu;
    const Doubles inverse = c.inverse();
    const Doubles z = inverse * (head.queries.row(i) - mean).transpose();
    const Doubles e_mean =
        (e_w.row(i) * head.keys.cwiseAbs() + 4 * u * mean.cwiseAbs()).transpose();
    const Doubles k_sizes = (head.keys.cwiseAbs().rowwise() + mean.cwiseAbs().row(0));
    Doubles e_c =
        ei.transpose() * a + 2 * u * (wi.transpose() * k_sizes + k_sizes.transpose() * wi);
    e_c += g(3 * double(d)) * c.diagonal().cwiseSqrt() * c.diagonal().cwiseSqrt().transpose();
    const Doubles e_z =
        inverse.cwiseAbs() *
        (e_mean + u * (head.queries.row(i).cwiseAbs() + mean.cwiseAbs()).transpose() +
         e_c * z.cwiseAbs());
    const Doubles e_cross =
        ei.transpose() * n + 2 * u *
                                 (wi.transpose() * values.cwiseAbs() +
                                  k_sizes.transpose() * (w.row(i).transpose().asDiagonal() * n));
    const Doubles f = mean_value + z.transpose() * s;
    bound.row(i) = e_w.row(i) * values.cwiseAbs() + z.cwiseAbs().transpose() * e_cross +
                   e_z.transpose() * s.cwiseAbs() +
                   g(double(d)) * z.cwiseAbs().transpose() * s.cwiseAbs() +
                   4 * u *
                       (f.cwiseAbs() + mean_value.cwiseAbs() +
                        2 * e_mean.transpose().cwiseAbs().maxCoeff() * Doubles::Ones(1, f.cols()));
    bound.row(i).array() += 2 * u * head.queries.row(i).cwiseAbs().maxCoeff();
  }
  return bound;
}

template <class Scalar, class High>
void check_local_linear(const Problem<Scalar>& p, MaskKind mask_kind, double ridge) {
  const auto mask = dense_mask(mask_kind, p.queries.rows(), p.keys.rows());
  const reference::Heads heads{p.sizes.query_heads, p.sizes.key_value_heads};
  const double bandwidth = 1.2;
  const Matrix<High> q = p.queries.template cast<High>(), k = p.keys.template cast<High>(),
                     v = p.values.template cast<High>(), prior = p.log_prior.template cast<High>();
  const auto forward = reference::project_forward<High>(q, k, High(bandwidth), prior, heads, mask);
  const auto bound_for = [&](const Doubles& values) {
    Doubles bound = Doubles::Zero(q.rows(), values.cols() / heads.key_value * heads.query);
    for (Index h = 0; h < heads.query; ++h) {
      auto one =
          exact_head<High>(doubles(p.queries), doubles(p.keys), doubles(p.keys), doubles(p.queries),
                           forward, h, heads.query, heads.key_value, 1 / (bandwidth * bandwidth));
      one.query_bias = one.scale / 2 * one.queries.rowwise().squaredNorm();
      const Index shared = h / (heads.query / heads.key_value);
      one.key_bias_magnitude = one.scale / 2 * one.keys.rowwise().squaredNorm() +
                               doubles(p.log_prior).cwiseAbs().col(shared);
      const Doubles own = columns(values, shared, heads.key_value);
      bound.middleCols(h * own.cols(), own.cols()) = local_linear_bound<Scalar>(one, own, ridge);
    }
    return bound;
  };
  const SurfaceOptions options{.heads = p.heads, .bandwidth = bandwidth, .prior = p.log_prior};
  const auto check = [&](const auto&... terms) {
    check_error("f of keys", local_linear(p.queries, p.keys, ridge, options, terms...),
                reference::local_linear<Scalar>(p.queries, p.keys, {}, Scalar(bandwidth),
                                                Scalar(ridge), p.log_prior, heads, mask),
                reference::local_linear<High>(q, k, {}, High(Scalar(bandwidth)),
                                              High(Scalar(ridge)), prior, heads, mask),
                bound_for(doubles(p.keys)));
    check_error("f of values", local_linear(p.queries, p.keys, p.values, ridge, options, terms...),
                reference::local_linear<Scalar>(p.queries, p.keys, p.values, Scalar(bandwidth),
                                                Scalar(ridge), p.log_prior, heads, mask),
                reference::local_linear<High>(q, k, v, High(Scalar(bandwidth)), High(Scalar(ridge)),
                                              prior, heads, mask),
                bound_for(doubles(p.values)));
  };
  if (mask_kind == MaskKind::none) return check();
  check(BoolMask{mask});
}

template <class Scalar>
double difference(const Matrix<Scalar>& a, const Matrix<Scalar>& b) {
  return double((a - b).cwiseAbs().maxCoeff());
}

}  // namespace

TEST_CASE("local_linear agrees with the reference in the next higher precision") {
  std::mt19937_64 random = seeded_random();
  int turn = 0;
  for (const Sizes& s : local_sizes) {
    for (const double ridge : {0.05, 1.0}) {
      const MaskKind mask = all_masks[turn++ % std::size(all_masks)];
      CAPTURE(seed(), s.queries, s.keys, s.head_dim, s.query_heads, int(mask), ridge);
      check_local_linear<float, double>(Problem<float>(s, random), mask, ridge);
      check_local_linear<double, long double>(Problem<double>(s, random), mask, ridge);
    }
  }
}

TEST_CASE("local_linear: a large ridge gives the local constant") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({7, 40, 3, 2, 2, 1}, random);
  const SurfaceOptions options{.heads = p.heads, .bandwidth = 0.9};
  const Options standard{.heads = p.heads};
  const auto constant = project(p.queries, p.keys, options);
  double before = 1e9;
  for (const double ridge : {1e2, 1e4, 1e6, 1e8}) {
    const double now = difference(local_linear(p.queries, p.keys, ridge, options), constant);
    CHECK(now <= 4 / ridge);  // f − μ = M·(M + λI)⁻¹·(q − μ)
    CHECK(now < before);
    before = now;
  }
  const SurfaceOptions as_sdpa{.heads = p.heads, .prior = KeyPrior::sdpa};
  CHECK(difference(local_linear(p.queries, p.keys, p.values, 1e12, as_sdpa),
                   attention(p.queries, p.keys, p.values, standard)) <= 1e-10);
}

TEST_CASE("local_linear: a small ridge keeps what lies in the span of the keys") {
  std::mt19937_64 random = seeded_random();
  // keys in the plane x₂ = 1 of space, queries anywhere
  Matrix<double> k = random_matrix<double>(60, 3, random), q = random_matrix<double>(9, 3, random);
  k.col(2).setOnes();
  Matrix<double> expected = q;
  expected.col(2).setOnes();
  const SurfaceOptions options{.bandwidth = 2.0};
  CHECK(difference(local_linear(q, k, 1e-10, options), expected) <= 1e-6);
  // where the keys span everything, the query itself
  const Matrix<double> all = random_matrix<double>(60, 3, random);
  CHECK(difference(local_linear(q, all, 1e-10, options), q) <= 1e-6);
}

TEST_CASE("local_linear: values that are linear in the keys are found exactly by a small ridge") {
  std::mt19937_64 random = seeded_random();
  const Matrix<double> k = random_matrix<double>(80, 3, random),
                       q = random_matrix<double>(9, 3, random),
                       m = random_matrix<double>(3, 4, random);
  const Matrix<double> v = (k * m).rowwise() + RowVector<double>::Ones(4),
                       expected = (q * m).rowwise() + RowVector<double>::Ones(4);
  const SurfaceOptions options{.bandwidth = 2.0};
  CHECK(difference(local_linear(q, k, v, 1e-10, options), expected) <= 1e-6);
  CHECK(difference(attention(q, k, v, {.scale = 0.25}), expected) > 0.5);
}

TEST_CASE("local_linear: in float moments about the projection survive an offset of all points") {
  std::mt19937_64 random = seeded_random();
  const Matrix<double> k = random_matrix<double>(300, 4, random),
                       q = random_matrix<double>(20, 4, random);
  const Matrix<double> exact = local_linear(q, k, 0.01, {.bandwidth = 0.7});
  for (const double offset : {0.0, 8.0}) {  // a power of two, so that the points are the same
    const Matrix<float> far_k = ((k.cast<float>().cast<double>().array() + offset)).cast<float>(),
                        far_q = ((q.cast<float>().cast<double>().array() + offset)).cast<float>();
    const Matrix<double> same_k = far_k.cast<double>().array() - offset,
                         same_q = far_q.cast<double>().array() - offset;
    const Matrix<double> f =
        local_linear(far_q, far_k, 0.01, {.bandwidth = 0.7}).cast<double>().array() - offset;
    CHECK(difference(f, Matrix<double>(local_linear(same_q, same_k, 0.01, {.bandwidth = 0.7}))) <=
          (offset == 0 ? 2e-5 : 2e-3));
  }
  CHECK(exact.allFinite());
}

TEST_CASE("local_linear: what stands behind a mask reaches nothing") {
  std::mt19937_64 random = seeded_random();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Problem<double> p({6, 40, 3, 2, 2, 1}, random);
  const SurfaceOptions options{.heads = p.heads, .bandwidth = 1.0};
  const auto run = [&](const Problem<double>& at) {
    const auto f = local_linear_forward(at.queries, at.keys, 0.1, options, KeyLengths{30});
    const auto g = local_linear_backward(at.queries, at.keys, 0.1, f, at.grad_projection, options,
                                         KeyLengths{30});
    const auto fv =
        local_linear_forward(at.queries, at.keys, at.values, 0.1, options, KeyLengths{30});
    const auto gv = local_linear_backward(at.queries, at.keys, at.values, 0.1, fv, at.grad_out,
                                          options, KeyLengths{30});
    CHECK(g.keys.bottomRows(10).isZero(0));
    CHECK(gv.values.bottomRows(10).isZero(0));
    CHECK(g.log_prior.bottomRows(10).isZero(0));
    return std::vector<Matrix<double>>{
        f.out,       g.queries, g.keys,
        g.log_prior, fv.out,    gv.queries,
        gv.keys,     gv.values, Matrix<double>{{g.bandwidth, g.ridge, gv.bandwidth, gv.ridge}}};
  };
  const auto clean = run(p);
  p.keys.bottomRows(10).setConstant(nan);
  p.values.bottomRows(10).setConstant(nan);
  const auto masked = run(p);
  for (std::size_t n = 0; n < clean.size(); ++n) CHECK(masked[n] == clean[n]);

  // a query that sees no key: 0 and −∞, and no gradient, whatever it holds
  const Problem<double> all({4, 3, 3, 2}, random);
  Matrix<double> q = all.queries;
  q.row(0).setConstant(nan);
  const auto f = local_linear_forward(q, all.keys, 0.1, {}, Causal{Align::bottom_right});
  CHECK(f.out.row(0).isZero(0));
  CHECK(f.projection.log_sum_exp(0, 0) == -std::numeric_limits<double>::infinity());
  const auto g = local_linear_backward(q, all.keys, 0.1, f, all.grad_projection, {},
                                       Causal{Align::bottom_right});
  CHECK(g.queries.row(0).isZero(0));
  CHECK(g.keys.allFinite());
  CHECK(std::isfinite(g.ridge));
  CHECK(std::isfinite(g.bandwidth));

  // a NaN in sight reaches the queries that see it and no other
  Matrix<double> k = all.keys;
  k(2, 1) = nan;
  const auto causal = local_linear(all.queries, k, 0.1, {}, Causal{Align::top_left});
  CHECK(causal.topRows(2).allFinite());
  CHECK(causal.row(2).array().isNaN().all());
}

TEST_CASE("local_linear: no keys, no queries") {
  const Matrix<double> none(0, 3), some = Matrix<double>::Ones(2, 3);
  CHECK(local_linear(some, none, 0.1).isZero(0));
  CHECK(local_linear(none, some, 0.1).rows() == 0);
  const auto f = local_linear_forward(some, none, 0.1);
  CHECK(local_linear_backward(some, none, 0.1, f, some).queries.isZero(0));
}

TEST_CASE(
    "local_linear: the same bits on any number of threads, in any storage, without allocating") {
  std::mt19937_64 random = seeded_random();
  const Problem<float> p({150, 310, 5, 3, 4, 2}, random);
  ThreadPool pool(3);
  const SurfaceOptions serial{.heads = p.heads, .bandwidth = 1.0};
  SurfaceOptions parallel = serial;
  parallel.executor = &pool;
  const auto f = local_linear_forward(p.queries, p.keys, p.values, 0.2, serial);
  const auto g = local_linear_backward(p.queries, p.keys, p.values, 0.2, f, p.grad_out, serial);
  const auto fp = local_linear_forward(p.queries, p.keys, p.values, 0.2, parallel);
  const auto gp = local_linear_backward(p.queries, p.keys, p.values, 0.2, fp, p.grad_out, parallel);
  CHECK(f.out == fp.out);
  CHECK(g.queries == gp.queries);
  CHECK(g.keys == gp.keys);
  CHECK(g.values == gp.values);
  CHECK(g.log_prior == gp.log_prior);
  CHECK(g.ridge == gp.ridge);
  CHECK(g.bandwidth == gp.bandwidth);

  const Eigen::MatrixXf q = p.queries, k = p.keys, v = p.values, go = p.grad_out;  // column-major
  Eigen::MatrixXf out(f.out.rows(), f.out.cols()), projection(q.rows(), q.cols()),
      log_sum_exp(q.rows(), 4), grad_q = q, grad_k = k, grad_v = v, grad_prior(k.rows(), 2);
  float bandwidth = 0, ridge = 0;
  const Workspace workspace(std::max(local_linear_workspace_size(Pass::forward, q, k, v, serial),
                                     local_linear_workspace_size(Pass::backward, q, k, v, serial)));
  std::size_t count = 0;
  {
    const NoAllocation watch;
    local_linear_forward_into(q, k, v, 0.2, out, projection, log_sum_exp, workspace, serial);
    local_linear_backward_into(q, k, v, 0.2, projection, log_sum_exp, go, grad_q, grad_k, grad_v,
                               bandwidth, ridge, grad_prior, workspace, serial);
    count = watch.count();
  }
  CHECK(count == 0);
  CHECK(out == f.out);
  CHECK(grad_q == g.queries);
  CHECK(grad_k == g.keys);
  CHECK(grad_v == g.values);
  CHECK(grad_prior == g.log_prior);
  CHECK(ridge == g.ridge);
  CHECK(bandwidth == g.bandwidth);

  Eigen::MatrixXf out_keys(q.rows(), q.cols());
  const Workspace for_keys(std::max(local_linear_workspace_size(Pass::forward, q, k, serial),
                                    local_linear_workspace_size(Pass::backward, q, k, serial)));
  {
    const NoAllocation watch;
    local_linear_forward_into(q, k, 0.2, out_keys, projection, log_sum_exp, for_keys, serial);
    local_linear_backward_into(q, k, 0.2, projection, log_sum_exp, q, grad_q, grad_k, bandwidth,
                               ridge, grad_prior, for_keys, serial);
    count = watch.count();
  }
  CHECK(count == 0);
  const auto of_keys = local_linear_forward(p.queries, p.keys, 0.2, serial);
  CHECK(out_keys == of_keys.out);
  CHECK(grad_k == local_linear_backward(p.queries, p.keys, 0.2, of_keys, p.queries, serial).keys);
}

TEST_CASE("local_linear: a batch is its sequences") {
  std::mt19937_64 random = seeded_random();
  const Problem<double> p({90, 110, 4, 3, 2, 1}, random);
  const std::vector<Index> of_queries{0, 70, 70, 90}, of_keys{0, 80, 100, 110};
  SurfaceOptions one{.heads = p.heads, .bandwidth = 1.0}, batch = one;
  batch.sequences = {of_queries, of_keys};
  const Causal causal{Align::bottom_right};
  const auto f = local_linear_forward(p.queries, p.keys, p.values, 0.2, batch, causal);
  const auto g =
      local_linear_backward(p.queries, p.keys, p.values, 0.2, f, p.grad_out, batch, causal);
  double ridge = 0, bandwidth = 0;
  for (std::size_t s = 0; s < 3; ++s) {
    const auto queries = [&](const Matrix<double>& m) -> Matrix<double> {
      return m.middleRows(of_queries[s], of_queries[s + 1] - of_queries[s]);
    };
    const auto keys = [&](const Matrix<double>& m) -> Matrix<double> {
      return m.middleRows(of_keys[s], of_keys[s + 1] - of_keys[s]);
    };
    const auto fs =
        local_linear_forward(queries(p.queries), keys(p.keys), keys(p.values), 0.2, one, causal);
    const auto gs = local_linear_backward(queries(p.queries), keys(p.keys), keys(p.values), 0.2, fs,
                                          queries(p.grad_out), one, causal);
    CHECK(queries(f.out) == fs.out);
    CHECK(queries(g.queries) == gs.queries);
    CHECK(keys(g.keys) == gs.keys);
    CHECK(keys(g.values) == gs.values);
    CHECK(keys(g.log_prior) == gs.log_prior);
    ridge += gs.ridge;
    bandwidth += gs.bandwidth;
  }
  CHECK(g.ridge == Approx(ridge));
  CHECK(g.bandwidth == Approx(bandwidth));
}

TEST_CASE("local_linear names what is wrong before it writes") {
  const Matrix<double> q = Matrix<double>::Ones(3, 4), k = Matrix<double>::Ones(5, 4),
                       v = Matrix<double>::Ones(6, 2);
  CHECK_THROWS_WITH(
      local_linear(q, k, 0.0),
      contains_text("surfattn::local_linear_forward: ridge must be positive and finite"));
  CHECK_THROWS_WITH(local_linear(q, k, std::numeric_limits<double>::infinity()),
                    contains_text("ridge"));
  for (const double too_small : {1e-60, 1e-40}) {
    CHECK_THROWS_WITH(
        local_linear(q.cast<float>(), k.cast<float>(), too_small),
        contains_text("ridge must be positive, finite and normal in the precision of queries"));
  }
  CHECK_THROWS_WITH(local_linear(q, k, v, 0.1),
                    contains_text("values must have one row for each key"));
  CHECK_THROWS_WITH(local_linear(q, k, 0.1, {.bandwidth = -1}), contains_text("bandwidth"));
  const auto f = local_linear_forward(q, k, 0.1);
  CHECK_THROWS_WITH(local_linear_backward(q, k, 0.1, f, v),
                    contains_text("local_linear_backward: grad_out is 6×2 but must be 3×4"));
  Matrix<double> out = Matrix<double>::Constant(3, 4, -7), projection(3, 4), narrow(3, 2), l(3, 1);
  CHECK_THROWS_WITH(local_linear_forward_into(q, k, 0.1, out, narrow, l, Workspace(1 << 20)),
                    contains_text("projection is 3×2 but must be 3×4"));
  CHECK_THROWS_WITH(local_linear_forward_into(q, k, 0.1, out, projection, l, Workspace(8)),
                    contains_text("workspace has 8 bytes"));
  CHECK((out.array() == -7).all());
}
