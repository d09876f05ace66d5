// surfattn layer 5: an executor on OpenMP

#pragma once

#include <surfattn/executor.hpp>

#ifndef _OPENMP
#error \
    "surfattn/executors/openmp.hpp needs OpenMP: compile and link with -fopenmp (CMake: OpenMP::OpenMP_CXX)"
#endif
#include <omp.h>

namespace surfattn {

/// Runs tasks in an OpenMP parallel region of `threads` threads, by default omp_get_max_threads().
class OpenMpExecutor final : public Executor {
 public:
  explicit OpenMpExecutor(Index threads = omp_get_max_threads())
      : threads_(static_cast<int>(threads)) {}

  Index concurrency() const override { return threads_; }

  void run(Index count, Task task) override {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_)
    for (Index number = 0; number < count; ++number) task(number);
  }

 private:
  int threads_;
};

}  // namespace surfattn
