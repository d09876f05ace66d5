// surfattn layer 7: local-linear projection, which gives the surface a tangent

#pragma once

#include <surfattn/detail/local_linear_backward.hpp>
#include <surfattn/detail/subnormals.hpp>
#include <surfattn/surface.hpp>

/// The projection of surface.hpp is a local constant: it cuts corners where the surface bends and is
/// drawn inward where the surface ends, for there all keys lie on one side. The local-linear
/// estimate (W. S. Cleveland 1979; J. Fan 1993, "Local linear regression smoothers and their minimax
/// efficiencies", Annals of Statistics 21) fits a plane to the keys around the query instead. With
/// the weights w_j of `project` for a query q,
///
///     μ = Σ w_j·k_j,   C = Σ w_j (k_j − μ)(k_j − μ)ᵀ + λI,   z = C⁻¹(q − μ),
///     f(q) = q − λ·z,
///
/// or, for values that are not the keys, with v̄ = Σ w_j·v_j and S = Σ w_j (k_j − μ)(v_j − v̄)ᵀ,
///
///     f(q) = v̄ + Sᵀ·z = Σ_j w_j·(1 + z·(k_j − μ))·v_j.
///
/// λ, the ridge, is a variance: along a direction in which the keys spread with variance s about μ,
/// f keeps the share s/(s + λ) of q − μ, and of what is orthogonal to all of them nothing. λ → ∞ is
/// the local constant, μ or v̄; λ → 0 is the orthogonal projection of q onto the plane that the keys
/// with any weight span, so q itself where they span everything. For a surface with noise of
/// standard deviation s, λ between s² and σ² tells the surface's directions from the noise.
namespace surfattn {

/// The result of a local-linear forward pass and what its backward needs.
template <class Scalar>
struct LocalLinearForward {
  Matrix<Scalar> out;          ///< f, Tq × (Hq·dv)
  Forward<Scalar> projection;  ///< μ, Tq × (Hq·d), and log_sum_exp, Tq × Hq, as of project_forward
};

/// Gradients of a loss with respect to the inputs of `local_linear`.
template <class Scalar>
struct LocalLinearGradients {
  Matrix<Scalar> queries;  ///< Tq × (Hq·d)
  Matrix<Scalar> keys;     ///< Tk × (Hkv·d); through the values too where the keys are the values
  Matrix<Scalar> values;   ///< Tk × (Hkv·dv); 0×0 where the keys are the values
  Scalar bandwidth{};      ///< ∂loss/∂σ
  Scalar ridge{};          ///< ∂loss/∂λ
  Matrix<Scalar> log_prior;  ///< Tk × Hkv, or Tk × 1 where one explicit prior serves all heads
};

namespace detail {

/// The operands of the scores are those of `project`; the values may be others.
template <class Queries, class Keys, class Values>
Operands<scalar_t<Queries>> local_operands(const Queries& queries, const Keys& keys,
                                           const Values* values, const SurfaceOptions& options,
                                           const Require& require) {
  using Scalar = scalar_t<Queries>;
  refuse_16_bits_at_compile_time<Scalar>();
  auto operands = surface_operands(queries, keys, options, require);
  if (values) {
    operands.shape = require.shapes(extent(queries), extent(keys), extent(*values), options.heads,
                                    options.sequences);
    operands.values = view(*values);
    operands.values_are_keys = false;
  }
  return operands;
}

/// The operands of the projection alone.
template <class Scalar>
Operands<Scalar> projection_of(Operands<Scalar> operands) {
  operands.values = operands.keys;
  operands.more.values = operands.more.keys;
  operands.values_are_keys = true;
  operands.shape.value_dim = operands.shape.head_dim;
  return operands;
}

template <class Scalar>
Extent projection_extent(const Operands<Scalar>& operands) {
  return operands.shape.queries_extent();
}

template <class Scalar>
accumulator_t<Scalar> checked_ridge(double ridge, const Require& require) {
  require.positive("ridge", ridge);
  const auto usable = static_cast<accumulator_t<Scalar>>(ridge);
  if (!(usable > 0 && std::isnormal(usable)))
    require.fail("ridge must be positive, finite and normal in the precision of queries");
  return usable;
}

/// The plans of a backward pass, one after the other over the same workspace: the adjoints of all
/// queries, then buffers.
template <class Scalar>
struct LocalBackwardPlans {
  MomentPlan<Scalar> moments;
  LocalGradientPlan<Scalar> gradients;

  LocalBackwardPlans(const Shape& shape, bool values_are_keys, std::size_t modifiers,
                     const Executor* executor)
      : moments(shape, values_are_keys, executor), gradients(shape, modifiers, executor) {
    Arena shared;
    LocalAdjoints<Scalar>(shared, shape);
    moments.shared_bytes = gradients.shared_bytes = shared.used();
  }
  std::size_t workspace_size() const {
    return std::max(moments.workspace_size(), gradients.workspace_size());
  }
  std::size_t least_workspace_size() const {
    return std::max(moments.least_workspace_size(), gradients.least_workspace_size());
  }
};

/// How many of the terms change scores.
template <class... Terms>
inline constexpr std::size_t modifier_count =
    decltype(bind_terms(std::declval<const Shape&>(), std::declval<const Require&>(),
                        std::declval<const Terms&>()...))::modifiers;

template <class... Terms, class Scalar>
std::size_t local_linear_bytes(Pass pass, const Operands<Scalar>& operands,
                               const Executor* executor) {
  if (pass == Pass::backward) {
    return LocalBackwardPlans<Scalar>(operands.shape, operands.values_are_keys,
                                      modifier_count<Terms...>, executor)
        .workspace_size();
  }
  return std::max(
      forward_workspace_size<Scalar>(projection_of(operands).shape, executor),
      MomentPlan<Scalar>(operands.shape, operands.values_are_keys, executor).workspace_size());
}

/// f of one query from its moments; `row` receives it.
template <class Scalar, class Accumulator>
void local_linear_row(const LocalProblem<Scalar>& problem, Index head, Index query,
                      const Moments<Accumulator>& moments, MatrixView<Scalar> out) {
  const auto queries = problem.operands.query_head(head);
  Accumulator* z = moments.scratch[0];
  for (Index c = 0; c < moments.dim; ++c)
    z[c] = static_cast<Accumulator>(queries(query, c)) - moments.centre[c];
  factorise(moments.dim, moments.second, moments.stride, problem.ridge);
  solve(moments.dim, moments.second, moments.stride, z);
  const auto row = out.block_cols(head * moments.value_dim, moments.value_dim);
  for (Index c = 0; c < moments.value_dim; ++c) {
    Accumulator value(0);
    if (problem.operands.values_are_keys) {
      value = static_cast<Accumulator>(queries(query, c)) - problem.ridge * z[c];
    } else {
      for (Index r = 0; r < moments.dim; ++r)
        value += moments.cross[r * moments.value_stride + c] * z[r];
      value += moments.value_origin[c] + moments.value_sum[c];
    }
    row(query, c) = static_cast<Scalar>(value);
  }
}

template <class Scalar>
void set_zero_row(MatrixView<Scalar> view, Index row) {
  for (Index c = 0; c < view.cols; ++c) view(row, c) = Scalar(0);
}

/// Projection, log-sum-exp and f, every output written once.
template <class Scalar, class... Terms>
void run_local_linear(const Operands<Scalar>& operands, accumulator_t<Scalar> ridge,
                      MatrixView<Scalar> out, MatrixView<Scalar> projection,
                      MatrixView<Scalar> log_sum_exp, const Workspace& workspace,
                      Executor* executor, const Require& require, const Terms&... terms) {
  const Shape& shape = operands.shape;
  const auto bind = term_binder(shape, require, terms...);
  require.shape("out", extent(out), shape.out_extent(), "queries × query heads · value width");
  require.shape("projection", extent(projection), projection_extent(operands),
                "the shape of queries");
  require.shape("log_sum_exp", extent(log_sum_exp), shape.log_sum_exp_extent(),
                "queries × query heads");
  const MomentPlan<Scalar> plan(shape, operands.values_are_keys, executor);
  check_workspace(require, workspace, plan.least_workspace_size());
  run_forward(projection_of(operands), {projection, log_sum_exp}, workspace, executor, require,
              terms...);
  const LocalProblem<Scalar> problem{operands, projection, log_sum_exp, ridge};
  for_each_sequence(problem, bind, [&](const auto& one, const auto& bound) {
    const auto rows = query_rows(out, one.operands.shape);
    for_each_moments(one, bound, plan, workspace, executor,
                     [&](Index head, Index query, bool sees_a_key, const auto& moments) {
                       if (sees_a_key) return local_linear_row(one, head, query, moments, rows);
                       set_zero_row(rows.block_cols(head * shape.value_dim, shape.value_dim),
                                    query);
                     });
  });
}

/// Where the gradients go.
template <class Scalar>
struct LocalLinearOutputs {
  LocalGradientOutputs<Scalar> of_inputs;
  Scalar* bandwidth;
  Scalar* ridge;
};

/// What norms add to dq where modifiers act, dσ, dq = a besides, and dλ = −Σ D/λ.
template <class Terms, class Scalar>
void finish_local_gradients(const LocalProblem<Scalar>& problem, MatrixView<const Scalar> grad_out,
                            const LocalAdjoints<Scalar>& adjoints,
                            const LocalLinearOutputs<Scalar>& gradients) {
  using Accumulator = accumulator_t<Scalar>;
  const Shape& shape = problem.operands.shape;
  Accumulator grad_scale(0);
  for (Index s = 0; s < shape.sequences.count(); ++s) {
    const auto one = problem.operands.of_sequence(s);
    const auto of_queries = query_rows(gradients.of_inputs.queries, one.shape);
    RawRowSums<Scalar> row_sums;
    if constexpr (Terms::modifies_scores) {
      row_sums.sums = adjoints.of_sequence(one.shape).row_sums;
      row_sums.upstream.out.rows = one.shape.queries;
      add_query_norm_gradient(one, row_sums, of_queries);
    }
    for (Index head = 0; head < shape.key_value_heads; ++head) {
      grad_scale += scale_gradient<Scalar>(
          one, head, of_queries, key_rows(gradients.of_inputs.key_bias, one.shape), row_sums);
    }
  }
  const Accumulator scale = problem.operands.scale;
  *gradients.bandwidth = static_cast<Scalar>(-2 * scale * std::sqrt(scale) * grad_scale);
  Accumulator total(0);
  for (Index i = 0; i < shape.queries; ++i) {
    for (Index head = 0; head < shape.query_heads; ++head) {
      if (problem.log_sum_exp(i, head) == simd::minus_infinity<Scalar>) continue;
      total += static_cast<Accumulator>(adjoints.means(i, head));
      for (Index c = head * shape.head_dim; c < (head + 1) * shape.head_dim; ++c) {
        Scalar pull = adjoints.pulls(i, c);
        if (problem.operands.values_are_keys) pull += grad_out(i, c);
        gradients.of_inputs.queries(i, c) += pull;
      }
    }
  }
  *gradients.ridge = static_cast<Scalar>(-total / problem.ridge);
}

template <class Scalar, class... Terms>
void run_local_linear_backward(const LocalProblem<Scalar>& problem,
                               MatrixView<const Scalar> grad_out,
                               const LocalLinearOutputs<Scalar>& gradients,
                               const Workspace& workspace, Executor* executor,
                               const Require& require, const Terms&... terms) {
  const Shape& shape = problem.operands.shape;
  const auto bind = term_binder(problem.operands, require, terms...);
  const LocalGradientOutputs<Scalar>& to = gradients.of_inputs;
  require.shape("forward.projection.out", extent(problem.projection),
                projection_extent(problem.operands), "the shape of queries");
  require.shape("forward.projection.log_sum_exp", extent(problem.log_sum_exp),
                shape.log_sum_exp_extent(), "queries × query heads");
  require.shape("grad_out", extent(grad_out), shape.out_extent(), "the shape of the output");
  require.shape("grad_queries", extent(to.queries), shape.queries_extent(), "the shape of queries");
  require.shape("grad_keys", extent(to.keys), shape.keys_extent(), "the shape of keys");
  if (to.values)
    require.shape("grad_values", extent(*to.values), shape.values_extent(), "the shape of values");
  require.shape("grad_log_prior", extent(to.key_bias), {shape.keys, shape.key_value_heads},
                "keys × key/value heads");
  using Chain = plain_t<decltype(bind(shape))>;
  for (Index s = 0; s < shape.sequences.count(); ++s) {
    bind(shape.of_sequence(s)).each_wanted_gradient([&](std::size_t, const auto&) {
      require.fail("the gradient of a term's parameters is not formed: leave out gradient_into");
    });
  }
  const LocalBackwardPlans<Scalar> plans(shape, problem.operands.values_are_keys, Chain::modifiers,
                                         executor);
  check_workspace(require, workspace, plans.least_workspace_size());
  Arena shared(workspace);
  const LocalAdjoints<Scalar> adjoints(shared, shape);
  for_each_sequence(problem, bind, [&](const auto& one, const auto& bound) {
    const Shape& sequence = one.operands.shape;
    const auto upstream = query_rows(grad_out, sequence);
    const auto of_queries = adjoints.of_sequence(sequence);
    for_each_moments(one, bound, plans.moments, workspace, executor,
                     AdjointSolver<Scalar>(one, upstream, of_queries));
    local_gradients(one, bound, plans.gradients, upstream, of_queries, to.of_sequence(sequence),
                    workspace, executor);
  });
  const SubnormalsAsZeros mode;
  finish_local_gradients<Chain>(problem, grad_out, adjoints, gradients);
}

/// Both `_into` functions; `values` is null where the values are the keys.
template <class Queries, class Keys, class Values, class Out, class Projection, class LogSumExp,
          class... Terms>
void local_linear_forward_into(const Queries& queries, const Keys& keys, const Values* values,
                               double ridge, Out& out, Projection& projection,
                               LogSumExp& log_sum_exp, const Workspace& workspace,
                               const SurfaceOptions& options, const Terms&... terms) {
  using Scalar = scalar_t<Queries>;
  check_inputs_at_compile_time<Queries, Keys, Values>();
  check_outputs_at_compile_time<Scalar, Out, Projection, LogSumExp>();
  constexpr Require require("local_linear_forward");
  const auto operands = local_operands(queries, keys, values, options, require);
  run_local_linear<Scalar>(operands, checked_ridge<Scalar>(ridge, require), view(out),
                           view(projection), view(log_sum_exp), workspace, options.executor,
                           require, terms...);
}

template <class Queries, class Keys, class Values, class Projection, class LogSumExp, class GradOut,
          class... Terms>
void local_linear_backward_into(const Queries& queries, const Keys& keys, const Values* values,
                                double ridge, const Projection& projection,
                                const LogSumExp& log_sum_exp, const GradOut& grad_out,
                                const LocalLinearOutputs<scalar_t<Queries>>& gradients,
                                const Workspace& workspace, const SurfaceOptions& options,
                                const Terms&... terms) {
  using Scalar = scalar_t<Queries>;
  check_inputs_at_compile_time<Queries, Keys, Values, Projection, LogSumExp, GradOut>();
  constexpr Require require("local_linear_backward");
  const auto& p = stored(projection);
  const auto& l = stored(log_sum_exp);
  const auto& g = stored(grad_out);
  const LocalProblem<Scalar> problem{local_operands(queries, keys, values, options, require),
                                     view(p), view(l), checked_ridge<Scalar>(ridge, require)};
  run_local_linear_backward<Scalar>(problem, view(g), gradients, workspace, options.executor,
                                    require, terms...);
}

/// The returning forward pass; `values` is null where the values are the keys.
template <class Queries, class Keys, class Values, class... Terms>
LocalLinearForward<scalar_t<Queries>> local_linear_forward(const char* function,
                                                           const Queries& queries, const Keys& keys,
                                                           const Values* values, double ridge,
                                                           const SurfaceOptions& options,
                                                           const Terms&... terms) {
  using Scalar = scalar_t<Queries>;
  const Require require(function);
  const auto operands = local_operands(queries, keys, values, options, require);
  const auto usable_ridge = checked_ridge<Scalar>(ridge, require);
  LocalLinearForward<Scalar> forward{matrix<Scalar>(operands.shape.out_extent()),
                                     {matrix<Scalar>(projection_extent(operands)),
                                      matrix<Scalar>(operands.shape.log_sum_exp_extent())}};
  run_local_linear<Scalar>(operands, usable_ridge, view(forward.out), view(forward.projection.out),
                           view(forward.projection.log_sum_exp),
                           Workspace(local_linear_bytes(Pass::forward, operands, options.executor)),
                           options.executor, require, terms...);
  return forward;
}

template <class Queries, class Keys, class Values, class Scalar, class GradOut, class... Terms>
LocalLinearGradients<Scalar> local_linear_backward(const Queries& queries, const Keys& keys,
                                                   const Values* values, double ridge,
                                                   const LocalLinearForward<Scalar>& forward,
                                                   const GradOut& grad_out,
                                                   const SurfaceOptions& options,
                                                   const Terms&... terms) {
  constexpr Require require("local_linear_backward");
  const auto operands = local_operands(queries, keys, values, options, require);
  const Shape& shape = operands.shape;
  const auto usable_ridge = checked_ridge<Scalar>(ridge, require);
  LocalLinearGradients<Scalar> gradients{matrix<Scalar>(shape.queries_extent()),
                                         matrix<Scalar>(shape.keys_extent()),
                                         matrix<Scalar>(values ? shape.values_extent() : Extent{}),
                                         Scalar(0),
                                         Scalar(0),
                                         matrix<Scalar>({shape.keys, shape.key_value_heads})};
  const LocalProblem<Scalar> problem{operands, view(forward.projection.out),
                                     view(forward.projection.log_sum_exp), usable_ridge};
  LocalLinearOutputs<Scalar> outputs{
      {view(gradients.queries), view(gradients.keys), {}, view(gradients.log_prior)},
      &gradients.bandwidth,
      &gradients.ridge};
  if (values) outputs.of_inputs.values = view(gradients.values);
  run_local_linear_backward<Scalar>(
      problem, view(grad_out), outputs,
      Workspace(local_linear_bytes<Terms...>(Pass::backward, operands, options.executor)),
      options.executor, require, terms...);
  if (options.prior.is_explicit() && options.prior.cols() == 1)
    gradients.log_prior = gradients.log_prior.rowwise().sum().eval();
  return gradients;
}

}  // namespace detail

/// Bytes of workspace for `local_linear_forward_into` (Pass::forward) or
/// `local_linear_backward_into` (Pass::backward); the latter grow with the number of queries, by
/// about two numbers for each number of a query. Modifiers among the terms want some for the latter;
/// other terms may be left out.
template <class Queries, class Keys, class... Terms>
std::size_t local_linear_workspace_size(Pass pass, const Queries& queries, const Keys& keys,
                                        const SurfaceOptions& options = {}, const Terms&...) {
  const detail::Require require("local_linear_workspace_size");
  const Keys* none = nullptr;
  return detail::local_linear_bytes<Terms...>(
      pass, detail::local_operands(queries, keys, none, options, require), options.executor);
}

/// The same for values that are not the keys.
template <class Queries, class Keys, detail::DenseMatrix Values, class... Terms>
std::size_t local_linear_workspace_size(Pass pass, const Queries& queries, const Keys& keys,
                                        const Values& values, const SurfaceOptions& options = {},
                                        const Terms&...) {
  const detail::Require require("local_linear_workspace_size");
  return detail::local_linear_bytes<Terms...>(
      pass, detail::local_operands(queries, keys, &values, options, require), options.executor);
}

/// `local_linear_forward` into matrices of any storage, without allocating: f into `out`, μ into
/// `projection` and the log-sum-exp of the scores into `log_sum_exp`. Inputs must be stored
/// matrices; no output may overlap an input or another output.
template <class Queries, class Keys, class Out, class Projection, class LogSumExp, class... Terms>
void local_linear_forward_into(const Queries& queries, const Keys& keys, double ridge, Out&& out,
                               Projection&& projection, LogSumExp&& log_sum_exp,
                               const Workspace& workspace, const SurfaceOptions& options = {},
                               const Terms&... terms) {
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const decltype(&k) none = nullptr;
  detail::local_linear_forward_into(q, k, none, ridge, out, projection, log_sum_exp, workspace,
                                    options, terms...);
}

/// The same for values that are not the keys.
template <class Queries, class Keys, detail::DenseMatrix Values, class Out, class Projection,
          class LogSumExp, class... Terms>
void local_linear_forward_into(const Queries& queries, const Keys& keys, const Values& values,
                               double ridge, Out&& out, Projection&& projection,
                               LogSumExp&& log_sum_exp, const Workspace& workspace,
                               const SurfaceOptions& options = {}, const Terms&... terms) {
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const auto& v = detail::stored(values);
  detail::local_linear_forward_into(q, k, &v, ridge, out, projection, log_sum_exp, workspace,
                                    options, terms...);
}

/// Local-linear projection f(q) = q − λ·C⁻¹(q − μ) of each query onto the surface that the keys
/// sample; see above for the formula.
///
/// `queries`, `keys`, `options` and `terms` as for `project`, which gives the weights, but for sinks,
/// dropout and numbers of 16 bits; `ridge` is λ > 0, a variance in the squared units of the keys. A
/// query that sees no key gets 0.
///
/// Moments are summed about μ, which a first pass over the keys finds, so nothing cancels; C is
/// factorised by Cholesky. Its condition is at most 1 + (Σ w‖k − μ‖²)/λ: in float choose λ above
/// 1e-4 times the squared bandwidth. Allocates its result and a workspace that holds d² numbers for
/// each query of a block of at most 64, never Tq × Tk. Time O(Hq·Tq·(Tk·(2d² + 6d) + d³)), less the
/// keys whose weight is 0. Errors as for `project`; besides, a λ that is not positive.
template <class Queries, class Keys, class... Terms>
auto local_linear_forward(const Queries& queries, const Keys& keys, double ridge,
                          const SurfaceOptions& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys>();
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const decltype(&k) none = nullptr;
  return detail::local_linear_forward("local_linear_forward", q, k, none, ridge, options, terms...);
}

/// Local-linear regression f(q) = v̄ + Sᵀ·C⁻¹(q − μ) of values on keys; see above for the formula.
/// `values` is Tk × (Hkv·dv). Time O(Hq·Tq·(Tk·2d·(d + dv) + d³)). With V = K this is the projection.
template <class Queries, class Keys, detail::DenseMatrix Values, class... Terms>
auto local_linear_forward(const Queries& queries, const Keys& keys, const Values& values,
                          double ridge, const SurfaceOptions& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, Values>();
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const auto& v = detail::stored(values);
  return detail::local_linear_forward("local_linear_forward", q, k, &v, ridge, options, terms...);
}

/// `local_linear_forward` without what the backward pass needs: f, Tq × (Hq·d).
template <class Queries, class Keys, class... Terms>
auto local_linear(const Queries& queries, const Keys& keys, double ridge,
                  const SurfaceOptions& options = {}, const Terms&... terms) {
  return local_linear_forward(queries, keys, ridge, options, terms...).out;
}

/// The same for values that are not the keys: f, Tq × (Hq·dv).
template <class Queries, class Keys, detail::DenseMatrix Values, class... Terms>
auto local_linear(const Queries& queries, const Keys& keys, const Values& values, double ridge,
                  const SurfaceOptions& options = {}, const Terms&... terms) {
  return local_linear_forward(queries, keys, values, ridge, options, terms...).out;
}

/// Gradients of a loss with respect to queries, keys, bandwidth, λ and log-prior, given grad_out =
/// ∂loss/∂f, without allocating. `projection` and `log_sum_exp` are what local_linear_forward_into
/// wrote. Shapes as for `project_backward_into`.
template <class Queries, class Keys, class Projection, class LogSumExp, class GradOut,
          class GradQueries, class GradKeys, class GradLogPrior, class... Terms>
void local_linear_backward_into(const Queries& queries, const Keys& keys, double ridge,
                                const Projection& projection, const LogSumExp& log_sum_exp,
                                const GradOut& grad_out, GradQueries&& grad_queries,
                                GradKeys&& grad_keys, detail::scalar_t<Queries>& grad_bandwidth,
                                detail::scalar_t<Queries>& grad_ridge,
                                GradLogPrior&& grad_log_prior, const Workspace& workspace,
                                const SurfaceOptions& options = {}, const Terms&... terms) {
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const decltype(&k) none = nullptr;
  detail::check_outputs_at_compile_time<detail::scalar_t<Queries>, GradQueries, GradKeys,
                                        GradLogPrior>();
  detail::local_linear_backward_into(
      q, k, none, ridge, projection, log_sum_exp, grad_out,
      {{detail::view(grad_queries), detail::view(grad_keys), {}, detail::view(grad_log_prior)},
       &grad_bandwidth,
       &grad_ridge},
      workspace, options, terms...);
}

/// The same for values that are not the keys.
template <class Queries, class Keys, detail::DenseMatrix Values, class Projection, class LogSumExp,
          class GradOut, class GradQueries, class GradKeys, class GradValues, class GradLogPrior,
          class... Terms>
void local_linear_backward_into(const Queries& queries, const Keys& keys, const Values& values,
                                double ridge, const Projection& projection,
                                const LogSumExp& log_sum_exp, const GradOut& grad_out,
                                GradQueries&& grad_queries, GradKeys&& grad_keys,
                                GradValues&& grad_values, detail::scalar_t<Queries>& grad_bandwidth,
                                detail::scalar_t<Queries>& grad_ridge,
                                GradLogPrior&& grad_log_prior, const Workspace& workspace,
                                const SurfaceOptions& options = {}, const Terms&... terms) {
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const auto& v = detail::stored(values);
  detail::check_outputs_at_compile_time<detail::scalar_t<Queries>, GradQueries, GradKeys,
                                        GradValues, GradLogPrior>();
  detail::local_linear_backward_into(q, k, &v, ridge, projection, log_sum_exp, grad_out,
                                     {{detail::view(grad_queries), detail::view(grad_keys),
                                       detail::view(grad_values), detail::view(grad_log_prior)},
                                      &grad_bandwidth,
                                      &grad_ridge},
                                     workspace, options, terms...);
}

/// Gradients of a loss with respect to queries, keys, bandwidth, λ and log-prior, given grad_out =
/// ∂loss/∂f, Tq × (Hq·d), and what local_linear_forward returned for the same inputs, options and
/// terms. With z and C as above, b = −λ·C⁻¹·g and δ_j = k_j − μ, for each query
///
///     dS_j = −w_j((1 + z·δ_j)·(b·δ_j) + D),   D = λ·z·(b + g),
///     dq = g + b + β·Σ_j dS_j·k_j,   dλ = −z·(g + b),
///     dk_j = −w_j((b·δ_j)·z + (1 + z·δ_j)·b) + β·dS_j·(q − k_j), summed over the queries,
///
/// and bandwidth and prior from dS as for `project_backward`, through modifiers too; gradients of the
/// terms' own parameters are not formed. A query that sees no key gets and gives gradient 0. Recomputes weights and moments: time of the forward and O(Hq·Tq·Tk·16d).
template <class Queries, class Keys, class Scalar, class GradOut, class... Terms>
auto local_linear_backward(const Queries& queries, const Keys& keys, double ridge,
                           const LocalLinearForward<Scalar>& forward, const GradOut& grad_out,
                           const SurfaceOptions& options = {}, const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, Matrix<Scalar>, GradOut>();
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const auto& g = detail::stored(grad_out);
  const decltype(&k) none = nullptr;
  return detail::local_linear_backward(q, k, none, ridge, forward, g, options, terms...);
}

/// The same with respect to the values too, which are not the keys: with a = C⁻¹·S·g and h_j =
/// g·(v_j − v̄) − a·δ_j, dS_j = w_j((1 + z·δ_j)·h_j − λ·z·a), dv_j = w_j(1 + z·δ_j)·g, dk_j =
/// w_j(h_j·z − (1 + z·δ_j)·a) + β·dS_j·(q − k_j), dq = a + β·Σ_j dS_j·k_j, dλ = −z·a.
template <class Queries, class Keys, detail::DenseMatrix Values, class Scalar, class GradOut,
          class... Terms>
auto local_linear_backward(const Queries& queries, const Keys& keys, const Values& values,
                           double ridge, const LocalLinearForward<Scalar>& forward,
                           const GradOut& grad_out, const SurfaceOptions& options = {},
                           const Terms&... terms) {
  detail::check_inputs_at_compile_time<Queries, Keys, Values, Matrix<Scalar>, GradOut>();
  const auto& q = detail::stored(queries);
  const auto& k = detail::stored(keys);
  const auto& v = detail::stored(values);
  const auto& g = detail::stored(grad_out);
  return detail::local_linear_backward(q, k, &v, ridge, forward, g, options, terms...);
}

}  // namespace surfattn
