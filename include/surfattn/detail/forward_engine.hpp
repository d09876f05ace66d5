// surfattn layer 4: the forward pass of both forms

#pragma once

#include <algorithm>
#include <surfattn/detail/online_softmax.hpp>
#include <surfattn/detail/operands.hpp>
#include <surfattn/detail/score_tile.hpp>
#include <surfattn/detail/tiling.hpp>
#include <surfattn/executor.hpp>
#include <surfattn/workspace.hpp>

namespace surfattn::detail {

/// Buffers of one task; over an empty arena, their size.
template <class Accumulator>
struct ForwardBuffers {
  Index block_rows;
  Index query_stride;
  Index out_stride;
  Index score_stride;
  Accumulator* queries;
  Accumulator* query_bias;
  Accumulator* out;
  OnlineSoftmax<Accumulator> softmax;
  Accumulator* key_panels;
  Accumulator* key_bias;
  Accumulator* value_panels;
  Accumulator* scores;
  simd::NonFiniteRows non_finite_values;

  ForwardBuffers(Arena& arena, const Shape& shape, const Tiling& tiling)
      : block_rows(shape.group() * std::min(tiling.block, shape.queries)),
        query_stride(simd::padded<Accumulator>(shape.head_dim)),
        out_stride(simd::padded<Accumulator>(shape.value_dim)),
        score_stride(detail::score_stride<Accumulator>(tiling.key_tile)) {
    queries = arena.take<Accumulator>(block_rows * query_stride);
    query_bias = arena.take<Accumulator>(block_rows);
    out = arena.take<Accumulator>(block_rows * out_stride);
    softmax = {arena.take<Accumulator>(block_rows), arena.take<Accumulator>(block_rows)};
    key_panels =
        arena.take<Accumulator>(simd::padded<Accumulator>(tiling.key_tile) * shape.head_dim);
    key_bias = arena.take<Accumulator>(simd::padded<Accumulator>(tiling.key_tile));
    value_panels = arena.take<Accumulator>(tiling.key_tile * out_stride);
    scores = arena.take<Accumulator>(tiling.query_tile * score_stride);
    non_finite_values.rows = arena.take<Index>(tiling.key_tile);
  }
};

/// One block of queries of all query heads that share one key/value head, against all keys.
template <class Scalar, class Terms>
class ForwardTask {
  using Accumulator = accumulator_t<Scalar>;

 public:
  ForwardTask(const Operands<Scalar>& operands, const Terms& terms, const Tiling& tiling,
              ForwardBuffers<Accumulator>& buffers, Index key_value_head, Index first_query)
      : operands_(operands),
        shape_(operands.shape),
        terms_(terms),
        tiling_(tiling),
        buffers_(buffers),
        key_value_head_(key_value_head),
        first_query_(first_query),
        queries_(std::min(tiling.block, operands.shape.queries - first_query)) {}

  void run(const ForwardOutputs<Scalar>& outputs) {
    load_queries();
    for (Index key = 0; key < shape_.keys; key += tiling_.key_tile) {
      visit_keys(key, std::min(tiling_.key_tile, shape_.keys - key));
    }
    store(outputs);
  }

 private:
  Index first_head() const { return key_value_head_ * shape_.group(); }

  void load_queries() {
    for (Index member = 0; member < shape_.group(); ++member) {
      const Index row = member * queries_;
      pack_query_tile(
          operands_, operands_.query_head(first_head() + member).block_rows(first_query_, queries_),
          buffers_.queries + row * buffers_.query_stride, buffers_.query_bias + row);
    }
    const Index rows = shape_.group() * queries_;
    std::fill(buffers_.out, buffers_.out + rows * buffers_.out_stride, Accumulator(0));
    buffers_.softmax.reset(rows);
  }

  /// All tiles of one run of keys. The keys are packed when the first tile that is not empty needs
  /// them.
  void visit_keys(Index first_key, Index keys) {
    bool packed = false;
    for (Index member = 0; member < shape_.group(); ++member) {
      for (Index query = 0; query < queries_; query += tiling_.query_tile) {
        const Tile tile =
            terms_.trim({first_head() + member, first_query_ + query,
                         std::min(tiling_.query_tile, queries_ - query), first_key, keys},
                        simd::panel_width<Accumulator>);
        const Coverage coverage = tile.keys > 0 ? terms_.coverage(tile) : Coverage::empty;
        if (coverage == Coverage::empty) continue;
        if (!packed) pack_keys(first_key, keys);
        packed = true;
        visit_tile(tile, coverage, member * queries_ + query, tile.first_key - first_key);
      }
    }
  }

  void pack_keys(Index first_key, Index keys) {
    const auto key_rows = operands_.key_head(key_value_head_).block_rows(first_key, keys);
    simd::pack_transposed(key_rows, buffers_.key_panels);
    fill_key_bias(operands_, key_value_head_, first_key, key_rows, buffers_.key_bias);
    value_rows_ = operands_.value_head(key_value_head_).block_rows(first_key, keys);
    simd::pack_panels(value_rows_, Accumulator(1), buffers_.value_panels,
                      keys * simd::panel_width<Accumulator>, buffers_.non_finite_values);
  }

  /// `row` is the tile's first row within the block and `offset` its first key within the packed
  /// ones, a whole number of panels.
  void visit_tile(const Tile& tile, Coverage coverage, Index row, Index offset) {
    const simd::Tile<Accumulator> scores{buffers_.scores, buffers_.score_stride};
    score_tile(tile, shape_.head_dim,
               {buffers_.queries + row * buffers_.query_stride, buffers_.query_stride,
                buffers_.query_bias + row},
               {buffers_.key_panels + offset * shape_.head_dim, buffers_.key_bias + offset},
               scores);
    if (coverage == Coverage::partial) {
      terms_.hide(tile, scores.data, scores.row_stride, simd::minus_infinity<Accumulator>);
    }
    const simd::Tile<Accumulator> out{buffers_.out + row * buffers_.out_stride,
                                      buffers_.out_stride};
    take_weights(tile, row, scores, out);
    // O += W·V
    add_weighted_rows<false, Scalar>(
        terms_, tile, scores,
        {buffers_.value_panels, buffers_.non_finite_values, value_rows_, Accumulator(1)}, offset,
        out);
  }

  /// Scores become weights; the columns that only pad the tile get weight 0.
  void take_weights(const Tile& tile, Index row, simd::Tile<Accumulator> scores,
                    simd::Tile<Accumulator> out) {
    const Index padded_keys = simd::padded<Accumulator>(tile.keys);
    for (Index i = 0; i < tile.queries; ++i) {
      Accumulator* score_row = scores.data + i * scores.row_stride;
      std::fill(score_row + tile.keys, score_row + padded_keys, simd::minus_infinity<Accumulator>);
      buffers_.softmax.update(row + i, score_row, padded_keys, out.data + i * out.row_stride,
                              out.row_stride);
    }
  }

  void store(const ForwardOutputs<Scalar>& outputs) const {
    for (Index member = 0; member < shape_.group(); ++member) {
      for (Index i = 0; i < queries_; ++i)
        store_row(outputs, first_head() + member, first_query_ + i, member * queries_ + i);
    }
  }

  void store_row(const ForwardOutputs<Scalar>& outputs, Index head, Index query, Index row) const {
    simd::write_row<simd::Store::set>(
        buffers_.out + row * buffers_.out_stride, buffers_.softmax.normaliser(row),
        outputs.out.block_cols(head * shape_.value_dim, shape_.value_dim), query);
    if (outputs.log_sum_exp)
      (*outputs.log_sum_exp)(query, head) = static_cast<Scalar>(buffers_.softmax.log_sum_exp(row));
  }

  const Operands<Scalar>& operands_;
  const Shape& shape_;
  const Terms& terms_;
  const Tiling& tiling_;
  ForwardBuffers<Accumulator>& buffers_;
  Index key_value_head_;
  Index first_query_;
  Index queries_;
  MatrixView<const Scalar> value_rows_;  ///< those that are packed
};

/// How a forward pass is shared out: one item for each block of queries of each key/value head.
template <class Scalar>
struct ForwardPlan {
  Shape shape;
  Tiling tiling;
  Index items;
  Index workers;
  std::size_t bytes_per_worker;

  ForwardPlan(const Shape& problem, const Tiling& cut, const Executor* executor)
      : shape(problem),
        tiling(cut),
        items(shape.key_value_heads * blocks(shape.queries, tiling.block)),
        workers(detail::workers(executor, items)) {
    Arena counter;
    ForwardBuffers<accumulator_t<Scalar>>(counter, shape, tiling);
    bytes_per_worker = counter.used();
  }

  std::size_t workspace_size() const {
    return Arena::alignment + static_cast<std::size_t>(workers) * bytes_per_worker;
  }
};

/// O = W·V and log_sum_exp, every output written once.
template <class Scalar, class Terms>
void forward(const Operands<Scalar>& operands, const Terms& terms, const ForwardPlan<Scalar>& plan,
             const ForwardOutputs<Scalar>& outputs, const Workspace& workspace,
             Executor* executor) {
  const Index blocks_per_head = blocks(plan.shape.queries, plan.tiling.block);
  share_items(executor, plan.workers, [&](Index worker, const auto& take) {
    Arena arena(workspace, static_cast<std::size_t>(worker) * plan.bytes_per_worker);
    ForwardBuffers<accumulator_t<Scalar>> buffers(arena, plan.shape, plan.tiling);
    for (Index item = take(); item < plan.items; item = take()) {
      ForwardTask<Scalar, Terms>(operands, terms, plan.tiling, buffers, item / blocks_per_head,
                                 item % blocks_per_head * plan.tiling.block)
          .run(outputs);
    }
  });
}

}  // namespace surfattn::detail
