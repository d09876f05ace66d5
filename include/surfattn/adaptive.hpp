// surfattn layer 6: projection with a learned diagonal metric, or with a bandwidth for each head or
// query

#pragma once

#include <algorithm>
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

/// A row-major matrix at the arena's next place.
template <class Scalar>
Eigen::Map<Matrix<Scalar>> take_matrix(Arena& arena, Index rows, Index cols) {
  return {arena.take<Scalar>(rows * cols), rows, cols};
}

/// What is left of a workspace behind the arrays of an arena, which are `bytes` long in all.
inline Workspace behind(const Workspace& workspace, std::size_t bytes) {
  return {workspace.data() + bytes, workspace.size() - bytes};
}

/// Bytes of `Buffers`, wherever the workspace begins.
template <class Buffers>
std::size_t buffer_bytes(Pass pass, const Shape& shape) {
  Arena counter;
  Buffers(counter, pass, shape);
  return counter.used() + Arena::alignment;
}

template <class Scalar>
void check_metric(const RowVector<Scalar>& metric, const Shape& shape, const Require& require) {
  const Index all = shape.key_value_heads * shape.head_dim;
  if (metric.size() != shape.head_dim && metric.size() != all) {
    require.fail("metric is 1×", metric.size(), " but must be ",
                 words_of_either({1, shape.head_dim}, {1, all}),
                 " (one number for each column of a key head), because keys is ",
                 shape.keys_extent());
  }
  for (Index c = 0; c < metric.size(); ++c) require.positive("metric", double(metric[c]));
}

/// The place in a metric, 1×d for all heads or one number for each column of the keys, that belongs
/// to a column of a matrix of `heads` heads.
inline Index place_in_metric(Index col, Index heads, const Shape& shape, Index metric_size) {
  const Index d = shape.head_dim, head = col / d;
  if (metric_size == d) return col % d;
  return (heads == shape.key_value_heads ? head : head / shape.group()) * d + col % d;
}

/// Inputs times the roots of a metric, and the same of the backward pass's further inputs.
template <class Scalar>
struct MetricBuffers {
  using Map = Eigen::Map<Matrix<Scalar>>;
  Map query_roots, key_roots;  ///< √m of every column
  Map queries, keys;
  Map out, grad_out;  ///< of no rows in a forward pass

  MetricBuffers(Arena& arena, Pass pass, const Shape& shape)
      : query_roots(take_matrix<Scalar>(arena, 1, shape.query_heads * shape.head_dim)),
        key_roots(take_matrix<Scalar>(arena, 1, shape.key_value_heads * shape.head_dim)),
        queries(take_matrix<Scalar>(arena, shape.queries, query_roots.cols())),
        keys(take_matrix<Scalar>(arena, shape.keys, key_roots.cols())),
        out(take_matrix<Scalar>(arena, pass == Pass::backward ? shape.queries : 0,
                                query_roots.cols())),
        grad_out(take_matrix<Scalar>(arena, out.rows(), query_roots.cols())) {}

  /// The problem in coordinates in which the metric is 1.
  template <class Queries, class Keys>
  void fill(const Queries& from_queries, const Keys& from_keys, const RowVector<Scalar>& metric,
            const Shape& shape) {
    for (Map* roots : {&query_roots, &key_roots}) {
      const Index heads = roots->cols() / std::max<Index>(shape.head_dim, 1);
      for (Index c = 0; c < roots->cols(); ++c)
        (*roots)(0, c) = std::sqrt(metric[place_in_metric(c, heads, shape, metric.size())]);
    }
    queries = from_queries * query_roots.row(0).asDiagonal();
    keys = from_keys * key_roots.row(0).asDiagonal();
  }
};

/// dm += Σ dx'∘x/(2√m) over the rows of a matrix of inputs x, and dx = dx'∘√m in place. What takes no
/// part, NaN included, stays out.
template <class Scalar>
void pull_back_metric(MatrixView<const Scalar> inputs, const Eigen::Map<Matrix<Scalar>>& roots,
                      Index heads, const Shape& shape, MatrixView<Scalar> gradient,
                      MatrixView<Scalar> metric) {
  for (Index c = 0; c < gradient.cols; ++c) {
    Scalar sum(0);
    for (Index i = 0; i < gradient.rows; ++i) {
      Scalar& entry = gradient(i, c);
      if (entry != Scalar(0)) sum += entry * inputs(i, c);
      entry *= roots(0, c);
    }
    metric(0, place_in_metric(c, heads, shape, metric.cols)) += sum / (2 * roots(0, c));
  }
}

/// A problem with bandwidths for each query, as attention of width d + 2, and its gradients.
template <class Scalar>
struct WideBuffers {
  using Map = Eigen::Map<Matrix<Scalar>>;
  Map queries, keys;
  Map grad_queries, grad_keys;  ///< of no rows in a forward pass

  WideBuffers(Arena& arena, Pass pass, const Shape& shape)
      : queries(take_matrix<Scalar>(arena, shape.queries, shape.query_heads * width(shape))),
        keys(take_matrix<Scalar>(arena, shape.keys, shape.key_value_heads * width(shape))),
        grad_queries(
            take_matrix<Scalar>(arena, pass == Pass::backward ? shape.queries : 0, queries.cols())),
        grad_keys(
            take_matrix<Scalar>(arena, pass == Pass::backward ? shape.keys : 0, keys.cols())) {}

  static Index width(const Shape& shape) { return shape.head_dim + 2; }
};

/// β_i = 1/σ_i² of one query of one head.
template <class Bandwidths>
scalar_t<Bandwidths> precision(const Bandwidths& bandwidths, Index query, Index head) {
  const auto sigma = bandwidths(bandwidths.rows() == 1 ? 0 : query, head);
  return 1 / (sigma * sigma);
}

template <class Queries, class Keys, class Bandwidths>
Shape bandwidths_shape(const Queries& queries, const Keys& keys, const Bandwidths& bandwidths,
                       const SurfaceOptions& options, const Require& require) {
  using Scalar = scalar_t<Queries>;
  refuse_16_bits_at_compile_time<Scalar>();
  const Shape shape =
      require.shapes(extent(queries), extent(keys), extent(keys), options.heads, options.sequences);
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
  return shape;
}

inline Options wide_options(const SurfaceOptions& options) {
  return {.scale = 1,
          .heads = options.heads,
          .executor = options.executor,
          .sequences = options.sequences};
}

/// [β_i·q_i, −β_i/2, 1] and [k_j, ‖k_j‖², log π_j], head by head.
template <class Scalar, class Queries, class Keys, class Bandwidths>
void widen(const Queries& queries, const Keys& keys, const Bandwidths& bandwidths,
           const KeyPrior& prior, const Shape& shape, WideBuffers<Scalar>& wide) {
  const Index d = shape.head_dim, width = wide.width(shape);
  for (Index h = 0; h < shape.query_heads; ++h) {
    for (Index i = 0; i < shape.queries; ++i) {
      const Scalar beta = precision(bandwidths, i, h);
      wide.queries.row(i).segment(h * width, d) = beta * queries.row(i).segment(h * d, d);
      wide.queries(i, h * width + d) = -beta / 2;
      wide.queries(i, h * width + d + 1) = Scalar(1);
    }
  }
  for (Index g = 0; g < shape.key_value_heads; ++g) {
    auto block = wide.keys.middleCols(g * width, width);
    block.leftCols(d) = keys.middleCols(g * d, d);
    block.col(d) = keys.middleCols(g * d, d).rowwise().squaredNorm();
    block.col(d + 1).setZero();
    if (!prior.is_explicit()) continue;
    const auto weights = prior.template log_weights<Scalar>();
    for (Index j = 0; j < shape.keys; ++j) block(j, d + 1) = weights(j, weights.cols == 1 ? 0 : g);
  }
}

/// dq and dσ from the gradients of the wide queries.
template <class Scalar, class Queries, class Bandwidths>
void narrow_queries(const Queries& queries, const Bandwidths& bandwidths,
                    MatrixView<const Scalar> log_sum_exp, const WideBuffers<Scalar>& wide,
                    const Shape& shape, MatrixView<Scalar> grad_queries,
                    MatrixView<Scalar> grad_bandwidths) {
  const Index d = shape.head_dim, width = wide.width(shape);
  for (Index i = 0; i < grad_bandwidths.rows; ++i) {
    for (Index h = 0; h < shape.query_heads; ++h) grad_bandwidths(i, h) = Scalar(0);
  }
  for (Index h = 0; h < shape.query_heads; ++h) {
    for (Index i = 0; i < shape.queries; ++i) {
      const auto u = wide.grad_queries.row(i).segment(h * width, width);
      const Scalar beta = precision(bandwidths, i, h);
      for (Index c = 0; c < d; ++c) grad_queries(i, h * d + c) = beta * u[c];
      if (log_sum_exp(i, h) == simd::minus_infinity<Scalar>) continue;
      Scalar of_precision = -u[d] / 2;
      for (Index c = 0; c < d; ++c) of_precision += queries(i, h * d + c) * u[c];
      grad_bandwidths(grad_bandwidths.rows == 1 ? 0 : i, h) -=
          2 * beta * std::sqrt(beta) * of_precision;
    }
  }
}

/// dk, of which that of the values is there already, and d log π from those of the wide keys.
template <class Scalar, class Keys>
void narrow_keys(const Keys& keys, const WideBuffers<Scalar>& wide, const Shape& shape,
                 MatrixView<Scalar> grad_keys, MatrixView<Scalar> grad_log_prior) {
  const Index d = shape.head_dim, width = wide.width(shape);
  for (Index g = 0; g < shape.key_value_heads; ++g) {
    for (Index j = 0; j < shape.keys; ++j) {
      const auto w = wide.grad_keys.row(j).segment(g * width, width);
      for (Index c = 0; c < d; ++c) {
        grad_keys(j, g * d + c) += w[c];
        // what a key holds that nobody sees must not come through
        if (w[d] != Scalar(0)) grad_keys(j, g * d + c) += 2 * w[d] * keys(j, g * d + c);
      }
      grad_log_prior(j, g) = w[d + 1];
    }
  }
}

template <class Scalar>
Matrix<Scalar> prior_gradient_of(const KeyPrior& prior, Matrix<Scalar> of_heads) {
  if (prior.is_explicit() && prior.cols() == 1) of_heads = of_heads.rowwise().sum().eval();
  return of_heads;
}

}  // namespace detail

/// Bytes of workspace for `project_metric_forward_into` (Pass::forward) or
/// `project_metric_backward_into` (Pass::backward), of which copies of the inputs are a part.
template <class Queries, class Keys, class... Terms>
std::size_t metric_workspace_size(Pass pass, const Queries& queries, const Keys& keys,
                                  const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  constexpr detail::Require require("metric_workspace_size");
  const auto shape = require.shapes(detail::extent(queries), detail::extent(keys),
                                    detail::extent(keys), options.heads, options.sequences);
  return detail::buffer_bytes<detail::MetricBuffers<Scalar>>(pass, shape) +
         workspace_size(pass, queries, keys, options, terms...);
}

/// `project_metric_forward` into matrices of any storage, without allocating. Inputs must be stored
/// matrices; no output may overlap an input or another output.
template <class Queries, class Keys, class Out, class LogSumExp, class... Terms>
void project_metric_forward_into(const Queries& queries, const Keys& keys,
                                 const RowVector<detail::scalar_t<Queries>>& metric, Out&& out,
                                 LogSumExp&& log_sum_exp, const Workspace& workspace,
                                 const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  using Buffers = detail::MetricBuffers<Scalar>;
  detail::check_inputs_at_compile_time<Queries, Keys>();
  detail::check_outputs_at_compile_time<Scalar, Out, LogSumExp>();
  detail::refuse_16_bits_at_compile_time<Scalar>();
  constexpr detail::Require require("project_metric_forward");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const auto shape = require.shapes(detail::extent(q), detail::extent(k), detail::extent(k),
                                    options.heads, options.sequences);
  detail::check_metric(metric, shape, require);
  const std::size_t own = detail::buffer_bytes<Buffers>(Pass::forward, shape);
  detail::check_workspace(require, workspace,
                          own + detail::forward_workspace_size<Scalar>(shape, nullptr));
  detail::Arena arena(workspace);
  Buffers scaled(arena, Pass::forward, shape);
  scaled.fill(q, k, metric, shape);
  project_forward_into(scaled.queries, scaled.keys, out, log_sum_exp,
                       detail::behind(workspace, own), options, terms...);
  const auto result = detail::view(out);
  for (Index i = 0; i < result.rows; ++i) {
    for (Index c = 0; c < result.cols; ++c) result(i, c) /= scaled.query_roots(0, c);
  }
}

/// `project_forward` with a diagonal metric: S_ij = −Σ_c m_c (q_ic − k_jc)²/(2σ²) + log π_j.
///
/// `metric`: m > 0, one number for each column of a head (1×d, for all heads) or of the keys
/// (1×(Hkv·d)). Everything else as for `project_forward`, but no numbers of 16 bits; with
/// KeyPrior::sdpa S_ij = β·Σ_c m_c·q_ic·k_jc. Returns {out, log_sum_exp}. Allocates scaled copies of
/// queries and keys besides. Errors as for `project`; a metric of another size, or one that is not
/// positive.
template <class Queries, class Keys, class... Terms>
auto project_metric_forward(const Queries& queries, const Keys& keys,
                            const RowVector<detail::scalar_t<Queries>>& metric,
                            const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys>();
  const auto shape = detail::Require("project_metric_forward")
                         .shapes(detail::extent(queries), detail::extent(keys),
                                 detail::extent(keys), options.heads, options.sequences);
  Forward<Scalar> forward{detail::matrix<Scalar>(shape.queries_extent()),
                          detail::matrix<Scalar>(shape.log_sum_exp_extent())};
  project_metric_forward_into(
      queries, keys, metric, forward.out, forward.log_sum_exp,
      Workspace(metric_workspace_size(Pass::forward, queries, keys, options)), options, terms...);
  return forward;
}

/// `project_metric_forward` without the log-sum-exp: P(Q), Tq × (Hq·d).
template <class Queries, class Keys, class... Terms>
auto project_metric(const Queries& queries, const Keys& keys,
                    const RowVector<detail::scalar_t<Queries>>& metric,
                    const SurfaceOptions& options = {}, const Terms&... terms) {
  return project_metric_forward(queries, keys, metric, options, terms...).out;
}

/// `project_metric_backward` into matrices of any storage, without allocating. Outputs as for
/// `project_backward_into`, and `grad_metric` of the metric's size.
template <class Queries, class Keys, class Out, class LogSumExp, class GradOut, class GradQueries,
          class GradKeys, class GradMetric, class GradLogPrior, class... Terms>
void project_metric_backward_into(const Queries& queries, const Keys& keys,
                                  const RowVector<detail::scalar_t<Queries>>& metric,
                                  const Out& out, const LogSumExp& log_sum_exp,
                                  const GradOut& grad_out, GradQueries&& grad_queries,
                                  GradKeys&& grad_keys, GradMetric&& grad_metric,
                                  detail::scalar_t<Queries>& grad_bandwidth,
                                  GradLogPrior&& grad_log_prior, const Workspace& workspace,
                                  const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  using Buffers = detail::MetricBuffers<Scalar>;
  detail::check_inputs_at_compile_time<Queries, Keys, Out, LogSumExp, GradOut>();
  detail::check_outputs_at_compile_time<Scalar, GradQueries, GradKeys, GradMetric, GradLogPrior>();
  detail::refuse_16_bits_at_compile_time<Scalar>();
  constexpr detail::Require require("project_metric_backward");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const auto& o = detail::stored(out);
  const auto& g = detail::stored(grad_out);
  const auto shape = require.shapes(detail::extent(q), detail::extent(k), detail::extent(k),
                                    options.heads, options.sequences);
  detail::check_metric(metric, shape, require);
  require.shape("forward.out", detail::extent(o), shape.out_extent(), "the shape of queries");
  require.shape("grad_out", detail::extent(g), shape.out_extent(), "the shape of queries");
  require.shape("grad_metric", detail::extent(grad_metric), {1, metric.size()},
                "the shape of metric");
  const std::size_t own = detail::buffer_bytes<Buffers>(Pass::backward, shape);
  SurfaceOptions serial = options;
  serial.executor = nullptr;
  detail::check_workspace(require, workspace,
                          own + workspace_size(Pass::backward, q, k, serial, terms...));
  detail::Arena arena(workspace);
  Buffers scaled(arena, Pass::backward, shape);
  scaled.fill(q, k, metric, shape);
  scaled.out = o * scaled.query_roots.row(0).asDiagonal();
  scaled.grad_out = g * scaled.query_roots.row(0).cwiseInverse().asDiagonal();
  project_backward_into(scaled.queries, scaled.keys, scaled.out, log_sum_exp, scaled.grad_out,
                        grad_queries, grad_keys, grad_bandwidth, grad_log_prior,
                        detail::behind(workspace, own), options, terms...);
  // P = P'/√m
  const detail::MatrixView<Scalar> of_metric = detail::view(grad_metric);
  for (Index c = 0; c < metric.size(); ++c) of_metric(0, c) = Scalar(0);
  for (Index c = 0; c < o.cols(); ++c) {
    const Index place = detail::place_in_metric(c, shape.query_heads, shape, metric.size());
    Scalar sum(0);
    for (Index i = 0; i < o.rows(); ++i) sum += g(i, c) * o(i, c);
    of_metric(0, place) -= sum / (2 * metric[place]);
  }
  detail::pull_back_metric<Scalar>(detail::view(q), scaled.query_roots, shape.query_heads, shape,
                                   detail::view(grad_queries), of_metric);
  detail::pull_back_metric<Scalar>(detail::view(k), scaled.key_roots, shape.key_value_heads, shape,
                                   detail::view(grad_keys), of_metric);
}

/// Gradients of a loss with respect to queries, keys, metric, bandwidth and log-prior, given
/// grad_out = ∂loss/∂out and what project_metric_forward returned. With q' = q∘√m, k' = k∘√m and
/// P' = P∘√m, from the gradients dq', dk' of project_backward for the upstream gradient g/√m:
///
///     dq = dq'∘√m,   dk = dk'∘√m,   dm = (Σ dq'∘q + Σ dk'∘k)/(2√m) − Σ g∘P/(2m).
///
/// Gradients of terms with parameters as for attention_backward.
template <class Queries, class Keys, class Scalar, class GradOut, class... Terms>
auto project_metric_backward(const Queries& queries, const Keys& keys,
                             const std::type_identity_t<RowVector<Scalar>>& metric,
                             const Forward<Scalar>& forward, const GradOut& grad_out,
                             const SurfaceOptions& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, Matrix<Scalar>, GradOut>();
  const auto shape = detail::Require("project_metric_backward")
                         .shapes(detail::extent(queries), detail::extent(keys),
                                 detail::extent(keys), options.heads, options.sequences);
  return detail::with_term_gradients(
      MetricGradients<Scalar>{detail::matrix<Scalar>(shape.queries_extent()),
                              detail::matrix<Scalar>(shape.keys_extent()),
                              RowVector<Scalar>(metric.size()), Scalar(0),
                              detail::matrix<Scalar>({shape.keys, shape.key_value_heads})},
      [&](MetricGradients<Scalar>& gradients, const auto&... directed) {
        project_metric_backward_into(
            queries, keys, metric, forward.out, forward.log_sum_exp, grad_out, gradients.queries,
            gradients.keys, gradients.metric, gradients.bandwidth, gradients.log_prior,
            Workspace(metric_workspace_size(Pass::backward, queries, keys, options, directed...)),
            options, directed...);
        gradients.log_prior =
            detail::prior_gradient_of(options.prior, std::move(gradients.log_prior));
      },
      terms...);
}

/// Bytes of workspace for `project_bandwidths_forward_into` (Pass::forward) or
/// `project_bandwidths_backward_into` (Pass::backward), of which copies of the inputs are a part.
template <class Queries, class Keys, class... Terms>
std::size_t bandwidths_workspace_size(Pass pass, const Queries& queries, const Keys& keys,
                                      const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  constexpr detail::Require require("bandwidths_workspace_size");
  const auto shape = require.shapes(detail::extent(queries), detail::extent(keys),
                                    detail::extent(keys), options.heads, options.sequences);
  detail::Shape wide = shape;
  wide.head_dim = detail::WideBuffers<Scalar>::width(shape);
  return detail::buffer_bytes<detail::WideBuffers<Scalar>>(pass, shape) +
         detail::workspace_size<Scalar>(pass, wide, false, options.executor, require, terms...);
}

/// `project_bandwidths_forward` into matrices of any storage, without allocating. Inputs must be
/// stored matrices; no output may overlap an input or another output.
template <class Queries, class Keys, class Bandwidths, class Out, class LogSumExp, class... Terms>
void project_bandwidths_forward_into(const Queries& queries, const Keys& keys,
                                     const Bandwidths& bandwidths, Out&& out,
                                     LogSumExp&& log_sum_exp, const Workspace& workspace,
                                     const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  using Buffers = detail::WideBuffers<Scalar>;
  detail::check_inputs_at_compile_time<Queries, Keys, Bandwidths>();
  detail::check_outputs_at_compile_time<Scalar, Out, LogSumExp>();
  constexpr detail::Require require("project_bandwidths_forward");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const detail::Shape shape = detail::bandwidths_shape(q, k, bandwidths, options, require);
  static_assert(!decltype(detail::bind_terms(shape, std::declval<const detail::Require&>(),
                                             terms...))::needs_whole_scores,
                "surfattn: project_bandwidths takes no modifiers and no sinks: its scores lack the "
                "norm of the query");
  const std::size_t own = detail::buffer_bytes<Buffers>(Pass::forward, shape);
  SurfaceOptions serial = options;
  serial.executor = nullptr;
  detail::check_workspace(require, workspace,
                          bandwidths_workspace_size(Pass::forward, q, k, serial));
  detail::Arena arena(workspace);
  Buffers wide(arena, Pass::forward, shape);
  detail::widen(q, k, bandwidths, options.prior, shape, wide);
  attention_forward_into(wide.queries, wide.keys, k, out, log_sum_exp,
                         detail::behind(workspace, own), detail::wide_options(options), terms...);
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
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys, Bandwidths>();
  const auto shape = detail::Require("project_bandwidths_forward")
                         .shapes(detail::extent(queries), detail::extent(keys),
                                 detail::extent(keys), options.heads, options.sequences);
  Forward<Scalar> forward{detail::matrix<Scalar>(shape.queries_extent()),
                          detail::matrix<Scalar>(shape.log_sum_exp_extent())};
  project_bandwidths_forward_into(
      queries, keys, bandwidths, forward.out, forward.log_sum_exp,
      Workspace(bandwidths_workspace_size(Pass::forward, queries, keys, options)), options,
      terms...);
  return forward;
}

/// `project_bandwidths_forward` without the log-sum-exp: P(Q), Tq × (Hq·d).
template <class Queries, class Keys, class Bandwidths, class... Terms>
auto project_bandwidths(const Queries& queries, const Keys& keys, const Bandwidths& bandwidths,
                        const SurfaceOptions& options = {}, const Terms&... terms) {
  return project_bandwidths_forward(queries, keys, bandwidths, options, terms...).out;
}

/// `project_bandwidths_backward` into matrices of any storage, without allocating: `grad_bandwidths`
/// of the bandwidths' shape, `grad_log_prior` Tk × Hkv also where one prior serves all heads.
template <class Queries, class Keys, class Bandwidths, class Out, class LogSumExp, class GradOut,
          class GradQueries, class GradKeys, class GradBandwidths, class GradLogPrior,
          class... Terms>
void project_bandwidths_backward_into(const Queries& queries, const Keys& keys,
                                      const Bandwidths& bandwidths, const Out& out,
                                      const LogSumExp& log_sum_exp, const GradOut& grad_out,
                                      GradQueries&& grad_queries, GradKeys&& grad_keys,
                                      GradBandwidths&& grad_bandwidths,
                                      GradLogPrior&& grad_log_prior, const Workspace& workspace,
                                      const SurfaceOptions& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  using Buffers = detail::WideBuffers<Scalar>;
  detail::check_inputs_at_compile_time<Queries, Keys, Bandwidths, Out, LogSumExp, GradOut>();
  detail::check_outputs_at_compile_time<Scalar, GradQueries, GradKeys, GradBandwidths,
                                        GradLogPrior>();
  constexpr detail::Require require("project_bandwidths_backward");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const auto& l = detail::stored(log_sum_exp);
  const detail::Shape shape = detail::bandwidths_shape(q, k, bandwidths, options, require);
  require.shape("grad_queries", detail::extent(grad_queries), shape.queries_extent(),
                "the shape of queries");
  require.shape("grad_bandwidths", detail::extent(grad_bandwidths), detail::extent(bandwidths),
                "the shape of bandwidths");
  require.shape("grad_log_prior", detail::extent(grad_log_prior),
                {shape.keys, shape.key_value_heads}, "keys × key/value heads");
  const std::size_t own = detail::buffer_bytes<Buffers>(Pass::backward, shape);
  SurfaceOptions serial = options;
  serial.executor = nullptr;
  detail::check_workspace(require, workspace,
                          bandwidths_workspace_size(Pass::backward, q, k, serial, terms...));
  detail::Arena arena(workspace);
  Buffers wide(arena, Pass::backward, shape);
  detail::widen(q, k, bandwidths, options.prior, shape, wide);
  attention_backward_into(wide.queries, wide.keys, k, out, l, grad_out, wide.grad_queries,
                          wide.grad_keys, grad_keys, detail::behind(workspace, own),
                          detail::wide_options(options), terms...);
  detail::narrow_queries<Scalar>(q, bandwidths, detail::view(l), wide, shape,
                                 detail::view(grad_queries), detail::view(grad_bandwidths));
  detail::narrow_keys<Scalar>(k, wide, shape, detail::view(grad_keys),
                              detail::view(grad_log_prior));
}

/// Gradients of a loss with respect to queries, keys, bandwidths and log-prior, given grad_out =
/// ∂loss/∂out and what project_bandwidths_forward returned. With u and w the gradients that
/// attention_backward gives for the wide queries and keys, and those of the values dv,
///
///     dq_i = β_i·u_i[1 … d],   dβ_i = q_i·u_i[1 … d] − u_i[d + 1]/2,   dσ_i = −2β_i^(3/2)·dβ_i,
///     dk_j = w_j[1 … d] + 2w_j[d + 1]·k_j + dv_j,   d log π_j = w_j[d + 2].
///
/// Gradients of terms with parameters as for attention_backward.
template <class Queries, class Keys, class Bandwidths, class Scalar, class GradOut, class... Terms>
auto project_bandwidths_backward(const Queries& queries, const Keys& keys,
                                 const Bandwidths& bandwidths, const Forward<Scalar>& forward,
                                 const GradOut& grad_out, const SurfaceOptions& options = {},
                                 const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, Bandwidths, Matrix<Scalar>, GradOut>();
  const auto shape = detail::Require("project_bandwidths_backward")
                         .shapes(detail::extent(queries), detail::extent(keys),
                                 detail::extent(keys), options.heads, options.sequences);
  return detail::with_term_gradients(
      BandwidthsGradients<Scalar>{detail::matrix<Scalar>(shape.queries_extent()),
                                  detail::matrix<Scalar>(shape.keys_extent()),
                                  detail::matrix<Scalar>(detail::extent(bandwidths)),
                                  detail::matrix<Scalar>({shape.keys, shape.key_value_heads})},
      [&](BandwidthsGradients<Scalar>& gradients, const auto&... directed) {
        project_bandwidths_backward_into(queries, keys, bandwidths, forward.out,
                                         forward.log_sum_exp, grad_out, gradients.queries,
                                         gradients.keys, gradients.bandwidths, gradients.log_prior,
                                         Workspace(bandwidths_workspace_size(
                                             Pass::backward, queries, keys, options, directed...)),
                                         options, directed...);
        gradients.log_prior =
            detail::prior_gradient_of(options.prior, std::move(gradients.log_prior));
      },
      terms...);
}

}  // namespace surfattn
