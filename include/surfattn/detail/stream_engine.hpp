// surfattn layer 4: the forward pass for few queries

#pragma once

#include <algorithm>
#include <surfattn/detail/operands.hpp>
#include <surfattn/detail/score_tile.hpp>
#include <surfattn/detail/simd/streaming.hpp>
#include <surfattn/detail/softmax_rows.hpp>
#include <surfattn/detail/tiling.hpp>
#include <surfattn/workspace.hpp>

/// With few queries (decoding) a call is as fast as keys and values can be read. A task owns a part
/// of the keys and all heads; it reads them in the order in which they lie in memory, a run of
/// tokens at a time, each row once for all query heads that share it: for the score, and while it
/// is still in the cache for the output. Where the values are the keys that is half as much to
/// read. The parts are merged by their log-sum-exp.
namespace surfattn::detail {

/// How a sequence of few queries is shared out: one item for each part of the keys.
template <class Scalar>
struct StreamPlan {
  using Accumulator = accumulator_t<Scalar>;

  Shape shape;
  Index run;   ///< keys that one task visits at a time, for all heads
  Index part;  ///< keys of one item
  Index items;

  explicit StreamPlan(const Shape& sequence);

  Index rows() const { return shape.query_heads * shape.queries; }

  /// Parts that are to be merged lie in memory of the whole call; a single one in its worker's.
  std::size_t shared_bytes() const {
    return items > 1 ? static_cast<std::size_t>(items) * bytes_per_item() : 0;
  }
  std::size_t bytes_per_worker() const;

  /// The sums of one of several parts.
  SoftmaxRows<Accumulator> part_of(Arena shared, Index item) const {
    shared.skip(static_cast<std::size_t>(item) * bytes_per_item());
    return SoftmaxRows<Accumulator>(shared, rows(), shape.value_dim);
  }

  /// Up to so many rows for each key/value head, packing keys and values would cost more than it
  /// saves; where the keys are few as well, so would tiles, for more rows.
  static constexpr Index most_rows = 16;
  static bool fits(const Shape& shape) {
    constexpr Index most_rows_of_few_keys = 128, few_keys = 16;
    const Index rows = shape.group() * shape.queries;
    return rows <= most_rows || (shape.keys <= few_keys && rows <= most_rows_of_few_keys);
  }

 private:
  std::size_t bytes_per_item() const {
    Arena counter;
    SoftmaxRows<Accumulator>(counter, rows(), shape.value_dim);
    return counter.used();
  }
};

/// Buffers of one worker; over an empty arena, their size.
template <class Accumulator>
struct StreamBuffers {
  Index query_stride;
  Index score_stride;
  Accumulator* queries;
  Accumulator* key_bias;
  Accumulator* value_panels;
  Accumulator* scores;
  Index* non_finite_values;
  SoftmaxRows<Accumulator> outs;  ///< of a sequence that is not cut into parts

  StreamBuffers(Arena& arena, const Shape& shape, Index run)
      : query_stride(simd::padded<Accumulator>(shape.head_dim)),
        score_stride(detail::score_stride<Accumulator>(run)) {
    const Index rows = shape.query_heads * shape.queries;
    queries = arena.take<Accumulator>(rows * query_stride);
    key_bias = arena.take<Accumulator>(simd::padded<Accumulator>(run));
    value_panels = arena.take<Accumulator>(run * simd::padded<Accumulator>(shape.value_dim));
    scores = arena.take<Accumulator>(shape.group() * shape.queries * score_stride);
    non_finite_values = arena.take<Index>(run);
    outs = SoftmaxRows<Accumulator>(arena, rows, shape.value_dim);
  }
};

template <class Scalar>
StreamPlan<Scalar>::StreamPlan(const Shape& sequence) : shape(sequence) {
  // A run of tokens, keys and values, and the next one stay in the second-level cache; one head's
  // rows of it in the first-level cache, from which values that are keys are read.
  const Index width = shape.key_value_heads * (shape.head_dim + shape.value_dim);
  constexpr Index first_level = (Index(1) << 15) / static_cast<Index>(sizeof(Accumulator));
  const Index of_head = std::max<Index>(16, first_level / std::max<Index>(shape.head_dim, 1));
  run = std::min({tile_rows<Accumulator>(256, width), of_head, std::max<Index>(shape.keys, 1)});
  constexpr Index parts = 16, fewest_keys = 1024;
  part = std::max(fewest_keys, blocks(blocks(shape.keys, parts), run) * run);
  items = std::max<Index>(1, blocks(shape.keys, part));
}

template <class Scalar>
std::size_t StreamPlan<Scalar>::bytes_per_worker() const {
  Arena counter;
  StreamBuffers<Accumulator>(counter, shape, run);
  return counter.used();
}

/// All queries of all heads against one part of the keys.
template <class Scalar, class Terms>
class StreamTask {
  using Accumulator = accumulator_t<Scalar>;

 public:
  StreamTask(const Operands<Scalar>& operands, const Terms& terms,
             StreamBuffers<Accumulator>& buffers)
      : operands_(operands), shape_(operands.shape), terms_(terms), buffers_(buffers) {
    for (Index head = 0; head < shape_.query_heads && !queries_lie_ready(); ++head) {
      simd::pack_rows(operands_.query_head(head), Accumulator(1),
                      buffers_.queries + head * shape_.queries * buffers_.query_stride);
    }
  }

  /// Whether all keys are one run.
  bool is_one_run(Index run) const {
    return shape_.keys <= run && operands_.run_of_keys(0, shape_.keys) == shape_.keys;
  }

  /// All keys are one run: each head is finished and written before the next.
  void run_once(const SoftmaxRows<Accumulator>& outs, const ForwardOutputs<Scalar>& outputs) {
    const bool is_cached = batch_is_cached();
    for (Index head = 0; head < shape_.key_value_heads; ++head) {
      if (!is_cached) look_ahead_to_head(head + 1, outputs.out);
      outs.softmax.reset(rows());
      const Coverage coverage = weigh(head, 0, shape_.keys, outs);
      normalise(head, coverage, outs, outputs);
      write_values(head, coverage, outs, outputs);
    }
  }

  void run(Index first_key, Index keys, Index run, const SoftmaxRows<Accumulator>& outs) {
    outs.reset(shape_.query_heads * shape_.queries);
    const Index end = first_key + keys;
    for (Index key = first_key, count; key < end; key += count) {
      count = operands_.run_of_keys(key, std::min(run, end - key));
      look_ahead_to_run(key + count, std::min(run, end - key - count));
      for (Index head = 0; head < shape_.key_value_heads; ++head) {
        const auto outs_of_head = outs.from(head * rows());
        const Coverage coverage = weigh(head, key, count, outs_of_head);
        if (coverage != Coverage::empty) add_values(head, key, count, coverage, outs_of_head);
      }
    }
  }

 private:
  /// The next run comes from memory while one is computed, for all heads.
  void look_ahead_to_run(Index first_key, Index wanted) {
    if (wanted == 0) return;
    const auto ahead = [&](MatrixView<const Scalar> rows) {
      constexpr Index line = 64 / static_cast<Index>(sizeof(Scalar));
      return simd::RowsAhead<Scalar>(rows, blocks(rows.cols, line * shape_.key_value_heads));
    };
    const auto next = operands_.segment_of(first_key, operands_.run_of_keys(first_key, wanted));
    keys_ahead_.at_steps = ahead(next.keys);
    if (!operands_.values_are_keys) values_ahead_.at_steps = ahead(next.values);
  }

  /// Whether all that a batch reads and writes is so little that a cache still holds what was made
  /// just before, as a rule; to ask for that costs up to a fifth of the time.
  bool batch_is_cached() const {
    constexpr Index most = (Index(1) << 23) / static_cast<Index>(sizeof(Scalar));
    const Index width = shape_.head_dim + shape_.value_dim;
    return width * (shape_.packed_queries * shape_.query_heads +
                    shape_.packed_keys * shape_.key_value_heads) <=
           most;
  }

  /// Where one run is all, the next head comes from memory while one is computed: all that it reads,
  /// and what it writes, which is read as well. After the last it is the first of the next sequence,
  /// whose rows follow in memory.
  void look_ahead_to_head(Index head, MatrixView<Scalar> out) {
    const Index queries_left = shape_.packed_queries - shape_.first_query - shape_.queries;
    const Index keys_left = shape_.packed_keys - shape_.first_key - shape_.keys;
    const auto of_head = [&](MatrixView<const Scalar> rows, Index left) {
      const Index width = rows.cols / shape_.key_value_heads;
      if (head < shape_.key_value_heads) return rows.block_cols(head * width, width);
      const Index count = std::max<Index>(0, std::min(rows.rows, left));
      return rows.block_rows(rows.rows, count).block_cols(0, width);
    };
    const auto segment = operands_.segment_of(0, shape_.keys);
    const MatrixView<const Scalar> none{};
    keys_ahead_.between_blocks = {
        of_head(segment.keys, keys_left),
        queries_lie_ready() ? of_head(operands_.queries, queries_left) : none,
        rows() * shape_.keys};
    values_ahead_.between_blocks = {
        operands_.values_are_keys ? none : of_head(segment.values, keys_left),
        of_head(out, queries_left), rows() * shape_.value_dim};
  }

  /// The weights of one run of keys of one key/value head, for all query heads that share it; none
  /// where no query sees a key.
  Coverage weigh(Index head, Index first_key, Index keys, const SoftmaxRows<Accumulator>& outs) {
    if (rows() == 0 || keys == 0) return Coverage::empty;  // no tile to ask the masks about
    const Coverage coverage = coverage_of_all(head, first_key, keys);
    if (coverage == Coverage::empty) return coverage;
    score(head, first_key, keys, coverage);
    outs.take_weights(0, rows(), keys, scores(0));
    for (Index member = 0; member < shape_.group(); ++member)
      terms_.drop(tile_of(head, member, first_key, keys), scores(member));
    return coverage;
  }

  /// Rows of one key/value head.
  Index rows() const { return shape_.group() * shape_.queries; }
  Index head_of(Index head, Index row) const {
    return head * shape_.group() + row / shape_.queries;
  }

  void score(Index head, Index first_key, Index keys, Coverage coverage) {
    const bool has_norms = operands_.key_norm_weight != Accumulator(0);
    simd::set_dot_products<Accumulator>(rows(), queries_of(head),
                                        operands_.keys_of(head, first_key, keys), scores(0),
                                        has_norms ? buffers_.key_bias : nullptr, keys_ahead_);
    if (!has_norms) std::fill_n(buffers_.key_bias, keys, Accumulator(0));
    finish_key_bias(operands_, head, first_key, keys, buffers_.key_bias);
    for (Index row = 0; row < rows(); ++row) {
      simd::scale_and_add_row(buffers_.key_bias, log2_scale(operands_), scores(0).from(row).data,
                              keys);
    }
    for (Index member = 0; member < shape_.group(); ++member) {
      const Tile tile = tile_of(head, member, first_key, keys);
      finish_scores(operands_, terms_, tile, scores(member));
      if (coverage == Coverage::full) continue;
      terms_.hide(tile, scores(member).data, buffers_.score_stride,
                  simd::minus_infinity<Accumulator>);
    }
  }

  /// O += W·V. The rows are still in the first-level cache where values are keys.
  void add_values(Index head, Index first_key, Index keys, Coverage coverage,
                  const SoftmaxRows<Accumulator>& outs) {
    const auto value_rows = operands_.values_of(head, first_key, keys);
    if (can_be_read_in_place(value_rows, coverage)) {
      simd::rows_product<Accumulator>(rows(), left_operand<false>(scores(0)), value_rows,
                                      {outs.out, outs.stride, simd::Store::add}, values_ahead_);
      return;
    }
    const auto values = pack_row_operand(value_rows, Accumulator(1), buffers_.value_panels,
                                         buffers_.non_finite_values);
    for (Index member = 0; member < shape_.group(); ++member) {
      add_weighted_rows<false>(terms_, tile_of(head, member, first_key, keys), scores(member),
                               values, 0, outs.tile(member * shape_.queries));
    }
  }

  /// W·V of a head whose keys are one run, in the buffer.
  void sum_values(Index head, Coverage coverage, const SoftmaxRows<Accumulator>& outs) {
    outs.reset_out(rows());
    if (coverage != Coverage::empty) add_values(head, 0, shape_.keys, coverage, outs);
  }

  /// W ← W/l of a head whose keys are one run, and its log-sum-exp.
  void normalise(Index head, Coverage coverage, const SoftmaxRows<Accumulator>& outs,
                 const ForwardOutputs<Scalar>& outputs) {
    const Index weights = coverage == Coverage::empty ? 0 : simd::padded<Accumulator>(shape_.keys);
    for (Index row = 0; row < rows(); ++row) {
      Accumulator* const weighed = scores(0).from(row).data;
      outs.include_sinks(row, terms_, head_of(head, row), weighed, weights);
      simd::scale_row(weighed, weights, outs.softmax.normaliser(row));
    }
    for (Index row = 0; outputs.log_sum_exp && row < rows(); row += shape_.queries) {
      outs.template load_offsets<Terms>(row, operands_, head_of(head, row), 0, shape_.queries);
      outs.write_log_sum_exp(row, outputs, head_of(head, row), 0, shape_.queries);
    }
  }

  /// O = W·V of such a head, where it belongs: at once, or through the buffer, with the same bits.
  void write_values(Index head, Coverage coverage, const SoftmaxRows<Accumulator>& outs,
                    const ForwardOutputs<Scalar>& outputs) {
    const Index width = shape_.value_dim;
    if constexpr (std::is_same_v<Scalar, Accumulator>) {
      const auto value_rows = operands_.values_of(head, 0, shape_.keys);
      if (coverage != Coverage::empty && lie_ready(outputs.out) &&
          can_be_read_in_place(value_rows, coverage)) {
        simd::rows_product<Accumulator>(
            rows(), left_operand<false>(scores(0)), value_rows,
            {outputs.out.block_cols(head * shape_.group() * width, width).data,
             row_distance(outputs.out), simd::Store::set},
            values_ahead_);
        return;
      }
    }
    sum_values(head, coverage, outs);
    for (Index row = 0; row < rows(); ++row) {
      simd::write_row<simd::Store::set>(outs.tile(row).data, Accumulator(1),
                                        outputs.out.block_cols(head_of(head, row) * width, width),
                                        row % shape_.queries);
    }
  }

  /// Whether the rows of a key/value head in a matrix with a row for each query are as they are
  /// wanted: whole packets, and one as far from the other as the next.
  template <class Stored>
  bool lie_ready(MatrixView<Stored> matrix) const {
    return std::is_same_v<Scalar, Accumulator> && matrix.col_stride == 1 &&
           matrix.cols / shape_.query_heads % simd::lanes<Accumulator> == 0 &&
           (shape_.group() == 1 || shape_.queries == 1);
  }
  template <class Stored>
  Index row_distance(MatrixView<Stored> matrix) const {
    return shape_.group() == 1 ? matrix.row_stride : matrix.cols / shape_.query_heads;
  }
  bool queries_lie_ready() const { return lie_ready(operands_.queries); }

  /// The queries of one key/value head, without the scale.
  simd::RowsOperand<Accumulator> queries_of(Index head) const {
    if constexpr (std::is_same_v<Scalar, Accumulator>) {
      if (queries_lie_ready())
        return {operands_.query_head(head * shape_.group()).data, row_distance(operands_.queries)};
    }
    return {buffers_.queries + head * rows() * buffers_.query_stride, buffers_.query_stride};
  }

  /// Values can be used as they lie where they are whole contiguous packets. Behind a mask they must
  /// be finite besides, since 0·NaN is NaN; without one every value is seen.
  static bool can_be_read_in_place(MatrixView<const Scalar> values, Coverage coverage) {
    if (values.col_stride != 1 || values.cols % simd::lanes<Accumulator> != 0) return false;
    return coverage == Coverage::full || simd::are_finite<Accumulator>(values);
  }

  /// The tile of one of the query heads that share a key/value head.
  Tile tile_of(Index head, Index member, Index first_key, Index keys) const {
    return {head * shape_.group() + member, 0, shape_.queries, first_key, keys};
  }

  Coverage coverage_of_all(Index head, Index first_key, Index keys) const {
    bool all_empty = true, all_full = true;
    for (Index member = 0; member < shape_.group(); ++member) {
      const Coverage coverage = terms_.coverage(tile_of(head, member, first_key, keys));
      all_empty = all_empty && coverage == Coverage::empty;
      all_full = all_full && coverage == Coverage::full;
    }
    return all_empty ? Coverage::empty : all_full ? Coverage::full : Coverage::partial;
  }

  /// The scores of one member of the group of query heads, and of those after it.
  simd::Tile<Accumulator> scores(Index member) const {
    return {buffers_.scores + member * shape_.queries * buffers_.score_stride,
            buffers_.score_stride};
  }

  const Operands<Scalar>& operands_;
  const Shape& shape_;
  const Terms& terms_;
  StreamBuffers<Accumulator>& buffers_;
  simd::AskAhead<Scalar> keys_ahead_, values_ahead_;
};

/// O = W·V and log_sum_exp of few queries: the items of one sequence that fall to one worker.
template <class Scalar, class Terms, class Items>
void forward(const Operands<Scalar>& operands, const Terms& terms, const StreamPlan<Scalar>& plan,
             const ForwardOutputs<Scalar>& outputs, Arena shared, Arena own, const Items& items) {
  StreamBuffers<accumulator_t<Scalar>> buffers(own, plan.shape, plan.run);
  StreamTask<Scalar, Terms> task(operands, terms, buffers);
  items([&](Index item) {
    if (task.is_one_run(plan.run)) return task.run_once(buffers.outs, outputs);
    const Index first_key = item * plan.part;
    task.run(first_key, std::min(plan.part, plan.shape.keys - first_key), plan.run,
             plan.items > 1 ? plan.part_of(shared, item) : buffers.outs);
    if (plan.items == 1) buffers.outs.write_all(operands, terms, outputs);
  });
}

/// Merges the parts of a sequence, in order, and writes every output once.
template <class Scalar, class Terms>
void finish_forward(const Operands<Scalar>& operands, const Terms& terms,
                    const StreamPlan<Scalar>& plan, const ForwardOutputs<Scalar>& outputs,
                    Arena shared) {
  if (plan.items == 1) return;
  const auto whole = plan.part_of(shared, 0);
  for (Index item = 1; item < plan.items; ++item) {
    const auto part = plan.part_of(shared, item);
    for (Index row = 0; row < plan.rows(); ++row) whole.merge(row, part);
  }
  whole.write_all(operands, terms, outputs);
}

}  // namespace surfattn::detail
