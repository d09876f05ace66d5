// surfattn layer 5: an executor on a pool of std::thread

#pragma once

#include <condition_variable>
#include <mutex>
#include <surfattn/executor.hpp>
#include <thread>
#include <vector>

namespace surfattn {

/// A fixed number of threads that wait for tasks; the thread that calls takes part. Calls from
/// several threads run one after the other.
///
///     surfattn::ThreadPool pool(4);
///     auto out = surfattn::attention(q, k, v, {.executor = &pool});
class ThreadPool final : public Executor {
 public:
  /// `threads` in all, with the calling one; by default as many as the machine runs at once.
  explicit ThreadPool(Index threads = static_cast<Index>(std::thread::hardware_concurrency())) {
    for (Index i = 1; i < threads; ++i) threads_.emplace_back([this] { wait_for_work(); });
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  ~ThreadPool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  Index concurrency() const override { return static_cast<Index>(threads_.size()) + 1; }

  void run(Index count, Task task) override {
    const std::lock_guard one_call_at_a_time(calls_);
    {
      const std::lock_guard lock(mutex_);
      task_ = &task;
      next_ = 0;
      count_ = count;
      unfinished_ = count;
    }
    work_.notify_all();
    std::unique_lock lock(mutex_);
    run_tasks(lock);
    done_.wait(lock, [this] { return unfinished_ == 0; });
    task_ = nullptr;
  }

 private:
  void wait_for_work() {
    std::unique_lock lock(mutex_);
    while (true) {
      work_.wait(lock, [this] { return stopping_ || (task_ && next_ < count_); });
      if (stopping_) return;
      run_tasks(lock);
    }
  }

  /// Takes tasks until none is left; the lock is open while one runs.
  void run_tasks(std::unique_lock<std::mutex>& lock) {
    while (next_ < count_) {
      const Index number = next_++;
      const Task task = *task_;
      lock.unlock();
      task(number);
      lock.lock();
      if (--unfinished_ == 0) done_.notify_all();
    }
  }

  std::mutex calls_;
  std::mutex mutex_;
  std::condition_variable work_, done_;
  const Task* task_ = nullptr;
  Index next_ = 0, count_ = 0, unfinished_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace surfattn
