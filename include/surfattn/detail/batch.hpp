// surfattn layer 4: both passes over all sequences of a batch

#pragma once

#include <cstddef>
#include <memory>
#include <surfattn/detail/backward_engine.hpp>
#include <surfattn/detail/forward_engine.hpp>
#include <surfattn/detail/operands.hpp>
#include <surfattn/detail/stream_engine.hpp>
#include <surfattn/detail/subnormals.hpp>
#include <surfattn/detail/work_plan.hpp>
#include <surfattn/executor.hpp>
#include <surfattn/workspace.hpp>

/// A batch is its sequences, each planned, bound and computed as if it were alone, so that it gives
/// the same bits as a call of its own. Their items stand in one row and are shared out together.
/// Nothing is stored for a sequence: its views, its plan and its bound terms are made anew by each
/// worker that takes items of it.
///
/// A planner calls `use` with the plan of one sequence, given its shape.
namespace surfattn::detail {

/// The forward pass: by reading keys once where queries are few, by tiles otherwise.
template <class Scalar>
struct ForwardPlanner {
  Index concurrency = 1;

  template <class Use>
  void operator()(const Shape& sequence, const Use& use) const {
    if (StreamPlan<Scalar>::fits(sequence)) return use(StreamPlan<Scalar>(sequence));
    use(ForwardPlan<Scalar>(sequence, forward_tiling<Scalar>(sequence, concurrency)));
  }
};

/// `Bind` gives the terms of a sequence, for what they need to be planned for.
template <class Scalar, class Bind>
struct BackwardPlanner {
  Index concurrency;
  bool values_are_keys;
  const Bind& bind;

  template <class Use>
  void operator()(const Shape& sequence, const Use& use) const {
    use(BackwardPlan<Scalar>(sequence, backward_tiling<Scalar>(sequence, concurrency),
                             values_are_keys, bind(sequence)));
  }
};

template <class Planner>
WorkPlan work_plan(const Shape& batch, const Planner& planner, const Executor* executor) {
  WorkPlan plan;
  for (Index s = 0; s < batch.sequences.count(); ++s) {
    planner(batch.of_sequence(s), [&](const auto& sequence) { plan.add(sequence); });
  }
  plan.workers = detail::workers(executor, plan.items);
  return plan;
}

/// One worker's way through a batch: work(plan, shared, items) once for each sequence of which it
/// gets items. `shared` is the sequence's part of the memory that all workers share, and items(use)
/// calls use(i) for each of its items that the worker takes. As items are taken in order, the
/// sequences come in order too.
template <class Planner, class Take, class Work>
void visit_sequences(const Shape& batch, const Planner& planner, Arena shared, const Take& take,
                     const Work& work) {
  Index item = take(), first = 0;
  for (Index s = 0; s < batch.sequences.count(); ++s) {
    planner(batch.of_sequence(s), [&](const auto& plan) {
      const Index end = first + plan.items;
      if (item < end) {
        work(plan, shared, [&](const auto& use) {
          for (; item < end; item = take()) use(item - first);
        });
      }
      first = end;
      shared.skip(plan.shared_bytes());
    });
  }
}

/// Calls use(plan, shared) for every sequence.
template <class Planner, class Use>
void for_each_sequence(const Shape& batch, const Planner& planner, Arena shared, const Use& use) {
  for (Index s = 0; s < batch.sequences.count(); ++s) {
    planner(batch.of_sequence(s), [&](const auto& sequence) {
      use(sequence, shared);
      shared.skip(sequence.shared_bytes());
    });
  }
}

/// O = W·V and log_sum_exp, every output written once. `bind` gives the terms of a sequence;
/// `plan` is what the planner makes of the batch.
template <class Scalar, class Bind, class Planner>
void forward(const Operands<Scalar>& batch, const Bind& bind, const Planner& planner,
             const WorkPlan& plan, const ForwardOutputs<Scalar>& outputs,
             const Workspace& workspace, Executor* executor) {
  share_items(executor, plan.workers_within(workspace), [&](Index worker, const auto& take) {
    visit_sequences(batch.shape, planner, Arena(workspace), take,
                    [&](const auto& sequence, Arena shared, const auto& items) {
                      const auto operands = batch.of_sequence(sequence.shape.sequence);
                      forward(operands, bind(sequence.shape), sequence,
                              outputs.of_sequence(sequence.shape), shared,
                              plan.arena_of(workspace, worker), items);
                    });
  });
  if (plan.shared_bytes == 0) return;
  const SubnormalsAsZeros mode;
  for_each_sequence(
      batch.shape, planner, Arena(workspace), [&](const auto& sequence, Arena shared) {
        finish_forward(batch.of_sequence(sequence.shape.sequence), bind(sequence.shape), sequence,
                       outputs.of_sequence(sequence.shape), shared);
      });
}

/// What nobody does with a sequence whose gradients are done.
struct DoNothing {
  template <class... Arguments>
  void operator()(const Arguments&...) const {}
};

/// All gradients, every output written; to those of terms the pass adds. In the end calls
/// done(operands, gradients, row_sums) for each sequence in order.
template <class Scalar, class Bind, class Planner, class Done = DoNothing>
void backward(const Operands<Scalar>& batch, const Bind& bind, const Planner& planner,
              const WorkPlan& plan, const Upstream<Scalar>& upstream,
              const GradientOutputs<Scalar>& gradients, const Workspace& workspace,
              Executor* executor, const Done& done = {}) {
  for_each_sequence(batch.shape, planner, Arena(workspace),
                    [](const auto& sequence, Arena shared) { start_backward(sequence, shared); });
  set_zero(gradients.query_sums);
  share_items(executor, plan.workers_within(workspace), [&](Index worker, const auto& take) {
    visit_sequences(batch.shape, planner, Arena(workspace), take,
                    [&](const auto& sequence, Arena shared, const auto& items) {
                      const auto operands = batch.of_sequence(sequence.shape.sequence);
                      backward(operands, bind(sequence.shape), sequence,
                               upstream.of_sequence(sequence.shape),
                               gradients.of_sequence(sequence.shape), shared,
                               plan.arena_of(workspace, worker), items);
                    });
  });
  const SubnormalsAsZeros mode;
  for_each_sequence(
      batch.shape, planner, Arena(workspace), [&](const auto& sequence, Arena shared) {
        const auto operands = batch.of_sequence(sequence.shape.sequence);
        const auto of_sequence = gradients.of_sequence(sequence.shape);
        const auto sums = sequence.sums_in(shared);
        const auto from = upstream.of_sequence(sequence.shape);
        finish_term_gradients(operands, bind(sequence.shape), sums, from, of_sequence.query_sums);
        done(operands, of_sequence, RawRowSums<Scalar>{sums.raw_rows, from});
      });
}

}  // namespace surfattn::detail
