// surfattn layer 4: one tile of scores, the same code forward and backward

#pragma once

#include <algorithm>
#include <limits>
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

/// bias_j ← bias_j + log π_j for `keys` keys of the head, from `first` on.
template <class Scalar, class Accumulator>
void add_log_prior(const Operands<Scalar>& operands, Index head, Index first, Index keys,
                   Accumulator* bias) {
  const auto log_prior = operands.log_prior_of(first, keys);
  for (Index j = 0; j < keys; ++j)
    bias[j] += static_cast<Accumulator>(log_prior(j, head)) * simd::log2_e<Accumulator>;
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
  if (operands.log_prior.data) add_log_prior(operands, head, first, keys, bias);
}

/// Where the norms of `keys` keys go, if they count: into the bias, which holds zeros but for them.
template <class Scalar, class Accumulator>
Accumulator* start_key_bias(const Operands<Scalar>& operands, Index keys, Accumulator* bias) {
  std::fill(bias, bias + simd::padded<Accumulator>(keys), Accumulator(0));
  return operands.key_norm_weight != Accumulator(0) ? bias : nullptr;
}

/// b_j = norm_weight·‖k_j‖² + log π_j for the keys `rows`, the head's from `first` on; padded with
/// zeros.
template <class Scalar, class Accumulator>
void fill_key_bias(const Operands<Scalar>& operands, Index head, Index first,
                   MatrixView<const Scalar> rows, Accumulator* bias) {
  if (auto* norms = start_key_bias(operands, rows.rows, bias)) simd::squared_norms(rows, norms);
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

/// query_norm_weight·‖q_i‖², what a query adds to its log-sum-exp, from the norms of `count` queries,
/// in place. Never inlined, where compilers would fuse the product with the sum, or not, differently
/// for different terms.
template <class Scalar>
SURFATTN_NEVER_INLINE void weigh_query_norms(const Operands<Scalar>& operands, Index count,
                                             accumulator_t<Scalar>* norms) {
  for (Index i = 0; i < count; ++i) norms[i] *= operands.query_norm_weight;
}

/// The same for one query.
template <class Scalar>
accumulator_t<Scalar> query_offset(const Operands<Scalar>& operands, Index head, Index query) {
  accumulator_t<Scalar> offset(0);
  if (operands.query_norm_weight == offset) return offset;
  simd::squared_norms(operands.query_head(head).block_rows(query, 1), &offset);
  weigh_query_norms(operands, 1, &offset);
  return offset;
}

/// S_ij += query_norm_weight·‖q_i‖². Norms of several queries are formed together, in far less time than
/// one by one.
template <class Scalar>
void add_query_offsets(const Operands<Scalar>& operands, const Tile& tile,
                       simd::Tile<accumulator_t<Scalar>> scores) {
  using Accumulator = accumulator_t<Scalar>;
  if (operands.query_norm_weight == Accumulator(0)) return;
  constexpr Index most = 16;
  Accumulator offsets[most];
  for (Index first = 0, count; first < tile.queries; first += count) {
    count = std::min(most, tile.queries - first);
    simd::squared_norms(operands.query_head(tile.head).block_rows(tile.first_query + first, count),
                        offsets);
    weigh_query_norms(operands, count, offsets);
    for (Index i = 0; i < count; ++i) {
      simd::add_to_row(scores.from(first + i).data, offsets[i] * simd::log2_e<Accumulator>,
                       simd::padded<Accumulator>(tile.keys));
    }
  }
}

/// Raw scores → modified ones. Modifiers and sinks see the whole raw score, with the norm of the query
/// that otherwise only goes into the log-sum-exp.
template <class Scalar, class Terms>
void modify_scores(const Operands<Scalar>& operands, const Terms& terms, const Tile& tile,
                   simd::Tile<accumulator_t<Scalar>> scores,
                   const TermRecords<accumulator_t<Scalar>, Terms::records>& records = {}) {
  if constexpr (Terms::needs_whole_scores) add_query_offsets(operands, tile, scores);
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

/// Where the norms of `count` queries go, if something of them stands beside the scores of the softmax:
/// into the offsets, which are zeros but for that.
template <class Scalar>
accumulator_t<Scalar>* start_offsets(const Operands<Scalar>& operands, bool norms_stand_beside,
                                     Index count, accumulator_t<Scalar>* offsets) {
  using Accumulator = accumulator_t<Scalar>;
  std::fill(offsets, offsets + count, Accumulator(0));
  return norms_stand_beside && operands.query_norm_weight != Accumulator(0) ? offsets : nullptr;
}

/// query_norm_weight·‖q_i‖² where the scores of the softmax do not hold it, and else 0, for `count`
/// queries from `first` on.
template <class Terms, class Scalar>
void offsets_beside_scores(const Operands<Scalar>& operands, Index head, Index first, Index count,
                           accumulator_t<Scalar>* to) {
  auto* const norms = start_offsets(operands, !Terms::needs_whole_scores, count, to);
  if (!norms) return;
  simd::squared_norms(operands.query_head(head).block_rows(first, count), norms);
  weigh_query_norms(operands, count, norms);
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
/// `first` on, where `log_sum_exp` is what the forward pass wrote: in place of the offsets beside the
/// scores. A row that saw no key has −∞ there; a number far beyond all scores in its place gives it weights
/// 0, whatever its scores are.
template <class Accumulator>
void finish_log_sum_exp(MatrixView<const Accumulator> log_sum_exp, Index head, Index first,
                        Index count, Accumulator* offsets) {
  constexpr Accumulator beyond_all_scores = std::numeric_limits<Accumulator>::max() / 4;
  for (Index i = 0; i < count; ++i) {
    const Accumulator written = log_sum_exp(first + i, head);
    const bool sees_a_key = written != simd::minus_infinity<Accumulator>;
    offsets[i] =
        sees_a_key ? (written - offsets[i]) * simd::log2_e<Accumulator> : beyond_all_scores;
  }
}

/// The same, with the offsets.
template <class Terms, class Scalar>
void load_log_sum_exp(const Operands<Scalar>& operands,
                      MatrixView<const accumulator_t<Scalar>> log_sum_exp, Index head, Index first,
                      Index count, accumulator_t<Scalar>* to) {
  offsets_beside_scores<Terms>(operands, head, first, count, to);
  finish_log_sum_exp(log_sum_exp, head, first, count, to);
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

/// Packs the rows of `source`, times `factor`; `non_finite` has room for all of them. Writes the
/// squared norms of the rows of `source` too, where there is a place for them.
template <class Scalar, class Element>
RowOperand<Scalar, Element> pack_row_operand(MatrixView<const Scalar> source,
                                             accumulator_t<Scalar> factor, Element* panels,
                                             Index* non_finite,
                                             accumulator_t<Scalar>* norms = nullptr) {
  const Index panel_stride = simd::depth_of<Element>(source.rows) * simd::panel_width<Element>;
  RowOperand<Scalar, Element> operand{{panels, panel_stride}, {non_finite, 0}, source, factor};
  simd::pack_panels(source, factor, panels, panel_stride, operand.non_finite, norms);
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
