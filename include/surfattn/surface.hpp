// surfattn layer 5: attention as projection onto the surface that the keys sample

#pragma once

#include <surfattn/detail/adapter.hpp>
#include <surfattn/options.hpp>
#include <surfattn/terms.hpp>
#include <surfattn/types.hpp>
#include <surfattn/workspace.hpp>

/// The surface form (T. D. Sanger 2026, arXiv:2602.02521). The keys are samples of a surface and
/// are the values too; a query is projected onto the surface by a Nadaraya–Watson estimate
/// (Nadaraya 1964, Watson 1964) with the Gaussian kernel of width σ.
namespace surfattn {
namespace detail {

template <class Scalar>
accumulator_t<Scalar> surface_scale(const SurfaceOptions& options, Index head_dim) {
  if (!options.bandwidth) return scale_or_default<Scalar>(options.scale, head_dim);
  const auto bandwidth = static_cast<accumulator_t<Scalar>>(*options.bandwidth);
  return 1 / (bandwidth * bandwidth);
}

template <class Scalar>
accumulator_t<Scalar> checked_surface_scale(const SurfaceOptions& options, Index head_dim,
                                            const Require& require) {
  if (options.scale && options.bandwidth)
    require.fail("give scale or bandwidth, not both: scale = 1/bandwidth²");
  require.positive("scale", options.scale);
  require.positive("bandwidth", options.bandwidth);
  const auto scale = surface_scale<Scalar>(options, head_dim);
  require.usable_scale(scale, true);
  return scale;
}

/// Views and sizes of a call in the surface form, checked: −‖q − k‖²/(2σ²) = β·q·k − β‖q‖²/2 −
/// β‖k‖²/2 with β = 1/σ², and the prior `sdpa` takes the keys' norms away again.
template <class Queries, class Keys>
Operands<scalar_t<Queries>> surface_operands(const Queries& queries, const Keys& keys,
                                             const SurfaceOptions& options,
                                             const Require& require) {
  using Scalar = scalar_t<Queries>;
  Operands<Scalar> operands;
  operands.shape =
      require.shapes(extent(queries), extent(keys), extent(keys), options.heads, options.sequences);
  operands.scale = checked_surface_scale<Scalar>(options, operands.shape.head_dim, require);
  require.template key_prior<Scalar>(options.prior, operands.shape);
  operands.queries = view(queries);
  operands.keys = operands.values = view(keys);
  operands.values_are_keys = true;
  if (!options.prior.is_sdpa())
    operands.query_norm_weight = operands.key_norm_weight = -operands.scale / 2;
  if (options.prior.is_explicit()) {
    operands.log_prior = options.prior.template log_weights<accumulator_t<Scalar>>();
    if (operands.log_prior.cols == 1) operands.log_prior.col_stride = 0;
  }
  return operands;
}

/// dβ of one key/value head. S_ij = β·q_i·k_j − (β/2)(‖q_i‖² + ‖k_j‖²) does not change when all
/// points move by the same m, so, with r_i = Σ_j dS_ij, which is 0 unless modifiers or sinks act or
/// the loss depends on log_sum_exp,
///
///     dβ = (1/β)·Σ_i (q_i − m)·dq_i + ½ Σ_i r_i‖q_i − m‖² − ½ Σ_j c_j‖k_j − m‖²
///
/// for every m. The first key that took part serves: about it, the numbers are as small as the
/// surface is wide. With the prior `sdpa` the norms fall away, and m must be 0.
template <class Scalar>
accumulator_t<Scalar> scale_gradient(const Operands<Scalar>& operands, Index head,
                                     MatrixView<const accumulator_t<Scalar>> grad_queries,
                                     MatrixView<const accumulator_t<Scalar>> grad_key_bias,
                                     const RawRowSums<Scalar>& row_sums) {
  using Accumulator = accumulator_t<Scalar>;
  const auto keys = operands.key_head(head);
  const auto took_part = [&](Index key) { return grad_key_bias(key, head) != Accumulator(0); };
  Index first = 0;
  while (first < keys.rows && !took_part(first)) ++first;
  const bool has_norms = operands.key_norm_weight != Accumulator(0);
  const Scalar zero(0);
  const auto origin = has_norms && first < keys.rows
                          ? keys.block_rows(first, 1)
                          : MatrixView<const Scalar>{&zero, 1, keys.cols, 0, 0};
  Accumulator of_queries(0), of_norms(0);
  for (Index member = head * operands.shape.group(); member < (head + 1) * operands.shape.group();
       ++member) {
    const auto grad =
        grad_queries.block_cols(member * operands.shape.head_dim, operands.shape.head_dim);
    of_queries += simd::sum_of_products<Accumulator>(grad, operands.query_head(member), origin);
    if (!has_norms || row_sums.are_zero()) continue;
    of_norms -= simd::sum_of_squared_distances<Accumulator>(
        operands.query_head(member), origin, [&](Index i) { return row_sums.of(member, i); });
  }
  if (has_norms) {
    of_norms += simd::sum_of_squared_distances<Accumulator>(
        keys, origin, [&](Index j) { return grad_key_bias(j, head); });
  }
  return of_queries / operands.scale - of_norms / 2;
}

/// Adds up dβ over the sequences of a batch. (A type with a name: the passes are compiled once for it,
/// where a lambda would have them compiled for each kind of matrices.)
template <class Scalar>
struct ScaleGradient {
  accumulator_t<Scalar>& sum;

  void operator()(const Operands<Scalar>& operands, const GradientOutputs<Scalar>& gradients,
                  const RawRowSums<Scalar>& row_sums) const {
    for (Index head = 0; head < operands.shape.key_value_heads; ++head) {
      sum += scale_gradient<Scalar>(operands, head, gradients.query_sums, *gradients.key_bias,
                                    row_sums);
    }
  }
};

}  // namespace detail

/// Bytes of workspace, as above, for `project_into` and `project_forward_into` (Pass::forward) or
/// `project_backward_into` (Pass::backward).
template <class Queries, class Keys, class... Terms>
std::size_t workspace_size(Pass pass, const Queries& queries, const Keys& keys,
                           const SurfaceOptions& options = {}, const Terms&... terms) {
  constexpr detail::Require require("workspace_size");
  const auto shape = require.shapes(detail::extent(queries), detail::extent(keys),
                                    detail::extent(keys), options.heads, options.sequences);
  return detail::workspace_size<detail::scalar_t<Queries>>(pass, shape, true, options.executor,
                                                           require, terms...);
}

/// P(Q) into `out`, without allocating: `project` for callers who own the memory.
///
/// Inputs must be stored matrices. `out`, Tq × (Hq·d), may have any storage; no output may overlap
/// an input or another output. `workspace` needs workspace_size(Pass::forward, queries, keys,
/// options) bytes.
template <class Queries, class Keys, class Out, class... Terms>
void project_into(const Queries& queries, const Keys& keys, Out&& out, const Workspace& workspace,
                  const SurfaceOptions& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys>();
  detail::check_outputs_at_compile_time<detail::scalar_t<Queries>, Out>();
  constexpr detail::Require require("project");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  detail::run_forward(detail::surface_operands(q, k, options, require), {detail::view(out), {}},
                      workspace, options.executor, require, terms...);
}

/// `project_into` that also writes log_sum_exp, Tq × Hq, which the backward pass needs.
template <class Queries, class Keys, class Out, class LogSumExp, class... Terms>
void project_forward_into(const Queries& queries, const Keys& keys, Out&& out,
                          LogSumExp&& log_sum_exp, const Workspace& workspace,
                          const SurfaceOptions& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys>();
  detail::check_outputs_at_compile_time<detail::scalar_t<Queries>, Out>();
  detail::check_writable_sums_at_compile_time<detail::scalar_t<Queries>, LogSumExp>();
  constexpr detail::Require require("project_forward");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  detail::run_forward(detail::surface_operands(q, k, options, require),
                      {detail::view(out), detail::view(log_sum_exp)}, workspace, options.executor,
                      require, terms...);
}

/// Gradients of a loss with respect to queries, keys, bandwidth and log-prior, without allocating.
///
/// `out` and `log_sum_exp` are what project_forward_into wrote for the same inputs, options and
/// terms; `grad_out` is ∂loss/∂out, or ForwardGradients. Every gradient is overwritten, and none
/// may overlap an input or another output: `grad_queries` and `grad_keys` of their inputs' shapes,
/// `grad_bandwidth` a scalar, `grad_log_prior` Tk × Hkv also where one prior serves all heads (its
/// gradient is then the sum over the columns). Terms with parameters as for
/// attention_backward_into. `workspace` needs workspace_size(Pass::backward, queries, keys,
/// options, terms...) bytes.
template <class Queries, class Keys, class Out, class LogSumExp, class GradOut, class GradQueries,
          class GradKeys, class GradLogPrior, class... Terms>
void project_backward_into(const Queries& queries, const Keys& keys, const Out& out,
                           const LogSumExp& log_sum_exp, const GradOut& grad_out,
                           GradQueries&& grad_queries, GradKeys&& grad_keys,
                           accumulator_t<detail::scalar_t<Queries>>& grad_bandwidth,
                           GradLogPrior&& grad_log_prior, const Workspace& workspace,
                           const SurfaceOptions& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, Out, detail::grad_out_t<GradOut>>();
  using Scalar = detail::scalar_t<Queries>;
  detail::check_sums_at_compile_time<Scalar, LogSumExp, detail::grad_log_sum_exp_t<GradOut>>();
  detail::check_outputs_at_compile_time<Scalar, GradQueries, GradKeys>();
  detail::check_writable_sums_at_compile_time<Scalar, GradLogPrior>();
  constexpr detail::Require require("project_backward");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const auto& o = detail::stored(out);
  const auto& l = detail::stored(log_sum_exp);
  const auto& g = detail::stored(detail::grad_out_of(grad_out));
  const auto& grad_sums = detail::grad_log_sum_exp_of(grad_out);
  const auto& gl = detail::stored(grad_sums);
  const auto operands = detail::surface_operands(q, k, options, require);
  const auto upstream = detail::upstream_of<GradOut>(o, l, g, gl);
  const detail::Shape& shape = operands.shape;
  require.shape("grad_log_prior", detail::extent(grad_log_prior),
                {shape.keys, shape.key_value_heads}, "keys × key/value heads");
  const detail::GradientOutputs<Scalar> gradients{
      detail::view(grad_queries), detail::view(grad_keys), {}, detail::view(grad_log_prior)};
  accumulator_t<Scalar> grad_scale(0);
  detail::run_backward(operands, upstream, gradients, workspace, options.executor, require,
                       detail::ScaleGradient<Scalar>{grad_scale}, terms...);
  // σ = β^(−1/2)
  grad_bandwidth = -2 * operands.scale * std::sqrt(operands.scale) * grad_scale;
}

namespace detail {

/// Of the gradients of project_backward_into those of queries and keys alone, which are all that a
/// layer needs under KeyPrior::sdpa. Allocates a workspace.
template <class Keys, class Scalar, class... Terms>
void project_backward_of_layer(const Matrix<Scalar>& queries, const Keys& keys,
                               const Forward<Scalar>& forward, const Matrix<Scalar>& grad_out,
                               Matrix<Scalar>& grad_queries, Matrix<Scalar>& grad_keys,
                               const SurfaceOptions& options, const Terms&... terms) {
  constexpr Require require("project_backward");
  const auto operands = surface_operands(queries, keys, options, require);
  const Upstream<Scalar> upstream{view(forward.out), view(forward.log_sum_exp), view(grad_out)};
  run_backward(operands, upstream,
               GradientOutputs<Scalar>{view(grad_queries), view(grad_keys), {}, {}},
               Workspace(workspace_size(Pass::backward, queries, keys, options, terms...)),
               options.executor, require, DoNothing{}, terms...);
}

}  // namespace detail

/// Projection of each query onto the surface that the keys sample: for each query head,
///
///     S_ij = −‖q_i − k_j‖²/(2σ²) + log π_j,
///     W_i = softmax of S_i over the keys that every term lets query i see,
///     P(q_i) = Σ_j W_ij·k_j.
///
/// `queries` is Tq × (Hq·d), `keys` Tk × (Hkv·d): any Eigen matrix expression of float, double, long
/// double, Eigen::half or Eigen::bfloat16, in any storage. σ is options.bandwidth, in the units of the keys, or
/// 1/√options.scale; by default σ² = √d. π is options.prior. With KeyPrior::sdpa the weights are
/// those of scaled dot-product attention with β = 1/σ², so that P(Q)·M = attention(Q, K, K·M) for
/// any readout M. Returns Tq × (Hq·d), a point within the convex hull of the keys for each query; 0
/// for a query that sees no key.
///
/// Distances are formed as β·q·k − β‖q‖²/2 − β‖k‖²/2, which loses digits where points lie much
/// farther from the origin than from each other: subtract a common offset from queries and keys
/// first (the projection moves with them). Allocates the result and a workspace of O(block)
/// numbers. Time O(Hq·Tq·Tk·2d), less the tiles that the terms leave empty. Errors as for
/// `attention`; besides, a bandwidth or scale that is not positive, both given, or a prior of the
/// wrong shape or scalar type.
template <class Queries, class Keys, class... Terms>
auto project(const Queries& queries, const Keys& keys, const SurfaceOptions& options = {},
             const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys>();
  const auto shape =
      detail::Require("project").shapes(detail::extent(queries), detail::extent(keys),
                                        detail::extent(keys), options.heads, options.sequences);
  auto out = detail::matrix<Scalar>(shape.out_extent());
  project_into(queries, keys, out,
               Workspace(detail::forward_workspace_size<Scalar>(shape, options.executor)), options,
               terms...);
  return out;
}

/// `project`, and with it what the backward pass needs: returns {out, log_sum_exp}, where
/// log_sum_exp_i = log Σ_j exp S_ij (Tq × Hq, −∞ for a query that sees no key). Under a uniform
/// prior that is, up to a constant, the log of the kernel density of the keys at q_i, and its
/// gradient is (P(q_i) − q_i)/σ². Under KeyPrior::sdpa the norm of the query is left out: it is the
/// log-sum-exp of the scores β·q_i·k_j, as for attention_forward.
template <class Queries, class Keys, class... Terms>
auto project_forward(const Queries& queries, const Keys& keys, const SurfaceOptions& options = {},
                     const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys>();
  const auto shape = detail::Require("project_forward")
                         .shapes(detail::extent(queries), detail::extent(keys),
                                 detail::extent(keys), options.heads, options.sequences);
  Forward<Scalar> forward{detail::matrix<Scalar>(shape.out_extent()),
                          detail::matrix<accumulator_t<Scalar>>(shape.log_sum_exp_extent())};
  project_forward_into(queries, keys, forward.out, forward.log_sum_exp,
                       Workspace(detail::forward_workspace_size<Scalar>(shape, options.executor)),
                       options, terms...);
  return forward;
}

/// Gradients of a loss with respect to queries, keys, bandwidth and log-prior, given grad_out =
/// ∂loss/∂out, Tq × (Hq·d). With dP = dO·Kᵀ, D_i = dO_i·O_i, dS = W∘(dP − D), c_j = Σ_i dS_ij:
///
///     dQ = β·dS·K,   dK = Wᵀ·dO + β·(dSᵀ·Q − c∘K),   d log π = c,
///     dβ = (1/β)·Σ Q∘dQ − ½ Σ_j c_j‖k_j‖²,   dσ = −2β^(3/2)·dβ,
///
/// Where the loss depends on log_sum_exp too, give ForwardGradients{grad_out, grad_log_sum_exp} for
/// grad_out: then D_i = dO_i·O_i − dL_i, and the norm of the query in L_i adds −β·dL_i·q_i to dq_i
/// and ½ Σ_i dL_i‖q_i‖² to dβ. The terms with norms and c∘K fall away for KeyPrior::sdpa, whose log
/// π_j = β‖k_j‖²/2 moves with keys and bandwidth. `log_prior` is the gradient with respect to a
/// number added to log π_j, under every prior: Tk × Hkv, or Tk × 1 for an explicit Tk × 1 prior.
/// `forward` must come from project_forward with the same inputs, options and terms. A query that
/// sees no key gets and gives gradient 0; so does a key that no query sees. Gradients of terms with
/// parameters as for attention_backward. Allocates the gradients and a workspace of O(block)
/// numbers. Time O(Hq·Tq·Tk·5d). Errors as for `project`.
template <class Queries, class Keys, class Scalar, class GradOut, class... Terms>
auto project_backward(const Queries& queries, const Keys& keys, const Forward<Scalar>& forward,
                      const GradOut& grad_out, const SurfaceOptions& options = {},
                      const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, Matrix<Scalar>,
                                       detail::grad_out_t<GradOut>>();
  constexpr detail::Require require("project_backward");
  const auto shape = require.shapes(detail::extent(queries), detail::extent(keys),
                                    detail::extent(keys), options.heads, options.sequences);
  const auto run = [&](SurfaceGradients<Scalar>& gradients, const auto&... directed) {
    const Workspace workspace(detail::workspace_size<Scalar>(
        Pass::backward, shape, true, options.executor, require, directed...));
    project_backward_into(queries, keys, forward.out, forward.log_sum_exp, grad_out,
                          gradients.queries, gradients.keys, gradients.bandwidth,
                          gradients.log_prior, workspace, options, directed...);
    if (options.prior.is_explicit() && options.prior.cols() == 1)
      gradients.log_prior = gradients.log_prior.rowwise().sum().eval();
  };
  return detail::with_term_gradients(
      SurfaceGradients<Scalar>{
          detail::matrix<Scalar>(shape.queries_extent()),
          detail::matrix<Scalar>(shape.keys_extent()), accumulator_t<Scalar>(0),
          detail::matrix<accumulator_t<Scalar>>({shape.keys, shape.key_value_heads})},
      run, terms...);
}

}  // namespace surfattn
