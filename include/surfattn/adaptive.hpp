// surfattn layer 6: projection with a learned diagonal metric, or with a bandwidth for each head or
// query

#pragma once

#include <cmath>
#include <surfattn/attention.hpp>
#include <surfattn/surface.hpp>

/// Both are exact rewritings of calls that exist. With a metric m,
///
///     S_ij = −Σ_c m_c (q_ic − k_jc)²/(2σ²) + log π_j,
///
/// is the score of queries and keys whose columns are multiplied by √m, and the projection of
/// these, divided by √m, is that of the original ones. A bandwidth for each query, β_i = 1/σ_i²,
///
///     S_ij = −β_i‖q_i − k_j‖²/2 + log π_j  ≡  [β_i·q_i, −β_i/2, 1]·[k_j, ‖k_j‖², log π_j],
///
/// up to a number that is the same for all keys, makes scaled dot-product attention of width d + 2
/// with the keys as values. (A learned prior needs nothing new: pass it as `.prior`, and
/// project_backward gives its gradient.)
namespace surfattn {

/// Gradients of a loss with respect to the inputs of `project_metric`.
template <class Scalar>
struct MetricGradients {
  Matrix<Scalar> queries;    ///< Tq × (Hq·d)
  Matrix<Scalar> keys;       ///< Tk × (Hkv·d)
  RowVector<Scalar> metric;  ///< of the metric's size
  Scalar bandwidth{};        ///< ∂loss/∂σ
  Matrix<Scalar> log_prior;  ///< Tk × Hkv, or Tk × 1 where one explicit prior serves all heads
};

/// Gradients of a loss with respect to the inputs of `project_bandwidths`.
template <class Scalar>
struct BandwidthsGradients {
  Matrix<Scalar> queries;     ///< Tq × (Hq·d)
  Matrix<Scalar> keys;        ///< Tk × (Hkv·d)
  Matrix<Scalar> bandwidths;  ///< of the bandwidths' shape
  Matrix<Scalar> log_prior;   ///< Tk × Hkv, or Tk × 1 where one explicit prior serves all heads
};

namespace detail {

/// √m of each column of a matrix of `heads` heads; the metric is 1×d, for all heads, or has one
/// number for each column of the keys.
template <class Scalar>
RowVector<Scalar> metric_roots(const RowVector<Scalar>& metric, const Shape& shape, Index heads) {
  const Index d = shape.head_dim;
  RowVector<Scalar> roots(heads * d);
  for (Index head = 0; head < heads; ++head) {
    const Index shared = heads == shape.key_value_heads ? head : head / shape.group();
    const Index first = metric.size() == d ? 0 : shared * d;
    roots.segment(head * d, d) = metric.segment(first, d).cwiseSqrt();
  }
  return roots;
}

template <class Scalar>
void check_metric(const RowVector<Scalar>& metric, const Shape& shape, const Require& require) {
  const Index all = shape.key_value_heads * shape.head_dim;
  if (metric.size() != shape.head_dim && metric.size() != all) {
    require.fail("metric is 1×" + std::to_string(metric.size()) + " but must be 1×" +
                 std::to_string(shape.head_dim) + " or 1×" + std::to_string(all) +
                 " (one number for each column of a key head), because keys is " +
                 words(shape.keys_extent()));
  }
  for (Index c = 0; c < metric.size(); ++c) require.positive("metric", double(metric[c]));
}

/// Adds what the columns of a matrix of `heads` heads give to the gradient of the metric.
template <class Scalar>
void add_to_metric(const RowVector<Scalar>& of_columns, const Shape& shape, Index heads,
                   RowVector<Scalar>& gradient) {
  const Index d = shape.head_dim;
  for (Index head = 0; head < heads; ++head) {
    const Index shared = heads == shape.key_value_heads ? head : head / shape.group();
    gradient.segment(gradient.size() == d ? 0 : shared * d, d) += of_columns.segment(head * d, d);
  }
}

/// Column sums of a∘b over the rows of which `takes_part(row)`, so that what others hold, NaN
/// included, stays out.
template <class A, class B, class TakesPart>
auto column_products(const A& a, const B& b, const TakesPart& takes_part) {
  using Scalar = scalar_t<A>;
  RowVector<Scalar> sums = RowVector<Scalar>::Zero(a.cols());
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index c = 0; c < a.cols(); ++c) {
      if (takes_part(i, c)) sums[c] += a(i, c) * b(i, c);
    }
  }
  return sums;
}

/// A problem with bandwidths for each query, as attention of width d + 2.
template <class Scalar>
struct WidenedProblem {
  Shape shape;  ///< of the problem as posed
  Matrix<Scalar> queries, keys;
  Matrix<Scalar> precisions;  ///< β, Tq × Hq
  Options options;

  Index width() const { return shape.head_dim + 2; }
};

template <class Queries, class Keys, class Bandwidths>
WidenedProblem<scalar_t<Queries>> widen(const Queries& queries, const Keys& keys,
                                        const Bandwidths& bandwidths, const SurfaceOptions& options,
                                        const Require& require) {
  using Scalar = scalar_t<Queries>;
  static_assert(std::is_same_v<Scalar, accumulator_t<Scalar>>,
                "surfattn: bandwidths take float, double or long double");
  WidenedProblem<Scalar> wide;
  wide.shape =
      require.shapes(extent(queries), extent(keys), extent(keys), options.heads, options.sequences);
  const Shape& shape = wide.shape;
  if (options.scale || options.bandwidth)
    require.fail("give bandwidths alone, without options.scale and options.bandwidth");
  if (options.prior.is_sdpa())
    require.fail("the sdpa prior belongs to one bandwidth: give log-weights, or none");
  require.template key_prior<Scalar>(options.prior, shape);
  if (bandwidths.rows() != 1)
    require.shape("bandwidths", extent(bandwidths), shape.log_sum_exp_extent(),
                  "queries × query heads, or one row for all queries");
  require.shape("bandwidths", extent(bandwidths), {bandwidths.rows(), shape.query_heads},
                "queries × query heads, or one row for all queries");
  for (Index i = 0; i < bandwidths.rows(); ++i) {
    for (Index h = 0; h < shape.query_heads; ++h)
      require.positive("bandwidths", double(bandwidths(i, h)));
  }
  wide.options = {.scale = 1,
                  .heads = options.heads,
                  .executor = options.executor,
                  .sequences = options.sequences};
  const Index d = shape.head_dim, width = wide.width();
  wide.precisions.resize(shape.queries, shape.query_heads);
  wide.queries.resize(shape.queries, shape.query_heads * width);
  for (Index h = 0; h < shape.query_heads; ++h) {
    for (Index i = 0; i < shape.queries; ++i) {
      const Scalar sigma = bandwidths(bandwidths.rows() == 1 ? 0 : i, h);
      const Scalar beta = 1 / (sigma * sigma);
      wide.precisions(i, h) = beta;
      wide.queries.row(i).segment(h * width, d) = beta * queries.row(i).segment(h * d, d);
      wide.queries(i, h * width + d) = -beta / 2;
      wide.queries(i, h * width + d + 1) = Scalar(1);
    }
  }
  wide.keys.resize(shape.keys, shape.key_value_heads * width);
  for (Index g = 0; g < shape.key_value_heads; ++g) {
    auto block = wide.keys.middleCols(g * width, width);
    block.leftCols(d) = keys.middleCols(g * d, d);
    block.col(d) = keys.middleCols(g * d, d).rowwise().squaredNorm();
    block.col(d + 1).setZero();
    if (!options.prior.is_explicit()) continue;
    const auto weights = options.prior.template log_weights<Scalar>();
    for (Index j = 0; j < shape.keys; ++j) block(j, d + 1) = weights(j, weights.cols == 1 ? 0 : g);
  }
  return wide;
}

}  // namespace detail

/// `project_forward` with a diagonal metric: S_ij = −Σ_c m_c (q_ic − k_jc)²/(2σ²) + log π_j.
///
/// `metric`: m > 0, one number for each column of a head (1×d, for all heads) or of the keys
/// (1×(Hkv·d)). Everything else as for `project_forward`; with KeyPrior::sdpa S_ij = β·Σ_c
/// m_c·q_ic·k_jc. Returns {out, log_sum_exp}. Allocates scaled copies of queries and keys besides.
/// Errors as for `project`; a metric of another size, or one that is not positive.
template <class Queries, class Keys, class... Terms>
auto project_metric_forward(const Queries& queries, const Keys& keys,
                            const RowVector<detail::scalar_t<Queries>>& metric,
                            const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys>();
  constexpr detail::Require require("project_metric_forward");
  const auto shape = require.shapes(detail::extent(queries), detail::extent(keys),
                                    detail::extent(keys), options.heads, options.sequences);
  detail::check_metric(metric, shape, require);
  const RowVector<Scalar> of_queries = detail::metric_roots(metric, shape, shape.query_heads),
                          of_keys = detail::metric_roots(metric, shape, shape.key_value_heads);
  const Matrix<Scalar> scaled_queries = queries * of_queries.asDiagonal(),
                       scaled_keys = keys * of_keys.asDiagonal();
  auto forward = project_forward(scaled_queries, scaled_keys, options, terms...);
  forward.out *= of_queries.cwiseInverse().asDiagonal();
  return forward;
}

/// `project_metric_forward` without the log-sum-exp: P(Q), Tq × (Hq·d).
template <class Queries, class Keys, class... Terms>
auto project_metric(const Queries& queries, const Keys& keys,
                    const RowVector<detail::scalar_t<Queries>>& metric,
                    const SurfaceOptions& options = {}, const Terms&... terms) {
  return project_metric_forward(queries, keys, metric, options, terms...).out;
}

/// Gradients of a loss with respect to queries, keys, metric, bandwidth and log-prior, given
/// grad_out = ∂loss/∂out and what project_metric_forward returned. With q' = q∘√m, k' = k∘√m and
/// P' = P∘√m, from the gradients dq', dk' of project_backward for the upstream gradient g/√m:
///
///     dq = dq'∘√m,   dk = dk'∘√m,   dm = (Σ dq'∘q + Σ dk'∘k)/(2√m) − Σ g∘P/(2m).
template <class Queries, class Keys, class Scalar, class GradOut, class... Terms>
auto project_metric_backward(const Queries& queries, const Keys& keys,
                             const std::type_identity_t<RowVector<Scalar>>& metric,
                             const Forward<Scalar>& forward, const GradOut& grad_out,
                             const SurfaceOptions& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, Matrix<Scalar>, GradOut>();
  static_assert(!(detail::TrainableTermType<Terms> || ...),
                "surfattn: project_metric_backward gives no gradients of terms with parameters");
  constexpr detail::Require require("project_metric_backward");
  const auto shape = require.shapes(detail::extent(queries), detail::extent(keys),
                                    detail::extent(keys), options.heads, options.sequences);
  detail::check_metric(metric, shape, require);
  require.shape("forward.out", detail::extent(forward.out), shape.out_extent(),
                "the shape of queries");
  require.shape("grad_out", detail::extent(grad_out), shape.out_extent(), "the shape of queries");
  const RowVector<Scalar> of_queries = detail::metric_roots(metric, shape, shape.query_heads),
                          of_keys = detail::metric_roots(metric, shape, shape.key_value_heads);
  const Matrix<Scalar> q = queries, k = keys, g = grad_out;
  const Matrix<Scalar> scaled_queries = q * of_queries.asDiagonal(),
                       scaled_keys = k * of_keys.asDiagonal(),
                       scaled_gradient = g * of_queries.cwiseInverse().asDiagonal();
  const Forward<Scalar> scaled{forward.out * of_queries.asDiagonal(), forward.log_sum_exp};
  auto inner =
      project_backward(scaled_queries, scaled_keys, scaled, scaled_gradient, options, terms...);
  MetricGradients<Scalar> gradients;
  gradients.metric = RowVector<Scalar>::Zero(metric.size());
  const auto by_queries = detail::column_products(
      inner.queries, q, [&](Index i, Index c) { return inner.queries(i, c) != Scalar(0); });
  const auto by_out = detail::column_products(g, forward.out, [](Index, Index) { return true; });
  const auto by_keys = detail::column_products(
      inner.keys, k, [&](Index j, Index c) { return inner.keys(j, c) != Scalar(0); });
  const RowVector<Scalar> halves_q = of_queries.cwiseInverse() / 2;
  detail::add_to_metric<Scalar>(
      by_queries.cwiseProduct(halves_q) - by_out.cwiseProduct(2 * halves_q.cwiseProduct(halves_q)),
      shape, shape.query_heads, gradients.metric);
  detail::add_to_metric<Scalar>(by_keys.cwiseProduct(of_keys.cwiseInverse() / 2), shape,
                                shape.key_value_heads, gradients.metric);
  gradients.queries = inner.queries * of_queries.asDiagonal();
  gradients.keys = inner.keys * of_keys.asDiagonal();
  gradients.bandwidth = inner.bandwidth;
  gradients.log_prior = std::move(inner.log_prior);
  return gradients;
}

/// `project_forward` with a bandwidth σ for each query head, 1 × Hq, or for each query of each
/// head, Tq × Hq: S_ij = −‖q_i − k_j‖²/(2σ_i²) + log π_j.
///
/// Everything else as for `project_forward`, with a uniform or an explicit prior, and with
/// `bandwidths` in the place of options.bandwidth. Returns {out, log_sum_exp}, the latter of the
/// scores β_i·(q_i·k_j − ‖k_j‖²/2) + log π_j. Allocates copies of queries and keys that are two
/// columns wider for each head. Errors as for `project`; bandwidths of another shape or not
/// positive, an option that gives a bandwidth besides.
template <class Queries, class Keys, class Bandwidths, class... Terms>
auto project_bandwidths_forward(const Queries& queries, const Keys& keys,
                                const Bandwidths& bandwidths, const SurfaceOptions& options = {},
                                const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, Bandwidths>();
  const auto wide = detail::widen(queries, keys, bandwidths, options,
                                  detail::Require("project_bandwidths_forward"));
  static_assert(!decltype(detail::bind_terms(wide.shape, std::declval<const detail::Require&>(),
                                             terms...))::needs_whole_scores,
                "surfattn: project_bandwidths takes no modifiers and no sinks: its scores lack the "
                "norm of the query");
  return attention_forward(wide.queries, wide.keys, keys, wide.options, terms...);
}

/// `project_bandwidths_forward` without the log-sum-exp: P(Q), Tq × (Hq·d).
template <class Queries, class Keys, class Bandwidths, class... Terms>
auto project_bandwidths(const Queries& queries, const Keys& keys, const Bandwidths& bandwidths,
                        const SurfaceOptions& options = {}, const Terms&... terms) {
  return project_bandwidths_forward(queries, keys, bandwidths, options, terms...).out;
}

/// Gradients of a loss with respect to queries, keys, bandwidths and log-prior, given grad_out =
/// ∂loss/∂out and what project_bandwidths_forward returned. With u and w the gradients that
/// attention_backward gives for the wide queries and keys, and those of the values dv,
///
///     dq_i = β_i·u_i[1 … d],   dβ_i = q_i·u_i[1 … d] − u_i[d + 1]/2,   dσ_i = −2β_i^(3/2)·dβ_i,
///     dk_j = w_j[1 … d] + 2w_j[d + 1]·k_j + dv_j,   d log π_j = w_j[d + 2].
template <class Queries, class Keys, class Bandwidths, class Scalar, class GradOut, class... Terms>
auto project_bandwidths_backward(const Queries& queries, const Keys& keys,
                                 const Bandwidths& bandwidths, const Forward<Scalar>& forward,
                                 const GradOut& grad_out, const SurfaceOptions& options = {},
                                 const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, Bandwidths, Matrix<Scalar>, GradOut>();
  static_assert(
      !(detail::TrainableTermType<Terms> || ...),
      "surfattn: project_bandwidths_backward gives no gradients of terms with parameters");
  const auto wide = detail::widen(queries, keys, bandwidths, options,
                                  detail::Require("project_bandwidths_backward"));
  const detail::Shape& shape = wide.shape;
  const Index d = shape.head_dim, width = wide.width();
  const auto inner =
      attention_backward(wide.queries, wide.keys, keys, forward, grad_out, wide.options, terms...);
  const bool shared_prior = options.prior.is_explicit() && options.prior.cols() == 1;
  BandwidthsGradients<Scalar> gradients{
      Matrix<Scalar>(shape.queries, shape.query_heads * d), inner.values,
      Matrix<Scalar>::Zero(bandwidths.rows(), bandwidths.cols()),
      Matrix<Scalar>::Zero(shape.keys, shared_prior ? 1 : shape.key_value_heads)};
  for (Index h = 0; h < shape.query_heads; ++h) {
    for (Index i = 0; i < shape.queries; ++i) {
      const auto u = inner.queries.row(i).segment(h * width, width);
      const Scalar beta = wide.precisions(i, h);
      gradients.queries.row(i).segment(h * d, d) = beta * u.head(d);
      if (forward.log_sum_exp(i, h) == detail::simd::minus_infinity<Scalar>) continue;
      const Scalar by_precision = queries.row(i).segment(h * d, d).dot(u.head(d)) - u[d] / 2;
      gradients.bandwidths(bandwidths.rows() == 1 ? 0 : i, h) -=
          2 * beta * std::sqrt(beta) * by_precision;
    }
  }
  for (Index g = 0; g < shape.key_value_heads; ++g) {
    for (Index j = 0; j < shape.keys; ++j) {
      const auto w = inner.keys.row(j).segment(g * width, width);
      auto row = gradients.keys.row(j).segment(g * d, d);
      row += w.head(d);
      // what a key holds that nobody sees must not come through
      if (w[d] != Scalar(0)) row += 2 * w[d] * keys.row(j).segment(g * d, d);
      gradients.log_prior(j, shared_prior ? 0 : g) += w[d + 1];
    }
  }
  return gradients;
}

}  // namespace surfattn
