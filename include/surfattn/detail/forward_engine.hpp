// surfattn layer 4: the forward pass of both forms

#pragma once

#include <algorithm>
#include <surfattn/detail/operands.hpp>
#include <surfattn/detail/score_bounds.hpp>
#include <surfattn/detail/score_tile.hpp>
#include <surfattn/detail/simd/weight_products.hpp>
#include <surfattn/detail/softmax_rows.hpp>
#include <surfattn/detail/tiling.hpp>
#include <surfattn/workspace.hpp>

namespace surfattn::detail {

/// Buffers of one task; over an empty arena, their size.
template <class Scalar>
struct ForwardBuffers {
  using Accumulator = accumulator_t<Scalar>;
  using Element = packed_t<Scalar>;

  Index depth;        ///< of a packed row of queries or keys
  Index member_rows;  ///< rows of one query head of the group, whole panels of a left operand
  Index score_stride;
  Element* queries;
  SoftmaxRows<Accumulator> outs;
  Element* key_panels;
  Accumulator* key_bias;
  Element* value_panels;
  Accumulator* scores;
  simd::WeighedRow<Accumulator>* weighed_rows;
  Accumulator* query_lengths;
  Index* non_finite_values;

  ForwardBuffers(Arena& arena, const Shape& shape, const Tiling& tiling)
      : depth(simd::depth_of<Element>(shape.head_dim)),
        member_rows(
            simd::rounded_up(std::min(tiling.block, shape.queries), simd::left_width<Element>)),
        score_stride(detail::score_stride<Accumulator>(tiling.key_tile)) {
    const Index block_rows = shape.group() * member_rows;
    queries = arena.take<Element>(block_rows * depth);
    outs = SoftmaxRows<Accumulator>(arena, block_rows, shape.value_dim);
    key_panels = arena.take<Element>(simd::padded<Accumulator>(tiling.key_tile) * depth);
    key_bias = arena.take<Accumulator>(simd::padded<Accumulator>(tiling.key_tile));
    value_panels = arena.take<Element>(simd::depth_of<Element>(tiling.key_tile) * outs.stride);
    scores = arena.take<Accumulator>(tiling.query_tile * score_stride);
    weighed_rows = arena.take<simd::WeighedRow<Accumulator>>(tiling.query_tile);
    query_lengths = arena.take<Accumulator>(block_rows);
    non_finite_values = arena.take<Index>(tiling.key_tile);
  }
};

/// One block of queries of all query heads that share one key/value head, against all keys.
///
/// Where many queries see whole tiles, and no term changes scores, bounds of the scores serve as maxima of
/// the softmax: weights then need not wait for the last score of a row, and are made while the next scores
/// are formed. The bits are the same, but for outputs near the smallest normal number.
template <class Scalar, class Terms>
class ForwardTask {
  using Accumulator = accumulator_t<Scalar>;

  /// Bounds cost the norms of all keys.
  static constexpr Index fewest_for_bounds = 128;
  static constexpr bool can_bound_scores = !Terms::needs_whole_scores && !Terms::has_biases &&
                                           simd::overlaps_exponentials<packed_t<Scalar>>;

 public:
  ForwardTask(const Operands<Scalar>& operands, const Terms& terms, const Tiling& tiling,
              ForwardBuffers<Scalar>& buffers, Index key_value_head, Index first_query)
      : operands_(operands),
        shape_(operands.shape),
        terms_(terms),
        tiling_(tiling),
        buffers_(buffers),
        key_value_head_(key_value_head),
        first_query_(first_query),
        queries_(std::min(tiling.block, operands.shape.queries - first_query)) {}

  void run(const ForwardOutputs<Scalar>& outputs) {
    Index key = 0;
    do {
      const Index keys = operands_.run_of_keys(key, std::min(tiling_.key_tile, shape_.keys - key));
      visit_keys(key, keys, outputs);
      key += keys;
    } while (key < shape_.keys);
  }

 private:
  Index first_head() const { return key_value_head_ * shape_.group(); }

  /// The first row of a tile within the block.
  Index row_of(const Tile& tile) const {
    return (tile.head - first_head()) * buffers_.member_rows + tile.first_query - first_query_;
  }

  /// Loads the rows of a tile, and the first tile of a panel all that lie within it. Norms are formed while
  /// the rows are in the first-level cache.
  void load_queries(const Tile& tile, bool with_offsets) {
    constexpr Index panel = simd::left_width<packed_t<Scalar>>;
    const Index row = row_of(tile), first = tile.first_query;
    if (row % panel != 0) return;
    const Index count =
        std::min(simd::rounded_up(tile.queries, panel), first_query_ + queries_ - first);
    const auto queries = operands_.query_head(tile.head).block_rows(first, count);
    simd::pack_left(queries, log2_scale(operands_), buffers_.queries + row * buffers_.depth);
    const auto outs = buffers_.outs.from(row);
    outs.reset(count);
    Accumulator* const offsets =
        with_offsets ? start_offsets(operands_, !Terms::needs_whole_scores, count, outs.offsets)
                     : nullptr;
    load_norms(queries, offsets, buffers_.query_lengths + row);
  }

  /// ‖q‖ of queries that are packed with their factor, where scores are bounded, and what stands beside
  /// the scores, where there is a place for it.
  void load_norms(MatrixView<const Scalar> queries, Accumulator* offsets,
                  Accumulator* lengths) const {
    if (!offsets && !bounds_scores_) return;
    simd::squared_norms(queries, lengths);
    if (offsets) {
      std::copy(lengths, lengths + queries.rows, offsets);
      weigh_query_norms(operands_, queries.rows, offsets);
    }
    const Accumulator factor = std::abs(log2_scale(operands_));
    for (Index i = 0; bounds_scores_ && i < queries.rows; ++i)
      lengths[i] = bound_of_length(lengths[i], queries.cols) * factor;
  }

  /// All tiles of one run of keys. Rows are loaded before the first run and written after the last, while
  /// they are in the cache.
  void visit_keys(Index first_key, Index keys, const ForwardOutputs<Scalar>& outputs) {
    keys_are_packed_ = false;
    for (Index member = 0; member < shape_.group(); ++member) {
      for (Index query = 0; query < queries_; query += tiling_.query_tile) {
        const Tile tile{first_head() + member, first_query_ + query,
                        std::min(tiling_.query_tile, queries_ - query), first_key, keys};
        if (first_key == 0) load_queries(tile, outputs.log_sum_exp.has_value());
        if (keys > 0) visit_parts(tile);
        if (first_key + keys == shape_.keys) {
          buffers_.outs.write(row_of(tile), operands_, terms_, outputs, tile.head, tile.first_query,
                              tile.queries);
        }
      }
    }
  }

  /// The keys are packed when the first part that is not empty needs them.
  void visit_parts(const Tile& whole) {
    terms_.each_part(whole, simd::left_width<packed_t<Scalar>>, simd::panel_width<Accumulator>,
                     [&](const Tile& tile, Coverage coverage) {
                       if (!keys_are_packed_) pack_keys(whole.first_key, whole.keys);
                       keys_are_packed_ = true;
                       visit_tile(tile, coverage, tile.first_key - whole.first_key);
                     });
  }

  /// Values that are whole keys give the norms of these.
  void pack_keys(Index first_key, Index keys) {
    const auto key_rows = operands_.keys_of(key_value_head_, first_key, keys);
    simd::pack_transposed(key_rows, buffers_.key_panels);
    const bool needs_norms = bounds_scores_ || operands_.key_norm_weight != Accumulator(0);
    Accumulator* const norms = needs_norms ? buffers_.key_bias : nullptr;
    const bool values_give_norms = operands_.values_are_keys && shape_.value_dim == shape_.head_dim;
    if (norms && !values_give_norms) simd::squared_norms(key_rows, norms);
    values_ = pack_row_operand(operands_.values_of(key_value_head_, first_key, keys),
                               Accumulator(1), buffers_.value_panels, buffers_.non_finite_values,
                               values_give_norms ? norms : nullptr);
    load_key_bias(first_key, keys);
  }

  /// Norms of keys, where they are needed, become b_j.
  void load_key_bias(Index first_key, Index keys) {
    Accumulator* const bias = buffers_.key_bias;
    Accumulator longest(0);
    if (bounds_scores_)
      longest = bound_of_length(simd::pad_and_find_maximum(bias, keys), shape_.head_dim);
    if (operands_.key_norm_weight == Accumulator(0)) std::fill(bias, bias + keys, Accumulator(0));
    finish_key_bias(operands_, key_value_head_, first_key, keys, bias);
    std::fill(bias + keys, bias + simd::padded<Accumulator>(keys), Accumulator(0));
    if (bounds_scores_) bounds_ = {longest, bias, keys};
  }

  /// `offset` is the tile's first key within the packed ones, a whole number of panels.
  void visit_tile(const Tile& tile, Coverage coverage, Index offset) {
    const simd::Tile<Accumulator> weights{buffers_.scores, buffers_.score_stride};
    Tile rest = tile;
    if constexpr (can_bound_scores) {
      if (coverage == Coverage::full && are_bounded(tile)) {
        Tile bounded = tile;
        bounded.queries -= tile.queries % simd::kernel_rows;
        take_bounded_weights(bounded, offset, weights);
        rest.first_query += bounded.queries, rest.queries -= bounded.queries;
      }
    }
    if (rest.queries > 0)
      take_weights(rest, coverage, offset, weights.from(rest.first_query - tile.first_query));
    terms_.drop(tile, weights);
    add_weighted_rows<false>(terms_, tile, weights, values_, offset,
                             buffers_.outs.tile(row_of(tile)));  // O += W·V
  }

  /// Scores → weights.
  void take_weights(const Tile& tile, Coverage coverage, Index offset,
                    simd::Tile<Accumulator> scores) {
    score_tile(tile, shape_.head_dim, queries_of(tile),
               buffers_.key_panels + offset * buffers_.depth, buffers_.key_bias + offset, scores,
               log2_scale(operands_));
    finish_scores(operands_, terms_, tile, scores);
    if (coverage == Coverage::partial) {
      terms_.hide(tile, scores.data, scores.row_stride, simd::minus_infinity<Accumulator>);
    }
    buffers_.outs.take_weights(row_of(tile), tile.queries, tile.keys, scores);
  }

  simd::ColumnsOperand<packed_t<Scalar>> queries_of(const Tile& tile) const {
    return simd::packed_left(buffers_.queries, shape_.head_dim, row_of(tile), tile.queries);
  }

  bool are_bounded(const Tile& tile) const {
    bool bounded = bounds_scores_;
    const Index first = row_of(tile);
    for (Index i = first; bounded && i < first + tile.queries; ++i)
      bounded = bounds_.give_maximum(buffers_.query_lengths[i], buffers_.outs.softmax.maximum[i]);
    return bounded;
  }

  /// Scores → weights, without a look at the scores between: where these are bounded and nothing changes
  /// or hides them.
  void take_bounded_weights(const Tile& tile, Index offset, simd::Tile<Accumulator> weights) {
    const Index first = row_of(tile), count = tile.queries, depth = buffers_.depth;
    const auto outs = buffers_.outs.from(first);
    auto* const rows = buffers_.weighed_rows;
    for (Index i = 0; i < count; ++i) {
      outs.softmax.raise(i, bounds_.highest(buffers_.query_lengths[first + i]), outs.tile(i).data,
                         outs.stride);
      rows[i].start(outs.softmax.maximum[i]);
    }
    simd::set_weights<packed_t<Scalar>>(
        count, tile.keys, depth, queries_of(tile),
        {buffers_.key_panels + offset * depth, depth * simd::panel_width<Accumulator>}, weights,
        {buffers_.key_bias + offset, log2_scale(operands_)}, rows, outs.out,
        count * outs.stride * Index(sizeof(Accumulator)));
    for (Index i = 0; i < count; ++i) outs.softmax.sum[i] += rows[i].sum();
  }

  const Operands<Scalar>& operands_;
  const Shape& shape_;
  const Terms& terms_;
  const Tiling& tiling_;
  ForwardBuffers<Scalar>& buffers_;
  Index key_value_head_;
  Index first_query_;
  Index queries_;
  bool keys_are_packed_ = false;
  bool bounds_scores_ = can_bound_scores && queries_ * shape_.group() >= fewest_for_bounds;
  ScoreBounds<Accumulator> bounds_;
  RowOperand<Scalar, packed_t<Scalar>> values_{};  ///< of the run of keys at hand
};

/// How the forward pass of a sequence is shared out: one item for each block of queries of each
/// key/value head.
template <class Scalar>
struct ForwardPlan {
  Shape shape;
  Tiling tiling;
  Index items;

  ForwardPlan(const Shape& sequence, const Tiling& cut)
      : shape(sequence),
        tiling(cut),
        items(shape.key_value_heads * blocks(shape.queries, tiling.block)) {}

  std::size_t shared_bytes() const { return 0; }
  SURFATTN_NEVER_INLINE std::size_t bytes_per_worker() const {
    Arena counter;
    ForwardBuffers<Scalar>(counter, shape, tiling);
    return counter.used();
  }
};

/// O = W·V and log_sum_exp of many queries, every output written once: the items of one sequence
/// that fall to one worker.
template <class Scalar, class Terms, class Items>
void forward(const Operands<Scalar>& operands, const Terms& terms, const ForwardPlan<Scalar>& plan,
             const ForwardOutputs<Scalar>& outputs, Arena, Arena own, const Items& items) {
  const Index blocks_per_head = blocks(plan.shape.queries, plan.tiling.block);
  ForwardBuffers<Scalar> buffers(own, plan.shape, plan.tiling);
  items([&](Index taken) {
    // The last queries see the most keys under a causal mask: they go first, so that no worker is
    // left with a long task at the end.
    const Index item = plan.items - 1 - taken;
    ForwardTask<Scalar, Terms>(operands, terms, plan.tiling, buffers, item / blocks_per_head,
                               item % blocks_per_head * plan.tiling.block)
        .run(outputs);
  });
}

template <class Scalar, class Terms>
void finish_forward(const Operands<Scalar>&, const Terms&, const ForwardPlan<Scalar>&,
                    const ForwardOutputs<Scalar>&, Arena) {}

}  // namespace surfattn::detail
