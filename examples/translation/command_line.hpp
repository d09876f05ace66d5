#pragma once
// The options of the program.

#include <charconv>
#include <cstdio>
#include <functional>
#include <string>
#include <system_error>
#include <vector>

#include "../support/arguments.hpp"
#include "../support/svg_plot.hpp"
#include "settings.hpp"

namespace translation {

using examples::UsageError;

enum class Task { train, translate, plot, benchmark, help };

struct CommandLine {
  Task task = Task::train;
  Settings settings;
  std::string pairs;  ///< empty: those that are built in
  Index epochs = 20;
  std::string checkpoint, resume, log, svg;
  double checkpoint_seconds = 60;
  std::size_t beam = 1;
  bool recompute = false;
  double seconds = 20;
  std::vector<std::string> files;  ///< of --plot
};

namespace command_line_detail {

template <class Number>
Number number_in(const std::string& option, const std::string& text, Number least, Number most) {
  Number number{};
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || rest != end || !(number >= least && number <= most)) {
    const auto words = [](Number n) {
      return std::is_integral_v<Number> ? std::to_string(n)
                                        : examples::svg_detail::number(double(n), "%g");
    };
    throw UsageError(option + " takes a number from " + words(least) + " to " + words(most) +
                     ", not \"" + text + "\"");
  }
  return number;
}

struct Option {
  std::string name, value, help;  ///< no value: a switch
  std::function<void(const std::string&)> set;
};

/// Gives option tables a line for each option.
class Options {
 public:
  explicit Options(CommandLine& line) : line_(line) {
    add_tasks();
    add_training();
    add_model();
  }
  const std::vector<Option>& all() const { return all_; }

 private:
  void add_switch(const char* name, const char* help, std::function<void()> set) {
    all_.push_back({name, "", help, [set](const std::string&) { set(); }});
  }
  void add_text(const char* name, const char* value, const char* help, std::string& to) {
    all_.push_back({name, value, help, [&to](const std::string& text) { to = text; }});
  }
  template <class Number>
  void add_number(const char* name, const char* help, Number& to,
                  std::type_identity_t<Number> least, std::type_identity_t<Number> most) {
    all_.push_back({name, "N", help, [=, &to, option = std::string(name)](const std::string& text) {
                      to = number_in<Number>(option, text, least, most);
                    }});
  }
  /// One of several words.
  template <class Choice>
  void add_choice(const char* name, const char* help, Choice& to,
                  const std::vector<std::pair<std::string, Choice>>& choices) {
    std::string words;
    for (const auto& [word, choice] : choices) words += (words.empty() ? "" : "|") + word;
    all_.push_back({name, words, help, [=, &to, option = std::string(name)](const auto& text) {
                      for (const auto& [word, choice] : choices) {
                        if (word == text) return static_cast<void>(to = choice);
                      }
                      throw UsageError(option + " takes " + words + ", not \"" + text + "\"");
                    }});
  }

  void add_tasks();
  void add_training();
  void add_model();

  CommandLine& line_;
  std::vector<Option> all_;
};

inline void Options::add_tasks() {
  const auto task = [this](Task chosen) { return [this, chosen] { line_.task = chosen; }; };
  all_.push_back({"--translate", "CHECKPOINT", "translates the lines of standard input",
                  [this](const std::string& file) {
                    line_.task = Task::translate;
                    line_.resume = file;
                  }});
  add_number("--beam", "with --translate: how many beginnings are followed, and shown", line_.beam,
             1, 1000);
  add_switch("--recompute", "with --translate: without a cache of keys and values",
             [this] { line_.recompute = true; });
  add_switch("--plot", "LOG.csv ... OUT.svg: draws the logs of training runs, prints a table",
             task(Task::plot));
  add_switch("--benchmark", "times the training steps of both forms by turns",
             task(Task::benchmark));
  add_number("--seconds", "with --benchmark: for how long", line_.seconds, 0.1, 1e4);
  add_switch("--help", "prints this", task(Task::help));
}

inline void Options::add_training() {
  Settings& settings = line_.settings;
  add_text("--pairs", "FILE", "sentence pairs, one a line, separated by a tab", line_.pairs);
  add_choice<Form>("--form", "of attention", settings.form,
                   {{"standard", Form::standard},
                    {"surface", Form::surface},
                    {"merged-init", Form::merged_init}});
  add_number("--epochs", "when to stop", line_.epochs, 1, 1000000);
  add_text("--checkpoint", "FILE", "where the state is saved", line_.checkpoint);
  add_number("--checkpoint-seconds", "how often", line_.checkpoint_seconds, 0.0, 1e9);
  add_text("--resume", "CHECKPOINT", "goes on from there, with its settings", line_.resume);
  add_text("--log", "FILE.csv", "where losses and accuracies are written", line_.log);
  add_text("--svg", "FILE.svg", "where they are drawn", line_.svg);
  add_number("--limit", "sentence pairs that are used, drawn at random; 0: all", settings.limit, 0,
             1000000000);
  add_number("--seed", "of all that is drawn at random", settings.seed, 0, ~std::uint64_t(0));
  add_number("--batch", "sentence pairs of a step", settings.batch, 1, 1000000);
  add_choice<Method>("--optimizer", "how steps are taken", settings.optimizer.method,
                     {{"rmsprop", Method::rmsprop}, {"adam", Method::adam}});
  add_number("--learning-rate", "of either", settings.optimizer.learning_rate, 0.0, 1e3);
  add_number("--clip", "the longest gradient that is not shortened; 0: none is",
             settings.optimizer.clip_norm, 0.0, 1e9);
  add_number("--dropout", "before the output layer", settings.dropout, 0.0, 0.99);
  add_switch("--freeze-attention", "leaves the weights of attention as they are",
             [&] { settings.optimizer.frozen_attention = true; });
  add_switch("--keep-padding", "computes padding as well, as frameworks do",
             [&] { settings.padding = Padding::kept; });
  add_number("--records", "lines of the log for each epoch", settings.records_per_epoch, 1, 1000);
}

inline void Options::add_model() {
  Settings& settings = line_.settings;
  add_number("--width", "of the model", settings.size.width, 1, 100000);
  add_number("--heads", "of each attention layer", settings.size.heads, 1, 1000);
  add_number("--head-width", "of the standard form's heads", settings.size.head_width, 1, 100000);
  add_number("--feed-forward", "width within the feed-forward layers", settings.size.feed_forward,
             1, 1000000);
  all_.push_back(
      {"--vocabulary", "N", "words of each language at most", [&settings](const std::string& text) {
         const auto size = number_in<Index>("--vocabulary", text, 5, 10000000);
         settings.size.source_vocabulary = settings.size.target_vocabulary = size;
       }});
  add_number("--length", "words of a sentence at most", settings.size.length, 1, 10000);
}

}  // namespace command_line_detail

/// A model that suits the sentences that are built in.
inline Settings small_settings() {
  Settings settings;
  settings.size = {.width = 64, .heads = 4, .head_width = 64, .feed_forward = 128};
  settings.dropout = 0.1;
  settings.batch = 16;
  return settings;
}

inline std::string usage() {
  CommandLine line;
  std::string text =
      "Trains a small transformer to translate, in the standard form of attention or in the\n"
      "surface form, and translates with it.\n\nusage: surfattn_translation [OPTION]...\n\n";
  const command_line_detail::Options options(line);
  for (const auto& option : options.all()) {
    std::string head = "  " + option.name + (option.value.empty() ? "" : " " + option.value);
    head.resize(std::max<std::size_t>(head.size() + 2, 30), ' ');
    text += head + option.help + "\n";
  }
  return text +
         "\nWithout --pairs, sentences that are built in are learnt by a small model; with it, "
         "the\n"
         "defaults are the sizes of the Keras example: width 256, 8 heads of 256, 2048, 15000 "
         "words.\n";
}

inline CommandLine parse_command_line(const std::vector<std::string>& words) {
  CommandLine line;
  const bool has_pairs = std::find(words.begin(), words.end(), "--pairs") != words.end();
  const bool is_benchmark = std::find(words.begin(), words.end(), "--benchmark") != words.end();
  if (!has_pairs && !is_benchmark) line.settings = small_settings();
  const command_line_detail::Options options(line);
  for (std::size_t i = 0; i < words.size(); ++i) {
    const auto& all = options.all();
    const auto option = std::find_if(all.begin(), all.end(),
                                     [&](const auto& known) { return known.name == words[i]; });
    if (option == all.end()) {
      if (line.task != Task::plot || words[i].rfind("--", 0) == 0)
        throw UsageError("there is no option \"" + words[i] + "\"");
      line.files.push_back(words[i]);
    } else if (option->value.empty()) {
      option->set("");
    } else {
      if (i + 1 == words.size()) throw UsageError(option->name + " needs a value");
      option->set(words[++i]);
    }
  }
  if (line.task == Task::plot && line.files.size() < 2)
    throw UsageError("--plot takes the log of at least one run and the SVG file to write");
  return line;
}

}  // namespace translation
