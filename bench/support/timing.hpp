// Timing on a machine that others use too: what is compared runs by turns, and medians are compared.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <vector>

namespace surfattn::bench {

using Work = std::function<void()>;

inline double seconds_of(const Work& work, long repeats = 1) {
  const auto start = std::chrono::steady_clock::now();
  for (long i = 0; i < repeats; ++i) work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() /
         double(repeats);
}

struct Quartiles {
  double low = 0, median = 0, high = 0;

  explicit Quartiles(std::vector<double> values) {
    if (values.empty()) return;
    std::sort(values.begin(), values.end());
    const auto at = [&](double share) {
      return values[static_cast<std::size_t>(std::lround(share * double(values.size() - 1)))];
    };
    low = at(0.25), median = at(0.5), high = at(0.75);
  }
};

struct Effort {
  double seconds = 1;    ///< for one comparison, once every work has run `least_rounds` times
  int least_rounds = 5;  ///< however long they take
  double shortest_sample = 5e-4;  ///< seconds; what is shorter is repeated within one sample
};

/// Seconds of one run of each work, in every round: round r ran them all once, forwards or backwards
/// by turns, so that drift and neighbours meet all alike. Every work has run once before.
inline std::vector<std::vector<double>> run_by_turns(const std::vector<Work>& works,
                                                     const Effort& effort) {
  std::vector<long> repeats;
  for (const Work& work : works) {
    work();
    repeats.push_back(1 + long(effort.shortest_sample / (seconds_of(work) + 1e-9)));
  }
  std::vector<std::vector<double>> rounds;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  while (int(rounds.size()) < effort.least_rounds || elapsed() < effort.seconds) {
    std::vector<double>& round = rounds.emplace_back(works.size());
    for (std::size_t turn = 0; turn < works.size(); ++turn) {
      const std::size_t i = rounds.size() % 2 ? turn : works.size() - 1 - turn;
      round[i] = seconds_of(works[i], repeats[i]);
    }
  }
  return rounds;
}

/// Of every round, the time of work `other` as a multiple of the time of work `ours`.
inline Quartiles ratios(const std::vector<std::vector<double>>& rounds, std::size_t other,
                        std::size_t ours) {
  std::vector<double> values;
  for (const auto& round : rounds) values.push_back(round[other] / round[ours]);
  return Quartiles(std::move(values));
}

inline double median_seconds(const std::vector<std::vector<double>>& rounds, std::size_t work) {
  std::vector<double> values;
  for (const auto& round : rounds) values.push_back(round[work]);
  return Quartiles(std::move(values)).median;
}

}  // namespace surfattn::bench
