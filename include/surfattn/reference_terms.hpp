// surfattn layer 8: plain reference of modifiers, biases, sinks and dropout, for any scalar type,
// sharing no engine code.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <surfattn/reference.hpp>
#include <vector>

/// Both forms with terms, written out as reference.hpp writes them without: every score is stored
/// at every stage. The conventions are those of reference.hpp. What scores go through, in order:
///
///     raw scores -> modifiers, one after the other -> + biases -> masks -> softmax with sinks
///
/// and the weights are multiplied by factors (dropout) before they meet the values. Biases and factors are
/// given as matrices; the functions below make those of each term, and take their gradient back.
namespace surfattn::reference {

/// For each query head a matrix Tq x Tk.
template <class S>
using HeadMatrices = std::vector<Matrix<S>>;

/// A function of a score and of its query head, query and key, and its derivative by the score.
template <class S>
struct ScoreModifier {
  std::function<S(const S&score, Index head, Index i, Index j)> value, derivative;
};

template <class S>
struct Terms {
  Mask mask;                                ///< Tq x Tk or 0 x 0
  std::vector<ScoreModifier<S>> modifiers;  ///< each acts on what the one before it left
  std::vector<HeadMatrices<S>> biases;      ///< added; -infinity hides the pair as the mask does
  std::vector<Matrix<S>> sinks;             ///< each 1 x Hq
  std::vector<HeadMatrices<S>> weight_factors;  ///< multiply the weights after the softmax
};

/// Gradients at every stage. That of a bias is `scores`.
template <class S>
struct TermGradients {
  HeadMatrices<S> raw_scores;                     ///< of the scores before the modifiers
  std::vector<HeadMatrices<S>> modifier_inputs;   ///< for each modifier, the scores it was given
  std::vector<HeadMatrices<S>> modifier_outputs;  ///< for each modifier, the gradient of its result
  HeadMatrices<S> scores;                         ///< of the scores that the softmax takes
  std::vector<Matrix<S>> sinks;                   ///< each 1 x Hq
};

template <class S>
struct AttentionTermGradients : AttentionGradients<S> {
  TermGradients<S> terms;
};

template <class S>
struct SurfaceTermGradients : SurfaceGradients<S> {
  TermGradients<S> terms;
};

namespace detail {

template <class S>
S minus_infinity() {
  return S(-std::numeric_limits<double>::infinity());
}

/// What query i of a head sees: the mask, less the pairs with a bias of -infinity.
template <class S>
Mask mask_of_head(const Terms<S>& terms, Index head, Index query_count, Index key_count) {
  Mask mask =
      terms.mask.size() == 0 ? Mask(Mask::Constant(query_count, key_count, true)) : terms.mask;
  for (const HeadMatrices<S>& bias : terms.biases) {
    const Matrix<S>& b = bias[static_cast<std::size_t>(head)];
    require_shape("bias", b, query_count, key_count);
    for (Index i = 0; i < query_count; ++i) {
      for (Index j = 0; j < key_count; ++j) {
        if (b(i, j) == minus_infinity<S>()) mask(i, j) = false;
      }
    }
  }
  return mask;
}

/// The scores of one head at every stage: [0] raw, [n] after modifier n, and the last with biases.
template <class S>
std::vector<Matrix<S>> score_stages(const Matrix<S>& raw, const Terms<S>& terms, const Mask& mask,
                                    Index head) {
  std::vector<Matrix<S>> stages{raw};
  for (const ScoreModifier<S>& modifier : terms.modifiers) {
    Matrix<S> modified = zeros_like(raw);
    for (Index i = 0; i < raw.rows(); ++i) {
      for (const Index j : attended_keys(mask, i, raw.cols()))
        modified(i, j) = modifier.value(stages.back()(i, j), head, i, j);
    }
    stages.push_back(modified);
  }
  Matrix<S> biased = stages.back();
  for (const HeadMatrices<S>& bias : terms.biases) {
    for (Index i = 0; i < raw.rows(); ++i) {
      for (const Index j : attended_keys(mask, i, raw.cols()))
        biased(i, j) += bias[static_cast<std::size_t>(head)](i, j);
    }
  }
  stages.push_back(biased);
  return stages;
}

/// A sink is one more key, whose score is the same for all queries: scores with a column for each.
template <class S>
Matrix<S> with_sinks(const Matrix<S>& scores, const Terms<S>& terms, Index head) {
  Matrix<S> extended(scores.rows(), scores.cols() + static_cast<Index>(terms.sinks.size()));
  extended.leftCols(scores.cols()) = scores;
  Index column = scores.cols();
  for (const Matrix<S>& sink : terms.sinks) extended.col(column++).setConstant(sink(0, head));
  return extended;
}

/// Every query sees every sink that is not -infinity.
template <class S>
Mask with_sinks(const Mask& mask, const Terms<S>& terms, Index head) {
  Mask extended(mask.rows(), mask.cols() + static_cast<Index>(terms.sinks.size()));
  extended.leftCols(mask.cols()) = mask;
  Index column = mask.cols();
  for (const Matrix<S>& sink : terms.sinks)
    extended.col(column++).setConstant(!(sink(0, head) == minus_infinity<S>()));
  return extended;
}

/// weights o factors of every dropout
template <class S>
Matrix<S> dropped(const Matrix<S>& weights, const Terms<S>& terms, Index head) {
  Matrix<S> result = weights;
  for (const HeadMatrices<S>& factors : terms.weight_factors)
    result = result.cwiseProduct(factors[static_cast<std::size_t>(head)]).eval();
  return result;
}

/// One head from its raw scores on.
template <class S>
void append_head(Forward<S>& result, const Matrix<S>& raw, const Matrix<S>& v,
                 const Terms<S>& terms, const Mask& mask, Index head) {
  const Matrix<S> scores = score_stages(raw, terms, mask, head).back();
  const Softmax<S> attention =
      softmax(with_sinks(scores, terms, head), with_sinks(mask, terms, head));
  const Matrix<S> weights = dropped<S>(attention.weights.leftCols(raw.cols()), terms, head);
  add_to_head(result.out, weighted_sum(weights, v, mask), head);
  result.log_sum_exp.col(head) = attention.log_sum_exp;
  result.weights.push_back(weights);
}

/// Gradients of one head's values; those of its raw scores are returned.
template <class S>
Matrix<S> head_backward(TermGradients<S>& grad, const Matrix<S>& raw, const Matrix<S>& v,
                        const Terms<S>& terms, const Mask& mask, Index head,
                        const Matrix<S>& grad_out, const Matrix<S>& grad_log_sum_exp,
                        Matrix<S>& grad_values) {
  const std::vector<Matrix<S>> stages = score_stages(raw, terms, mask, head);
  const Mask seen = with_sinks(mask, terms, head);
  const Matrix<S> weights = softmax(with_sinks(stages.back(), terms, head), seen).weights;
  // forward: O = (W o M) V
  const auto sum = weighted_sum_backward(dropped<S>(weights.leftCols(raw.cols()), terms, head), v,
                                         mask, grad_out);
  grad_values = sum.values;
  Matrix<S> grad_weights = zeros_like(weights);
  grad_weights.leftCols(raw.cols()) = dropped(sum.weights, terms, head);
  // forward: W = softmax of scores and sinks
  const Matrix<S> grad_all = softmax_backward(weights, grad_weights, grad_log_sum_exp, seen);
  for (std::size_t n = 0; n < terms.sinks.size(); ++n)
    grad.sinks[n](0, head) = grad_all.col(raw.cols() + static_cast<Index>(n)).sum();
  Matrix<S> grad_scores = grad_all.leftCols(raw.cols());
  grad.scores.push_back(grad_scores);
  // forward: modified = f(score)
  for (std::size_t n = terms.modifiers.size(); n-- > 0;) {
    grad.modifier_inputs[n].push_back(stages[n]);
    grad.modifier_outputs[n].push_back(grad_scores);
    for (Index i = 0; i < raw.rows(); ++i) {
      for (const Index j : attended_keys(mask, i, raw.cols()))
        grad_scores(i, j) *= terms.modifiers[n].derivative(stages[n](i, j), head, i, j);
    }
  }
  grad.raw_scores.push_back(grad_scores);
  return grad_scores;
}

template <class S>
TermGradients<S> empty_term_gradients(const Terms<S>& terms, Heads heads) {
  TermGradients<S> grad;
  grad.modifier_inputs.resize(terms.modifiers.size());
  grad.modifier_outputs.resize(terms.modifiers.size());
  grad.sinks.assign(terms.sinks.size(), Matrix<S>::Constant(1, heads.query, S(0)));
  return grad;
}

}  // namespace detail

/// The standard form with terms: attention_forward of reference.hpp, the scores changed on their
/// way. `weights` of the result are those that meet the values, after dropout.
template <class S>
Forward<S> attention_forward(const Matrix<S>& q, const Matrix<S>& k, const Matrix<S>& v,
                             std::type_identity_t<S> scale, Heads heads, const Terms<S>& terms) {
  detail::require_attention(q, k, v, heads, terms.mask);
  const Index group = heads.query / heads.key_value;
  Forward<S> result = detail::empty_forward<S>(q.rows(), heads.query, v.cols() / heads.key_value);
  for (Index h = 0; h < heads.query; ++h) {
    const Mask mask = detail::mask_of_head(terms, h, q.rows(), k.rows());
    const Matrix<S> raw =
        detail::dot_scores(detail::head_of(q, h, heads.query),
                           detail::head_of(k, h / group, heads.key_value), scale, mask);
    detail::append_head(result, raw, detail::head_of(v, h / group, heads.key_value), terms, mask,
                        h);
  }
  return result;
}

/// Its gradients for the loss sum dO * O + sum dL * L.
template <class S>
AttentionTermGradients<S> attention_backward(const Matrix<S>& q, const Matrix<S>& k,
                                             const Matrix<S>& v, std::type_identity_t<S> scale,
                                             Heads heads, const Terms<S>& terms,
                                             const Matrix<S>& grad_out,
                                             const Matrix<S>& grad_log_sum_exp = {}) {
  detail::require_attention(q, k, v, heads, terms.mask);
  const Index group = heads.query / heads.key_value;
  AttentionTermGradients<S> grad{
      {detail::zeros_like(q), detail::zeros_like(k), detail::zeros_like(v)},
      detail::empty_term_gradients(terms, heads)};
  for (Index h = 0; h < heads.query; ++h) {
    const Index g = h / group;
    const Mask mask = detail::mask_of_head(terms, h, q.rows(), k.rows());
    const Matrix<S> q_h = detail::head_of(q, h, heads.query);
    const Matrix<S> k_h = detail::head_of(k, g, heads.key_value);
    const Matrix<S> raw = detail::dot_scores(q_h, k_h, scale, mask);
    Matrix<S> grad_values;
    const Matrix<S> grad_raw =
        detail::head_backward(grad.terms, raw, detail::head_of(v, g, heads.key_value), terms, mask,
                              h, detail::head_of(grad_out, h, heads.query),
                              detail::column_or_zero(grad_log_sum_exp, h, q.rows()), grad_values);
    const auto scores = detail::dot_scores_backward(q_h, k_h, scale, mask, grad_raw);
    detail::add_to_head(grad.queries, scores.queries, h);
    detail::add_to_head(grad.keys, scores.keys, g);
    detail::add_to_head(grad.values, grad_values, g);
  }
  return grad;
}

/// The surface form with terms: modifiers see -||q_i - k_j||^2 / (2 sigma^2) + log pi_j.
template <class S>
Forward<S> project_forward(const Matrix<S>& q, const Matrix<S>& k,
                           std::type_identity_t<S> bandwidth, const Matrix<S>& log_prior,
                           Heads heads, const Terms<S>& terms) {
  detail::require_surface(q, k, log_prior, heads, terms.mask);
  const Index group = heads.query / heads.key_value;
  Forward<S> result = detail::empty_forward<S>(q.rows(), heads.query, k.cols() / heads.key_value);
  for (Index h = 0; h < heads.query; ++h) {
    const Mask mask = detail::mask_of_head(terms, h, q.rows(), k.rows());
    const Matrix<S> k_h = detail::head_of(k, h / group, heads.key_value);
    const Matrix<S> prior = detail::column_or_zero(log_prior, h / group, k.rows());
    const Matrix<S> raw =
        detail::distance_scores(detail::head_of(q, h, heads.query), k_h, bandwidth, prior, mask);
    detail::append_head(result, raw, k_h, terms, mask, h);
  }
  return result;
}

/// Its gradients for the loss sum dO * P + sum dL * L, with log_prior held fixed.
template <class S>
SurfaceTermGradients<S> project_backward(const Matrix<S>& q, const Matrix<S>& k,
                                         std::type_identity_t<S> bandwidth,
                                         const Matrix<S>& log_prior, Heads heads,
                                         const Terms<S>& terms, const Matrix<S>& grad_out,
                                         const Matrix<S>& grad_log_sum_exp = {}) {
  detail::require_surface(q, k, log_prior, heads, terms.mask);
  const Index group = heads.query / heads.key_value;
  const Index prior_columns = log_prior.cols() == 0 ? heads.key_value : log_prior.cols();
  SurfaceTermGradients<S> grad{{detail::zeros_like(q), detail::zeros_like(k), S(0),
                                Matrix<S>::Constant(k.rows(), prior_columns, S(0))},
                               detail::empty_term_gradients(terms, heads)};
  for (Index h = 0; h < heads.query; ++h) {
    const Index g = h / group;
    const Mask mask = detail::mask_of_head(terms, h, q.rows(), k.rows());
    const Matrix<S> q_h = detail::head_of(q, h, heads.query);
    const Matrix<S> k_h = detail::head_of(k, g, heads.key_value);
    const Matrix<S> raw = detail::distance_scores(
        q_h, k_h, bandwidth, detail::column_or_zero(log_prior, g, k.rows()), mask);
    Matrix<S> grad_values;
    const Matrix<S> grad_raw = detail::head_backward(
        grad.terms, raw, k_h, terms, mask, h, detail::head_of(grad_out, h, heads.query),
        detail::column_or_zero(grad_log_sum_exp, h, q.rows()), grad_values);
    const auto scores = detail::distance_scores_backward(q_h, k_h, bandwidth, mask, grad_raw);
    detail::add_to_head(grad.queries, scores.queries, h);
    detail::add_to_head(grad.keys, grad_values, g);
    detail::add_to_head(grad.keys, scores.keys, g);
    grad.bandwidth += scores.bandwidth;
    grad.log_prior.col(prior_columns == 1 ? 0 : g) += scores.log_prior;
  }
  return grad;
}

/// cap tanh(score / cap)
template <class S>
ScoreModifier<S> soft_cap(const S& cap) {
  using std::tanh;
  const auto tangent = [cap](const S& score) {
    const S ratio = score / cap;
    return S(tanh(ratio));
  };
  return {[=](const S& score, Index, Index, Index) { return S(cap * tangent(score)); },
          [=](const S& score, Index, Index, Index) {
            const S t = tangent(score);
            return S(S(1) - t * t);
          }};
}

/// factor_h score; factors: 1 x Hq.
template <class S>
ScoreModifier<S> temperature(const Matrix<S>& factors) {
  return {[=](const S& score, Index h, Index, Index) { return S(factors(0, h) * score); },
          [=](const S&, Index h, Index, Index) { return factors(0, h); }};
}

/// dfactor_h = sum_ij dS_ij score_ij; 1 x Hq.
template <class S>
Matrix<S> temperature_backward(const HeadMatrices<S>& inputs, const HeadMatrices<S>& grad_outputs) {
  Matrix<S> grad(1, static_cast<Index>(inputs.size()));
  for (std::size_t h = 0; h < inputs.size(); ++h)
    grad(0, static_cast<Index>(h)) = inputs[h].cwiseProduct(grad_outputs[h]).sum();
  return grad;
}

/// A matrix for each query head from one function of head, query and key.
template <class S, class Function>
HeadMatrices<S> head_matrices(Index heads, Index query_count, Index key_count,
                              const Function& function) {
  HeadMatrices<S> matrices(static_cast<std::size_t>(heads), Matrix<S>(query_count, key_count));
  for (Index h = 0; h < heads; ++h) {
    for (Index i = 0; i < query_count; ++i) {
      for (Index j = 0; j < key_count; ++j)
        matrices[static_cast<std::size_t>(h)](i, j) = function(h, i, j);
    }
  }
  return matrices;
}

/// Calls use(dS_ij, h, i, j) for the gradient of every score.
template <class S, class Use>
void for_each_gradient(const HeadMatrices<S>& grad_scores, const Use& use) {
  for (std::size_t h = 0; h < grad_scores.size(); ++h) {
    for (Index i = 0; i < grad_scores[h].rows(); ++i) {
      for (Index j = 0; j < grad_scores[h].cols(); ++j)
        use(grad_scores[h](i, j), static_cast<Index>(h), i, j);
    }
  }
}

/// Bias B(i, j), B(i, h Tk + j), or one row of these for all queries.
template <class S>
HeadMatrices<S> dense_bias(const Matrix<S>& bias, Index heads, Index query_count, Index key_count) {
  return head_matrices<S>(heads, query_count, key_count, [&](Index h, Index i, Index j) {
    return bias(bias.rows() == 1 ? 0 : i, bias.cols() == key_count ? j : h * key_count + j);
  });
}

/// Its gradient, of the shape of the bias: summed over the heads or queries that share a number.
template <class S>
Matrix<S> dense_bias_backward(const HeadMatrices<S>& grad_scores, const Matrix<S>& bias,
                              Index key_count) {
  Matrix<S> grad = detail::zeros_like(bias);
  for_each_gradient(grad_scores, [&](const S& g, Index h, Index i, Index j) {
    grad(bias.rows() == 1 ? 0 : i, bias.cols() == key_count ? j : h * key_count + j) += g;
  });
  return grad;
}

/// -slope_h |i + offset - j|; slopes: 1 x Hq; query i stands at key position i + offset.
template <class S>
HeadMatrices<S> alibi_bias(const Matrix<S>& slopes, Index query_count, Index key_count,
                           Index offset) {
  return head_matrices<S>(slopes.cols(), query_count, key_count, [&](Index h, Index i, Index j) {
    return S(slopes(0, h) * S(-std::abs(static_cast<double>(i + offset - j))));
  });
}

template <class S>
Matrix<S> alibi_backward(const HeadMatrices<S>& grad_scores, Index offset) {
  Matrix<S> grad = Matrix<S>::Constant(1, static_cast<Index>(grad_scores.size()), S(0));
  for_each_gradient(grad_scores, [&](const S& g, Index h, Index i, Index j) {
    grad(0, h) -= g * S(std::abs(static_cast<double>(i + offset - j)));
  });
  return grad;
}

/// Which row of the table a distance key - query has in T5 (Raffel et al. 2020): exact up to half
/// of the buckets of its direction, then logarithmic up to max_distance.
inline Index relative_position_bucket(Index distance, Index buckets, Index max_distance,
                                      bool bidirectional) {
  Index bucket = 0;
  if (bidirectional) {
    buckets /= 2;
    if (distance > 0) bucket = buckets;
    distance = distance < 0 ? -distance : distance;
  } else {
    distance = distance > 0 ? 0 : -distance;
  }
  const Index exact = buckets / 2;
  if (distance < exact) return bucket + distance;
  const double position =
      std::log(double(distance) / double(exact)) / std::log(double(max_distance) / double(exact));
  const Index large = exact + static_cast<Index>(position * double(buckets - exact));
  return bucket + (large < buckets ? large : buckets - 1);
}

/// table(bucket, h); table: buckets x Hq.
template <class S>
HeadMatrices<S> relative_position_bias(const Matrix<S>& table, Index query_count, Index key_count,
                                       Index offset, bool bidirectional, Index max_distance) {
  return head_matrices<S>(table.cols(), query_count, key_count, [&](Index h, Index i, Index j) {
    return table(
        relative_position_bucket(j - i - offset, table.rows(), max_distance, bidirectional), h);
  });
}

template <class S>
Matrix<S> relative_position_backward(const HeadMatrices<S>& grad_scores, Index buckets,
                                     Index offset, bool bidirectional, Index max_distance) {
  Matrix<S> grad = Matrix<S>::Constant(buckets, static_cast<Index>(grad_scores.size()), S(0));
  for_each_gradient(grad_scores, [&](const S& g, Index h, Index i, Index j) {
    grad(relative_position_bucket(j - i - offset, buckets, max_distance, bidirectional), h) += g;
  });
  return grad;
}

/// F(i + offset, h) - F(j, h); F: Tk x Hq, or Tk x 1 for all heads.
template <class S>
HeadMatrices<S> forget_gate_bias(const Matrix<S>& cumulative, Index heads, Index query_count,
                                 Index offset) {
  return head_matrices<S>(heads, query_count, cumulative.rows(), [&](Index h, Index i, Index j) {
    const Index c = cumulative.cols() == 1 ? 0 : h;
    return S(cumulative(i + offset, c) - cumulative(j, c));
  });
}

template <class S>
Matrix<S> forget_gate_backward(const HeadMatrices<S>& grad_scores, const Matrix<S>& cumulative,
                               Index offset) {
  Matrix<S> grad = detail::zeros_like(cumulative);
  for_each_gradient(grad_scores, [&](const S& g, Index h, Index i, Index j) {
    const Index c = cumulative.cols() == 1 ? 0 : h;
    grad(i + offset, c) += g;
    grad(j, c) -= g;
  });
  return grad;
}

/// -rate_h |t_i - t_j|; rates: 1 x Hq; times: Tq x 1 and Tk x 1.
template <class S>
HeadMatrices<S> time_decay_bias(const Matrix<S>& rates, const Matrix<S>& query_times,
                                const Matrix<S>& key_times) {
  using std::abs;
  return head_matrices<S>(rates.cols(), query_times.rows(), key_times.rows(),
                          [&](Index h, Index i, Index j) {
                            const S difference = query_times(i, 0) - key_times(j, 0);
                            const S distance = abs(difference);
                            return S(-rates(0, h) * distance);
                          });
}

template <class S>
Matrix<S> time_decay_backward(const HeadMatrices<S>& grad_scores, const Matrix<S>& query_times,
                              const Matrix<S>& key_times) {
  using std::abs;
  Matrix<S> grad = Matrix<S>::Constant(1, static_cast<Index>(grad_scores.size()), S(0));
  for_each_gradient(grad_scores, [&](const S& g, Index h, Index i, Index j) {
    const S difference = query_times(i, 0) - key_times(j, 0);
    const S distance = abs(difference);
    grad(0, h) -= g * distance;
  });
  return grad;
}

/// Philox4x32-10 (Salmon et al. 2011): ten rounds on four words, the key stepping by Weyl constants.
inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                           std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ull * counter[0], b = 0xCD9E8D57ull * counter[2];
    counter = {std::uint32_t(b >> 32) ^ counter[1] ^ key[0], std::uint32_t(b),
               std::uint32_t(a >> 32) ^ counter[3] ^ key[1], std::uint32_t(a)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
  }
  return counter;
}

/// 0 with probability p and else 1 / (1 - p). The random word of a pair is word j mod 4 of the block
/// at the counter (j / 4, i, h, sequence), under the first two words of the seed's block at `offset`.
template <class S>
HeadMatrices<S> dropout_factors(double p, std::uint64_t seed, std::uint64_t offset, Index sequence,
                                Index heads, Index query_count, Index key_count) {
  const auto block = philox({std::uint32_t(offset), std::uint32_t(offset >> 32), 0, 0},
                            {std::uint32_t(seed), std::uint32_t(seed >> 32)});
  return head_matrices<S>(heads, query_count, key_count, [&](Index h, Index i, Index j) {
    const auto words =
        philox({std::uint32_t(j / 4), std::uint32_t(i), std::uint32_t(h), std::uint32_t(sequence)},
               {block[0], block[1]});
    const double uniform = double(words[static_cast<std::size_t>(j % 4)]) / 4294967296.0;
    return uniform < p ? S(0) : S(1 / (1 - p));
  });
}

}  // namespace surfattn::reference
