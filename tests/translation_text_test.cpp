// Words, vocabularies, files and options of examples/translation.

#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "../examples/translation/built_in_pairs.hpp"
#include "../examples/translation/command_line.hpp"
#include "../examples/translation/plot.hpp"
#include "support/catch.hpp"

namespace {

using namespace translation;
using surfattn::test::contains_text;
using Words = std::vector<std::string>;

std::vector<WordPair> parse(const std::string& text) {
  std::istringstream stream(text);
  return read_pairs(stream, "pairs.txt");
}

std::string complaint(const std::string& text) {
  try {
    parse(text);
    return "";
  } catch (const DataError& error) {
    return error.what();
  }
}

}  // namespace

TEST_CASE("sentences become words in small letters without marks", "[translation]") {
  CHECK(words_of("Go.") == Words{"go"});
  CHECK(words_of("  I don't\tknow, Tom! \r") == Words{"i", "dont", "know", "tom"});
  CHECK(words_of("¿Dónde está Ángel?") == Words{"dónde", "está", "ángel"});
  CHECK(words_of("¡ÑAME × 3!") == Words{"ñame", "×", "3"});
  CHECK(words_of("... ?").empty());
  CHECK(words_of("").empty());
}

TEST_CASE("a vocabulary holds the most frequent words", "[translation]") {
  const std::vector<Words> sentences{{"b", "a", "c"}, {"c", "b"}, {"c", "d"}};
  const Vocabulary vocabulary = Vocabulary::most_frequent(sentences, 7);
  CHECK(vocabulary.size() == 7);
  CHECK(vocabulary.words() == Words{"c", "b", "a"});
  CHECK(vocabulary.tokens({"c", "d", "a"}) == std::vector<Token>{4, unknown, 6});
  CHECK(vocabulary.sentence({start, 4, 6, unknown, stop}) == "c a [unknown]");
  CHECK(Vocabulary::most_frequent(sentences, 2).size() == 4);
  CHECK_THROWS_WITH(Vocabulary({"a", "a"}), contains_text("\"a\" twice"));
}

TEST_CASE("files of pairs are read, and what is wrong with them is said", "[translation]") {
  const auto pairs = parse("Go.\tVe.\nHi there.\t¡Hola!\tCC-BY 2.0 (France)\n");
  REQUIRE(pairs.size() == 2);
  CHECK(pairs[1].source == Words{"hi", "there"});
  CHECK(pairs[1].target == Words{"hola"});
  CHECK(complaint("Go.\tVe.\nHi.\n") ==
        "pairs.txt, line 2: found no tab, which separates a sentence from its translation");
  CHECK(complaint("...\tVe.\n") == "pairs.txt, line 1: found no word before the tab");
  CHECK(complaint("Go.\t!\tx\n") == "pairs.txt, line 1: found no word after the tab");
  CHECK(complaint("Go.\tVe.\n") == "pairs.txt: holds fewer than two sentence pairs");
  CHECK_THROWS_WITH(read_pairs("/nonexistent/pairs.txt"), contains_text("no such file"));
}

TEST_CASE("a pair becomes an input and, one place later, labels", "[translation]") {
  const Vocabulary source({"a", "b", "c"}), target({"x", "y", "z"});
  const WordPair pair{{"a", "b", "c"}, {"x", "y"}};
  const Example whole = example(source, target, pair, 5);
  CHECK(whole.source == std::vector<Token>{4, 5, 6});
  CHECK(whole.input == std::vector<Token>{start, 4, 5});
  CHECK(whole.label == std::vector<Token>{4, 5, stop});
  const Example cut = example(source, target, pair, 2);
  CHECK(cut.source == std::vector<Token>{4, 5});
  CHECK(cut.input == std::vector<Token>{start, 4});
  CHECK(cut.label == std::vector<Token>{4, 5});
}

TEST_CASE("batches hold a token in each row", "[translation]") {
  const Example one{{4, 5}, {start, 6}, {6, stop}}, other{{7}, {start, 4, 5}, {4, 5, stop}};
  const Batch dropped = make_batch({&one, &other}, Padding::dropped, 3);
  CHECK(dropped.source.tokens == std::vector<Token>{4, 5, 7});
  CHECK(dropped.source.positions == std::vector<Index>{0, 1, 0});
  CHECK(dropped.source.offsets == std::vector<int>{0, 2, 3});
  CHECK(dropped.labelled == std::vector<Index>{0, 1, 2, 3, 4});
  const Batch kept = make_batch({&one, &other}, Padding::kept, 3);
  CHECK(kept.source.tokens == std::vector<Token>{4, 5, padding, 7, padding, padding});
  CHECK(kept.source.offsets == std::vector<int>{0, 3, 6});
  CHECK(kept.source.lengths == std::vector<int>{2, 1});
  CHECK(kept.labelled == std::vector<Index>{0, 1, 3, 4, 5});
  CHECK(kept.labels == dropped.labels);
}

TEST_CASE("pairs are divided, and the vocabulary is that of those to learn from", "[translation]") {
  std::vector<WordPair> pairs;
  for (int i = 0; i < 40; ++i) pairs.push_back({{"w" + std::to_string(i)}, {"t"}});
  const DataSet data = make_data_set(pairs, {.limit = 20, .validation_share = 0.25});
  CHECK(data.training.size() == 15);
  CHECK(data.validation.size() == 5);
  CHECK(data.source.size() == 4 + 15);
  std::set<Token> learnt;
  for (const Example& example : data.training) learnt.insert(example.source.at(0));
  CHECK(learnt.size() == 15);
  CHECK(learnt.count(unknown) == 0);
  for (const Example& example : data.validation)
    CHECK(example.source == std::vector<Token>{unknown});
  CHECK(make_data_set(pairs, {.limit = 20, .seed = 2}).source.words() != data.source.words());
}

TEST_CASE("the pairs that are built in are all different", "[translation]") {
  const auto pairs = built_in_pairs();
  CHECK(pairs.size() == 504);
  std::set<Words> sources;
  for (const WordPair& pair : pairs) sources.insert(pair.source);
  CHECK(sources.size() == pairs.size());
  const auto has = [&](const Words& source, const Words& target) {
    return std::any_of(pairs.begin(), pairs.end(), [&](const WordPair& pair) {
      return pair.source == source && pair.target == target;
    });
  };
  CHECK(has(words_of("She does not look for two white chairs."),
            words_of("Ella no busca dos sillas blancas.")));
  CHECK(has(words_of("We find the red house."), words_of("Encontramos la casa roja.")));
}

TEST_CASE("logs of runs are read as they were written", "[translation]") {
  const auto file = std::filesystem::temp_directory_path() / "surfattn_translation_text_test.csv";
  const std::vector<Record> history{{0.5, 10, 1.25, 5.5, 0.1, 5.25, 0.125},
                                    {1, 20, 2.5, 4.75, 0.2, 4.5, 0.25}};
  write_history(file.string(), history);
  const auto read = read_history(file.string());
  CHECK(to_csv(read) == to_csv(history));
  CHECK(read[1].validation_accuracy == 0.25);
  std::ofstream(file) << "year,sunspots\n1700,5\n";
  CHECK_THROWS_WITH(read_history(file.string()), contains_text("is no record of a training run"));
  const auto svg = std::filesystem::temp_directory_path() / "surfattn_translation_text_test.svg";
  plot_runs({{"standard", history}, {"surface", history}}, svg.string());
  std::ifstream stream(svg);
  const std::string text{std::istreambuf_iterator<char>(stream), {}};
  CHECK_THAT(text, contains_text(">surface<"));
  CHECK_THAT(text, contains_text("seconds of one core"));
  CHECK(text.find("nan") == std::string::npos);
  CHECK(table_of({{"one", history}, {"other", history}}) ==
        "| epoch | one: validation loss | accuracy | seconds | other: validation loss | accuracy | "
        "seconds |\n|---|---|---|---|---|---|---|\n"
        "| 1 | 4.500 | 0.250 | 2 | 4.500 | 0.250 | 2 |\n");
  std::filesystem::remove(file);
  std::filesystem::remove(svg);
}

TEST_CASE("options are read", "[translation]") {
  const CommandLine built_in = parse_command_line({});
  CHECK(built_in.task == Task::train);
  CHECK(built_in.settings.size.width == 64);
  const CommandLine line = parse_command_line(
      {"--pairs", "spa.txt", "--form", "merged-init", "--optimizer", "adam", "--learning-rate",
       "3e-4", "--clip", "1", "--epochs", "7", "--keep-padding", "--vocabulary", "500"});
  CHECK(line.pairs == "spa.txt");
  CHECK(line.settings.size.width == 256);
  CHECK(line.settings.size.source_vocabulary == 500);
  CHECK(line.settings.form == Form::merged_init);
  CHECK(line.settings.optimizer.method == Method::adam);
  CHECK(line.settings.optimizer.learning_rate == 3e-4);
  CHECK(line.settings.optimizer.clip_norm == 1);
  CHECK(line.epochs == 7);
  CHECK(line.settings.padding == Padding::kept);
  const CommandLine plot = parse_command_line({"--plot", "a.csv", "b.csv", "c.svg"});
  CHECK(plot.files == Words{"a.csv", "b.csv", "c.svg"});
  CHECK(parse_command_line({"--translate", "x", "--beam", "3"}).beam == 3);
}

TEST_CASE("options that make no sense are refused", "[translation]") {
  const auto complain = [](const Words& words, const std::string& what) {
    CHECK_THROWS_WITH(parse_command_line(words), contains_text(what));
  };
  complain({"--fast"}, "there is no option \"--fast\"");
  complain({"a.csv"}, "there is no option \"a.csv\"");
  complain({"--epochs"}, "--epochs needs a value");
  complain({"--epochs", "0"}, "--epochs takes a number from 1 to 1000000, not \"0\"");
  complain({"--epochs", "2x"}, "not \"2x\"");
  complain({"--dropout", "1"}, "--dropout takes a number from 0 to 0.99, not \"1\"");
  complain({"--form", "new"}, "--form takes standard|surface|merged-init, not \"new\"");
  complain({"--plot", "a.svg"}, "--plot takes the log");
  CHECK_THAT(usage(), contains_text("--form standard|surface|merged-init"));
}
