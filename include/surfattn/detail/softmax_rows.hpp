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

  SoftmaxRows() = default;
  SoftmaxRows(Arena& arena, Index rows, Index value_dim)
      : out(arena.take<Accumulator>(rows * simd::padded<Accumulator>(value_dim))),
        stride(simd::padded<Accumulator>(value_dim)) {
    softmax = {arena.take<Accumulator>(rows), arena.take<Accumulator>(rows)};
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
    return rest;
  }

  /// Turns the scores of `rows` rows from `row` on into weights; the columns that only pad the tile
  /// get weight 0.
  void take_weights(Index row, Index rows, Index keys, simd::Tile<Accumulator> scores) const {
    const Index padded_keys = simd::padded<Accumulator>(keys);
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

  /// The finished row: o/l and the log-sum-exp, −∞ where no key was seen and no sink is.
  template <class Scalar, class Terms>
  void write(Index row, const Operands<Scalar>& operands, const Terms& terms,
             const ForwardOutputs<Scalar>& outputs, Index head, Index query) const {
    include_sinks(row, terms, head, out + row * stride, stride);
    const Index value_dim = operands.shape.value_dim;
    simd::write_row<simd::Store::set>(out + row * stride, softmax.normaliser(row),
                                      outputs.out.block_cols(head * value_dim, value_dim), query);
    write_log_sum_exp<Terms>(row, operands, outputs, head, query);
  }

  /// The same for all queries of all heads; the row of query i of head h is h·Tq + i.
  template <class Scalar, class Terms>
  void write_all(const Operands<Scalar>& operands, const Terms& terms,
                 const ForwardOutputs<Scalar>& outputs) const {
    const Shape& shape = operands.shape;
    for (Index query = 0; query < shape.queries; ++query) {
      for (Index head = 0; head < shape.query_heads; ++head)
        write(head * shape.queries + query, operands, terms, outputs, head, query);
    }
  }

  template <class Terms, class Scalar>
  void write_log_sum_exp(Index row, const Operands<Scalar>& operands,
                         const ForwardOutputs<Scalar>& outputs, Index head, Index query) const {
    if (!outputs.log_sum_exp) return;
    const Accumulator seen = softmax.log_sum_exp(row);
    const bool sees_a_key = seen != simd::minus_infinity<Accumulator>;
    (*outputs.log_sum_exp)(query, head) =
        sees_a_key ? seen + offset_beside_scores<Terms>(operands, head, query) : seen;
  }
};

}  // namespace surfattn::detail
