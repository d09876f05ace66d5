// Attention as Eigen code is written by hand, to compare with: all scores stored, the product first and then the scale in
// place. One head; for several, blocks of columns.
#pragma once

#include <cmath>
#include <limits>
#include <surfattn/types.hpp>

namespace surfattn::bench {

/// W = softmax(β·Q·Kᵀ), with β = 1/√d. `hide(scores)` sets the scores of hidden pairs to −∞.
template <class Queries, class Keys, class Hide>
Matrix<typename Queries::Scalar> naive_weights(const Queries& q, const Keys& k, const Hide& hide) {
  using Scalar = typename Queries::Scalar;
  Matrix<Scalar> scores(q.rows(), k.rows());
  scores.noalias() = q * k.transpose();
  scores *= Scalar(1 / std::sqrt(double(q.cols())));
  hide(scores);
  scores = (scores.colwise() - scores.rowwise().maxCoeff()).array().exp();
  scores.array().colwise() /= scores.rowwise().sum().array();
  return scores;
}

/// O = W·V, and nothing kept of the scores.
template <class Queries, class Keys, class Values, class Hide>
Matrix<typename Queries::Scalar> naive_attention(const Queries& q, const Keys& k, const Values& v,
                                                 const Hide& hide) {
  Matrix<typename Queries::Scalar> out(q.rows(), v.cols());
  out.noalias() = naive_weights(q, k, hide) * v;
  return out;
}

/// dV = Wᵀ·dO, dP = dO·Vᵀ, dS = W∘(dP − dO·O), dQ = β·dS·K, dK = β·dSᵀ·Q, with W kept from the
/// forward pass.
template <class Scalar, class Queries, class Keys, class Values, class Out, class GradOut,
          class GradQueries, class GradKeys, class GradValues>
void naive_backward(const Matrix<Scalar>& weights, const Queries& q, const Keys& k, const Values& v,
                    const Out& out, const GradOut& grad_out, GradQueries&& grad_queries,
                    GradKeys&& grad_keys, GradValues&& grad_values) {
  grad_values.noalias() = weights.transpose() * grad_out;
  Matrix<Scalar> grad_scores(weights.rows(), weights.cols());
  grad_scores.noalias() = grad_out * v.transpose();
  grad_scores.colwise() -= grad_out.cwiseProduct(out).rowwise().sum();
  grad_scores.array() *= weights.array() * Scalar(1 / std::sqrt(double(q.cols())));
  grad_queries.noalias() = grad_scores * k;
  grad_keys.noalias() = grad_scores.transpose() * q;
}

}  // namespace surfattn::bench
