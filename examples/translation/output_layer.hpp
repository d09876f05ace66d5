#pragma once
// What a model says about the next token: dropout, a linear map to the vocabulary, softmax and
// cross-entropy.

#include <cmath>
#include <vector>

#include "attention_weights.hpp"
#include "vocabulary.hpp"

namespace translation {

template <class Scalar>
struct OutputLayer {
  Matrix<Scalar> weight;  ///< D × V
  RowVector<Scalar> bias;
};

/// Sums over tokens.
struct LossSums {
  double loss = 0;
  Index tokens = 0, correct = 0;

  double mean() const { return loss / static_cast<double>(tokens); }
  double accuracy() const { return static_cast<double>(correct) / static_cast<double>(tokens); }
  LossSums& operator+=(const LossSums& other) {
    loss += other.loss, tokens += other.tokens, correct += other.correct;
    return *this;
  }
};

template <class Scalar>
void draw_output(OutputLayer<Scalar>& layer, Index width, Index vocabulary, Random& random) {
  draw(layer.weight, width, vocabulary, random);
  layer.bias.setZero(vocabulary);
}

template <class Scalar>
void compute_logits(const Matrix<Scalar>& hidden, const OutputLayer<Scalar>& layer,
                    Matrix<Scalar>& logits) {
  logits.resize(hidden.rows(), layer.weight.cols());
  logits.noalias() = hidden * layer.weight;
}

/// Cross-entropy of softmax(logits + bias) with the labels. The logits become the gradient of the
/// mean loss by themselves, (softmax − one-hot)/labels, in the same pass over each row.
template <class Scalar>
LossSums cross_entropy(Matrix<Scalar>& logits, const RowVector<Scalar>& bias,
                       const std::vector<Token>& labels) {
  LossSums sums;
  sums.tokens = logits.rows();
  const Scalar share = Scalar(1) / static_cast<Scalar>(sums.tokens);
  for (Index i = 0; i < logits.rows(); ++i) {
    auto row = logits.row(i).array();
    const Index label = labels[static_cast<std::size_t>(i)];
    row += bias.array();
    const Scalar largest = row.maxCoeff(), of_label = row(label);
    row = (row - largest).exp();
    const Scalar total = row.sum();
    sums.loss += static_cast<double>(std::log(total)) - static_cast<double>(of_label - largest);
    sums.correct += of_label == largest;
    row *= share / total;
    row(label) -= share;
  }
  return sums;
}

/// The gradients of the layer, and, returned, that of `hidden`.
template <class Scalar>
Matrix<Scalar> output_backward(const Matrix<Scalar>& hidden, const OutputLayer<Scalar>& layer,
                               const Matrix<Scalar>& grad_logits, OutputLayer<Scalar>& gradients) {
  gradients.weight.noalias() = hidden.transpose() * grad_logits;
  gradients.bias = grad_logits.colwise().sum();
  Matrix<Scalar> of_hidden(hidden.rows(), hidden.cols());
  of_hidden.noalias() = grad_logits * layer.weight.transpose();
  return of_hidden;
}

/// Each number is dropped with this probability; those that stay are multiplied by `1/(1 −
/// probability)`. Empty where nothing is dropped.
template <class Scalar>
Matrix<Scalar> dropout_factors(Index rows, Index cols, double probability, Random& random) {
  if (probability <= 0) return {};
  const auto kept = static_cast<Scalar>(1 / (1 - probability));
  return Matrix<Scalar>::NullaryExpr(
      rows, cols, [&](Index, Index) { return random.uniform() < probability ? Scalar(0) : kept; });
}

}  // namespace translation
