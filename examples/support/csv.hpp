#pragma once
// A small reader for comma-separated numbers, used by the examples.
//
// A file holds one record a line, as many fields in each as in the first; the first line may be a
// header (no field of it a number); fields may be quoted. Whatever else it holds is an error that
// names the file, the line and what was found there.

#include <cmath>
#include <cstddef>
#include <fstream>
#include <istream>
#include <locale>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace examples {

/// What is wrong with a file of numbers.
class CsvError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The columns of a file. `names` is as long as `columns`; without a header it holds "column 1" …
struct Table {
  std::vector<std::string> names;
  std::vector<std::vector<double>> columns;

  std::size_t rows() const { return columns.empty() ? 0 : columns.front().size(); }
};

namespace csv_detail {

struct Line {
  std::string file;
  std::size_t number = 0;

  [[noreturn]] void fail(const std::string& what) const {
    throw CsvError(file + ", line " + std::to_string(number) + ": " + what);
  }
};

inline std::string trimmed(const std::string& text) {
  const char* const blanks = " \t\r";
  const std::size_t first = text.find_first_not_of(blanks);
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

/// Cuts a record at the commas outside quotes; "" within quotes stands for one quote.
inline std::vector<std::string> split(const std::string& text, const Line& line) {
  std::vector<std::string> fields(1);
  bool quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const bool doubled = quoted && text[i] == '"' && i + 1 < text.size() && text[i + 1] == '"';
    if (doubled) {
      fields.back() += text[i++];
    } else if (text[i] == '"') {
      quoted = !quoted;
    } else if (text[i] == ',' && !quoted) {
      fields.emplace_back();
    } else {
      fields.back() += text[i];
    }
  }
  if (quoted) line.fail("a quote is opened but not closed");
  for (std::string& field : fields) field = trimmed(field);
  return fields;
}

/// The finite number that a field spells, with a point whatever the user's locale.
inline std::optional<double> number_in(const std::string& field) {
  std::istringstream stream(field);
  stream.imbue(std::locale::classic());
  double value = 0;
  if (!(stream >> value) || stream.peek() != std::istringstream::traits_type::eof()) return {};
  return std::isfinite(value) ? std::optional<double>(value) : std::nullopt;
}

inline bool is_header(const std::vector<std::string>& fields) {
  for (const std::string& field : fields) {
    if (field.empty() || number_in(field)) return false;
  }
  return true;
}

inline Table empty_table(const std::vector<std::string>& first_record) {
  Table table{first_record, std::vector<std::vector<double>>(first_record.size())};
  if (is_header(first_record)) return table;
  for (std::size_t c = 0; c < table.names.size(); ++c) {
    table.names[c] = "column " + std::to_string(c + 1);
  }
  return table;
}

inline void append(Table& table, const std::vector<std::string>& fields, const Line& line) {
  if (fields.size() != table.columns.size()) {
    line.fail("found " + std::to_string(fields.size()) + " fields where the first line has " +
              std::to_string(table.columns.size()));
  }
  for (std::size_t c = 0; c < fields.size(); ++c) {
    const std::optional<double> value = number_in(fields[c]);
    if (!value) {
      const std::string found = fields[c].empty() ? "nothing" : "\"" + fields[c] + "\"";
      line.fail("found " + found + " in field " + std::to_string(c + 1) + " instead of a number");
    }
    table.columns[c].push_back(*value);
  }
}

inline void drop_byte_order_mark(std::string& text) {
  if (text.rfind("\xEF\xBB\xBF", 0) == 0) text.erase(0, 3);
}

}  // namespace csv_detail

/// Reads numbers from a stream; `file` is the name that errors carry. Empty lines may only end it.
inline Table read_csv(std::istream& stream, const std::string& file) {
  csv_detail::Line line{file};
  Table table;
  std::string text;
  std::optional<csv_detail::Line> blank;
  while (std::getline(stream, text)) {
    if (++line.number == 1) csv_detail::drop_byte_order_mark(text);
    if (csv_detail::trimmed(text).empty()) {
      if (!blank) blank = line;
      continue;
    }
    if (blank) blank->fail("found an empty line before the end of the data");
    const std::vector<std::string> fields = csv_detail::split(text, line);
    const bool first = table.columns.empty();
    if (first) table = csv_detail::empty_table(fields);
    if (!first || !csv_detail::is_header(fields)) csv_detail::append(table, fields, line);
  }
  if (stream.bad()) throw CsvError(file + ": cannot be read");
  if (table.rows() == 0) throw CsvError(file + ": holds no numbers");
  return table;
}

/// Reads the numbers of a file.
inline Table read_csv(const std::string& file) {
  std::ifstream stream(file);
  if (!stream) throw CsvError(file + ": no such file, or it cannot be opened");
  return read_csv(stream, file);
}

}  // namespace examples
