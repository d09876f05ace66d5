// surfattn layer 4: how a pass is shared out among workers, and the memory that it needs

#pragma once

#include <algorithm>
#include <cstddef>
#include <surfattn/executor.hpp>
#include <surfattn/workspace.hpp>

namespace surfattn::detail {

/// Items of work of all sequences of a batch, one sequence after the other, and the workspace: a
/// part that all workers share, then one part for each worker.
struct WorkPlan {
  Index items = 0;
  Index workers = 1;  ///< how many are of use
  std::size_t shared_bytes = 0;
  std::size_t bytes_per_worker = 0;

  std::size_t workspace_size() const { return size_for(workers); }

  /// One worker is enough; with less than that a call cannot run.
  std::size_t least_workspace_size() const { return size_for(1); }

  /// As many workers as the workspace has room for: one made for a longer sequence serves a shorter
  /// one, though that may be cut into more items.
  Index workers_within(const Workspace& workspace) const {
    Index count = workers;
    while (count > 1 && size_for(count) > workspace.size()) --count;
    return count;
  }

  /// Takes in the plan of the next sequence. Workers go from sequence to sequence with the same
  /// memory; what they share has its own place for each.
  template <class SequencePlan>
  void add(const SequencePlan& sequence) {
    items += sequence.items;
    shared_bytes += sequence.shared_bytes();
    bytes_per_worker = std::max(bytes_per_worker, sequence.bytes_per_worker());
  }

  Arena arena_of(const Workspace& workspace, Index worker) const {
    return Arena(workspace, shared_bytes + static_cast<std::size_t>(worker) * bytes_per_worker);
  }

 private:
  std::size_t size_for(Index count) const {
    return Arena::alignment + shared_bytes + static_cast<std::size_t>(count) * bytes_per_worker;
  }
};

}  // namespace surfattn::detail
