// surfattn layer 4: tiles of weights, recomputed from the log-sum-exp

#pragma once

#include <surfattn/detail/operands.hpp>
#include <surfattn/detail/score_tile.hpp>
#include <surfattn/detail/tiling.hpp>
#include <surfattn/workspace.hpp>

namespace surfattn::detail {

/// Buffers of `WeightTiles`; over an empty arena, their size.
template <class Accumulator>
struct WeightBuffers {
  Index score_stride = 0;
  Accumulator* queries = nullptr;
  Accumulator* log_sum_exp = nullptr;
  Accumulator* transposed_keys = nullptr;
  Accumulator* key_bias = nullptr;
  Accumulator* weights = nullptr;

  WeightBuffers(Arena& arena, const Shape& shape, Index query_tile, Index key_tile)
      : score_stride(detail::score_stride<Accumulator>(key_tile)) {
    queries =
        arena.take<Accumulator>(simd::packed_left_size<Accumulator>(query_tile, shape.head_dim));
    log_sum_exp = arena.take<Accumulator>(query_tile);
    transposed_keys = arena.take<Accumulator>(simd::padded<Accumulator>(key_tile) * shape.head_dim);
    key_bias = arena.take<Accumulator>(simd::padded<Accumulator>(key_tile));
    weights = arena.take<Accumulator>(query_tile * score_stride);
  }
};

/// W = exp(S − L), tile by tile, of a problem whose log-sum-exp is known: what every pass after the
/// first works with. The tile at hand is that of the queries and keys loaded last.
template <class Scalar, class Terms>
class WeightTiles {
  using Accumulator = accumulator_t<Scalar>;

 public:
  WeightTiles(const Operands<Scalar>& operands, const Terms& terms,
              MatrixView<const Scalar> log_sum_exp, const WeightBuffers<Accumulator>& buffers)
      : operands_(operands), terms_(terms), log_sum_exp_(log_sum_exp), buffers_(buffers) {}

  /// Loads a run of queries.
  void load_queries(Index head, Index first, Index count) {
    tile_.head = head;
    tile_.first_query = first;
    tile_.queries = count;
    simd::pack_left(query_rows(), log2_scale(operands_), buffers_.queries);
    load_log_sum_exp<Terms>(operands_, log_sum_exp_, head, first, count, buffers_.log_sum_exp);
  }

  /// Loads a run of keys of the key/value head.
  void load_keys(Index key_value_head, Index first, Index count) {
    key_value_head_ = key_value_head;
    tile_.first_key = first;
    tile_.keys = count;
    simd::pack_transposed(key_rows(), buffers_.transposed_keys);
    fill_key_bias(operands_, key_value_head, first, key_rows(), buffers_.key_bias);
  }

  const Tile& tile() const { return tile_; }
  Coverage coverage() const { return terms_.coverage(tile_); }

  bool sees_a_key(Index row) const {
    return log_sum_exp_(tile_.first_query + row, tile_.head) != simd::minus_infinity<Scalar>;
  }

  MatrixView<const Scalar> query_rows() const {
    return operands_.query_head(tile_.head).block_rows(tile_.first_query, tile_.queries);
  }
  MatrixView<const Scalar> key_rows() const {
    return operands_.keys_of(key_value_head_, tile_.first_key, tile_.keys);
  }
  MatrixView<const Scalar> value_rows() const {
    return operands_.values_of(key_value_head_, tile_.first_key, tile_.keys);
  }

  /// The keys as the right operand of products with rows of their width.
  simd::Panels<Accumulator> transposed_keys() const {
    return {buffers_.transposed_keys, operands_.shape.head_dim * simd::panel_width<Accumulator>};
  }

  /// W of the tile, still without the masks; modifiers leave their records.
  simd::Tile<Accumulator> weights(
      const TermRecords<Accumulator, Terms::records>& records = {}) const {
    const simd::Tile<Accumulator> weights{buffers_.weights, buffers_.score_stride};
    score_tile<Accumulator>(
        tile_, operands_.shape.head_dim,
        simd::packed_left(buffers_.queries, operands_.shape.head_dim, 0, tile_.queries),
        buffers_.transposed_keys, buffers_.key_bias, weights);
    finish_scores(operands_, terms_, tile_, weights, records);
    const Index padded_keys = simd::padded<Accumulator>(tile_.keys);
    for (Index i = 0; i < tile_.queries; ++i) {
      Accumulator* row = weights.data + i * weights.row_stride;
      for (Index j = 0; j < padded_keys; ++j) row[j] -= buffers_.log_sum_exp[i];
      simd::exp2_row(row, padded_keys, Accumulator(0));
    }
    return weights;
  }

  /// Zeros, by selection, where a mask stands between query and key.
  void hide(simd::Tile<Accumulator> tile) const {
    terms_.hide(tile_, tile.data, tile.row_stride, Accumulator(0));
  }

 private:
  const Operands<Scalar>& operands_;
  const Terms& terms_;
  MatrixView<const Scalar> log_sum_exp_;
  const WeightBuffers<Accumulator>& buffers_;
  Tile tile_;
  Index key_value_head_ = 0;
};

}  // namespace surfattn::detail
