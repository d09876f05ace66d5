#pragma once
// The record of a run, kept as a table of comma-separated numbers.

#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../support/csv.hpp"

namespace translation {

/// What was measured once, usually at the end of an epoch. Losses are means over tokens, with
/// dropout in training and without it in validation.
struct Record {
  double epoch = 0;    ///< epochs done
  double steps = 0;    ///< batches learnt from
  double seconds = 0;  ///< of processor time spent on these steps, without validation
  double training_loss = 0, training_accuracy = 0;
  double validation_loss = 0, validation_accuracy = 0;
};

inline constexpr const char* record_names =
    "epoch,steps,seconds,training_loss,training_accuracy,validation_loss,validation_accuracy";

/// Calls visit(number...) for each number of these records.
template <class Visit, class... Records>
void visit_record(const Visit& visit, Records&... records) {
  visit(records.epoch...);
  visit(records.steps...);
  visit(records.seconds...);
  visit(records.training_loss...);
  visit(records.training_accuracy...);
  visit(records.validation_loss...);
  visit(records.validation_accuracy...);
}

inline std::string to_csv(const std::vector<Record>& history) {
  std::string text = std::string(record_names) + "\n";
  for (const Record& record : history) {
    std::string line;
    visit_record(
        [&](double number) {
          char digits[32];
          std::snprintf(digits, sizeof digits, "%.9g", number);
          line += (line.empty() ? "" : ",") + std::string(digits);
        },
        record);
    text += line + "\n";
  }
  return text;
}

inline void write_history(const std::string& file, const std::vector<Record>& history) {
  std::ofstream stream(file, std::ios::binary);
  stream << to_csv(history) << std::flush;
  if (!stream) throw std::runtime_error(file + ": cannot be written");
}

inline std::vector<Record> read_history(const std::string& file) {
  const examples::Table table = examples::read_csv(file);
  std::string names;
  for (const std::string& name : table.names) names += (names.empty() ? "" : ",") + name;
  if (names != record_names)
    throw examples::CsvError(file + ": is no record of a training run: its columns are " + names +
                             " instead of " + record_names);
  std::vector<Record> history(table.rows());
  for (std::size_t row = 0; row < history.size(); ++row) {
    std::size_t column = 0;
    visit_record([&](double& number) { number = table.columns[column++][row]; }, history[row]);
  }
  return history;
}

}  // namespace translation
