#pragma once
// The command line of the examples that draw, and of those that take a series: options, --help, exit
// codes.

#include <charconv>
#include <cstddef>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <system_error>

namespace examples {

struct Program {
  std::string name, purpose;
  std::string default_series;  // in words; empty: the program takes no series
  std::string default_svg;

  bool takes_series() const { return !default_series.empty(); }
};

struct Arguments {
  std::string csv;         // empty: the default series
  std::size_t column = 0;  // from 1; 0: the last
  std::string svg;
  bool help = false;
};

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string usage(const Program& program) {
  const std::string series =
      "  --csv FILE    a series of your own: comma-separated numbers, with a header line or none\n"
      "                (default: " +
      program.default_series +
      ")\n"
      "  --column N    the column of that file that holds the series, the first being 1\n"
      "                (default: the last)\n";
  return program.purpose + "\n\nusage: " + program.name +
         (program.takes_series() ? " [--csv FILE] [--column N]" : "") +
         " [--svg FILE] [--help]\n\n" + (program.takes_series() ? series : "") +
         "  --svg FILE    where the plot is written (default: " + program.default_svg +
         ")\n"
         "  --help        prints this\n";
}

inline std::size_t parse_column(const std::string& text) {
  std::size_t column = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, column);
  if (error != std::errc() || rest != end || column == 0) {
    throw UsageError("--column takes a whole number from 1, not \"" + text + "\"");
  }
  return column;
}

inline Arguments parse_arguments(const Program& program, int count, char** words) {
  Arguments arguments;
  arguments.svg = program.default_svg;
  for (int i = 1; i < count; ++i) {
    const std::string option = words[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == count) throw UsageError(option + " needs a value");
      return words[++i];
    };
    if (option == "--help" || option == "-h")
      arguments.help = true;
    else if (option == "--csv" && program.takes_series())
      arguments.csv = value();
    else if (option == "--svg")
      arguments.svg = value();
    else if (option == "--column" && program.takes_series())
      arguments.column = parse_column(value());
    else
      throw UsageError("there is no option \"" + option + "\"");
  }
  if (arguments.column != 0 && arguments.csv.empty()) throw UsageError("--column needs --csv");
  return arguments;
}

/// Runs `run(arguments)`. Returns main's exit code: 2 for a wrong command line, 1 for any other
/// failure, such as bad data; both are explained on standard error.
template <class Run>
int run_example(const Program& program, int count, char** words, const Run& run) {
  try {
    const Arguments arguments = parse_arguments(program, count, words);
    if (arguments.help) {
      std::printf("%s", usage(program).c_str());
    } else {
      run(arguments);
    }
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "%s: %s\n\n%s", program.name.c_str(), error.what(),
                 usage(program).c_str());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", program.name.c_str(), error.what());
    return 1;
  }
}

}  // namespace examples
