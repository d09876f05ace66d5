// Rows of promises of speed: two times that were taken by turns, and what their ratio should be.
#pragma once

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "timing.hpp"

namespace surfattn::bench {

/// What one row times. `scale` · (time of other) stands against the time of ours.
struct Comparison {
  Work ours, other;
  double scale = 1;
};

struct Row {
  std::string name;
  std::string other;  ///< what it is compared with, in words
  double target = 0;  ///< for scale·other/ours, at least; 0 for none
  std::function<Comparison()> make;
};

/// Every row, in the order of the report.
std::vector<Row> all_rows();

struct RowResult {
  double ours, other;  ///< seconds, medians; the latter scaled
  Quartiles ratio;
};

inline RowResult run(const Row& row, const Effort& effort) {
  const Comparison comparison = row.make();
  const auto rounds = run_by_turns({comparison.ours, comparison.other}, effort);
  Quartiles ratio = ratios(rounds, 1, 0);
  for (double* value : {&ratio.low, &ratio.median, &ratio.high}) *value *= comparison.scale;
  return {median_seconds(rounds, 0), comparison.scale * median_seconds(rounds, 1), ratio};
}

inline bool is_met(const Row& row, const RowResult& result) {
  return result.ratio.median >= row.target;
}

inline std::string verdict(const Row& row, const RowResult& result) {
  if (row.target == 0) return "";
  char words[32];
  std::snprintf(words, sizeof words, "%.2f %s", row.target, is_met(row, result) ? "ok" : "SHORT");
  return words;
}

}  // namespace surfattn::bench
