// surfattn layer 1: who runs the tasks of a call

#pragma once

#include <algorithm>
#include <atomic>
#include <surfattn/detail/subnormals.hpp>
#include <surfattn/types.hpp>
#include <type_traits>

namespace surfattn {

/// A reference to something callable with a task's number. It does not own: valid while the
/// callable lives.
class Task {
 public:
  template <class Callable>
  requires(!std::is_same_v<std::remove_cvref_t<Callable>, Task>)
      Task(const Callable& callable)  // implicit, so that a lambda can be passed
      : callable_(&callable), call_([](const void* object, Index number) {
          (*static_cast<const Callable*>(object))(number);
        }) {}

  void operator()(Index number) const { call_(callable_, number); }

 private:
  const void* callable_;
  void (*call_)(const void*, Index);
};

/// Runs tasks, on as many threads as it likes. The library starts no threads of its own: without an
/// executor a call runs on the caller's thread. Results have the same bits under every executor and
/// every number of threads.
///
/// Provided: surfattn/executors/thread_pool.hpp, surfattn/executors/openmp.hpp and
/// surfattn/executors/eigen_thread_pool.hpp. An executor of your own implements the two functions.
class Executor {
 public:
  /// How many tasks can run at the same time, at least 1. The workspace of a call depends on it.
  virtual Index concurrency() const = 0;

  /// Calls task(0), …, task(count − 1) once each, in any order and on any threads, and returns when
  /// all have returned. A task may wait for a task that has begun, never for one that has not.
  /// Tasks do not throw, and do not call `run` of the same executor.
  virtual void run(Index count, Task task) = 0;

 protected:
  Executor() = default;
  Executor(const Executor&) = default;
  Executor& operator=(const Executor&) = default;
  ~Executor() = default;
};

namespace detail {

/// How many tasks can run at the same time, 1 without an executor.
inline Index concurrency(const Executor* executor) {
  return executor ? std::max<Index>(1, executor->concurrency()) : 1;
}

/// How many workers share `items` items.
inline Index workers(const Executor* executor, Index items) {
  return std::clamp<Index>(items, 1, concurrency(executor));
}

/// Calls work(w, take) once for each worker w. Workers take items in order, each the next one when
/// it is free: take() gives the next item, or `items` and more when none is left. So an item that
/// has begun is never behind one that has not.
template <class Work>
void share_items(Executor* executor, Index worker_count, const Work& work) {
  std::atomic<Index> next{0};
  const auto take = [&next] { return next.fetch_add(1, std::memory_order_relaxed); };
  const auto run = [&](Index worker) {
    const SubnormalsAsZeros mode;
    work(worker, take);
  };
  if (!executor || worker_count == 1) return run(0);
  executor->run(worker_count, run);
}

}  // namespace detail
}  // namespace surfattn
