// surfattn layer 5: what the adapters of both forms share

#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <surfattn/detail/batch.hpp>
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

template <class Scalar>
std::size_t workspace_size(Pass pass, const Shape& batch, bool values_are_keys,
                           const Executor* executor) {
  return pass == Pass::forward
             ? work_plan(batch, ForwardPlanner<Scalar>{concurrency(executor)}, executor)
                   .workspace_size()
             : work_plan(batch, BackwardPlanner<Scalar>{values_are_keys}, executor)
                   .workspace_size();
}

/// Binds terms to the sequences of a batch, once to check them and again by whoever computes one.
template <class... Terms>
auto term_binder(const Shape& batch, const Require& require, const Terms&... terms) {
  auto bind = [&](const Shape& sequence) {
    return bind_terms(sequence, require.about(sequence), terms...);
  };
  for (Index s = 0; s < batch.sequences.count(); ++s) bind(batch.of_sequence(s));
  return bind;
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
  const auto bind = term_binder(shape, require, terms...);
  require.shape("out", extent(outputs.out), shape.out_extent(),
                "queries × query heads · value width");
  if (outputs.log_sum_exp) {
    require.shape("log_sum_exp", extent(*outputs.log_sum_exp), shape.log_sum_exp_extent(),
                  "queries × query heads");
  }
  const ForwardPlanner<Scalar> planner{concurrency(executor)};
  const WorkPlan plan = work_plan(shape, planner, executor);
  check_workspace(require, workspace, plan.least_workspace_size());
  forward(operands, bind, planner, plan, outputs, workspace, executor);
}

/// The same for the backward pass.
template <class Scalar, class... Terms>
void run_backward(const Operands<Scalar>& operands, const Upstream<Scalar>& upstream,
                  const GradientOutputs<Scalar>& gradients, const Workspace& workspace,
                  Executor* executor, const Require& require, const Terms&... terms) {
  const Shape& shape = operands.shape;
  const auto bind = term_binder(shape, require, terms...);
  const BackwardPlanner<Scalar> planner{operands.values_are_keys};
  const WorkPlan plan = work_plan(shape, planner, executor);
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
  backward(operands, bind, planner, plan, upstream, gradients, workspace, executor);
}

}  // namespace surfattn::detail
