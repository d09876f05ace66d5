#pragma once
// Sentences cut into words: small letters, no punctuation.

#include <string>
#include <string_view>
#include <vector>

namespace translation {
namespace tokenizer_detail {

inline bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

inline bool is_punctuation(char c) {
  return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') ||
         (c >= '{' && c <= '~');
}

/// How many bytes at the head of `text` are a mark that no word keeps: ASCII punctuation, ¿ or ¡.
inline std::size_t mark_size(std::string_view text) {
  if (is_punctuation(text[0])) return 1;
  const std::string_view pair = text.substr(0, 2);
  return pair == "\xC2\xBF" || pair == "\xC2\xA1" ? 2 : 0;
}

/// The small letter of an ASCII capital, or of the second byte of one of À to Þ in UTF-8.
inline char small(char c, char before) {
  if (c >= 'A' && c <= 'Z') return static_cast<char>(c - 'A' + 'a');
  const auto byte = static_cast<unsigned char>(c);
  const bool is_capital = before == '\xC3' && byte >= 0x80 && byte <= 0x9E && byte != 0x97;
  return is_capital ? static_cast<char>(byte + 0x20) : c;
}

}  // namespace tokenizer_detail

/// The words of a sentence in UTF-8. Marks are dropped, not replaced: "don't" becomes "dont".
inline std::vector<std::string> words_of(std::string_view sentence) {
  using namespace tokenizer_detail;
  std::vector<std::string> words;
  bool in_word = false;
  char before = 0;
  for (std::size_t i = 0; i < sentence.size();) {
    const std::size_t mark = mark_size(sentence.substr(i));
    if (mark > 0) {
      i += mark, before = 0;
      continue;
    }
    const char c = sentence[i++];
    if (is_blank(c)) {
      in_word = false;
    } else {
      if (!in_word) words.emplace_back();
      in_word = true;
      words.back() += small(c, before);
    }
    before = c;
  }
  return words;
}

}  // namespace translation
