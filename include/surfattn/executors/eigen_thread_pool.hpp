// surfattn layer 5: an executor on Eigen's thread pool

#pragma once

#include <surfattn/executor.hpp>

#if EIGEN_VERSION_AT_LEAST(3, 4, 90)
#include <Eigen/ThreadPool>
#else
#define EIGEN_USE_THREADS
#include <unsupported/Eigen/CXX11/ThreadPool>
#endif

namespace surfattn {

/// Runs tasks on a thread pool of the caller's, which must outlive the executor. The thread that
/// calls runs one task itself.
class EigenThreadPoolExecutor final : public Executor {
 public:
  explicit EigenThreadPoolExecutor(Eigen::ThreadPoolInterface& pool) : pool_(pool) {}

  Index concurrency() const override { return pool_.NumThreads() + 1; }

  void run(Index count, Task task) override {
    if (count < 1) return;
    Eigen::Barrier finished(static_cast<unsigned>(count - 1));
    for (Index number = 1; number < count; ++number) {
      pool_.Schedule([&finished, task, number] {
        task(number);
        finished.Notify();
      });
    }
    task(0);
    finished.Wait();
  }

 private:
  Eigen::ThreadPoolInterface& pool_;
};

}  // namespace surfattn
