// surfattn layer 5: what the adapters of both forms share

#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <surfattn/detail/batch.hpp>
#include <surfattn/terms/parameter.hpp>
#include <surfattn/workspace.hpp>
#include <tuple>
#include <utility>

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
  require.fail("workspace has ", workspace.size(), " bytes but must have ", needed,
               " (see workspace_size)");
}

/// Gives the terms of a sequence, for whoever computes one: refers to terms that the caller holds.
template <class... Terms>
class TermBinder {
 public:
  /// Checks the terms against every sequence of the batch.
  TermBinder(const Shape& batch, const Require& require, const Terms&... terms)
      : require_(require), terms_(terms...) {
    for (Index s = 0; s < batch.sequences.count(); ++s) (*this)(batch.of_sequence(s));
  }

  SURFATTN_NEVER_INLINE auto operator()(const Shape& sequence) const {
    return std::apply(
        [&](const Terms&... terms) {
          return bind_terms(sequence, require_.about(sequence), terms...);
        },
        terms_);
  }

 private:
  const Require& require_;
  std::tuple<const Terms&...> terms_;
};

template <class... Terms>
TermBinder<Terms...> term_binder(const Shape& batch, const Require& require,
                                 const Terms&... terms) {
  return {batch, require, terms...};
}

/// The same, and checks what the terms ask of the scores: that kernels of the distance get distances.
template <class Scalar, class... Terms>
TermBinder<Terms...> term_binder(const Operands<Scalar>& batch, const Require& require,
                                 const Terms&... terms) {
  constexpr bool has_kernel = (DistanceKernel<Terms> || ...);
  if (has_kernel && !batch.scores_are_distances()) {
    require.fail(
        "StudentT and Epanechnikov are kernels of the distance of query and key, which the scores "
        "are in the surface form under KeyPrior::uniform alone; list log-weights of keys as an "
        "AdditiveBias");
  }
  return term_binder(batch.shape, require, terms...);
}

/// Bytes of workspace; a forward pass needs none for its terms.
template <class Scalar>
std::size_t forward_workspace_size(const Shape& batch, const Executor* executor) {
  return work_plan(batch, ForwardPlanner<Scalar>{concurrency(executor)}, executor).workspace_size();
}

/// The same for all calls of no more queries and keys, where they are one sequence: few of them need
/// memory for all heads, which many do not.
template <class Scalar>
std::size_t forward_workspace_room(const Shape& batch, const Executor* executor) {
  WorkPlan plan = work_plan(batch, ForwardPlanner<Scalar>{concurrency(executor)}, executor);
  for (Index s = 0; s < batch.sequences.count(); ++s) {
    plan.bytes_per_worker =
        std::max(plan.bytes_per_worker, StreamPlan<Scalar>::bytes_for_fewer(batch.of_sequence(s)));
  }
  return plan.workspace_size();
}

/// The workspace's part for sums over blocks of keys of dQ, where 16 bits are stored.
template <class Scalar>
std::size_t query_sum_bytes(const Shape& batch) {
  if constexpr (std::is_same_v<Scalar, accumulator_t<Scalar>>) return 0;
  Arena counter;
  counter.take<accumulator_t<Scalar>>(batch.queries * batch.query_heads * batch.head_dim);
  return Arena::alignment + counter.used();
}

/// Calls use(gradients, the rest of the workspace) with a place for the sums of dQ, and writes these
/// where they belong.
template <class Scalar, class Use>
void with_query_sums(GradientOutputs<Scalar> gradients, const Workspace& workspace,
                     [[maybe_unused]] std::size_t bytes, const Use& use) {
  MatrixView<Scalar>& queries = gradients.queries;
  if constexpr (std::is_same_v<Scalar, accumulator_t<Scalar>>) {
    gradients.query_sums = queries;
    use(gradients, workspace);
  } else {
    auto* sums = Arena(workspace).take<accumulator_t<Scalar>>(queries.rows * queries.cols);
    gradients.query_sums = {sums, queries.rows, queries.cols, queries.cols, 1};
    use(gradients, Workspace(workspace.data() + bytes, workspace.size() - bytes));
    for (Index i = 0; i < queries.rows; ++i) {
      for (Index c = 0; c < queries.cols; ++c)
        queries(i, c) = static_cast<Scalar>(gradients.query_sums(i, c));
    }
  }
}

template <class Scalar, class... Terms>
std::size_t workspace_size(Pass pass, const Shape& batch, bool values_are_keys,
                           const Executor* executor, const Require& require,
                           const Terms&... terms) {
  if (pass == Pass::forward) return forward_workspace_room<Scalar>(batch, executor);
  const auto bind = term_binder(batch, require, terms...);
  const BackwardPlanner<Scalar, decltype(bind)> planner{concurrency(executor), values_are_keys,
                                                        bind};
  return query_sum_bytes<Scalar>(batch) + work_plan(batch, planner, executor).workspace_size();
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
  const auto bind = term_binder(operands, require, terms...);
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

/// What a backward pass reads; `grad_log_sum_exp` counts only where `Gradient` has such a part.
template <class Gradient, class Out, class LogSumExp, class GradOut, class GradLogSumExp>
auto upstream_of(const Out& out, const LogSumExp& log_sum_exp, const GradOut& grad_out,
                 const GradLogSumExp& grad_log_sum_exp) {
  Upstream<scalar_t<Out>> upstream{view(out), view(log_sum_exp), view(grad_out)};
  if constexpr (GradientPair<Gradient>) upstream.grad_log_sum_exp = view(grad_log_sum_exp);
  return upstream;
}

/// The same for the backward pass; `done` as for `backward`.
template <class Scalar, class Done, class... Terms>
void run_backward(const Operands<Scalar>& operands, const Upstream<Scalar>& upstream,
                  const GradientOutputs<Scalar>& gradients, const Workspace& workspace,
                  Executor* executor, const Require& require, const Done& done,
                  const Terms&... terms) {
  const Shape& shape = operands.shape;
  const auto bind = term_binder(operands, require, terms...);
  const BackwardPlanner<Scalar, decltype(bind)> planner{concurrency(executor),
                                                        operands.values_are_keys, bind};
  const WorkPlan plan = work_plan(shape, planner, executor);
  require.shape("forward.out", extent(upstream.out), shape.out_extent(),
                "queries × query heads · value width");
  require.shape("forward.log_sum_exp", extent(upstream.log_sum_exp), shape.log_sum_exp_extent(),
                "queries × query heads");
  require.shape("grad_out", extent(upstream.grad_out), shape.out_extent(),
                "the shape of the output");
  if (upstream.grad_log_sum_exp) {
    require.shape("grad_out.log_sum_exp", extent(*upstream.grad_log_sum_exp),
                  shape.log_sum_exp_extent(), "queries × query heads");
  }
  require.shape("grad_queries", extent(gradients.queries), shape.queries_extent(),
                "the shape of queries");
  require.shape("grad_keys", extent(gradients.keys), shape.keys_extent(), "the shape of keys");
  if (gradients.values) {
    require.shape("grad_values", extent(*gradients.values), shape.values_extent(),
                  "the shape of values");
  }
  const std::size_t of_sums = query_sum_bytes<Scalar>(shape);
  check_workspace(require, workspace, of_sums + plan.least_workspace_size());
  (clear_gradient(terms), ...);
  with_query_sums(gradients, workspace, of_sums, [&](const auto& into, const Workspace& rest) {
    backward(operands, bind, planner, plan, upstream, into, rest, executor, done);
  });
}

}  // namespace surfattn::detail
