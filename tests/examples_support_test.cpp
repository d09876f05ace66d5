// The reader of comma-separated numbers that the examples share.

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "../examples/support/csv.hpp"
#include "support/catch.hpp"

namespace {

examples::Table parse(const std::string& text) {
  std::istringstream stream(text);
  return examples::read_csv(stream, "input.csv");
}

/// The message with which the text is refused; empty when it is read.
std::string complaint(const std::string& text) {
  try {
    parse(text);
    return "";
  } catch (const examples::CsvError& error) {
    return error.what();
  }
}

/// A file of this text, removed when the test ends.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& text)
      : path_(std::filesystem::temp_directory_path() / "surfattn_examples_support_test.csv") {
    std::ofstream(path_, std::ios::binary) << text;
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() { std::filesystem::remove(path_); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

using Column = std::vector<double>;

}  // namespace

TEST_CASE("numbers are read column by column", "[csv]") {
  SECTION("with a quoted header") {
    const examples::Table table = parse("\"YEAR\",\"SUN, SPOTS\"\n1700,5\n1701,-11.5\n");
    CHECK(table.names == std::vector<std::string>{"YEAR", "SUN, SPOTS"});
    REQUIRE(table.columns.size() == 2);
    CHECK(table.columns[0] == Column{1700, 1701});
    CHECK(table.columns[1] == Column{5, -11.5});
    CHECK(table.rows() == 2);
  }
  SECTION("without a header") {
    const examples::Table table = parse("1,2e3\n");
    CHECK(table.names == std::vector<std::string>{"column 1", "column 2"});
    CHECK(table.columns[1] == Column{2000});
  }
  SECTION("with carriage returns, blanks, quotes, a byte order mark and a missing last newline") {
    const examples::Table table = parse("\xEF\xBB\xBF 1 ,\"2\"\r\n+3,\t.5");
    REQUIRE(table.columns.size() == 2);
    CHECK(table.columns[0] == Column{1, 3});
    CHECK(table.columns[1] == Column{2, 0.5});
  }
  SECTION("with empty lines at the end") { CHECK(parse("1\n2\n\n\r\n").rows() == 2); }
  SECTION("with doubled quotes in the header") {
    CHECK(parse("\"the \"\"sun\"\"\"\n1\n").names.front() == "the \"sun\"");
  }
}

TEST_CASE("a file on disk is read", "[csv]") {
  const TemporaryFile file("a,b\n1,2\n3,4\n");
  CHECK(examples::read_csv(file.path()).columns[1] == Column{2, 4});
}

TEST_CASE("a missing file is refused by its name", "[csv]") {
  const std::string missing = "no_such_directory/no_such_file.csv";
  CHECK_THROWS_WITH(examples::read_csv(missing),
                    missing + ": no such file, or it cannot be opened");
}

TEST_CASE("a directory is refused", "[csv]") {
  const std::string directory = std::filesystem::temp_directory_path().string();
  CHECK_THROWS_AS(examples::read_csv(directory), examples::CsvError);
}

TEST_CASE("a file without numbers is refused", "[csv]") {
  CHECK(complaint("") == "input.csv: holds no numbers");
  CHECK(complaint("\n\n") == "input.csv: holds no numbers");
  CHECK(complaint("year,number\n") == "input.csv: holds no numbers");
}

TEST_CASE("ragged lines are refused by line and by count", "[csv]") {
  CHECK(complaint("a,b\n1,2\n3\n") ==
        "input.csv, line 3: found 1 fields where the first line has 2");
  CHECK(complaint("1,2\n3,4,5\n") ==
        "input.csv, line 2: found 3 fields where the first line has 2");
  CHECK(complaint("1,2\n\n3,4\n") ==
        "input.csv, line 2: found an empty line before the end of the data");
}

TEST_CASE("what is not a number is refused by line and by field", "[csv]") {
  const auto found = [](const std::string& what) {
    return "input.csv, line 2: found " + what + " in field 2 instead of a number";
  };
  CHECK(complaint("1,2\n3,spots\n") == found("\"spots\""));
  CHECK(complaint("1,2\n3,4x\n") == found("\"4x\""));
  CHECK(complaint("1,2\n3,4 5\n") == found("\"4 5\""));
  CHECK(complaint("1,2\n3,\n") == found("nothing"));
  CHECK(complaint("1,2\n3,nan\n") == found("\"nan\""));
  CHECK(complaint("1,2\n3,inf\n") == found("\"inf\""));
  CHECK(complaint("1,2\n3,1e999\n") == found("\"1e999\""));
  CHECK(complaint("1,2\n3,--4\n") == found("\"--4\""));
}

TEST_CASE("a second line of words is refused, and a first line of words and numbers", "[csv]") {
  CHECK(complaint("a,b\nc,d\n1,2\n") ==
        "input.csv, line 2: found \"c\" in field 1 instead of a number");
  CHECK(complaint("1700,spots\n1,2\n") ==
        "input.csv, line 1: found \"spots\" in field 2 instead of a number");
}

TEST_CASE("an open quote is refused", "[csv]") {
  CHECK(complaint("\"a,b\n1,2\n") == "input.csv, line 1: a quote is opened but not closed");
}
