// surfattn layer 4: the forward pass of both forms

#pragma once

#include <algorithm>
#include <surfattn/detail/operands.hpp>
#include <surfattn/detail/score_tile.hpp>
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
    non_finite_values = arena.take<Index>(tiling.key_tile);
  }
};

/// One block of queries of all query heads that share one key/value head, against all keys.
template <class Scalar, class Terms>
class ForwardTask {
  using Accumulator = accumulator_t<Scalar>;

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
    load_queries(outputs.log_sum_exp.has_value());
    for (Index key = 0, keys; key < shape_.keys; key += keys) {
      keys = operands_.run_of_keys(key, std::min(tiling_.key_tile, shape_.keys - key));
      visit_keys(key, keys);
    }
    store(outputs);
  }

 private:
  Index first_head() const { return key_value_head_ * shape_.group(); }

  /// Norms of queries are formed while their rows are in the first-level cache.
  void load_queries(bool with_offsets) {
    constexpr Index some = simd::rounded_up(64, simd::left_width<packed_t<Scalar>>);
    buffers_.outs.reset(shape_.group() * buffers_.member_rows);
    for (Index member = 0; member < shape_.group(); ++member) {
      const Index head = first_head() + member;
      for (Index i = 0, count; i < queries_; i += count) {
        count = std::min(some, queries_ - i);
        const Index row = member * buffers_.member_rows + i, query = first_query_ + i;
        simd::pack_left(operands_.query_head(head).block_rows(query, count), log2_scale(operands_),
                        buffers_.queries + row * buffers_.depth);
        if (with_offsets)
          buffers_.outs.template load_offsets<Terms>(row, operands_, head, query, count);
      }
    }
  }

  /// All tiles of one run of keys. The keys are packed when the first tile that is not empty needs
  /// them.
  void visit_keys(Index first_key, Index keys) {
    bool packed = false;
    for (Index member = 0; member < shape_.group(); ++member) {
      for (Index query = 0; query < queries_; query += tiling_.query_tile) {
        const Tile whole{first_head() + member, first_query_ + query,
                         std::min(tiling_.query_tile, queries_ - query), first_key, keys};
        terms_.each_part(whole, simd::left_width<packed_t<Scalar>>, simd::panel_width<Accumulator>,
                         [&](const Tile& tile, Coverage coverage) {
                           if (!packed) pack_keys(first_key, keys);
                           packed = true;
                           visit_tile(
                               tile, coverage,
                               member * buffers_.member_rows + tile.first_query - first_query_,
                               tile.first_key - first_key);
                         });
      }
    }
  }

  /// Values that are whole keys give the norms of these.
  void pack_keys(Index first_key, Index keys) {
    const auto key_rows = operands_.keys_of(key_value_head_, first_key, keys);
    simd::pack_transposed(key_rows, buffers_.key_panels);
    Accumulator* const norms = start_key_bias(operands_, keys, buffers_.key_bias);
    const bool values_give_norms = operands_.values_are_keys && shape_.value_dim == shape_.head_dim;
    if (norms && !values_give_norms) simd::squared_norms(key_rows, norms);
    values_ = pack_row_operand(operands_.values_of(key_value_head_, first_key, keys),
                               Accumulator(1), buffers_.value_panels, buffers_.non_finite_values,
                               values_give_norms ? norms : nullptr);
    finish_key_bias(operands_, key_value_head_, first_key, keys, buffers_.key_bias);
  }

  /// `row` is the tile's first row within the block and `offset` its first key within the packed
  /// ones, a whole number of panels.
  void visit_tile(const Tile& tile, Coverage coverage, Index row, Index offset) {
    const simd::Tile<Accumulator> scores{buffers_.scores, buffers_.score_stride};
    score_tile(tile, shape_.head_dim,
               simd::packed_left(buffers_.queries, shape_.head_dim, row, tile.queries),
               buffers_.key_panels + offset * buffers_.depth, buffers_.key_bias + offset, scores,
               log2_scale(operands_));
    finish_scores(operands_, terms_, tile, scores);
    if (coverage == Coverage::partial) {
      terms_.hide(tile, scores.data, scores.row_stride, simd::minus_infinity<Accumulator>);
    }
    buffers_.outs.take_weights(row, tile.queries, tile.keys, scores);
    terms_.drop(tile, scores);
    add_weighted_rows<false>(terms_, tile, scores, values_, offset,
                             buffers_.outs.tile(row));  // O += W·V
  }

  void store(const ForwardOutputs<Scalar>& outputs) const {
    for (Index member = 0; member < shape_.group(); ++member) {
      buffers_.outs.write(member * buffers_.member_rows, operands_, terms_, outputs,
                          first_head() + member, first_query_, queries_);
    }
  }

  const Operands<Scalar>& operands_;
  const Shape& shape_;
  const Terms& terms_;
  const Tiling& tiling_;
  ForwardBuffers<Scalar>& buffers_;
  Index key_value_head_;
  Index first_query_;
  Index queries_;
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
