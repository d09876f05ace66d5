// surfattn layer 4: one tile of scores, the same code forward and backward

#pragma once

#include <algorithm>
#include <surfattn/detail/operands.hpp>
#include <surfattn/detail/simd/packing.hpp>
#include <surfattn/detail/simd/row_operations.hpp>
#include <surfattn/detail/term_chain.hpp>

/// One tile of scores. Within the engine, scores are in units of ln 2: exp(S) = 2^(S·log₂ e), and
/// log₂ e goes into the operands as they are packed.
namespace surfattn::detail {

/// The factor of queries: the scale, in units of ln 2.
template <class Scalar>
accumulator_t<Scalar> log2_scale(const Operands<Scalar>& operands) {
  return operands.scale * simd::log2_e<accumulator_t<Scalar>>;
}

/// bias_j ← norm_weight·bias_j + log π_j for `keys` keys of the head, from `first` on, where bias
/// holds ‖k_j‖², or 0 where the norms do not count.
template <class Scalar, class Accumulator>
void finish_key_bias(const Operands<Scalar>& operands, Index head, Index first, Index keys,
                     Accumulator* bias) {
  if (operands.key_norm_weight != Accumulator(0)) {
    for (Index j = 0; j < keys; ++j)
      bias[j] *= operands.key_norm_weight * simd::log2_e<Accumulator>;
  }
  if (!operands.log_prior.data) return;
  const auto log_prior = operands.segment_of(first, keys).log_prior;
  for (Index j = 0; j < keys; ++j)
    bias[j] += static_cast<Accumulator>(log_prior(j, head)) * simd::log2_e<Accumulator>;
}

/// b_j = norm_weight·‖k_j‖² + log π_j for the keys `rows`, the head's from `first` on; padded with
/// zeros.
template <class Scalar, class Accumulator>
void fill_key_bias(const Operands<Scalar>& operands, Index head, Index first,
                   MatrixView<const Scalar> rows, Accumulator* bias) {
  std::fill(bias, bias + simd::padded<Accumulator>(rows.rows), Accumulator(0));
  if (operands.key_norm_weight != Accumulator(0)) simd::squared_norms(rows, bias);
  finish_key_bias(operands, head, first, rows.rows, bias);
}

/// What the forward pass packs its operands as: pairs, where the target multiplies them.
template <class Scalar>
using packed_t =
    std::conditional_t<simd::multiplies_pairs && std::is_same_v<Scalar, Eigen::bfloat16>,
                       simd::BFloat16Pair, accumulator_t<Scalar>>;

/// S_ij = scale·q_i·k_j + b_j over the tile, in units of ln 2, unmasked: from packed queries,
/// transposed keys and b. `factor` is the scale where the queries are packed without it.
template <class Element>
void score_tile(const Tile& tile, Index head_dim, const simd::ColumnsOperand<Element>& queries,
                const Element* keys, const simd::sum_t<Element>* bias,
                simd::Tile<simd::sum_t<Element>> scores,
                simd::sum_t<Element> factor = simd::sum_t<Element>(1)) {
  const Index depth = simd::depth_of<Element>(head_dim);
  simd::set_product<Element>(tile.queries, tile.keys, depth, queries,
                             {keys, depth * simd::panel_width<Element>}, scores, bias, factor);
}

/// query_norm_weight·‖q_i‖², what a query adds to its log-sum-exp, for `count` queries from `first` on.
/// Never inlined, where compilers would fuse the product with the sum, or not, differently for
/// different terms.
template <class Scalar>
SURFATTN_NEVER_INLINE void query_offsets(const Operands<Scalar>& operands, Index head, Index first,
                                         Index count, accumulator_t<Scalar>* to) {
  std::fill(to, to + count, accumulator_t<Scalar>(0));
  if (operands.query_norm_weight == accumulator_t<Scalar>(0)) return;
  simd::squared_norms(operands.query_head(head).block_rows(first, count), to);
  for (Index i = 0; i < count; ++i) to[i] *= operands.query_norm_weight;
}

/// The same for one query.
template <class Scalar>
accumulator_t<Scalar> query_offset(const Operands<Scalar>& operands, Index head, Index query) {
  accumulator_t<Scalar> offset;
  query_offsets(operands, head, query, 1, &offset);
  return offset;
}

/// Raw scores → modified ones. Modifiers and sinks see the whole raw score, with the norm of the query
/// that otherwise only goes into the log-sum-exp.
template <class Scalar, class Terms>
void modify_scores(const Operands<Scalar>& operands, const Terms& terms, const Tile& tile,
                   simd::Tile<accumulator_t<Scalar>> scores,
                   const TermRecords<accumulator_t<Scalar>, Terms::records>& records = {}) {
  using Accumulator = accumulator_t<Scalar>;
  if constexpr (Terms::needs_whole_scores) {
    for (Index i = 0; i < tile.queries && operands.query_norm_weight != Accumulator(0); ++i) {
      const Accumulator offset = query_offset(operands, tile.head, tile.first_query + i);
      simd::add_to_row(scores.data + i * scores.row_stride, offset * simd::log2_e<Accumulator>,
                       simd::padded<Accumulator>(tile.keys));
    }
  }
  if constexpr (Terms::modifies_scores) terms.modify_scores(tile, scores, records);
}

/// Raw scores → the scores that the softmax takes: modifiers, then biases.
template <class Scalar, class Terms>
void finish_scores(const Operands<Scalar>& operands, const Terms& terms, const Tile& tile,
                   simd::Tile<accumulator_t<Scalar>> scores,
                   const TermRecords<accumulator_t<Scalar>, Terms::records>& records = {}) {
  modify_scores(operands, terms, tile, scores, records);
  if constexpr (Terms::has_biases) terms.add_biases(tile, scores);
}

/// query_norm_weight·‖q_i‖² where the scores of the softmax do not hold it, and else 0, for `count`
/// queries from `first` on.
template <class Terms, class Scalar>
void offsets_beside_scores(const Operands<Scalar>& operands, Index head, Index first, Index count,
                           accumulator_t<Scalar>* to) {
  if constexpr (Terms::needs_whole_scores) {
    std::fill(to, to + count, accumulator_t<Scalar>(0));
  } else {
    query_offsets(operands, head, first, count, to);
  }
}

/// The same for one query.
template <class Terms, class Scalar>
accumulator_t<Scalar> offset_beside_scores(const Operands<Scalar>& operands, Index head,
                                           Index query) {
  accumulator_t<Scalar> offset;
  offsets_beside_scores<Terms>(operands, head, query, 1, &offset);
  return offset;
}

/// log Σ_j exp S_ij of the scores that a pass forms again, in units of ln 2, for `count` queries from
/// `first` on, where `log_sum_exp` is what the forward pass wrote. A row that saw no key has −∞ there;
/// any finite number in its place gives it weights exp(−∞) = 0.
template <class Terms, class Scalar>
void load_log_sum_exp(const Operands<Scalar>& operands,
                      MatrixView<const accumulator_t<Scalar>> log_sum_exp, Index head, Index first,
                      Index count, accumulator_t<Scalar>* to) {
  using Accumulator = accumulator_t<Scalar>;
  offsets_beside_scores<Terms>(operands, head, first, count, to);
  for (Index i = 0; i < count; ++i) {
    const Accumulator written = log_sum_exp(first + i, head);
    const bool sees_a_key = written != simd::minus_infinity<Accumulator>;
    to[i] = sees_a_key ? (written - to[i]) * simd::log2_e<Accumulator> : Accumulator(0);
  }
}

/// Rows of an input, times `factor`, as a right operand.
template <class Scalar, class Element = accumulator_t<Scalar>>
struct RowOperand {
  using Accumulator = accumulator_t<Scalar>;

  simd::Panels<Element> panels;
  simd::NonFiniteRows non_finite;  ///< these are zeros in the panels
  MatrixView<const Scalar> source;
  Accumulator factor;
};

/// Packs the rows of `source`, times `factor`; `non_finite` has room for all of them.
template <class Scalar, class Element>
RowOperand<Scalar, Element> pack_row_operand(MatrixView<const Scalar> source,
                                             accumulator_t<Scalar> factor, Element* panels,
                                             Index* non_finite) {
  const Index panel_stride = simd::depth_of<Element>(source.rows) * simd::panel_width<Element>;
  RowOperand<Scalar, Element> operand{{panels, panel_stride}, {non_finite, 0}, source, factor};
  simd::pack_panels(source, factor, panels, panel_stride, operand.non_finite);
  return operand;
}

/// The coefficients A of one tile, queries × keys, as a left operand: as they are, where the rows B
/// of the product A·B are keys, or `transposed`, where they are queries.
template <bool transposed, class Accumulator>
auto left_operand(simd::Tile<Accumulator> coefficients) {
  if constexpr (transposed) {
    return simd::ColumnsOperand<Accumulator>{coefficients.data, coefficients.row_stride,
                                             simd::left_width<Accumulator>};
  } else {
    return simd::RowsOperand<Accumulator>{coefficients.data, coefficients.row_stride};
  }
}

/// Adds to C what the rows of B from `first` on that are not finite contribute to A·B, one by one,
/// and only to those rows of C that no mask keeps from seeing them.
template <bool transposed, class Scalar, class Element, class Terms>
void add_non_finite_rows(const Terms& terms, const Tile& tile,
                         simd::Tile<accumulator_t<Scalar>> coefficients,
                         const RowOperand<Scalar, Element>& b, Index first,
                         simd::Tile<accumulator_t<Scalar>> c) {
  const auto a = left_operand<transposed>(coefficients);
  const Index rows = transposed ? tile.keys : tile.queries;
  const Index depth = transposed ? tile.queries : tile.keys;
  for (Index n = 0; n < b.non_finite.count; ++n) {
    const Index k = b.non_finite.rows[n] - first;
    for (Index r = 0; 0 <= k && k < depth && r < rows; ++r) {
      if (!terms.allows(tile.head, tile.first_query + (transposed ? k : r),
                        tile.first_key + (transposed ? r : k)))
        continue;
      const auto weight = a.from(r)[k * a.depth_stride()];
      for (Index col = 0; col < b.source.cols; ++col) {
        c.data[r * c.row_stride + col] +=
            weight * (b.factor * static_cast<accumulator_t<Scalar>>(b.source(first + k, col)));
      }
    }
  }
}

/// C += A·B, where B are the rows of an operand from `first` on.
template <bool transposed, class Scalar, class Terms>
void add_weighted_rows(const Terms& terms, const Tile& tile,
                       simd::Tile<accumulator_t<Scalar>> coefficients, const RowOperand<Scalar>& b,
                       Index first, simd::Tile<accumulator_t<Scalar>> c) {
  simd::Panels<accumulator_t<Scalar>> panels = b.panels;
  panels.data += first * panels.row_stride;
  simd::add_product(transposed ? tile.keys : tile.queries, b.source.cols,
                    transposed ? tile.queries : tile.keys, left_operand<transposed>(coefficients),
                    panels, c);
  add_non_finite_rows<transposed>(terms, tile, coefficients, b, first, c);
}

/// The same with pairs: the coefficients are rounded to bfloat16, in place.
template <bool transposed, class Scalar, class Terms>
requires(!transposed) void add_weighted_rows(const Terms& terms, const Tile& tile,
                                             simd::Tile<float> coefficients,
                                             const RowOperand<Scalar, simd::BFloat16Pair>& b,
                                             Index first, simd::Tile<float> c) {
  using Pair = simd::BFloat16Pair;
  add_non_finite_rows<false>(terms, tile, coefficients, b, first, c);
  for (Index i = 0; i < tile.queries; ++i) {
    float* row = coefficients.from(i).data;
    for (Index j = 0; j < tile.keys; j += 2 * simd::lanes<Pair>)
      simd::store_pairs(reinterpret_cast<Pair*>(row) + j / 2, row + j);
  }
  simd::Panels<Pair> panels = b.panels;
  panels.data += simd::depth_of<Pair>(first) * panels.row_stride;  // first is even
  simd::add_product<Pair>(tile.queries, b.source.cols, simd::depth_of<Pair>(tile.keys),
                          simd::RowsOperand<Pair>{reinterpret_cast<const Pair*>(coefficients.data),
                                                  coefficients.row_stride},
                          panels, c);
}

}  // namespace surfattn::detail
