// surfattn layer 5: scaled dot-product attention in its standard form

#pragma once

#include <surfattn/detail/adapter.hpp>
#include <surfattn/options.hpp>
#include <surfattn/terms.hpp>
#include <surfattn/types.hpp>
#include <surfattn/workspace.hpp>

namespace surfattn {
namespace detail {

template <class Scalar>
accumulator_t<Scalar> checked_scale(std::optional<double> option, Index head_dim,
                                    const Require& require) {
  require.finite("scale", option);
  const auto scale = scale_or_default<Scalar>(option, head_dim);
  require.usable_scale(scale, false);
  return scale;
}

/// Views and sizes of a call in the standard form, checked.
template <class Queries, class Keys, class Values>
Operands<scalar_t<Queries>> attention_operands(const Queries& queries, const Keys& keys,
                                               const Values& values, const Options& options,
                                               const Require& require) {
  using Scalar = scalar_t<Queries>;
  Operands<Scalar> operands;
  operands.shape = require.shapes(extent(queries), extent(keys),
                                  require.values_extent(keys, values, options.heads), options.heads,
                                  options.sequences);
  operands.scale = checked_scale<Scalar>(options.scale, operands.shape.head_dim, require);
  operands.queries = view(queries);
  operands.keys = view(keys);
  operands.values_are_keys = is_left_columns_v<Values>;
  if constexpr (is_left_columns_v<Values>) {
    operands.values = operands.keys;
  } else {
    operands.values = view(values);
  }
  return operands;
}

}  // namespace detail

/// Bytes of workspace with which `attention_into` and `attention_forward_into` (Pass::forward) or
/// `attention_backward_into` (Pass::backward) use every worker of the executor for these arguments;
/// with less, down to what one worker needs, they use fewer. It depends on widths, heads and
/// executor and hardly on the number of queries and keys, beyond one block of them: for calls of
/// several lengths, take the largest. Errors: shapes that do not fit together.
///
/// Masks need no workspace and may be left out. Any other term must be listed as the backward pass
/// gets it, with where its gradient goes.
template <class Queries, class Keys, class Values, class... Terms>
std::size_t workspace_size(Pass pass, const Queries& queries, const Keys& keys,
                           const Values& values, const Options& options = {},
                           const Terms&... terms) requires(detail::DenseMatrix<Values> ||
                                                           detail::is_left_columns_v<Values>) {
  constexpr detail::Require require("workspace_size");
  const auto shape = require.shapes(detail::extent(queries), detail::extent(keys),
                                    require.values_extent(keys, values, options.heads),
                                    options.heads, options.sequences);
  return detail::workspace_size<detail::scalar_t<Queries>>(
      pass, shape, detail::is_left_columns_v<Values>, options.executor, require, terms...);
}

/// O = softmax(β·Q·Kᵀ)·V into `out`, without allocating: `attention` for callers who own the
/// memory.
///
/// Inputs must be stored matrices (an expression is evaluated first, and that allocates). `out`, Tq
/// × (Hq·dv), may have any storage and no output may overlap an input or another output.
/// `workspace` needs workspace_size(Pass::forward, queries, keys, values, options) bytes.
template <class Queries, class Keys, class Values, class Out, class... Terms>
void attention_into(const Queries& queries, const Keys& keys, const Values& values, Out&& out,
                    const Workspace& workspace, const Options& options = {},
                    const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, detail::value_matrix_t<Keys, Values>>();
  detail::check_outputs_at_compile_time<detail::scalar_t<Queries>, Out>();
  constexpr detail::Require require("attention");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const auto& v = detail::stored_values(values);
  detail::run_forward(detail::attention_operands(q, k, v, options, require),
                      {detail::view(out), {}}, workspace, options.executor, require, terms...);
}

/// `attention_into` that also writes log_sum_exp, Tq × Hq, which the backward pass needs.
template <class Queries, class Keys, class Values, class Out, class LogSumExp, class... Terms>
void attention_forward_into(const Queries& queries, const Keys& keys, const Values& values,
                            Out&& out, LogSumExp&& log_sum_exp, const Workspace& workspace,
                            const Options& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, detail::value_matrix_t<Keys, Values>>();
  detail::check_outputs_at_compile_time<detail::scalar_t<Queries>, Out>();
  detail::check_writable_sums_at_compile_time<detail::scalar_t<Queries>, LogSumExp>();
  constexpr detail::Require require("attention_forward");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const auto& v = detail::stored_values(values);
  detail::run_forward(detail::attention_operands(q, k, v, options, require),
                      {detail::view(out), detail::view(log_sum_exp)}, workspace, options.executor,
                      require, terms...);
}

/// Gradients of a loss with respect to queries, keys and values into matrices of their shapes,
/// without allocating.
///
/// Where the values are LeftColumns of the keys, pass the same for grad_values: grad_keys receives
/// both parts. `out` and `log_sum_exp` are what attention_forward_into wrote for the same inputs,
/// options and terms; `grad_out` is ∂loss/∂out, or ForwardGradients. Every gradient is overwritten;
/// no output may overlap an input or another output. A term with parameters writes their gradient
/// where it was told to, Alibi{slopes}.gradient_into(grad_slopes), and otherwise computes none.
/// `workspace` needs workspace_size(Pass::backward, queries, keys, values, options, terms...)
/// bytes.
template <class Queries, class Keys, class Values, class Out, class LogSumExp, class GradOut,
          class GradQueries, class GradKeys, class GradValues, class... Terms>
void attention_backward_into(const Queries& queries, const Keys& keys, const Values& values,
                             const Out& out, const LogSumExp& log_sum_exp, const GradOut& grad_out,
                             GradQueries&& grad_queries, GradKeys&& grad_keys,
                             GradValues&& grad_values, const Workspace& workspace,
                             const Options& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys, detail::value_matrix_t<Keys, Values>, Out,
                                       detail::grad_out_t<GradOut>>();
  detail::check_sums_at_compile_time<Scalar, LogSumExp, detail::grad_log_sum_exp_t<GradOut>>();
  constexpr bool is_shared = detail::is_left_columns_v<Values>;
  static_assert(
      is_shared == detail::is_left_columns_v<GradValues>,
      "surfattn: where the values are LeftColumns of the keys, so are their gradients: pass "
      "them in the place of both");
  detail::check_outputs_at_compile_time<Scalar, GradQueries, GradKeys,
                                        detail::value_matrix_t<GradKeys, GradValues>>();
  constexpr detail::Require require("attention_backward");
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const auto& v = detail::stored_values(values);
  const auto& o = detail::stored(out);
  const auto& l = detail::stored(log_sum_exp);
  const auto& g = detail::stored(detail::grad_out_of(grad_out));
  const auto& grad_sums = detail::grad_log_sum_exp_of(grad_out);
  const auto& gl = detail::stored(grad_sums);
  const auto upstream = detail::upstream_of<GradOut>(o, l, g, gl);
  detail::GradientOutputs<Scalar> gradients{
      detail::view(grad_queries), detail::view(grad_keys), {}, {}};
  if constexpr (!is_shared) gradients.values = detail::view(grad_values);
  detail::run_backward(detail::attention_operands(q, k, v, options, require), upstream, gradients,
                       workspace, options.executor, require, detail::DoNothing{}, terms...);
}

/// Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762): for each query head,
///
///     S_ij = β·q_i·k_j,
///     W_i = softmax of S_i over the keys that every term lets query i see,
///     out_i = Σ_j W_ij·v_j.
///
/// `queries` is Tq × (Hq·d), `keys` Tk × (Hkv·d), `values` Tk × (Hkv·dv): any Eigen matrix
/// expression of float, double, long double, Eigen::half or Eigen::bfloat16, in any storage, or
/// LeftColumns of the keys for values. Tokens are rows, heads are blocks of
/// columns (see Heads). β is options.scale, 1/√d by default. Returns Tq × (Hq·dv). A query that
/// sees no key gets 0, and so does one all of whose scores are −∞. A NaN or an infinity reaches the
/// outputs that see it and no other. On x86 subnormal floats and doubles count as 0 while a pass runs,
/// in functions of terms too, unless SURFATTN_SUBNORMALS_AS_ZEROS is defined as 0.
///
/// A batch is one call: with options.sequences the rows are several sequences, each of which
/// attends to itself alone and gives the same bits as a call of its own. Terms count queries and
/// keys within the sequence. Nothing is allocated for a sequence.
///
/// Allocates the result and a workspace of O(max(1024, 64·Hq/Hkv)·(d + dv)) numbers for each worker
/// of the executor, never Tq × Tk. Time O(Hq·Tq·Tk·(d + dv)), less the tiles that the terms leave
/// empty. A mistake in a shape is reported before anything is computed, through the error handler:
/// std::invalid_argument by default.
template <class Queries, class Keys, class Values, class... Terms>
auto attention(const Queries& queries, const Keys& keys, const Values& values,
               const Options& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys, detail::value_matrix_t<Keys, Values>>();
  constexpr detail::Require require("attention");
  const auto shape = require.shapes(detail::extent(queries), detail::extent(keys),
                                    require.values_extent(keys, values, options.heads),
                                    options.heads, options.sequences);
  auto out = detail::matrix<Scalar>(shape.out_extent());
  attention_into(queries, keys, values, out,
                 Workspace(detail::forward_workspace_size<Scalar>(shape, options.executor)),
                 options, terms...);
  return out;
}

/// `attention`, and with it what the backward pass needs: returns {out, log_sum_exp}, where
/// log_sum_exp_i = log Σ_j exp S_ij (Tq × Hq, −∞ for a query that sees no key).
template <class Queries, class Keys, class Values, class... Terms>
auto attention_forward(const Queries& queries, const Keys& keys, const Values& values,
                       const Options& options = {}, const Terms&... terms) {
  using Scalar = detail::scalar_t<Queries>;
  detail::check_inputs_at_compile_time<Queries, Keys, detail::value_matrix_t<Keys, Values>>();
  constexpr detail::Require require("attention_forward");
  const auto shape = require.shapes(detail::extent(queries), detail::extent(keys),
                                    require.values_extent(keys, values, options.heads),
                                    options.heads, options.sequences);
  Forward<Scalar> forward{detail::matrix<Scalar>(shape.out_extent()),
                          detail::matrix<accumulator_t<Scalar>>(shape.log_sum_exp_extent())};
  attention_forward_into(queries, keys, values, forward.out, forward.log_sum_exp,
                         Workspace(detail::forward_workspace_size<Scalar>(shape, options.executor)),
                         options, terms...);
  return forward;
}

/// Gradients of a loss with respect to queries, keys and values, given grad_out = ∂loss/∂out, Tq ×
/// (Hq·dv):
///
///     dP = dO·Vᵀ,   D_i = dO_i·O_i,   dS = W∘(dP − D),
///     dQ = β·dS·K,   dK = β·dSᵀ·Q,   dV = Wᵀ·dO,
///
/// summed over the query heads that share a key/value head. Where the loss depends on log_sum_exp
/// too, give ForwardGradients{grad_out, grad_log_sum_exp} for grad_out: then D_i = dO_i·O_i − dL_i.
/// W is recomputed from
/// forward.log_sum_exp, so `forward` must come from attention_forward with the same inputs, options
/// and terms. A query that sees no key gets and gives gradient 0; so does a key that no query sees.
/// Where terms have parameters (Alibi{slopes}, AdditiveBias{b}), the result holds their gradients
/// too: std::get<0>(gradients.terms) is that of the first such term, of its parameters' shape, and
/// empty where the term was told to write it elsewhere (gradient_into).
///
/// Allocates the gradients and a workspace of O(block) numbers. Time O(Hq·Tq·Tk·(3d + 2dv)).
/// Errors as for `attention`.
template <class Queries, class Keys, class Values, class Scalar, class GradOut, class... Terms>
auto attention_backward(const Queries& queries, const Keys& keys, const Values& values,
                        const Forward<Scalar>& forward, const GradOut& grad_out,
                        const Options& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, detail::value_matrix_t<Keys, Values>,
                                       Matrix<Scalar>, detail::grad_out_t<GradOut>>();
  constexpr detail::Require require("attention_backward");
  const auto shape = require.shapes(detail::extent(queries), detail::extent(keys),
                                    require.values_extent(keys, values, options.heads),
                                    options.heads, options.sequences);
  const auto run = [&](AttentionGradients<Scalar>& gradients, const auto&... directed) {
    const Workspace workspace(
        detail::workspace_size<Scalar>(Pass::backward, shape, detail::is_left_columns_v<Values>,
                                       options.executor, require, directed...));
    const auto into = [&](auto&& grad_values) {
      attention_backward_into(queries, keys, values, forward.out, forward.log_sum_exp, grad_out,
                              gradients.queries, gradients.keys, grad_values, workspace, options,
                              directed...);
    };
    if constexpr (detail::is_left_columns_v<Values>) {
      into(values);
    } else {
      into(gradients.values);
    }
  };
  detail::Extent grad_values = shape.values_extent();
  if (detail::is_left_columns_v<Values>) grad_values = {};
  return detail::with_term_gradients(
      AttentionGradients<Scalar>{detail::matrix<Scalar>(shape.queries_extent()),
                                 detail::matrix<Scalar>(shape.keys_extent()),
                                 detail::matrix<Scalar>(grad_values)},
      run, terms...);
}

}  // namespace surfattn
