#pragma once
// Sentences side by side in one matrix, a token in each row.

#include <vector>

#include "data_set.hpp"

namespace translation {

/// What becomes of the places between a sentence's end and the longest length.
enum class Padding {
  dropped,  ///< there are none: the rows of the next sentence follow at once
  kept,     ///< rows of the padding token, which no key mask lets anyone see
};

/// One side of a batch. Sequence s owns the rows from offsets[s] up to offsets[s + 1], the first
/// lengths[s] of which are tokens and the rest padding.
struct Tokens {
  std::vector<Token> tokens;
  std::vector<Index> positions;  ///< of each row within its sentence
  std::vector<int> offsets = {0}, lengths;

  Index rows() const { return static_cast<Index>(tokens.size()); }

  void append(const std::vector<Token>& sentence, Index rows) {
    const Index count = static_cast<Index>(sentence.size());
    for (Index i = 0; i < rows; ++i) {
      tokens.push_back(i < count ? sentence[static_cast<std::size_t>(i)] : padding);
      positions.push_back(i);
    }
    offsets.push_back(offsets.back() + static_cast<int>(rows));
    lengths.push_back(static_cast<int>(count));
  }
};

struct Batch {
  Tokens source, target;
  std::vector<Index> labelled;  ///< the rows of the target that are not padding
  std::vector<Token> labels;    ///< the token that should follow each of them

  Index sentences() const { return static_cast<Index>(source.lengths.size()); }
};

/// `length`: rows of each sentence where padding is kept.
inline Batch make_batch(const std::vector<const Example*>& examples, Padding kind, Index length) {
  Batch batch;
  const auto rows = [&](const std::vector<Token>& sentence) {
    return kind == Padding::kept ? length : static_cast<Index>(sentence.size());
  };
  for (const Example* example : examples) {
    const Index first = batch.target.rows();
    batch.source.append(example->source, rows(example->source));
    batch.target.append(example->input, rows(example->input));
    for (std::size_t i = 0; i < example->label.size(); ++i) {
      batch.labelled.push_back(first + static_cast<Index>(i));
      batch.labels.push_back(example->label[i]);
    }
  }
  return batch;
}

}  // namespace translation
