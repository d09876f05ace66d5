// surfattn layer 4: what terms need in a backward pass, and the way of gradients through them

#pragma once

#include <algorithm>
#include <surfattn/detail/operands.hpp>
#include <surfattn/detail/score_tile.hpp>
#include <surfattn/detail/term_chain.hpp>
#include <surfattn/detail/tiling.hpp>
#include <surfattn/workspace.hpp>

namespace surfattn::detail {

/// The sums that a chain of terms needs over the backward pass of a sequence, each 0 at its start. An item
/// is the keys of one addend of dQ. Rows are added to in the order of the items, columns and items' sums
/// have one writer, so that they have the same bits on any number of threads.
template <class Accumulator>
struct TermSums {
  Index item_stride = 0;  ///< numbers of each item
  bool sums_rows = false;
  bool sums_columns = false;
  bool sums_raw_rows = false;
  Index item_count = 0;
  Index item_room = 0;  ///< at least as many, and no more of fewer keys
  Index row_count = 0;
  Index column_count = 0;
  Accumulator* items = nullptr;
  Accumulator* rows = nullptr;      ///< Σ_j dS_ij of the scores that the softmax takes
  Accumulator* columns = nullptr;   ///< Σ_i of the same
  Accumulator* raw_rows = nullptr;  ///< Σ_j dS_ij of the raw scores

  /// `has_query_norms`: whether raw scores may hold a number of their own for each query.
  template <class Terms>
  TermSums(const Terms& terms, const Shape& shape, const Tiling& tiling, bool has_query_norms)
      : sums_raw_rows(Terms::needs_whole_scores && has_query_norms),
        item_count(shape.key_value_heads * blocks(shape.keys, tiling.addend)),
        item_room(std::max(
            item_count,
            shape.key_value_heads * std::min(blocks(shape.keys, tiling.key_tile), wanted_addends))),
        row_count(shape.query_heads * shape.queries),
        column_count(shape.query_heads * shape.keys) {
    terms.each_wanted_gradient([&](std::size_t, const auto& term) {
      item_stride += term.sums_per_item(shape);
      sums_rows |= term.wants_row_sums();
      sums_columns |= term.wants_column_sums();
    });
  }

  /// Takes its place in memory; of an empty arena, only counts.
  void take(Arena& arena) {
    const auto place = [&](bool wanted, Index count) {
      return wanted ? arena.take<Accumulator>(count) : nullptr;
    };
    items = place(item_stride > 0, item_room * item_stride);
    rows = place(sums_rows, row_count);
    columns = place(sums_columns, column_count);
    raw_rows = place(sums_raw_rows, row_count);
  }

  void set_zero() const {
    const auto clear = [](Accumulator* numbers, Index count) {
      if (numbers) std::fill(numbers, numbers + count, Accumulator(0));
    };
    clear(items, item_count * item_stride);
    clear(rows, row_count);
    clear(columns, column_count);
    clear(raw_rows, row_count);
  }
};

/// What one worker keeps of a tile for the way back through the terms. Over an empty arena, its
/// size.
template <class Accumulator, class Terms>
struct TermBuffers {
  TermRecords<Accumulator, Terms::records> records;
  Accumulator* row_sums = nullptr;
  Accumulator* raw_row_sums = nullptr;

  TermBuffers(Arena& arena, const Tiling& tiling) {
    const Index stride = score_stride<Accumulator>(tiling.key_tile);
    for (auto& record : records)
      record = {arena.take<Accumulator>(tiling.query_tile * stride), stride};
    if constexpr (Terms::is_trainable) row_sums = arena.take<Accumulator>(tiling.query_tile);
    if constexpr (Terms::needs_whole_scores)
      raw_row_sums = arena.take<Accumulator>(tiling.query_tile);
  }
};

/// The terms' part in one task of a backward pass, which has one item or several. For each tile, in this
/// order:
///
///     S → modifiers → + biases                       finish_scores
///     O = (W∘M)·V        dW = M∘dP                   drop_gradients (before dS = W∘(dW − D))
///                        W∘M, for dV                 drop_weights
///     S' = S + B         dB = dS                     differentiate
///     S = f(S_raw, θ)    dθ += dS·∂f/∂θ,  dS_raw = dS∘f'(S_raw)
///
/// Of a chain of masks all of it is nothing.
template <class Scalar, class Terms>
class TermTask {
  using Accumulator = accumulator_t<Scalar>;

 public:
  TermTask(const Shape& shape, const Terms& terms, TermBuffers<Accumulator, Terms>& buffers,
           const TermSums<Accumulator>& totals)
      : shape_(shape), terms_(terms), buffers_(buffers), totals_(totals) {}

  const TermRecords<Accumulator, Terms::records>& records() const { return buffers_.records; }

  /// Before the tiles of one item and one run of queries.
  void begin_run(Index item, Index queries) {
    item_ = item;
    if constexpr (Terms::is_trainable)
      std::fill(buffers_.row_sums, buffers_.row_sums + queries, Accumulator(0));
    if constexpr (Terms::needs_whole_scores)
      std::fill(buffers_.raw_row_sums, buffers_.raw_row_sums + queries, Accumulator(0));
  }

  void drop_gradients(const Tile& tile, simd::Tile<Accumulator> grad_weights) const {
    if constexpr (Terms::drops_weights) {
      terms_.record_dropout(tile, records());
      terms_.drop(tile, grad_weights, records());
    }
  }

  void drop_weights(const Tile& tile, simd::Tile<Accumulator> weights) const {
    if constexpr (Terms::drops_weights) terms_.drop(tile, weights, records());
  }

  /// `row` is the tile's first row within the run of queries. `wait` returns when the key/value head
  /// before this one has added what it adds for these keys and queries.
  template <class Wait>
  void differentiate(const Tile& tile, Index row, simd::Tile<Accumulator> grad_scores,
                     const Wait& wait) const {
    if constexpr (Terms::is_trainable) {
      sum_rows(totals_.sums_rows, tile, grad_scores, buffers_.row_sums + row);
      sum_columns(tile, grad_scores);
      add_gradients(tile, grad_scores, wait);
    }
    if constexpr (Terms::modifies_scores) {
      terms_.differentiate(tile, records(), grad_scores,
                           [&](std::size_t index) { return sums_of(index, tile.head); });
    }
    if constexpr (Terms::needs_whole_scores)
      sum_rows(totals_.sums_raw_rows, tile, grad_scores, buffers_.raw_row_sums + row);
  }

  /// Adds the sums of a run of queries to those of the pass. Called in the order of the blocks.
  void end_run(Index head, Index first_query, Index queries) const {
    const Index first = head * shape_.queries + first_query;
    if constexpr (Terms::is_trainable)
      add(totals_.sums_rows, buffers_.row_sums, totals_.rows, first, queries);
    if constexpr (Terms::needs_whole_scores)
      add(totals_.sums_raw_rows, buffers_.raw_row_sums, totals_.raw_rows, first, queries);
  }

 private:
  static void add(bool wanted, const Accumulator* from, Accumulator* to, Index first, Index count) {
    for (Index i = 0; wanted && i < count; ++i) to[first + i] += from[i];
  }

  static void sum_rows(bool wanted, const Tile& tile, simd::Tile<Accumulator> grad_scores,
                       Accumulator* sums) {
    for (Index i = 0; wanted && i < tile.queries; ++i)
      sums[i] += simd::row_sum(grad_scores.data + i * grad_scores.row_stride, tile.keys);
  }

  void sum_columns(const Tile& tile, simd::Tile<Accumulator> grad_scores) const {
    if (!totals_.sums_columns) return;
    Accumulator* sums = totals_.columns + tile.head * shape_.keys + tile.first_key;
    for (Index i = 0; i < tile.queries; ++i) {
      simd::store_row<simd::Store::add>(grad_scores.data + i * grad_scores.row_stride, sums, 1,
                                        tile.keys);
    }
  }

  template <class Wait>
  void add_gradients(const Tile& tile, simd::Tile<Accumulator> grad_scores,
                     const Wait& wait) const {
    terms_.each_wanted_gradient([&]<class Term>(std::size_t index, const Term& term) {
      if constexpr (DirectTrainable<Term>) {
        if (term.adds_across_heads() || term.adds_across_sequences()) wait();
      }
      if constexpr (TileTrainable<Term>)
        term.add_gradient(tile, grad_scores, sums_of(index, tile.head));
    });
  }

  /// This item's sums of one term.
  ItemSums<Accumulator> sums_of(std::size_t wanted, Index head) const {
    Accumulator* sums = totals_.items + item_ * totals_.item_stride;
    terms_.each_wanted_gradient([&](std::size_t index, const auto& term) {
      if (index < wanted) sums += term.sums_per_item(shape_);
    });
    return {sums, head % shape_.group()};
  }

  const Shape& shape_;
  const Terms& terms_;
  TermBuffers<Accumulator, Terms>& buffers_;
  const TermSums<Accumulator>& totals_;
  Index item_ = 0;
};

/// d logit_h = −Σ_i exp(logit_h − L_i)·D_i, with D_i = dO_i·O_i − dL_i: a sink is a key whose value is 0.
template <class Scalar, class Sink>
void add_sink_gradient(const Operands<Scalar>& operands, const Upstream<Scalar>& upstream,
                       const Sink& sink) {
  using Accumulator = accumulator_t<Scalar>;
  const Shape& shape = operands.shape;
  for (Index head = 0; head < shape.query_heads; ++head) {
    const Index first = head * shape.value_dim;
    const auto logit = sink.template logit<Accumulator>(head);
    Accumulator total(0);
    for (Index i = 0; i < shape.queries; ++i) {
      Accumulator delta(0);
      simd::row_products(upstream.grad_out.block_rows(i, 1).block_cols(first, shape.value_dim),
                         upstream.out.block_rows(i, 1).block_cols(first, shape.value_dim), &delta);
      const auto log_sum_exp = static_cast<Accumulator>(upstream.log_sum_exp(i, head));
      delta -= upstream.grad_log_sum_exp_of(i, head);
      const bool counts = logit != simd::minus_infinity<Accumulator>;
      if (counts) total += std::exp(logit - log_sum_exp) * delta;
    }
    sink.add_gradient(head, -total);
  }
}

/// dq_i += 2w·r_i·q_i, where raw scores hold w·‖q_i‖² and r_i = Σ_j dS_ij is not 0.
template <class Scalar>
void add_query_norm_gradient(const Operands<Scalar>& operands, const RawRowSums<Scalar>& raw_rows,
                             MatrixView<accumulator_t<Scalar>> grad_queries) {
  using Accumulator = accumulator_t<Scalar>;
  const Shape& shape = operands.shape;
  for (Index head = 0; head < shape.query_heads; ++head) {
    const auto queries = operands.query_head(head);
    const auto gradients = grad_queries.block_cols(head * shape.head_dim, shape.head_dim);
    for (Index i = 0; i < shape.queries; ++i) {
      const Accumulator sum = raw_rows.of(head, i);
      if (sum == Accumulator(0)) continue;
      const Accumulator factor = 2 * operands.query_norm_weight * sum;
      for (Index c = 0; c < shape.head_dim; ++c) {
        gradients(i, c) += factor * static_cast<Accumulator>(queries(i, c));
      }
    }
  }
}

/// What is left to do when every item of a sequence is done: gradients of parameters from their
/// sums, and what the norms of the queries add to dQ.
template <class Scalar, class Terms>
void finish_term_gradients(const Operands<Scalar>& operands, const Terms& terms,
                           const TermSums<accumulator_t<Scalar>>& totals,
                           const Upstream<Scalar>& upstream,
                           MatrixView<accumulator_t<Scalar>> grad_queries) {
  GradientSums<accumulator_t<Scalar>> sums{operands.shape,     totals.item_count, totals.items,
                                           totals.item_stride, totals.rows,       totals.columns};
  terms.each_wanted_gradient([&](std::size_t, const auto& term) {
    term.finish_gradient(sums);
    sums.of_items += term.sums_per_item(operands.shape);
  });
  terms.each_sink([&](const auto& sink) {
    if (sink.wants_gradient()) add_sink_gradient(operands, upstream, sink);
  });
  const RawRowSums<Scalar> raw_rows{totals.raw_rows, upstream};
  if (operands.query_norm_weight != accumulator_t<Scalar>(0) && !raw_rows.are_zero())
    add_query_norm_gradient(operands, raw_rows, grad_queries);
}

}  // namespace surfattn::detail
