#pragma once
// From what a model says about the next token to whole sentences: the likeliest token each time, or
// the best few beginnings side by side.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "model.hpp"

namespace translation {

/// Of each token of the vocabulary, given the decoder's row for the one before.
template <class Scalar>
RowVector<Scalar> log_probabilities(const Matrix<Scalar>& hidden,
                                    const OutputLayer<Scalar>& output) {
  RowVector<Scalar> logits = hidden * output.weight + output.bias;
  logits.array() -= logits.maxCoeff();
  logits.array() -= std::log(logits.array().exp().sum());
  // what no label ever is
  logits[padding] = logits[start] = -std::numeric_limits<Scalar>::infinity();
  return logits;
}

/// Computes what is to be said about the next token from all tokens so far, each time anew.
template <class Layer>
class RecomputingDecoder {
 public:
  using Scalar = typename Model<Layer>::Scalar;
  using State = std::vector<Token>;  ///< the tokens so far

  RecomputingDecoder(const Model<Layer>& model, const std::vector<Token>& source) : model_(model) {
    batch_.source.append(source, static_cast<Index>(source.size()));
    encode(model, batch_, encoded_);
  }

  State begin() const { return {}; }
  static State fork(const State& state) { return state; }
  Index length() const { return model_.length(); }

  /// Takes a token; returns the logarithms of the probabilities of the next one.
  RowVector<Scalar> next(State& state, Token token) const {
    state.push_back(token);
    Batch batch = batch_;
    batch.target.append(state, static_cast<Index>(state.size()));
    ModelPass<Layer> pass = encoded_;
    decode(model_, batch, pass);
    return log_probabilities<Scalar>(pass.decoded().bottomRows(1), model_.output);
  }

 private:
  const Model<Layer>& model_;
  Batch batch_;
  ModelPass<Layer> encoded_;
};

/// The likeliest token after each token.
template <class Decoder>
std::vector<Token> translate_greedily(const Decoder& decoder) {
  std::vector<Token> tokens;
  auto state = decoder.begin();
  for (Token token = start; static_cast<Index>(tokens.size()) < decoder.length();) {
    Index likeliest;
    decoder.next(state, token).maxCoeff(&likeliest);
    token = static_cast<Token>(likeliest);
    if (token == stop) break;
    tokens.push_back(token);
  }
  return tokens;
}

/// The beginning of a translation.
template <class State>
struct Hypothesis {
  std::vector<Token> tokens;
  double log_probability = 0;  ///< of all tokens, and of the stop where it is done
  State state;

  Token last() const { return tokens.empty() ? start : tokens.back(); }
};

struct Translation {
  std::vector<Token> tokens;
  double score = 0;  ///< mean log-probability of a token, so that long sentences are not worse
};

namespace search_detail {

struct Candidate {
  std::size_t hypothesis;
  Token token;
  double log_probability;
};

/// Adds the `count` likeliest tokens after a hypothesis.
template <class Scalar>
void add_candidates(const RowVector<Scalar>& log_probabilities, std::size_t hypothesis,
                    double so_far, std::size_t count, std::vector<Candidate>& candidates) {
  std::vector<Token> order(static_cast<std::size_t>(log_probabilities.size()));
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<Token>(i);
  count = std::min(count, order.size());
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count), order.end(),
                    [&](Token a, Token b) {
                      return std::pair(-log_probabilities[a], a) <
                             std::pair(-log_probabilities[b], b);
                    });
  for (std::size_t i = 0; i < count; ++i) {
    candidates.push_back(
        {hypothesis, order[i], so_far + static_cast<double>(log_probabilities[order[i]])});
  }
}

inline void add_result(std::vector<Token> tokens, double log_probability, bool is_stopped,
                       std::vector<Translation>& results) {
  const double count = static_cast<double>(tokens.size()) + (is_stopped ? 1 : 0);
  results.push_back({std::move(tokens), log_probability / count});
}

}  // namespace search_detail

/// Beam search: `width` beginnings at a time. The best translation first, `width` of them at most.
template <class Decoder>
std::vector<Translation> translate_by_beam(const Decoder& decoder, std::size_t width) {
  using namespace search_detail;
  std::vector<Hypothesis<typename Decoder::State>> beam;
  beam.push_back({{}, 0, decoder.begin()});
  std::vector<Translation> results;
  for (Index length = 0; length < decoder.length() && !beam.empty(); ++length) {
    std::vector<Candidate> candidates;
    for (std::size_t h = 0; h < beam.size(); ++h) {
      add_candidates(decoder.next(beam[h].state, beam[h].last()), h, beam[h].log_probability, width,
                     candidates);
    }
    std::stable_sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) {
      return a.log_probability > b.log_probability;
    });
    candidates.resize(std::min(candidates.size(), width - results.size()));
    std::vector<Hypothesis<typename Decoder::State>> next;
    for (const auto& [hypothesis, token, log_probability] : candidates) {
      std::vector<Token> tokens = beam[hypothesis].tokens;
      if (token == stop) {
        add_result(std::move(tokens), log_probability, true, results);
        continue;
      }
      tokens.push_back(token);
      next.push_back({std::move(tokens), log_probability, decoder.fork(beam[hypothesis].state)});
    }
    beam = std::move(next);
  }
  for (auto& hypothesis : beam)
    add_result(std::move(hypothesis.tokens), hypothesis.log_probability, false, results);
  std::stable_sort(results.begin(), results.end(),
                   [](const auto& a, const auto& b) { return a.score > b.score; });
  return results;
}

}  // namespace translation
