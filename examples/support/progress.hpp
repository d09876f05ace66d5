#pragma once
// A percentage on standard error for work that takes seconds; silent where it takes less.

#include <chrono>
#include <cstdio>
#include <string>
#include <utility>

namespace examples {

class Progress {
 public:
  Progress(std::string task, double total) : task_(std::move(task)), total_(total) {}
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress() {
    if (shown_) std::fprintf(stderr, "\r%*s\r", static_cast<int>(task_.size()) + 8, "");
  }

  /// Counts a piece of work, in the unit of the total, as done.
  void add(double amount) {
    done_ += amount;
    const Clock::time_point now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(500)) return;
    last_ = now;
    shown_ = true;
    std::fprintf(stderr, "\r%s: %3.0f %%", task_.c_str(), 100 * done_ / total_);
    std::fflush(stderr);
  }

 private:
  using Clock = std::chrono::steady_clock;
  std::string task_;
  double total_, done_ = 0;
  Clock::time_point last_ = Clock::now();
  bool shown_ = false;
};

}  // namespace examples
