// surfattn layer 5: what the adapters of both forms share

#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <surfattn/detail/backward_engine.hpp>
#include <surfattn/detail/forward_engine.hpp>
#include <surfattn/detail/stream_engine.hpp>
#include <surfattn/terms/parameter.hpp>
#include <surfattn/workspace.hpp>
#include <tuple>

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
  return use(ForwardPlan<Scalar>(shape, forward_tiling<Scalar>(shape), executor));
}

template <class Scalar, class Bound>
BackwardPlan<Scalar> backward_plan(const Shape& shape, bool values_are_keys,
                                   const Executor* executor, const Bound& terms) {
  return {shape, backward_tiling<Scalar>(shape), values_are_keys, executor, terms};
}

/// Bytes of workspace; a forward pass needs none for its terms.
template <class Scalar>
std::size_t forward_workspace_size(const Shape& shape, const Executor* executor) {
  return with_forward_plan<Scalar>(shape, executor,
                                   [](const auto& plan) { return plan.workspace_size(); });
}

template <class Scalar, class... Terms>
std::size_t workspace_size(Pass pass, const Shape& shape, bool values_are_keys,
                           const Executor* executor, const Require& require,
                           const Terms&... terms) {
  if (pass == Pass::forward) return forward_workspace_size<Scalar>(shape, executor);
  return backward_plan<Scalar>(shape, values_are_keys, executor,
                               bind_terms(shape, require, terms...))
      .workspace_size();
}

template <class Scalar>
Matrix<Scalar> matrix(Extent extent) {
  return Matrix<Scalar>(extent.rows, extent.cols);
}

/// The result type of a backward function: `Gradients`, and one matrix for each trainable term.
template <class Gradients, class Entries>
struct with_terms_of;
template <class Gradients, class... Entries>
struct with_terms_of<Gradients, std::tuple<Entries...>> {
  using type = WithTermGradients<Gradients, Entries...>;
};
template <class Gradients>
struct with_terms_of<Gradients, std::tuple<>> {
  using type = Gradients;
};

/// A tuple of one matrix for the gradient of a trainable term; of another term, of none. A term
/// that has been told where its gradient goes keeps that, and its matrix stays empty.
template <class Term>
auto gradient_entry(const Term& term) {
  if constexpr (TrainableTermType<Term>) {
    const Extent extent = term.wants_gradient() ? Extent{} : term.parameter_extent();
    return std::tuple(matrix<typename Term::ParameterScalar>(extent));
  } else {
    return std::tuple<>();
  }
}

/// The same term, told to write its gradient to its entry, the one at `index`.
template <std::size_t index, class Term, class Entries>
decltype(auto) directed(const Term& term, Entries& entries) {
  if constexpr (TrainableTermType<Term>) {
    return term.wants_gradient() ? term : term.gradient_into(view(std::get<index>(entries)));
  } else {
    return (term);
  }
}

/// How many of the terms before the one at `index` are trainable.
template <std::size_t index, class... Terms>
constexpr std::size_t trainable_before() {
  constexpr bool trainable[] = {TrainableTermType<Terms>...};
  std::size_t count = 0;
  for (std::size_t i = 0; i < index; ++i) count += trainable[i];
  return count;
}

/// Calls run(gradients, terms...) with matrices made for the gradient of every trainable term, and
/// returns the gradients with these.
template <class Gradients, class Run, class... Terms>
auto with_term_gradients(Gradients inputs, const Run& run, const Terms&... terms) {
  auto entries = std::tuple_cat(gradient_entry(terms)...);
  [&]<std::size_t... index>(std::index_sequence<index...>) {
    run(inputs, directed<trainable_before<index, Terms...>()>(terms, entries)...);
  }
  (std::index_sequence_for<Terms...>());
  if constexpr (std::tuple_size_v<decltype(entries)> == 0) {
    return inputs;
  } else {
    return typename with_terms_of<Gradients, decltype(entries)>::type{std::move(inputs),
                                                                      std::move(entries)};
  }
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

/// The same for the backward pass; returns what `backward` returns.
template <class Scalar, class... Terms>
const accumulator_t<Scalar>* run_backward(const Operands<Scalar>& operands,
                                          const Upstream<Scalar>& upstream,
                                          const GradientOutputs<Scalar>& gradients,
                                          const Workspace& workspace, Executor* executor,
                                          const Require& require, const Terms&... terms) {
  const Shape& shape = operands.shape;
  const auto bound = bind_terms(shape, require, terms...);
  const auto plan = backward_plan<Scalar>(shape, operands.values_are_keys, executor, bound);
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
  return backward(operands, bound, plan, upstream, gradients, workspace, executor);
}

}  // namespace surfattn::detail
