#pragma once
// y = layer_norm(x + relu(x·W₁ + b₁)·W₂ + b₂), forward and backward.

#include "attention_weights.hpp"

namespace translation {

/// ε of every layer norm.
inline constexpr double norm_epsilon = 1e-3;

template <class Scalar>
struct FeedForward {
  Matrix<Scalar> inner;  ///< W₁, D × F
  Matrix<Scalar> outer;  ///< W₂, F × D
  RowVector<Scalar> inner_bias, outer_bias;
  surfattn::NormWeights<Scalar> norm;
};

template <class Scalar>
struct FeedForwardPass {
  Matrix<Scalar> hidden;  ///< relu(x·W₁ + b₁)
  Matrix<Scalar> sum;     ///< what the norm is taken of
  Matrix<Scalar> out;
};

template <class Scalar>
void draw_norm(surfattn::NormWeights<Scalar>& norm, Index width) {
  norm.gain.setOnes(width);
  norm.bias.setZero(width);
}

template <class Scalar>
void draw_feed_forward(FeedForward<Scalar>& weights, Index width, Index inner, Random& random) {
  draw(weights.inner, width, inner, random);
  draw(weights.outer, inner, width, random);
  weights.inner_bias.setZero(inner);
  weights.outer_bias.setZero(width);
  draw_norm(weights.norm, width);
}

template <class Scalar>
FeedForwardPass<Scalar> feed_forward(const Matrix<Scalar>& x, const FeedForward<Scalar>& weights) {
  FeedForwardPass<Scalar> pass;
  pass.hidden.resize(x.rows(), weights.inner.cols());
  pass.hidden.noalias() = x * weights.inner;
  pass.hidden = (pass.hidden.rowwise() + weights.inner_bias).cwiseMax(Scalar(0));
  pass.sum = x.rowwise() + weights.outer_bias;
  pass.sum.noalias() += pass.hidden * weights.outer;
  pass.out = surfattn::layer_norm(pass.sum, weights.norm, {.epsilon = norm_epsilon});
  return pass;
}

/// The gradients of the weights, and, returned, that of x.
template <class Scalar>
Matrix<Scalar> feed_forward_backward(const Matrix<Scalar>& x, const FeedForward<Scalar>& weights,
                                     const FeedForwardPass<Scalar>& pass,
                                     const Matrix<Scalar>& grad_out,
                                     FeedForward<Scalar>& gradients) {
  // out = layer_norm(sum)
  auto of_sum =
      surfattn::layer_norm_backward(pass.sum, grad_out, weights.norm, {.epsilon = norm_epsilon});
  gradients.norm = std::move(of_sum.weights);
  // sum = x + hidden·W₂ + b₂
  gradients.outer.noalias() = pass.hidden.transpose() * of_sum.x;
  gradients.outer_bias = of_sum.x.colwise().sum();
  Matrix<Scalar> of_hidden(pass.hidden.rows(), pass.hidden.cols());
  of_hidden.noalias() = of_sum.x * weights.outer.transpose();
  // hidden = relu(x·W₁ + b₁)
  of_hidden = (pass.hidden.array() > Scalar(0)).select(of_hidden, Scalar(0));
  gradients.inner.noalias() = x.transpose() * of_hidden;
  gradients.inner_bias = of_hidden.colwise().sum();
  of_sum.x.noalias() += of_hidden * weights.inner.transpose();
  return std::move(of_sum.x);
}

template <class Visit, class... Weights>
void visit_feed_forward(Visit&& visit, Weights&... weights) {
  visit(Part::feed_forward, weights.inner...);
  visit(Part::feed_forward, weights.inner_bias...);
  visit(Part::feed_forward, weights.outer...);
  visit(Part::feed_forward, weights.outer_bias...);
  visit(Part::norm, weights.norm.gain...);
  visit(Part::norm, weights.norm.bias...);
}

}  // namespace translation
