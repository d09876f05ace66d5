// surfattn layer 8: plain, materialised reference of both forms, for any scalar type, sharing no
// engine code.
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

/// The definitions of both forms written out: every score and weight is stored, nothing is
/// rewritten, blocked or rescaled. Meant to be read beside the equations and to judge faster code,
/// so no other header of the library is included.
///
/// The scalar type S may be anything with +, -, *, /, >, exp and log found by argument-dependent
/// lookup: float, double, long double, Eigen::AutoDiffScalar. Conventions of all functions:
///  * tokens are rows; a head is a block of d = cols / heads columns; query head h reads key head
///    h / (Hq / Hkv); Tq queries, Tk keys; Tq, Tk and the head widths may be 0;
///  * a masked pair (i, j) is skipped, not multiplied by 0: what stands behind a mask, NaN included,
///    reaches no result and no gradient;
///  * a row with no key left has output 0, log-sum-exp -infinity and no part in any gradient;
///  * a row whose keys all score -infinity without being masked is 0/0: its results are NaN;
///  * every operation is stored in an S before the next: an automatic-differentiation scalar may
///    return expressions, and its constants may carry no derivatives;
///  * shape mistakes throw std::invalid_argument (std::abort in a build without exceptions);
///  * time O(Hq Tq Tk d), memory O(Hq Tq Tk); all results are newly allocated.
namespace surfattn::reference {

using Index = Eigen::Index;

template <class S>
using Matrix = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <class S>
using RowVector = Eigen::Matrix<S, 1, Eigen::Dynamic, Eigen::RowMajor>;

/// Tq x Tk, true = query i attends to key j; shared by all heads. 0 x 0 stands for no mask.
using Mask = Eigen::Matrix<bool, Eigen::Dynamic, Eigen::Dynamic>;

/// Numbers of heads; `query` is a multiple of `key_value`.
struct Heads {
  Index query = 1;
  Index key_value = query;
};

template <class S>
struct Forward {
  Matrix<S> out;                   ///< Tq x (Hq dv)
  Matrix<S> log_sum_exp;           ///< Tq x Hq
  std::vector<Matrix<S>> weights;  ///< for each query head Tq x Tk, 0 where masked
};

template <class S>
struct AttentionGradients {
  Matrix<S> queries, keys, values;
};

template <class S>
struct SurfaceGradients {
  Matrix<S> queries, keys;
  S bandwidth;          ///< dLoss/dsigma
  Matrix<S> log_prior;  ///< the shape of the explicit prior; Tk x Hkv for a uniform or sdpa prior
};

/// A standard attention layer: D x (Hq d), Dy x (Hkv d), Dy x (Hkv dv), (Hq dv) x Dout.
/// A bias of size 0 stands for none.
template <class S>
struct LayerWeights {
  Matrix<S> query, key, value, output;
  RowVector<S> query_bias, key_bias, value_bias, output_bias;
};

namespace detail {

inline void require(bool condition, const std::string& message) {
  if (condition) return;
#ifdef __cpp_exceptions
  throw std::invalid_argument("surfattn::reference: " + message);
#else
  std::fputs((message + "\n").c_str(), stderr);
  std::abort();
#endif
}

inline std::string shape(Index rows, Index cols) {
  return std::to_string(rows) + " x " + std::to_string(cols);
}

template <class Derived>
void require_shape(const char* name, const Eigen::MatrixBase<Derived>& matrix, Index rows,
                   Index cols) {
  require(matrix.rows() == rows && matrix.cols() == cols, std::string(name) + " is " +
                                                              shape(matrix.rows(), matrix.cols()) +
                                                              ", expected " + shape(rows, cols));
}

template <class Derived>
void require_shape_or_none(const char* name, const Eigen::MatrixBase<Derived>& matrix, Index rows,
                           Index cols) {
  if (matrix.rows() == 0 && matrix.cols() == 0) return;
  require_shape(name, matrix, rows, cols);
}

inline void require_heads(Heads heads) {
  require(heads.query > 0 && heads.key_value > 0 && heads.query % heads.key_value == 0,
          std::to_string(heads.query) + " query heads are no multiple of " +
              std::to_string(heads.key_value) + " key heads");
}

template <class S>
void require_columns(const char* name, const Matrix<S>& matrix, Index heads) {
  require(matrix.cols() % heads == 0, std::string(name) + " has " + std::to_string(matrix.cols()) +
                                          " columns, no multiple of its " + std::to_string(heads) +
                                          " heads");
}

template <class S>
void require_queries_keys(const Matrix<S>& q, const Matrix<S>& k, Heads heads, const Mask& mask) {
  require_heads(heads);
  require_columns("queries", q, heads.query);
  require_columns("keys", k, heads.key_value);
  require_shape("keys", k, k.rows(), q.cols() / heads.query * heads.key_value);
  require_shape_or_none("mask", mask, q.rows(), k.rows());
}

template <class S>
void require_attention(const Matrix<S>& q, const Matrix<S>& k, const Matrix<S>& v, Heads heads,
                       const Mask& mask) {
  require_queries_keys(q, k, heads, mask);
  require_columns("values", v, heads.key_value);
  require_shape("values", v, k.rows(), v.cols());
}

template <class S>
void require_surface(const Matrix<S>& q, const Matrix<S>& k, const Matrix<S>& log_prior,
                     Heads heads, const Mask& mask) {
  require_queries_keys(q, k, heads, mask);
  const Index columns = log_prior.cols() == 1 ? 1 : heads.key_value;
  require_shape_or_none("log_prior", log_prior, k.rows(), columns);
}

/// The block of columns of one head.
template <class S>
Matrix<S> head_of(const Matrix<S>& matrix, Index head, Index heads) {
  const Index width = matrix.cols() / heads;
  return matrix.middleCols(head * width, width);
}

/// matrix's block of columns of one head += block.
template <class S>
void add_to_head(Matrix<S>& matrix, const Matrix<S>& block, Index head) {
  matrix.middleCols(head * block.cols(), block.cols()) += block;
}

/// One column of an optional per-head matrix: zeros if it is 0 x 0, its only column if it has one.
template <class S>
Matrix<S> column_or_zero(const Matrix<S>& matrix, Index column, Index rows) {
  if (matrix.cols() == 0) return Matrix<S>::Constant(rows, 1, S(0));
  return matrix.col(matrix.cols() == 1 ? 0 : column);
}

template <class S>
Matrix<S> zeros_like(const Matrix<S>& matrix) {
  return Matrix<S>::Constant(matrix.rows(), matrix.cols(), S(0));
}

/// The keys that query i may attend to, in order. All masking in this file is done here.
inline std::vector<Index> attended_keys(const Mask& mask, Index i, Index key_count) {
  std::vector<Index> keys;
  for (Index j = 0; j < key_count; ++j) {
    if (mask.size() == 0 || mask(i, j)) keys.push_back(j);
  }
  return keys;
}

inline bool is_attended(const Mask& mask, Index j, Index query_count) {
  if (mask.size() == 0) return query_count > 0;
  return mask.col(j).any();
}

/// a_i . b_j
template <class S>
S dot(const Matrix<S>& a, Index i, const Matrix<S>& b, Index j) {
  S sum(0);
  for (Index c = 0; c < a.cols(); ++c) {
    const S product = a(i, c) * b(j, c);
    sum += product;
  }
  return sum;
}

/// ||a_i - b_j||^2
template <class S>
S squared_distance(const Matrix<S>& a, Index i, const Matrix<S>& b, Index j) {
  S sum(0);
  for (Index c = 0; c < a.cols(); ++c) {
    const S difference = a(i, c) - b(j, c);
    const S square = difference * difference;
    sum += square;
  }
  return sum;
}

template <class S>
struct Softmax {
  Matrix<S> weights;      // Tq x Tk
  Matrix<S> log_sum_exp;  // Tq x 1
};

/// W_ij = exp(S_ij) / sum_l exp(S_il),  L_i = log sum_l exp(S_il), over the attended keys l.
/// The row's maximum m_i is taken out of the exponentials,
/// W_ij = exp(S_ij - m_i) / sum_l exp(S_il - m_i) and L_i = m_i + log sum_l exp(S_il - m_i), so that they do not overflow.
template <class S>
Softmax<S> softmax(const Matrix<S>& scores, const Mask& mask) {
  using std::exp, std::log;
  const S minus_infinity = S(-std::numeric_limits<double>::infinity());
  Softmax<S> result{zeros_like(scores), Matrix<S>::Constant(scores.rows(), 1, minus_infinity)};
  for (Index i = 0; i < scores.rows(); ++i) {
    const std::vector<Index> keys = attended_keys(mask, i, scores.cols());
    if (keys.empty()) continue;
    S maximum = scores(i, keys.front());
    for (const Index j : keys) {
      if (scores(i, j) > maximum) maximum = scores(i, j);
    }
    S sum(0);
    for (const Index j : keys) {
      const S shifted = scores(i, j) - maximum;
      result.weights(i, j) = exp(shifted);
      sum += result.weights(i, j);
    }
    for (const Index j : keys) result.weights(i, j) /= sum;
    const S log_sum = log(sum);
    result.log_sum_exp(i, 0) = maximum + log_sum;
  }
  return result;
}

/// forward: W_ij = exp(S_ij) / sum_l exp(S_il)   =>  dW_il/dS_ij = W_il ([l = j] - W_ij)
/// forward: L_i  = log sum_l exp(S_il)           =>  dL_i/dS_ij  = W_ij
/// dS_ij = W_ij (dW_ij - sum_l W_il dW_il + dL_i)
template <class S>
Matrix<S> softmax_backward(const Matrix<S>& weights, const Matrix<S>& grad_weights,
                           const Matrix<S>& grad_log_sum_exp, const Mask& mask) {
  Matrix<S> grad_scores = zeros_like(weights);
  for (Index i = 0; i < weights.rows(); ++i) {
    const std::vector<Index> keys = attended_keys(mask, i, weights.cols());
    S mean(0);
    for (const Index j : keys) {
      const S product = weights(i, j) * grad_weights(i, j);
      mean += product;
    }
    for (const Index j : keys) {
      const S centred = grad_weights(i, j) - mean;
      const S total = centred + grad_log_sum_exp(i, 0);
      grad_scores(i, j) = weights(i, j) * total;
    }
  }
  return grad_scores;
}

/// O_i = sum_j W_ij v_j
template <class S>
Matrix<S> weighted_sum(const Matrix<S>& weights, const Matrix<S>& v, const Mask& mask) {
  Matrix<S> out = Matrix<S>::Constant(weights.rows(), v.cols(), S(0));
  for (Index i = 0; i < weights.rows(); ++i) {
    for (const Index j : attended_keys(mask, i, v.rows())) out.row(i) += weights(i, j) * v.row(j);
  }
  return out;
}

template <class S>
struct WeightedSumGradients {
  Matrix<S> weights, values;
};

/// forward: O_i = sum_j W_ij v_j   =>  dW_ij = dO_i . v_j,  dv_j = sum_i W_ij dO_i
template <class S>
WeightedSumGradients<S> weighted_sum_backward(const Matrix<S>& weights, const Matrix<S>& v,
                                              const Mask& mask, const Matrix<S>& grad_out) {
  WeightedSumGradients<S> grad{zeros_like(weights), zeros_like(v)};
  for (Index i = 0; i < weights.rows(); ++i) {
    for (const Index j : attended_keys(mask, i, v.rows())) {
      grad.weights(i, j) = dot(grad_out, i, v, j);
      grad.values.row(j) += weights(i, j) * grad_out.row(i);
    }
  }
  return grad;
}

/// S_ij = beta q_i . k_j
template <class S>
Matrix<S> dot_scores(const Matrix<S>& q, const Matrix<S>& k, const S& scale, const Mask& mask) {
  Matrix<S> scores = Matrix<S>::Constant(q.rows(), k.rows(), S(0));
  for (Index i = 0; i < q.rows(); ++i) {
    for (const Index j : attended_keys(mask, i, k.rows())) scores(i, j) = scale * dot(q, i, k, j);
  }
  return scores;
}

template <class S>
struct DotScoreGradients {
  Matrix<S> queries, keys;
};

/// forward: S_ij = beta q_i . k_j   =>  dq_i = sum_j dS_ij beta k_j,  dk_j = sum_i dS_ij beta q_i
template <class S>
DotScoreGradients<S> dot_scores_backward(const Matrix<S>& q, const Matrix<S>& k, const S& scale,
                                         const Mask& mask, const Matrix<S>& grad_scores) {
  DotScoreGradients<S> grad{zeros_like(q), zeros_like(k)};
  for (Index i = 0; i < q.rows(); ++i) {
    for (const Index j : attended_keys(mask, i, k.rows())) {
      const S scaled = grad_scores(i, j) * scale;
      grad.queries.row(i) += scaled * k.row(j);
      grad.keys.row(j) += scaled * q.row(i);
    }
  }
  return grad;
}

/// S_ij = -||q_i - k_j||^2 / (2 sigma^2) + log pi_j
template <class S>
Matrix<S> distance_scores(const Matrix<S>& q, const Matrix<S>& k, const S& bandwidth,
                          const Matrix<S>& log_prior, const Mask& mask) {
  Matrix<S> scores = Matrix<S>::Constant(q.rows(), k.rows(), S(0));
  const S variance = bandwidth * bandwidth;
  for (Index i = 0; i < q.rows(); ++i) {
    for (const Index j : attended_keys(mask, i, k.rows())) {
      const S half_distance = squared_distance(q, i, k, j) / S(2);
      const S exponent = half_distance / variance;
      scores(i, j) = log_prior(j, 0) - exponent;
    }
  }
  return scores;
}

/// forward: S_ij = -||q_i - k_j||^2 / (2 sigma^2) + log pi_j
///   =>  dq_i       = sum_j  dS_ij (k_j - q_i) / sigma^2
///       dk_j       = sum_i  dS_ij (q_i - k_j) / sigma^2
///       dsigma     = sum_ij dS_ij ||q_i - k_j||^2 / sigma^3
///       dlog pi_j  = sum_i  dS_ij
template <class S>
SurfaceGradients<S> distance_scores_backward(const Matrix<S>& q, const Matrix<S>& k,
                                             const S& bandwidth, const Mask& mask,
                                             const Matrix<S>& grad_scores) {
  SurfaceGradients<S> grad{zeros_like(q), zeros_like(k), S(0),
                           Matrix<S>::Constant(k.rows(), 1, S(0))};
  const S variance = bandwidth * bandwidth;
  for (Index i = 0; i < q.rows(); ++i) {
    for (const Index j : attended_keys(mask, i, k.rows())) {
      const S scaled = grad_scores(i, j) / variance;
      grad.queries.row(i) += scaled * (k.row(j) - q.row(i));
      grad.keys.row(j) += scaled * (q.row(i) - k.row(j));
      const S stretched = scaled * squared_distance(q, i, k, j);
      const S by_bandwidth = stretched / bandwidth;
      grad.bandwidth += by_bandwidth;
      grad.log_prior(j, 0) += grad_scores(i, j);
    }
  }
  return grad;
}

/// Results of one query head, before they are put side by side: softmax of the scores, then
/// O = W V.
template <class S>
void append_head(Forward<S>& result, const Matrix<S>& scores, const Matrix<S>& v, const Mask& mask,
                 Index head) {
  const Softmax<S> attention = softmax(scores, mask);
  add_to_head(result.out, weighted_sum(attention.weights, v, mask), head);
  result.log_sum_exp.col(head) = attention.log_sum_exp;
  result.weights.push_back(attention.weights);
}

template <class S>
Forward<S> empty_forward(Index query_count, Index heads, Index value_width) {
  return {Matrix<S>::Constant(query_count, heads * value_width, S(0)),
          Matrix<S>::Constant(query_count, heads, S(0)),
          {}};
}

/// a b + bias, the bias added to every row; a bias of size 0 stands for none.
template <class S>
Matrix<S> affine(const Matrix<S>& a, const Matrix<S>& b, const RowVector<S>& bias) {
  require_shape("weight matrix", b, a.cols(), b.cols());
  if (bias.size() != 0) require_shape("bias", bias, 1, b.cols());
  Matrix<S> result = Matrix<S>::Constant(a.rows(), b.cols(), S(0));
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index c = 0; c < a.cols(); ++c) result.row(i) += a(i, c) * b.row(c);
    if (bias.size() != 0) result.row(i) += bias;
  }
  return result;
}

}  // namespace detail

/// Standard form: S_ij = beta q_i . k_j,  W = softmax_j S,  O = W V,  L_i = log sum_j exp S_ij.
///
/// q: Tq x (Hq d), k: Tk x (Hkv d), v: Tk x (Hkv dv), scale: beta, mask: Tq x Tk or 0 x 0.
/// Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.
template <class S>
Forward<S> attention_forward(const Matrix<S>& q, const Matrix<S>& k, const Matrix<S>& v,
                             std::type_identity_t<S> scale, Heads heads = {},
                             const Mask& mask = {}) {
  detail::require_attention(q, k, v, heads, mask);
  const Index group = heads.query / heads.key_value;
  Forward<S> result = detail::empty_forward<S>(q.rows(), heads.query, v.cols() / heads.key_value);
  for (Index h = 0; h < heads.query; ++h) {
    const Matrix<S> q_h = detail::head_of(q, h, heads.query);
    const Matrix<S> k_h = detail::head_of(k, h / group, heads.key_value);
    const Matrix<S> v_h = detail::head_of(v, h / group, heads.key_value);
    const Matrix<S> scores = detail::dot_scores(q_h, k_h, scale, mask);
    detail::append_head(result, scores, v_h, mask, h);
  }
  return result;
}

/// Gradients of the standard form for the loss sum dO * O + sum dL * L, where dO = grad_out:
/// Tq x (Hq dv) and dL = grad_log_sum_exp: Tq x Hq, or 0 x 0 for none. Recomputes the forward pass.
/// Gradients of a key head are summed over the query heads that read it.
template <class S>
AttentionGradients<S> attention_backward(const Matrix<S>& q, const Matrix<S>& k, const Matrix<S>& v,
                                         std::type_identity_t<S> scale, Heads heads,
                                         const Mask& mask, const Matrix<S>& grad_out,
                                         const Matrix<S>& grad_log_sum_exp = {}) {
  const Forward<S> forward = attention_forward(q, k, v, scale, heads, mask);
  detail::require_shape("grad_out", grad_out, forward.out.rows(), forward.out.cols());
  detail::require_shape_or_none("grad_log_sum_exp", grad_log_sum_exp, q.rows(), heads.query);
  const Index group = heads.query / heads.key_value;
  AttentionGradients<S> grad{detail::zeros_like(q), detail::zeros_like(k), detail::zeros_like(v)};
  for (Index h = 0; h < heads.query; ++h) {
    const Index g = h / group;
    const Matrix<S> q_h = detail::head_of(q, h, heads.query);
    const Matrix<S> k_h = detail::head_of(k, g, heads.key_value);
    const Matrix<S> v_h = detail::head_of(v, g, heads.key_value);
    const Matrix<S>& weights = forward.weights[static_cast<std::size_t>(h)];
    // forward: O = W V
    const auto sum = detail::weighted_sum_backward(weights, v_h, mask,
                                                   detail::head_of(grad_out, h, heads.query));
    // forward: W = softmax_j S,  L_i = log sum_j exp S_ij
    const Matrix<S> grad_scores = detail::softmax_backward(
        weights, sum.weights, detail::column_or_zero(grad_log_sum_exp, h, q.rows()), mask);
    // forward: S_ij = beta q_i . k_j
    const auto scores = detail::dot_scores_backward(q_h, k_h, scale, mask, grad_scores);
    detail::add_to_head(grad.queries, scores.queries, h);
    detail::add_to_head(grad.keys, scores.keys, g);
    detail::add_to_head(grad.values, sum.values, g);
  }
  return grad;
}

/// Surface-projection form: S_ij = -||q_i - k_j||^2 / (2 sigma^2) + log pi_j,  W = softmax_j S,
/// P(q_i) = sum_j W_ij k_j,  L_i = log sum_j exp S_ij. The squared distance is taken as it stands.
///
/// q: Tq x (Hq d), k: Tk x (Hkv d), bandwidth: sigma, log_prior: Tk x Hkv, Tk x 1 (shared by all
/// heads) or 0 x 0 (log pi_j = 0), mask: Tq x Tk or 0 x 0.
/// Source: Sanger 2026, arXiv:2602.02521; Nadaraya 1964 and Watson 1964 for the estimate itself.
template <class S>
Forward<S> project_forward(const Matrix<S>& q, const Matrix<S>& k,
                           std::type_identity_t<S> bandwidth, const Matrix<S>& log_prior = {},
                           Heads heads = {}, const Mask& mask = {}) {
  detail::require_surface(q, k, log_prior, heads, mask);
  const Index group = heads.query / heads.key_value;
  Forward<S> result = detail::empty_forward<S>(q.rows(), heads.query, k.cols() / heads.key_value);
  for (Index h = 0; h < heads.query; ++h) {
    const Matrix<S> q_h = detail::head_of(q, h, heads.query);
    const Matrix<S> k_h = detail::head_of(k, h / group, heads.key_value);
    const Matrix<S> prior = detail::column_or_zero(log_prior, h / group, k.rows());
    const Matrix<S> scores = detail::distance_scores(q_h, k_h, bandwidth, prior, mask);
    detail::append_head(result, scores, k_h, mask, h);
  }
  return result;
}

/// Gradients of the surface form for the loss sum dO * P + sum dL * L, with log_prior held fixed:
/// an explicit or uniform prior. The keys are both ends of the kernel and values, so that their
/// gradient has two parts. grad_out: Tq x (Hq d), grad_log_sum_exp: Tq x Hq or 0 x 0.
/// The gradient of a prior shared by all heads (Tk x 1) is summed over the heads.
template <class S>
SurfaceGradients<S> project_backward(const Matrix<S>& q, const Matrix<S>& k,
                                     std::type_identity_t<S> bandwidth, const Matrix<S>& log_prior,
                                     Heads heads, const Mask& mask, const Matrix<S>& grad_out,
                                     const Matrix<S>& grad_log_sum_exp = {}) {
  const Forward<S> forward = project_forward(q, k, bandwidth, log_prior, heads, mask);
  detail::require_shape("grad_out", grad_out, forward.out.rows(), forward.out.cols());
  detail::require_shape_or_none("grad_log_sum_exp", grad_log_sum_exp, q.rows(), heads.query);
  const Index group = heads.query / heads.key_value;
  const Index prior_columns = log_prior.cols() == 0 ? heads.key_value : log_prior.cols();
  SurfaceGradients<S> grad{detail::zeros_like(q), detail::zeros_like(k), S(0),
                           Matrix<S>::Constant(k.rows(), prior_columns, S(0))};
  for (Index h = 0; h < heads.query; ++h) {
    const Index g = h / group;
    const Matrix<S> q_h = detail::head_of(q, h, heads.query);
    const Matrix<S> k_h = detail::head_of(k, g, heads.key_value);
    const Matrix<S>& weights = forward.weights[static_cast<std::size_t>(h)];
    // forward: P(q_i) = sum_j W_ij k_j
    const auto sum = detail::weighted_sum_backward(weights, k_h, mask,
                                                   detail::head_of(grad_out, h, heads.query));
    // forward: W = softmax_j S,  L_i = log sum_j exp S_ij
    const Matrix<S> grad_scores = detail::softmax_backward(
        weights, sum.weights, detail::column_or_zero(grad_log_sum_exp, h, q.rows()), mask);
    // forward: S_ij = -||q_i - k_j||^2 / (2 sigma^2) + log pi_j
    const auto scores = detail::distance_scores_backward(q_h, k_h, bandwidth, mask, grad_scores);
    detail::add_to_head(grad.queries, scores.queries, h);
    detail::add_to_head(grad.keys, sum.values, g);
    detail::add_to_head(grad.keys, scores.keys, g);
    grad.bandwidth += scores.bandwidth;
    grad.log_prior.col(prior_columns == 1 ? 0 : g) += scores.log_prior;
  }
  return grad;
}

/// The prior under which the surface form has the weights of standard attention with
/// beta = 1 / sigma^2: log pi_j = ||k_j||^2 / (2 sigma^2) for each key head. Tk x Hkv.
template <class S>
Matrix<S> sdpa_log_prior(const Matrix<S>& keys, std::type_identity_t<S> bandwidth,
                         Heads heads = {}) {
  detail::require_heads(heads);
  detail::require_columns("keys", keys, heads.key_value);
  Matrix<S> log_prior = Matrix<S>::Constant(keys.rows(), heads.key_value, S(0));
  const S variance = bandwidth * bandwidth;
  for (Index g = 0; g < heads.key_value; ++g) {
    const Matrix<S> k_g = detail::head_of(keys, g, heads.key_value);
    for (Index j = 0; j < keys.rows(); ++j) {
      const S half_norm = detail::dot(k_g, j, k_g, j) / S(2);
      log_prior(j, g) = half_norm / variance;
    }
  }
  return log_prior;
}

/// Gradients of project_forward(q, k, sigma, sdpa_log_prior(k, sigma, heads), heads, mask): the
/// prior moves with the keys and the bandwidth, and their gradients include that. log_prior (Tk x
/// Hkv) is the partial derivative with respect to something added to the prior.
template <class S>
SurfaceGradients<S> project_backward_sdpa(const Matrix<S>& q, const Matrix<S>& k,
                                          std::type_identity_t<S> bandwidth, Heads heads,
                                          const Mask& mask, const Matrix<S>& grad_out,
                                          const Matrix<S>& grad_log_sum_exp = {}) {
  const Matrix<S> log_prior = sdpa_log_prior(k, bandwidth, heads);
  SurfaceGradients<S> grad =
      project_backward(q, k, bandwidth, log_prior, heads, mask, grad_out, grad_log_sum_exp);
  const S variance = bandwidth * bandwidth;
  for (Index g = 0; g < heads.key_value; ++g) {
    const Matrix<S> k_g = detail::head_of(k, g, heads.key_value);
    Matrix<S> grad_k = detail::zeros_like(k_g);
    for (Index j = 0; j < k.rows(); ++j) {
      if (!detail::is_attended(mask, j, q.rows())) continue;
      // forward: log pi_j = ||k_j||^2 / (2 sigma^2)
      //   =>  dk_j += dlog pi_j k_j / sigma^2,  dsigma -= dlog pi_j ||k_j||^2 / sigma^3
      const S scaled = grad.log_prior(j, g) / variance;
      const S squared_norm = detail::dot(k_g, j, k_g, j);
      const S stretched = scaled * squared_norm;
      const S by_bandwidth = stretched / bandwidth;
      grad_k.row(j) = scaled * k_g.row(j);
      grad.bandwidth -= by_bandwidth;
    }
    detail::add_to_head(grad.keys, grad_k, g);
  }
  return grad;
}

/// Output (Tx x Dout) of a whole attention layer in the standard form:
/// attention(X Wq + bq, Y Wk + bk, Y Wv + bv) Wo + bo.
///
/// x: Tx x D, the inputs of the queries; y: Ty x Dy, the inputs of keys and values; scale: beta;
/// mask: Tx x Ty or 0 x 0. A fully masked row gives bo, or 0 without an output bias.
template <class S>
Matrix<S> layer_forward(const Matrix<S>& x, const Matrix<S>& y, const LayerWeights<S>& weights,
                        std::type_identity_t<S> scale, Heads heads = {}, const Mask& mask = {}) {
  const Matrix<S> q = detail::affine(x, weights.query, weights.query_bias);
  const Matrix<S> k = detail::affine(y, weights.key, weights.key_bias);
  const Matrix<S> v = detail::affine(y, weights.value, weights.value_bias);
  const Forward<S> attention = attention_forward(q, k, v, scale, heads, mask);
  return detail::affine(attention.out, weights.output, weights.output_bias);
}

/// The norms of `norm` below. layer: Ba, Kiros and Hinton 2016; rms: Zhang and Sennrich 2019.
enum class Norm { layer, rms, l2 };

/// y = gain * (x - m) / sqrt(s + epsilon) + bias for each head's block of each row, where
///   layer: m = mean x, s = mean (x - m)^2;   rms: m = 0, s = mean x^2;   l2: m = 0, s = sum x^2.
///
/// x: T x (H n); gain and bias: 1 x (H n), 1 x n (shared by all heads) or of size 0 for none.
template <class S>
Matrix<S> norm(Norm kind, const Matrix<S>& x, const RowVector<S>& gain, const RowVector<S>& bias,
               std::type_identity_t<S> epsilon, Index heads = 1) {
  using std::sqrt;
  detail::require_columns("x", x, heads);
  const Index n = x.cols() / heads;
  Matrix<S> y = detail::zeros_like(x);
  for (Index i = 0; i < x.rows(); ++i) {
    for (Index h = 0; h < heads; ++h) {
      S mean(0), squares(0);
      for (Index c = 0; kind == Norm::layer && c < n; ++c) mean += x(i, h * n + c);
      mean /= S(double(n));
      for (Index c = 0; c < n; ++c) {
        const S centred = x(i, h * n + c) - mean;
        const S square = centred * centred;
        squares += square;
      }
      if (kind != Norm::l2) squares /= S(double(n));
      const S variance = squares + epsilon;
      const S deviation = sqrt(variance);
      for (Index c = h * n; c < (h + 1) * n; ++c) {
        const S centred = x(i, c) - mean;
        y(i, c) = centred / deviation;
        if (gain.size() != 0) y(i, c) *= gain(gain.size() == x.cols() ? c : c - h * n);
        if (bias.size() != 0) y(i, c) += bias(bias.size() == x.cols() ? c : c - h * n);
      }
    }
  }
  return y;
}

namespace detail {

/// x = C^-1 b for a symmetric positive definite C, by Gaussian elimination, which needs no pivoting
/// there.
template <class S>
Matrix<S> solved(Matrix<S> c, Matrix<S> b) {
  const Index n = c.rows();
  for (Index p = 0; p < n; ++p) {
    for (Index r = p + 1; r < n; ++r) {
      const S factor = c(r, p) / c(p, p);
      c.row(r) -= factor * c.row(p);
      b.row(r) -= factor * b.row(p);
    }
  }
  for (Index p = n - 1; p >= 0; --p) {
    for (Index r = p + 1; r < n; ++r) b.row(p) -= c(p, r) * b.row(r);
    b.row(p) /= c(p, p);
  }
  return b;
}

/// sum_j w_j (a_j - mean_a)^T (b_j - mean_b) over the keys that query i may attend to.
template <class S>
Matrix<S> weighted_covariance(const Matrix<S>& weights, Index i, const Matrix<S>& a,
                              const Matrix<S>& mean_a, const Matrix<S>& b, const Matrix<S>& mean_b,
                              const Mask& mask) {
  Matrix<S> sum = Matrix<S>::Constant(a.cols(), b.cols(), S(0));
  for (const Index j : attended_keys(mask, i, a.rows())) {
    const Matrix<S> from_a = a.row(j) - mean_a.row(i);
    const Matrix<S> from_b = b.row(j) - mean_b.row(i);
    for (Index r = 0; r < a.cols(); ++r) {
      const S weighted = weights(i, j) * from_a(0, r);
      sum.row(r) += weighted * from_b;
    }
  }
  return sum;
}

}  // namespace detail

/// Local-linear estimate: with the weights W of project_forward, mu_i = sum_j W_ij k_j,
/// C_i = sum_j W_ij (k_j - mu_i)^T (k_j - mu_i) + lambda I, z_i = (q_i - mu_i) C_i^-1,
///   f_i = q_i - lambda z_i                                                  (v is 0 x 0: V = K)
///   f_i = vm_i + z_i S_i,  vm_i = sum_j W_ij v_j,  S_i = sum_j W_ij (k_j - mu_i)^T (v_j - vm_i).
///
/// q, k, log_prior, heads and mask as for project_forward; v: Tk x (Hkv dv) or 0 x 0. A fully masked
/// row gives 0. Source: Cleveland 1979; Fan 1993.
template <class S>
Matrix<S> local_linear(const Matrix<S>& q, const Matrix<S>& k, const Matrix<S>& v,
                       std::type_identity_t<S> bandwidth, std::type_identity_t<S> ridge,
                       const Matrix<S>& log_prior = {}, Heads heads = {}, const Mask& mask = {}) {
  const Forward<S> projection = project_forward(q, k, bandwidth, log_prior, heads, mask);
  const bool values_are_keys = v.rows() == 0 && v.cols() == 0 && k.rows() > 0;
  const Matrix<S>& values = values_are_keys ? k : v;
  const Index group = heads.query / heads.key_value, d = q.cols() / heads.query;
  Matrix<S> result =
      Matrix<S>::Constant(q.rows(), heads.query * (values.cols() / heads.key_value), S(0));
  for (Index h = 0; h < heads.query; ++h) {
    const Matrix<S> q_h = detail::head_of(q, h, heads.query);
    const Matrix<S> k_h = detail::head_of(k, h / group, heads.key_value);
    const Matrix<S> v_h = detail::head_of(values, h / group, heads.key_value);
    const Matrix<S> mean = detail::head_of(projection.out, h, heads.query);
    const Matrix<S>& weights = projection.weights[static_cast<std::size_t>(h)];
    const Matrix<S> mean_value = detail::weighted_sum(weights, v_h, mask);
    Matrix<S> f = detail::zeros_like(mean_value);
    for (Index i = 0; i < q.rows(); ++i) {
      if (detail::attended_keys(mask, i, k.rows()).empty()) continue;
      Matrix<S> c = detail::weighted_covariance(weights, i, k_h, mean, k_h, mean, mask);
      for (Index r = 0; r < d; ++r) c(r, r) += ridge;
      const Matrix<S> offset = (q_h.row(i) - mean.row(i)).transpose();
      const Matrix<S> z = detail::solved<S>(c, offset).transpose();
      if (values_are_keys) {
        f.row(i) = q_h.row(i) - ridge * z;
        continue;
      }
      const Matrix<S> cross =
          detail::weighted_covariance(weights, i, k_h, mean, v_h, mean_value, mask);
      f.row(i) = mean_value.row(i);
      for (Index r = 0; r < d; ++r) f.row(i) += z(0, r) * cross.row(r);
    }
    detail::add_to_head(result, f, h);
  }
  return result;
}

}  // namespace surfattn::reference
