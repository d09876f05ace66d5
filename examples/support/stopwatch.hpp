#pragma once
// Times of functions that compete with each other.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <functional>
#include <vector>

namespace examples {

inline double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// Median microseconds of each function; they take turns, so that drift meets all alike. At most
/// 301 rounds; after `patience` no more than are needed for five.
inline std::vector<double> median_times(const std::vector<std::function<void()>>& functions,
                                        std::chrono::seconds patience = std::chrono::seconds(2)) {
  using Clock = std::chrono::steady_clock;
  using Microseconds = std::chrono::duration<double, std::micro>;
  std::vector<std::vector<double>> times(functions.size());
  const Clock::time_point start = Clock::now();
  for (int round = 0; round < 301; ++round) {
    if (round >= 5 && Clock::now() - start > patience) break;
    for (std::size_t f = 0; f < functions.size(); ++f) {
      const Clock::time_point before = Clock::now();
      functions[f]();
      times[f].push_back(Microseconds(Clock::now() - before).count());
    }
  }
  std::vector<double> medians;
  for (const std::vector<double>& t : times) medians.push_back(median(t));
  return medians;
}

}  // namespace examples
