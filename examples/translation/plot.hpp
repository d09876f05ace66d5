#pragma once
// Loss and accuracy of two runs, against epochs and against seconds.

#include <algorithm>
#include <string>
#include <vector>

#include "../support/svg_plot.hpp"
#include "history.hpp"

namespace translation {

struct Run {
  std::string label;
  std::vector<Record> history;
};

namespace plot_detail {

struct Quantity {
  const char* title;
  const char* name;
  double Record::*validation;
  double Record::*training;
};

inline constexpr Quantity loss{"Loss", "loss (nats a token)", &Record::validation_loss,
                               &Record::training_loss};
inline constexpr Quantity accuracy{"Accuracy", "accuracy of the next token",
                                   &Record::validation_accuracy, &Record::training_accuracy};

inline std::vector<double> column(const std::vector<Record>& history, double Record::*number) {
  std::vector<double> values;
  for (const Record& record : history) values.push_back(record.*number);
  return values;
}

inline examples::Axis axis_around(const std::string& label,
                                  const std::vector<examples::Curve>& curves,
                                  std::vector<double> examples::Curve::*numbers) {
  double low = 1e300, high = -1e300;
  for (const examples::Curve& curve : curves) {
    for (const double value : curve.*numbers)
      low = std::min(low, value), high = std::max(high, value);
  }
  const double margin = high > low ? 0.04 * (high - low) : 0.5;
  return {label, low - margin, high + margin};
}

inline examples::Panel panel(const std::vector<Run>& runs, const Quantity& quantity,
                             double Record::*against, const std::string& x_label) {
  const std::string colours[] = {examples::colour::blue, examples::colour::vermilion,
                                 examples::colour::green, examples::colour::purple};
  examples::Panel panel;
  panel.title = quantity.title;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const auto add = [&](const std::string& label, double Record::*number, const char* dash) {
      panel.curves.push_back({label, colours[i % 4], column(runs[i].history, against),
                              column(runs[i].history, number), 1.8, dash});
    };
    add(runs[i].label, quantity.validation, "");
    add("", quantity.training, "5 4");
  }
  panel.x = axis_around(x_label, panel.curves, &examples::Curve::x);
  panel.y = axis_around(quantity.name, panel.curves, &examples::Curve::y);
  panel.height = 220;
  return panel;
}

}  // namespace plot_detail

/// Writes the figure of these runs.
inline void plot_runs(const std::vector<Run>& runs, const std::string& file) {
  using namespace plot_detail;
  const std::string seconds = "seconds of one core", epochs = "epochs";
  examples::write_svg(
      file, "English to Spanish: attention in two forms",
      "Solid: validation, without dropout. Dashed: training, with dropout, as it went along.",
      {panel(runs, loss, &Record::epoch, epochs), panel(runs, loss, &Record::seconds, seconds),
       panel(runs, accuracy, &Record::epoch, epochs),
       panel(runs, accuracy, &Record::seconds, seconds)});
}

/// A table in Markdown: a line for each epoch that all of these runs have ended.
inline std::string table_of(const std::vector<Run>& runs) {
  std::string text = "| epoch |", rule = "\n|---|";
  for (const Run& run : runs) {
    text += " " + run.label + ": validation loss | accuracy | seconds |";
    rule += "---|---|---|";
  }
  text += rule;
  for (double epoch = 1;; ++epoch) {
    std::string line = "\n| " + examples::svg_detail::number(epoch, "%.0f") + " |";
    for (const Run& run : runs) {
      const auto record = std::find_if(run.history.begin(), run.history.end(),
                                       [&](const Record& r) { return r.epoch == epoch; });
      if (record == run.history.end()) return text + "\n";
      const auto add = [&](double number, const char* format) {
        line += " " + examples::svg_detail::number(number, format) + " |";
      };
      add(record->validation_loss, "%.3f");
      add(record->validation_accuracy, "%.3f");
      add(record->seconds, "%.0f");
    }
    text += line;
  }
}

}  // namespace translation
