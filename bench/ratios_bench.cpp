// Whether the library keeps its promises of speed: every row is a ratio of two times that were taken by turns in this process,
// beside its target. Results are judged by the reference before anything is timed.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/rows.hpp"

namespace {

using namespace surfattn::bench;

/// Prints the row and returns whether it is at its target.
bool print(const Row& row, const Effort& effort) {
  try {
    const RowResult result = run(row, effort);
    std::printf("%-24s %10.4f %10.4f  %-17s %7.3f [%.3f, %.3f] %s\n", row.name.c_str(),
                1e3 * result.ours, 1e3 * result.other, row.other.c_str(), result.ratio.median,
                result.ratio.low, result.ratio.high, verdict(row, result).c_str());
    std::fflush(stdout);
    return is_met(row, result);
  } catch (const std::exception& error) {
    std::printf("%-24s %s\n", row.name.c_str(), error.what());
    return false;
  }
}

struct Arguments {
  std::vector<std::string> only;
  Effort effort;
  bool list = false, help = false;
};

const char* const usage =
    "Every row: what is timed, its time, the time of what it is compared with (ms), which that "
    "is,\n"
    "the ratio of the second time to the first as the median of all rounds with its quartiles, "
    "the\n"
    "least that it should be, and whether it is. A share of the peak is such a ratio as well: the\n"
    "flops of the call, run as multiply-adds on registers, against the call; half of the unmasked\n"
    "time against the causal one; reading keys and values against the call that decodes.\n\n"
    "usage: ratios_bench [--only=NAMES] [--seconds=S] [--rounds=N] [--list] [--help]\n\n"
    "  --only=NAMES  rows by name, separated by commas; a name also stands for all rows that\n"
    "                begin with it and '-': --only=D, --only=forward-float, --only=B,decode\n"
    "  --seconds=S   time for each row (default 1)\n"
    "  --rounds=N    rounds at the least, whatever they take (default 5)\n"
    "  --list        prints the names of all rows\n\n"
    "The exit code is 0 if all rows that ran are at their targets, else 1; 2 for a mistake.\n";

bool is_wanted(const Arguments& arguments, const std::string& name) {
  for (const std::string& only : arguments.only) {
    if (name == only || name.starts_with(only + "-")) return true;
  }
  return arguments.only.empty();
}

double number(const std::string& text) {
  double value = 0;
  const auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || rest != text.data() + text.size() || !(value >= 0))
    throw std::invalid_argument("\"" + text + "\" is no number of 0 or more");
  return value;
}

std::vector<std::string> separated(std::string names) {
  std::vector<std::string> result;
  for (std::size_t comma; (comma = names.find(',')) != std::string::npos;
       names.erase(0, comma + 1)) {
    result.push_back(names.substr(0, comma));
  }
  result.push_back(names);
  return result;
}

Arguments parse(int count, char** words) {
  Arguments arguments;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i],
                      value = word.substr(std::min(word.find('='), word.size() - 1) + 1);
    if (word.starts_with("--only="))
      arguments.only = separated(value);
    else if (word.starts_with("--seconds="))
      arguments.effort.seconds = number(value);
    else if (word.starts_with("--rounds="))
      arguments.effort.least_rounds = std::max(1, int(number(value)));
    else if (word == "--list")
      arguments.list = true;
    else if (word == "--help")
      arguments.help = true;
    else
      throw std::invalid_argument("there is no option \"" + word + "\"; see --help");
  }
  return arguments;
}

int run_all(const Arguments& arguments) {
  if (arguments.help) return std::printf("%s", usage) < 0;
  std::vector<Row> rows = all_rows();
  std::erase_if(rows, [&](const Row& row) { return !is_wanted(arguments, row.name); });
  if (rows.empty()) throw std::invalid_argument("no row has such a name; see --list");
  if (arguments.list) {
    for (const Row& row : rows) std::printf("%s\n", row.name.c_str());
    return 0;
  }
  bool all_met = true;
  for (const Row& row : rows) all_met = print(row, arguments.effort) && all_met;
  return all_met ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
  try {
    return run_all(parse(count, words));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "ratios_bench: %s\n", error.what());
    return 2;
  }
}
