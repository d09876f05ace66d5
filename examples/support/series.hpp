#pragma once
// A series of numbers from a file, cut into the periods that an example chooses and judges by.

#include <Eigen/Core>
#include <cstddef>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "csv.hpp"

namespace examples {

struct Period {
  std::string label;
  Eigen::Index begin, end;  // of the series, `end` excluded
};

struct Series {
  std::string title, unit, time_unit;
  Eigen::VectorXd times, values;
  std::vector<Period> periods;  // the first one is for choosing
  double reference_variance;    // relative variances are multiples of this
};

inline Eigen::VectorXd to_vector(const std::vector<double>& values) {
  return Eigen::Map<const Eigen::VectorXd>(values.data(), static_cast<Eigen::Index>(values.size()));
}

inline double variance(const Eigen::VectorXd& values) {
  return (values.array() - values.mean()).square().mean();
}

/// The first 70 %, the next 15 % and the rest.
inline std::vector<Period> split(Eigen::Index size) {
  const Eigen::Index first = size * 70 / 100, second = size * 85 / 100;
  return {{"first 70 %", 0, first}, {"next 15 %", first, second}, {"last 15 %", second, size}};
}

/// Reads one column, counted from 1 (0: the last one); it must hold `smallest` values or more.
inline Series read_series(const std::string& file, std::size_t column, Eigen::Index smallest) {
  const Table table = read_csv(file);
  const std::size_t count = table.columns.size(), chosen = (column == 0 ? count : column) - 1;
  if (column > count) {
    throw CsvError(file + ": there is no column " + std::to_string(column) + ", the last is " +
                   std::to_string(count));
  }
  const Eigen::VectorXd values = to_vector(table.columns[chosen]);
  if (values.size() < smallest) {
    throw CsvError(file + ": holds " + std::to_string(values.size()) + " values where at least " +
                   std::to_string(smallest) + " are needed");
  }
  const std::vector<Period> periods = split(values.size());
  if (!(variance(values.head(periods[0].end)) > 0)) {
    throw CsvError(file + ": " + table.names[chosen] + " is constant over its first 70 %");
  }
  const double last = static_cast<double>(values.size());
  return {table.names[chosen] + " of " + std::filesystem::path(file).filename().string(),
          table.names[chosen],
          "row",
          Eigen::VectorXd::LinSpaced(values.size(), 1, last),
          values,
          periods,
          variance(values)};
}

}  // namespace examples
