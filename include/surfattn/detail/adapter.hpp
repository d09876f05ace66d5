// surfattn layer 5: what the adapters of both forms share

#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <surfattn/detail/backward_engine.hpp>
#include <surfattn/detail/forward_engine.hpp>
#include <surfattn/detail/stream_engine.hpp>
#include <surfattn/workspace.hpp>

namespace surfattn::detail {

template <class Scalar>
accumulator_t<Scalar> scale_or_default(std::optional<double> scale, Index head_dim) {
  using Accumulator = accumulator_t<Scalar>;
  if (scale) return static_cast<Accumulator>(*scale);
  return 1 / std::sqrt(static_cast<Accumulator>(std::max<Index>(head_dim, 1)));
}

inline void check_workspace(const Require& require, const Workspace& workspace,
                            std::size_t needed) {
  if (workspace.size() >= needed) return;
  require.fail("workspace has " + std::to_string(workspace.size()) + " bytes but must have " +
               std::to_string(needed) + " (see workspace_size)");
}

/// Calls `use` with the plan of the forward pass that suits the shape.
template <class Scalar, class Use>
auto with_forward_plan(const Shape& shape, const Executor* executor, const Use& use) {
  if (StreamPlan<Scalar>::fits(shape)) return use(StreamPlan<Scalar>(shape, executor));
  return use(
      ForwardPlan<Scalar>(shape, forward_tiling<Scalar>(shape, concurrency(executor)), executor));
}

template <class Scalar>
BackwardPlan<Scalar> backward_plan(const Shape& shape, bool values_are_keys,
                                   const Executor* executor) {
  return {shape, backward_tiling<Scalar>(shape), values_are_keys, executor};
}

template <class Scalar>
std::size_t workspace_size(Pass pass, const Shape& shape, bool values_are_keys,
                           const Executor* executor) {
  return pass == Pass::forward
             ? with_forward_plan<Scalar>(shape, executor,
                                         [](const auto& plan) { return plan.workspace_size(); })
             : backward_plan<Scalar>(shape, values_are_keys, executor).workspace_size();
}

template <class Scalar>
Matrix<Scalar> matrix(Extent extent) {
  return Matrix<Scalar>(extent.rows, extent.cols);
}

/// Binds the terms, checks outputs and workspace, and only then runs the forward pass.
template <class Scalar, class... Terms>
void run_forward(const Operands<Scalar>& operands, const ForwardOutputs<Scalar>& outputs,
                 const Workspace& workspace, Executor* executor, const Require& require,
                 const Terms&... terms) {
  const Shape& shape = operands.shape;
  const auto bound = bind_terms(shape, require, terms...);
  require.shape("out", extent(outputs.out), shape.out_extent(),
                "queries × query heads · value width");
  if (outputs.log_sum_exp) {
    require.shape("log_sum_exp", extent(*outputs.log_sum_exp), shape.log_sum_exp_extent(),
                  "queries × query heads");
  }
  with_forward_plan<Scalar>(shape, executor, [&](const auto& plan) {
    check_workspace(require, workspace, plan.least_workspace_size());
    forward(operands, bound, plan, outputs, workspace, executor);
  });
}

/// The same for the backward pass.
template <class Scalar, class... Terms>
void run_backward(const Operands<Scalar>& operands, const Upstream<Scalar>& upstream,
                  const GradientOutputs<Scalar>& gradients, const Workspace& workspace,
                  Executor* executor, const Require& require, const Terms&... terms) {
  const Shape& shape = operands.shape;
  const auto bound = bind_terms(shape, require, terms...);
  const auto plan = backward_plan<Scalar>(shape, operands.values_are_keys, executor);
  require.shape("forward.out", extent(upstream.out), shape.out_extent(),
                "queries × query heads · value width");
  require.shape("forward.log_sum_exp", extent(upstream.log_sum_exp), shape.log_sum_exp_extent(),
                "queries × query heads");
  require.shape("grad_out", extent(upstream.grad_out), shape.out_extent(),
                "the shape of the output");
  require.shape("grad_queries", extent(gradients.queries), shape.queries_extent(),
                "the shape of queries");
  require.shape("grad_keys", extent(gradients.keys), shape.keys_extent(), "the shape of keys");
  if (gradients.values) {
    require.shape("grad_values", extent(*gradients.values), shape.values_extent(),
                  "the shape of values");
  }
  check_workspace(require, workspace, plan.least_workspace_size());
  backward(operands, bound, plan, upstream, gradients, workspace, executor);
}

}  // namespace surfattn::detail
