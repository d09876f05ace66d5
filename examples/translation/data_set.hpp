#pragma once
// Pairs of sentences: read, cut into words, divided into those to learn from and those to judge by.

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <istream>
#include <stdexcept>
#include <string>
#include <vector>

#include "random.hpp"
#include "vocabulary.hpp"

namespace translation {

/// What is wrong with a file of sentence pairs.
class DataError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Words of a sentence and of its translation.
struct WordPair {
  std::vector<std::string> source, target;
};

/// A sentence and its translation as tokens, each cut off at the length that a model reads.
struct Example {
  std::vector<Token> source;  ///< words
  std::vector<Token> input;   ///< start, words
  std::vector<Token> label;   ///< words, stop: at each place the token after that of `input`
};

/// A pair on each line, the sentences separated by a tab; further columns are not read. `file` is
/// the name that errors carry.
inline std::vector<WordPair> read_pairs(std::istream& stream, const std::string& file) {
  std::vector<WordPair> pairs;
  std::string line;
  for (long number = 1; std::getline(stream, line); ++number) {
    const auto fail = [&](const std::string& what) {
      throw DataError(file + ", line " + std::to_string(number) + ": " + what);
    };
    const std::size_t tab = line.find('\t');
    if (tab == std::string::npos)
      fail("found no tab, which separates a sentence from its translation");
    const std::size_t end = line.find('\t', tab + 1);
    WordPair pair{words_of(line.substr(0, tab)), words_of(line.substr(tab + 1, end - tab - 1))};
    if (pair.source.empty()) fail("found no word before the tab");
    if (pair.target.empty()) fail("found no word after the tab");
    pairs.push_back(std::move(pair));
  }
  if (stream.bad()) throw DataError(file + ": cannot be read");
  if (pairs.size() < 2) throw DataError(file + ": holds fewer than two sentence pairs");
  return pairs;
}

inline std::vector<WordPair> read_pairs(const std::string& file) {
  std::ifstream stream(file);
  if (!stream) throw DataError(file + ": no such file, or it cannot be opened");
  return read_pairs(stream, file);
}

/// A sentence as a model reads it: its words and no more than `length` of them.
inline std::vector<Token> source_tokens(const Vocabulary& vocabulary,
                                        const std::vector<std::string>& words, Index length) {
  std::vector<Token> tokens = vocabulary.tokens(words);
  tokens.resize(std::min(tokens.size(), static_cast<std::size_t>(length)));
  return tokens;
}

inline Example example(const Vocabulary& source, const Vocabulary& target, const WordPair& pair,
                       Index length) {
  std::vector<Token> whole = target.tokens(pair.target);
  whole.insert(whole.begin(), start);
  whole.push_back(stop);
  whole.resize(std::min(whole.size(), static_cast<std::size_t>(length) + 1));
  return {source_tokens(source, pair.source, length),
          {whole.begin(), whole.end() - 1},
          {whole.begin() + 1, whole.end()}};
}

struct DataSet {
  Vocabulary source, target;
  std::vector<Example> training, validation;
};

struct DataOptions {
  std::size_t limit = 0;                ///< pairs that are used, drawn by the seed; 0: all
  double validation_share = 0.15;       ///< of the pairs that are used
  std::size_t vocabulary_size = 15000;  ///< tokens of each language at most
  Index length = 10;                    ///< tokens of a sentence at most
  std::uint64_t seed = 1;
};

/// Draws and divides the pairs; the vocabularies are those of the pairs to learn from.
inline DataSet make_data_set(std::vector<WordPair> pairs, const DataOptions& options) {
  Random(options.seed, /*purpose=*/1).shuffle(pairs);
  if (options.limit > 0) pairs.resize(std::min(pairs.size(), options.limit));
  const auto share = static_cast<double>(pairs.size()) * options.validation_share;
  const std::size_t held_out =
      std::clamp<std::size_t>(static_cast<std::size_t>(share), 1, pairs.size() - 1);
  const std::size_t learnt = pairs.size() - held_out;
  std::vector<std::vector<std::string>> sources, targets;
  for (std::size_t i = 0; i < learnt; ++i) {
    sources.push_back(pairs[i].source);
    targets.push_back(pairs[i].target);
  }
  DataSet data{Vocabulary::most_frequent(sources, options.vocabulary_size),
               Vocabulary::most_frequent(targets, options.vocabulary_size),
               {},
               {}};
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    auto& part = i < learnt ? data.training : data.validation;
    part.push_back(example(data.source, data.target, pairs[i], options.length));
  }
  return data;
}

}  // namespace translation
