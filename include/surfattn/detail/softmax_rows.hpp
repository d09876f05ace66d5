// surfattn layer 4: rows of an output on their way through the keys

#pragma once

#include <algorithm>
#include <surfattn/detail/online_softmax.hpp>
#include <surfattn/detail/operands.hpp>
#include <surfattn/detail/score_tile.hpp>
#include <surfattn/detail/simd/packing.hpp>
#include <surfattn/workspace.hpp>

namespace surfattn::detail {

/// The unnormalised outputs o of some rows and the running softmax that belongs to them.
template <class Accumulator>
struct SoftmaxRows {
  Accumulator* out = nullptr;
  Index stride = 0;
  OnlineSoftmax<Accumulator> softmax;
  Accumulator* offsets = nullptr;  ///< what each row's log-sum-exp has besides

  SoftmaxRows() = default;
  SoftmaxRows(Arena& arena, Index rows, Index value_dim)
      : out(arena.take<Accumulator>(rows * simd::padded<Accumulator>(value_dim))),
        stride(simd::padded<Accumulator>(value_dim)) {
    softmax = {arena.take<Accumulator>(rows), arena.take<Accumulator>(rows)};
    offsets = arena.take<Accumulator>(rows);
  }

  void reset(Index rows) const {
    reset_out(rows);
    softmax.reset(rows);
  }
  void reset_out(Index rows) const { std::fill(out, out + rows * stride, Accumulator(0)); }

  simd::Tile<Accumulator> tile(Index row) const { return {out + row * stride, stride}; }

  /// The rows from `row` on.
  SoftmaxRows from(Index row) const {
    SoftmaxRows rest = *this;
    rest.out += row * stride;
    rest.softmax = {softmax.maximum + row, softmax.sum + row};
    rest.offsets += row;
    return rest;
  }

  /// Turns the scores of `rows` rows from `row` on into weights; the columns that pad the keys to whole
  /// packets get weight 0.
  void take_weights(Index row, Index rows, Index keys, simd::Tile<Accumulator> scores) const {
    const Index padded_keys = simd::rounded_up(keys, simd::lanes<Accumulator>);
    // A few rows at a time: they stay in the first-level cache for both passes, and their maxima do
    // not wait for each other.
    for (Index first = 0, end; first < rows; first = end) {
      end = std::min<Index>(first + 4, rows);
      for (Index i = first; i < end; ++i) {
        softmax.raise(row + i, simd::pad_and_find_maximum(scores.from(i).data, keys),
                      out + (row + i) * stride, stride);
      }
      for (Index i = first; i < end; ++i) softmax.weigh(row + i, scores.from(i).data, padded_keys);
    }
  }

  /// Takes in what another part of the keys gave for the same row.
  void merge(Index row, const SoftmaxRows& part) const {
    softmax.merge(row, part.softmax, out + row * stride, part.out + row * stride, stride);
  }

  /// Takes in the sinks, when all keys are done: what has been weighed so far, whole packets of
  /// numbers, is brought to the new maximum.
  template <class Terms>
  void include_sinks(Index row, const Terms& terms, Index head, Accumulator* weighed,
                     Index count) const {
    terms.each_sink([&](const auto& sink) {
      const auto logit = sink.template logit<Accumulator>(head) * simd::log2_e<Accumulator>;
      softmax.include(row, logit, weighed, count);
    });
  }

  /// The offsets of `queries` rows from `row` on: queries of a head, the first of them `query`.
  template <class Terms, class Scalar>
  void load_offsets(Index row, const Operands<Scalar>& operands, Index head, Index query,
                    Index queries) const {
    offsets_beside_scores<Terms>(operands, head, query, queries, offsets + row);
  }

  /// The same rows, finished: o/l and, where it is asked for and offsets are loaded, the log-sum-exp;
  /// −∞ where no key was seen and no sink is.
  template <class Scalar, class Terms>
  void write(Index row, const Operands<Scalar>& operands, const Terms& terms,
             const ForwardOutputs<Scalar>& outputs, Index head, Index query, Index queries) const {
    const Index value_dim = operands.shape.value_dim;
    for (Index i = row; i < row + queries; ++i)
      include_sinks(i, terms, head, out + i * stride, stride);
    write_normalised(
        row, outputs.out.block_cols(head * value_dim, value_dim).block_rows(query, queries));
    if (outputs.log_sum_exp) write_log_sum_exp(row, outputs, head, query, queries);
  }

  /// The same for all queries of all heads; the row of query i of head h is h·Tq + i.
  template <class Scalar, class Terms>
  void write_all(const Operands<Scalar>& operands, const Terms& terms,
                 const ForwardOutputs<Scalar>& outputs) const {
    const Index queries = operands.shape.queries;
    for (Index head = 0; head < operands.shape.query_heads; ++head) {
      if (outputs.log_sum_exp) load_offsets<Terms>(head * queries, operands, head, 0, queries);
      write(head * queries, operands, terms, outputs, head, 0, queries);
    }
  }

  /// o/l of the rows from `row` on.
  template <class Scalar>
  void write_normalised(Index row, MatrixView<Scalar> to) const {
    simd::write_rows<simd::Store::set>(out + row * stride, stride, to,
                                       [&](Index i) { return softmax.normaliser(row + i); });
  }

  template <class Scalar>
  void write_log_sum_exp(Index row, const ForwardOutputs<Scalar>& outputs, Index head, Index query,
                         Index queries) const {
    for (Index i = 0; i < queries; ++i) {
      const Accumulator seen = softmax.log_sum_exp(row + i);
      const bool sees_a_key = seen != simd::minus_infinity<Accumulator>;
      (*outputs.log_sum_exp)(query + i, head) = sees_a_key ? seen + offsets[row + i] : seen;
    }
  }
};

}  // namespace surfattn::detail
