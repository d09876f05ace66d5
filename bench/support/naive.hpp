// Attention as Eigen code is written by hand, to compare with.
#pragma once

#include <cmath>
#include <limits>
#include <surfattn/types.hpp>

namespace surfattn::bench {

/// softmax(β·Q·Kᵀ)·V for one head: all scores stored, the product first and then the scale in
/// place. `causal` hides the keys j > i + Tk − Tq.
template <class Queries, class Keys, class Values>
Matrix<typename Queries::Scalar> naive_attention(const Queries& q, const Keys& k, const Values& v,
                                                 bool causal = false) {
  using Scalar = typename Queries::Scalar;
  Matrix<Scalar> scores(q.rows(), k.rows());
  scores.noalias() = q * k.transpose();
  scores *= 1 / std::sqrt(Scalar(q.cols()));
  if (causal) {
    for (Index i = 0; i < scores.rows(); ++i) {
      const Index seen = i + 1 + k.rows() - q.rows();
      scores.row(i).tail(k.rows() - seen).setConstant(-std::numeric_limits<Scalar>::infinity());
    }
  }
  scores = (scores.colwise() - scores.rowwise().maxCoeff()).array().exp();
  scores.array().colwise() /= scores.rowwise().sum().array();
  Matrix<Scalar> out(q.rows(), v.cols());
  out.noalias() = scores * v;
  return out;
}

/// The same for several heads side by side, query head h reading key/value head h / (query heads / key/value heads).
template <class Scalar>
Matrix<Scalar> naive_attention(const Matrix<Scalar>& q, const Matrix<Scalar>& k,
                               const Matrix<Scalar>& v, Index query_heads, Index key_value_heads,
                               bool causal = false) {
  const Index d = q.cols() / query_heads, dv = v.cols() / key_value_heads;
  Matrix<Scalar> out(q.rows(), query_heads * dv);
  for (Index h = 0; h < query_heads; ++h) {
    const Index shared = h / (query_heads / key_value_heads);
    out.middleCols(h * dv, dv) = naive_attention(
        q.middleCols(h * d, d), k.middleCols(shared * d, d), v.middleCols(shared * dv, dv), causal);
  }
  return out;
}

}  // namespace surfattn::bench
