// surfattn layer 4: what the engine computes with; it knows no form

#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <surfattn/detail/require.hpp>
#include <surfattn/detail/view.hpp>

namespace surfattn::detail {

/// The rows of one sequence in a matrix with one row for each query, or for each key, of the batch.
template <class Scalar>
MatrixView<Scalar> query_rows(MatrixView<Scalar> batch, const Shape& sequence) {
  return batch.block_rows(sequence.first_query, sequence.queries);
}
template <class Scalar>
MatrixView<Scalar> key_rows(MatrixView<Scalar> batch, const Shape& sequence) {
  return batch.block_rows(sequence.first_key, sequence.keys);
}

/// Keys and values of some tokens, and the log-priors of the keys.
template <class Scalar>
struct KeySegment {
  MatrixView<const Scalar> keys;
  MatrixView<const Scalar> values;
  MatrixView<const accumulator_t<Scalar>> log_prior;
};

/// One attention problem, in either form:
///
///     S_ij = scale·q_i·k_j + b_j,   b_j = key_norm_weight·‖k_j‖² + log_prior_j,
///     W = softmax_j S,   O = W·V,   L_i = log Σ_j exp S_ij + query_norm_weight·‖q_i‖².
///
/// The standard form has no norms and no prior. The surface form, S_ij = −‖q_i − k_j‖²/(2σ²) + log
/// π_j, has scale = 1/σ², norm weights −scale/2 and V = K. The norm of the query is the same for
/// all its scores: it cancels in the softmax and is added to L alone, since in the scores it would
/// cost digits.
template <class Scalar>
struct Operands {
  using Accumulator = accumulator_t<Scalar>;

  Shape shape;
  MatrixView<const Scalar> queries;
  MatrixView<const Scalar> keys;
  /// the keys once more where `values_are_keys`: the left columns of each head, if they are wider
  MatrixView<const Scalar> values;
  /// Tk × Hkv, col_stride 0 where all heads share one; no data where there is none
  MatrixView<const Accumulator> log_prior;
  Accumulator scale{1};
  Accumulator query_norm_weight{0};
  Accumulator key_norm_weight{0};
  bool values_are_keys = false;
  /// whether `log_prior` is −(scale/2)·‖k_j‖² and nothing else: norms that were formed before
  bool log_prior_is_of_norms = false;
  /// The keys that follow those above, where a single sequence has more than these: a ring buffer
  /// that has come round, or what follows a past that several sequences share. For forward passes.
  KeySegment<Scalar> more = {};

  /// Whether the scores are −‖q − k‖²/(2σ²), up to what the norm of the query adds.
  bool scores_are_distances() const {
    return log_prior_is_of_norms || (key_norm_weight != Accumulator(0) && !log_prior.data);
  }

  MatrixView<const Scalar> query_head(Index head) const {
    return queries.block_cols(head * shape.head_dim, shape.head_dim);
  }
  MatrixView<const Scalar> key_head(Index head) const { return head_of_keys(keys, head); }
  MatrixView<const Scalar> value_head(Index head) const { return head_of_values(values, head); }

  /// How many of the `wanted` keys from `first` on lie in one segment: the end of a run of keys.
  Index run_of_keys(Index first, Index wanted) const {
    return first < keys.rows ? std::min(wanted, keys.rows - first) : wanted;
  }

  /// The keys [first, first + count) of all heads, in one segment.
  KeySegment<Scalar> segment_of(Index first, Index count) const {
    return {in_segment(keys, more.keys, first, count),
            in_segment(values, more.values, first, count), log_prior_of(first, count)};
  }

  /// The same of one head, and what is shared by all. From the parts alone: a whole segment would be
  /// copied in memory for each, see simd/streaming.hpp.
  MatrixView<const Scalar> keys_of(Index head, Index first, Index count) const {
    return head_of_keys(in_segment(keys, more.keys, first, count), head);
  }
  MatrixView<const Scalar> values_of(Index head, Index first, Index count) const {
    return head_of_values(in_segment(values, more.values, first, count), head);
  }
  MatrixView<const Accumulator> log_prior_of(Index first, Index count) const {
    return in_segment(log_prior, more.log_prior, first, count);
  }

  /// The problem of one sequence of the batch.
  SURFATTN_NEVER_INLINE Operands of_sequence(Index index) const {
    Operands one = *this;
    one.shape = shape.of_sequence(index);
    one.queries = query_rows(queries, one.shape);
    if (keys.rows < shape.keys) return one;  // segments are of one sequence
    one.keys = key_rows(keys, one.shape);
    one.values = key_rows(values, one.shape);
    one.log_prior = key_rows(log_prior, one.shape);
    return one;
  }

 private:
  /// The rows of some keys, which lie in `rows` or in what follows these.
  template <class Element>
  MatrixView<Element> in_segment(const MatrixView<Element>& rows, const MatrixView<Element>& later,
                                 Index first, Index count) const {
    return first < keys.rows ? rows.block_rows(first, count)
                             : later.block_rows(first - keys.rows, count);
  }
  MatrixView<const Scalar> head_of_keys(const MatrixView<const Scalar>& rows, Index head) const {
    return rows.block_cols(head * shape.head_dim, shape.head_dim);
  }
  MatrixView<const Scalar> head_of_values(const MatrixView<const Scalar>& rows, Index head) const {
    return rows.block_cols(head * (values_are_keys ? shape.head_dim : shape.value_dim),
                           shape.value_dim);
  }
};

/// What the forward pass writes.
template <class Scalar>
struct ForwardOutputs {
  MatrixView<Scalar> out;
  /// absent where nobody asked for it
  std::optional<MatrixView<accumulator_t<Scalar>>> log_sum_exp;

  SURFATTN_NEVER_INLINE ForwardOutputs of_sequence(const Shape& sequence) const {
    ForwardOutputs one{query_rows(out, sequence), {}};
    if (log_sum_exp) one.log_sum_exp = query_rows(*log_sum_exp, sequence);
    return one;
  }
};

/// What the backward pass reads of the forward pass and of the loss.
template <class Scalar>
struct Upstream {
  MatrixView<const Scalar> out;
  MatrixView<const accumulator_t<Scalar>> log_sum_exp;
  MatrixView<const Scalar> grad_out;
  /// absent where the loss does not depend on it
  std::optional<MatrixView<const accumulator_t<Scalar>>> grad_log_sum_exp = {};

  /// ∂loss/∂L_i; a row that saw no key has none, whatever stands there.
  accumulator_t<Scalar> grad_log_sum_exp_of(Index query, Index head) const {
    using Accumulator = accumulator_t<Scalar>;
    const bool counts = grad_log_sum_exp &&
                        log_sum_exp(query, head) != -std::numeric_limits<Accumulator>::infinity();
    return counts ? (*grad_log_sum_exp)(query, head) : Accumulator(0);
  }

  SURFATTN_NEVER_INLINE Upstream of_sequence(const Shape& sequence) const {
    Upstream one{query_rows(out, sequence), query_rows(log_sum_exp, sequence),
                 query_rows(grad_out, sequence)};
    if (grad_log_sum_exp) one.grad_log_sum_exp = query_rows(*grad_log_sum_exp, sequence);
    return one;
  }
};

/// r_i = Σ_j dS_ij of the raw scores of one sequence. Where no term changes them it is ∂loss/∂L_i,
/// for the gradient of a softmax alone sums to 0.
template <class Scalar>
struct RawRowSums {
  using Accumulator = accumulator_t<Scalar>;

  const Accumulator* sums = nullptr;  ///< at head·Tq + i, where terms change the scores
  Upstream<Scalar> upstream = {};

  bool are_zero() const { return !sums && !upstream.grad_log_sum_exp; }
  Accumulator of(Index head, Index query) const {
    return sums ? sums[head * upstream.out.rows + query]
                : upstream.grad_log_sum_exp_of(query, head);
  }
};

/// What the backward pass writes. Where the values are the keys, `keys` receives both parts.
template <class Scalar>
struct GradientOutputs {
  MatrixView<Scalar> queries;
  MatrixView<Scalar> keys;
  std::optional<MatrixView<Scalar>> values;  ///< absent where the values are the keys
  /// c_j = Σ_i dS_ij, Tk × Hkv; absent where nobody asked for it
  std::optional<MatrixView<accumulator_t<Scalar>>> key_bias;
  /// where blocks of keys add up dQ: `queries` itself, unless its numbers are too short for sums
  MatrixView<accumulator_t<Scalar>> query_sums = {};

  SURFATTN_NEVER_INLINE GradientOutputs of_sequence(const Shape& sequence) const {
    GradientOutputs one{query_rows(queries, sequence), key_rows(keys, sequence), {}, {}};
    if (values) one.values = key_rows(*values, sequence);
    if (key_bias) one.key_bias = key_rows(*key_bias, sequence);
    one.query_sums = query_rows(query_sums, sequence);
    return one;
  }
};

}  // namespace surfattn::detail
