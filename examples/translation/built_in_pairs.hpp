#pragma once
// Sentence pairs for a program that is given no file: all combinations of few subjects, verbs and
// objects, affirmed and denied. Verbs agree with subjects, articles and adjectives with nouns; held
// out sentences can be translated right by whoever has learnt that from the others.

#include <string>
#include <vector>

#include "data_set.hpp"

namespace translation {
namespace built_in_detail {

struct Subject {
  const char *english, *spanish;
  int person;  ///< which form of a Spanish verb
  bool is_third;
};

struct Verb {
  const char *english, *third;  ///< third: with he and she
  const char* spanish[5];       ///< of yo, tú, él or ella, nosotros, ellos
};

struct Object {
  const char *english, *spanish;
};

inline constexpr Subject subjects[] = {
    {"I", "", 0, false},       {"you", "", 1, false}, {"he", "él ", 2, true},
    {"she", "ella ", 2, true}, {"we", "", 3, false},  {"they", "", 4, false},
};

inline constexpr Verb verbs[] = {
    {"buy", "buys", {"compro", "compras", "compra", "compramos", "compran"}},
    {"sell", "sells", {"vendo", "vendes", "vende", "vendemos", "venden"}},
    {"paint", "paints", {"pinto", "pintas", "pinta", "pintamos", "pintan"}},
    {"want", "wants", {"quiero", "quieres", "quiere", "queremos", "quieren"}},
    {"see", "sees", {"veo", "ves", "ve", "vemos", "ven"}},
    {"look for", "looks for", {"busco", "buscas", "busca", "buscamos", "buscan"}},
    {"find", "finds", {"encuentro", "encuentras", "encuentra", "encontramos", "encuentran"}},
};

inline constexpr Object objects[] = {
    {"the red house", "la casa roja"},           {"a new book", "un libro nuevo"},
    {"the old boat", "el barco viejo"},          {"two white chairs", "dos sillas blancas"},
    {"three small cups", "tres tazas pequeñas"}, {"the black hats", "los sombreros negros"},
};

inline WordPair pair(const Subject& subject, const Verb& verb, const Object& object, bool denied) {
  std::string english = std::string(subject.english) + " ";
  if (denied) {
    english += std::string(subject.is_third ? "does" : "do") + " not " + verb.english;
  } else {
    english += subject.is_third ? verb.third : verb.english;
  }
  const std::string spanish =
      std::string(subject.spanish) + (denied ? "no " : "") + verb.spanish[subject.person];
  return {words_of(english + " " + object.english), words_of(spanish + " " + object.spanish)};
}

}  // namespace built_in_detail

inline std::vector<WordPair> built_in_pairs() {
  using namespace built_in_detail;
  std::vector<WordPair> pairs;
  for (const Subject& subject : subjects) {
    for (const Verb& verb : verbs) {
      for (const Object& object : objects) {
        for (const bool denied : {false, true})
          pairs.push_back(pair(subject, verb, object, denied));
      }
    }
  }
  return pairs;
}

}  // namespace translation
