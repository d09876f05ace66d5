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

/// Rows of an input, times `factor`, packed as a right operand.
template <class Scalar>
struct PackedRows {
  using Accumulator = accumulator_t<Scalar>;

  const Accumulator* panels;
  simd::NonFiniteRows non_finite;  ///< these are zeros in the panels
  MatrixView<const Scalar> source;
  Accumulator factor;
};

/// C += A·B, where B are the packed rows [first, first + depth) and A the coefficients of one tile,
/// queries × keys: its rows are C's where B are keys, its columns (`transposed`) where B are
/// queries. What rows that are not finite contribute is added one by one, and only to those rows of
/// C that no mask keeps from seeing them.
template <bool transposed, class Scalar, class Terms>
void add_weighted_rows(const Terms& terms, const Tile& tile,
                       simd::Tile<accumulator_t<Scalar>> coefficients, const PackedRows<Scalar>& b,
                       Index first, simd::Tile<accumulator_t<Scalar>> c) {
  using Accumulator = accumulator_t<Scalar>;
  constexpr Index width = simd::panel_width<Accumulator>;
  const Index stride = coefficients.row_stride;
  const simd::LeftOperand<Accumulator> a{coefficients.data, transposed ? 1 : stride,
                                         transposed ? stride : 1};
  const Index rows = transposed ? tile.keys : tile.queries;
  const Index depth = transposed ? tile.queries : tile.keys;
  simd::add_product<Accumulator>(rows, b.source.cols, depth, a,
                                 {b.panels + first * width, b.source.rows * width}, c);
  for (Index n = 0; n < b.non_finite.count; ++n) {
    const Index k = b.non_finite.rows[n] - first;
    for (Index r = 0; 0 <= k && k < depth && r < rows; ++r) {
      if (!terms.allows(tile.first_query + (transposed ? k : r),
                        tile.first_key + (transposed ? r : k)))
        continue;
      const Accumulator weight = a.data[r * a.row_stride + k * a.depth_stride];
      for (Index col = 0; col < b.source.cols; ++col) {
        c.data[r * c.row_stride + col] +=
            weight * (b.factor * static_cast<Accumulator>(b.source(first + k, col)));
      }
    }
  }
}

}  // namespace surfattn::detail
