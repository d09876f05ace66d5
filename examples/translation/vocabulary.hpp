#pragma once
// The words that a model knows, by number.

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tokenizer.hpp"

namespace translation {

using Token = int;

/// Tokens that are no words.
inline constexpr Token padding = 0, unknown = 1, start = 2, stop = 3;

class Vocabulary {
 public:
  Vocabulary() : Vocabulary(std::vector<std::string>()) {}

  /// Of these words, in this order, after the tokens that are no words.
  explicit Vocabulary(const std::vector<std::string>& words)
      : words_{"[padding]", "[unknown]", "[start]", "[stop]"} {
    for (const std::string& word : words) {
      if (!tokens_.emplace(word, size()).second)
        throw std::runtime_error("a vocabulary holds \"" + word + "\" twice");
      words_.push_back(word);
    }
  }

  /// Of the most frequent words of the sentences, `limit` tokens at most; words of equal frequency
  /// in alphabetical order.
  static Vocabulary most_frequent(const std::vector<std::vector<std::string>>& sentences,
                                  std::size_t limit) {
    std::map<std::string, long> counts;
    for (const auto& sentence : sentences) {
      for (const std::string& word : sentence) ++counts[word];
    }
    std::vector<std::pair<std::string, long>> order(counts.begin(), counts.end());
    std::stable_sort(order.begin(), order.end(),
                     [](const auto& a, const auto& b) { return a.second > b.second; });
    const std::size_t specials = Vocabulary().words_.size();
    order.resize(std::min(order.size(), limit > specials ? limit - specials : 0));
    std::vector<std::string> words;
    for (const auto& [word, count] : order) words.push_back(word);
    return Vocabulary(words);
  }

  Token size() const { return static_cast<Token>(words_.size()); }

  Token token(const std::string& word) const {
    const auto found = tokens_.find(word);
    return found == tokens_.end() ? unknown : found->second;
  }
  std::vector<Token> tokens(const std::vector<std::string>& words) const {
    std::vector<Token> result;
    for (const std::string& word : words) result.push_back(token(word));
    return result;
  }

  /// The words of a translation, without the tokens that begin and end it.
  std::string sentence(const std::vector<Token>& tokens) const {
    std::string text;
    for (const Token token : tokens) {
      if (token == padding || token == start || token == stop) continue;
      if (!text.empty()) text += ' ';
      text += words_.at(static_cast<std::size_t>(token));
    }
    return text;
  }

  /// The words alone, to make the same vocabulary of.
  std::vector<std::string> words() const { return {words_.begin() + stop + 1, words_.end()}; }

 private:
  std::vector<std::string> words_;
  std::unordered_map<std::string, Token> tokens_;
};

}  // namespace translation
