#pragma once
// A row for each token of the vocabulary, and one for each position: what a token enters as is
// their sum.

#include <algorithm>
#include <numeric>
#include <vector>

#include "attention_weights.hpp"
#include "batch.hpp"

namespace translation {

template <class Scalar>
struct Embedding {
  Matrix<Scalar> tokens;     ///< V × D
  Matrix<Scalar> positions;  ///< length × D
};

/// The gradient of a table of which a batch reads few rows: these rows, in order, and their
/// gradients.
template <class Scalar>
struct RowGradients {
  std::vector<Index> rows;
  Matrix<Scalar> values;
};

template <class Scalar>
void draw_embedding(Embedding<Scalar>& embedding, Index vocabulary, Index length, Index width,
                    Random& random) {
  constexpr double limit = 0.05;
  embedding.tokens.resize(vocabulary, width);
  embedding.positions.resize(length, width);
  random.fill(embedding.tokens, limit);
  random.fill(embedding.positions, limit);
}

template <class Scalar>
Matrix<Scalar> embed(const Tokens& tokens, const Embedding<Scalar>& embedding) {
  Matrix<Scalar> out(tokens.rows(), embedding.tokens.cols());
  for (Index row = 0; row < out.rows(); ++row) {
    const auto place = static_cast<std::size_t>(row);
    out.row(row) = embedding.tokens.row(tokens.tokens[place]) +
                   embedding.positions.row(tokens.positions[place]);
  }
  return out;
}

/// Adds up the gradients of all places where a token stands, row by row in their order.
template <class Scalar>
RowGradients<Scalar> token_gradients(const std::vector<Token>& tokens,
                                     const Matrix<Scalar>& grad_out) {
  std::vector<std::size_t> order(tokens.size());
  std::iota(order.begin(), order.end(), std::size_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return tokens[a] < tokens[b]; });
  RowGradients<Scalar> gradients;
  gradients.values.resize(grad_out.rows(), grad_out.cols());
  for (const std::size_t place : order) {
    const auto from = grad_out.row(static_cast<Index>(place));
    if (gradients.rows.empty() || gradients.rows.back() != tokens[place]) {
      gradients.rows.push_back(tokens[place]);
      gradients.values.row(static_cast<Index>(gradients.rows.size()) - 1) = from;
    } else {
      gradients.values.row(static_cast<Index>(gradients.rows.size()) - 1) += from;
    }
  }
  gradients.values.conservativeResize(static_cast<Index>(gradients.rows.size()), Eigen::NoChange);
  return gradients;
}

/// The gradients of both tables, given that of what `embed` returned.
template <class Scalar>
void embed_backward(const Tokens& tokens, const Matrix<Scalar>& grad_out,
                    RowGradients<Scalar>& of_tokens, Matrix<Scalar>& of_positions) {
  of_tokens = token_gradients(tokens.tokens, grad_out);
  of_positions.setZero();
  for (Index row = 0; row < grad_out.rows(); ++row)
    of_positions.row(tokens.positions[static_cast<std::size_t>(row)]) += grad_out.row(row);
}

}  // namespace translation
