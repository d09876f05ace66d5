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

/// Packed queries of one tile: rows scaled by the problem's scale, and the bias norm_weight·‖q_i‖²
/// of each.
template <class Accumulator>
struct QueryTile {
  const Accumulator* rows = nullptr;
  Index row_stride = 0;
  const Accumulator* bias = nullptr;
};

/// Packed keys of one tile: transposed panels, and the bias of each key, padded.
template <class Accumulator>
struct KeyTile {
  const Accumulator* panels = nullptr;
  const Accumulator* bias = nullptr;
};

/// Packs the rows of one head from `first` on as the left operand of the scores.
template <class Scalar, class Accumulator>
void pack_query_tile(const Operands<Scalar>& operands, MatrixView<const Scalar> rows,
                     Accumulator* packed, Accumulator* bias) {
  simd::pack_rows(rows, operands.scale * simd::log2_e<Accumulator>, packed);
  if (operands.query_norm_weight == Accumulator(0)) {
    std::fill(bias, bias + rows.rows, Accumulator(0));
    return;
  }
  simd::squared_norms(rows, bias);
  for (Index i = 0; i < rows.rows; ++i)
    bias[i] *= operands.query_norm_weight * simd::log2_e<Accumulator>;
}

/// b_j = norm_weight·‖k_j‖² + log π_j for the keys from `first` on, padded with zeros.
template <class Scalar, class Accumulator>
void fill_key_bias(const Operands<Scalar>& operands, Index head, Index first,
                   MatrixView<const Scalar> rows, Accumulator* bias) {
  std::fill(bias, bias + simd::padded<Accumulator>(rows.rows), Accumulator(0));
  if (operands.key_norm_weight != Accumulator(0)) {
    simd::squared_norms(rows, bias);
    for (Index j = 0; j < rows.rows; ++j)
      bias[j] *= operands.key_norm_weight * simd::log2_e<Accumulator>;
  }
  if (!operands.log_prior.data) return;
  for (Index j = 0; j < rows.rows; ++j)
    bias[j] +=
        static_cast<Accumulator>(operands.log_prior(first + j, head)) * simd::log2_e<Accumulator>;
}

/// S_ij = scale·q_i·k_j + a_i + b_j over the tile, in units of ln 2, unmasked.
template <class Accumulator>
void score_tile(const Tile& tile, Index head_dim, const QueryTile<Accumulator>& queries,
                const KeyTile<Accumulator>& keys, simd::Tile<Accumulator> scores) {
  simd::set_product<Accumulator>(
      tile.queries, tile.keys, head_dim, {queries.rows, queries.row_stride, 1},
      {keys.panels, head_dim * simd::panel_width<Accumulator>}, scores, {queries.bias, keys.bias});
}

/// What the rows that were packed as zeros contribute to C = A·B: row b of B goes into row r of C
/// with its weight A_rb wherever `sees(r, b)`.
template <class Scalar, class Accumulator, class Weight, class Sees>
void add_non_finite_rows(const simd::NonFiniteRows& list, MatrixView<const Scalar> source,
                         Accumulator factor, Index rows, simd::Tile<Accumulator> c, Weight&& weight,
                         Sees&& sees) {
  for (Index n = 0; n < list.count; ++n) {
    const Index b = list.rows[n];
    for (Index r = 0; r < rows; ++r) {
      if (!sees(r, b)) continue;
      Accumulator* row = c.data + r * c.row_stride;
      for (Index col = 0; col < source.cols; ++col) {
        row[col] += weight(r, b) * (factor * static_cast<Accumulator>(source(b, col)));
      }
    }
  }
}

}  // namespace surfattn::detail
