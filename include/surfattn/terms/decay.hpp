// surfattn layer 3: biases that let keys fade with time

#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <surfattn/detail/simd/term_rows.hpp>
#include <surfattn/terms/parameter.hpp>
#include <surfattn/terms/term.hpp>
#include <type_traits>

namespace surfattn {

/// Forget gates (Lin et al. 2025, arXiv:2503.02130): S_ij ← S_ij + F(p_i, h) − F(j, h), where F_t is
/// the sum of the log gates up to position t, so that a key fades by every gate between it and the
/// query, and query i stands at position p_i = i + offset as for Causal; `align` may be left out only
/// where Tq = Tk. Where every gate is the same this is exponential decay. A key after the query would
/// gain what one before it loses: list Causal as well.
///
/// A view of the cumulative log gates, Tk × Hq, or Tk × 1 for all heads (of a batch: those of each of
/// its sequences, or of all tokens packed as they are), at every position a query
/// stands at (Tq ≤ Tk, or a top-left alignment with no query beyond the last key). The gradient, of the same
/// shape, is dF(t, h) = Σ_j dS_ij at the query with p_i = t, less Σ_i dS_it.
/// `cumulative_log_gates` forms F and `log_gate_gradient` takes its gradient back to the gates.
template <class Element>
class ForgetGate : public detail::TrainableTerm<ForgetGate<Element>, Element> {
 public:
  template <detail::StoredMatrix Derived>
  explicit ForgetGate(const Derived& cumulative, std::optional<Align> align = {})
      : detail::TrainableTerm<ForgetGate<Element>, Element>(cumulative), align_(align) {}

  /// A temporary would be gone before it is used.
  template <detail::OwningMatrix Derived>
  explicit ForgetGate(const Derived&&, std::optional<Align> = {}) = delete;

  ForgetGate bind(const detail::Shape& shape, const detail::Require& require) const {
    const detail::Extent actual = this->parameter_extent();
    const bool rows = actual.rows == shape.keys || actual.rows == shape.packed_keys;
    if (!rows || (actual.cols != 1 && actual.cols != shape.query_heads)) {
      require.fail("ForgetGate is ", actual, " but must be ",
                   detail::words_of_either({shape.keys, shape.query_heads}, {shape.keys, 1}),
                   " (keys × query heads, or one for all heads)");
    }
    this->check_gradient_shape(require, "ForgetGate");
    ForgetGate bound = *this;
    bound.parameters_ = detail::sequence_rows(this->parameters_, shape.keys, shape.first_key);
    if (this->wants_gradient())
      bound.gradient_ = detail::sequence_rows(this->gradient_, shape.keys, shape.first_key);
    bound.first_position_ = detail::first_position("ForgetGate", align_, shape, require);
    if (bound.first_position_ < 0 || bound.first_position_ + shape.queries > shape.keys) {
      require.fail("ForgetGate needs a gate at the position of every query, but queries is ",
                   shape.queries_extent(), " and keys is ", shape.keys_extent());
    }
    return bound;
  }

  template <class Accumulator>
  void add_to(const Tile& tile, detail::simd::Tile<Accumulator> scores) const {
    for (Index i = 0; i < tile.queries; ++i) {
      const auto at_query = gate<Accumulator>(tile.head, first_position_ + tile.first_query + i);
      Accumulator* row = scores.data + i * scores.row_stride;
      const Element* at_key = &this->parameters_(tile.first_key, column(tile.head));
      for (Index j = 0; j < tile.keys; ++j) {
        const auto decay =
            at_query - static_cast<Accumulator>(at_key[j * this->parameters_.row_stride]);
        row[j] += decay * detail::simd::log2_e<Accumulator>;
      }
    }
  }

  Index sums_per_item(const detail::Shape&) const { return 0; }
  bool wants_row_sums() const { return true; }
  bool wants_column_sums() const { return true; }

  template <class Accumulator>
  void finish_gradient(const detail::GradientSums<Accumulator>& sums) const {
    const detail::Shape& shape = sums.shape;
    const Index summed = this->parameters_.cols == 1 ? shape.query_heads : 1;
    for (Index c = 0; c < this->parameters_.cols; ++c) {
      for (Index j = 0; j < shape.keys; ++j) {
        const Index query = j - first_position_;
        Accumulator total(0);
        for (Index head = c * summed; head < (c + 1) * summed; ++head) {
          if (0 <= query && query < shape.queries)
            total += sums.of_rows[head * shape.queries + query];
          total -= sums.of_columns[head * shape.keys + j];
        }
        detail::add_to_entry(this->gradient_(j, c), total);
      }
    }
  }

 private:
  Index column(Index head) const { return this->parameters_.cols == 1 ? 0 : head; }

  template <class Accumulator>
  Accumulator gate(Index head, Index position) const {
    return static_cast<Accumulator>(this->parameters_(position, column(head)));
  }

  std::optional<Align> align_;
  Index first_position_ = 0;
};

template <detail::StoredMatrix Derived>
explicit ForgetGate(const Derived&, std::optional<Align> = {})
    -> ForgetGate<detail::scalar_t<Derived>>;
template <detail::OwningMatrix Derived>
explicit ForgetGate(const Derived&&, std::optional<Align> = {})
    -> ForgetGate<detail::scalar_t<Derived>>;

/// F_t = Σ_{s ≤ t} log f_s down each column. Allocates the result.
template <detail::DenseMatrix Derived>
Matrix<detail::scalar_t<Derived>> cumulative_log_gates(const Derived& log_gates) {
  Matrix<detail::scalar_t<Derived>> sums = log_gates;
  for (Index t = 1; t < sums.rows(); ++t) sums.row(t) += sums.row(t - 1);
  return sums;
}

/// The way back: d log f_s = Σ_{t ≥ s} dF_t down each column. Allocates the result.
template <detail::DenseMatrix Derived>
Matrix<detail::scalar_t<Derived>> log_gate_gradient(const Derived& grad_cumulative) {
  Matrix<detail::scalar_t<Derived>> sums = grad_cumulative;
  for (Index t = sums.rows() - 2; t >= 0; --t) sums.row(t) += sums.row(t + 1);
  return sums;
}

/// Exponential decay with time, for tokens at irregular times: S_ij ← S_ij − λ_h·|t_i − t_j|, with a
/// rate λ_h for each query head, in one over the unit of the times; its gradient is
/// dλ_h = −Σ_ij dS_ij·|t_i − t_j|. Views of a row or column of Hq rates and of rows or columns of Tq
/// and Tk times (of a batch: of each of its sequences, or of all tokens packed as they are); the
/// gradient has the shape of the rates. A time behind a mask may be anything.
template <class Element, class Time>
class TimeDecay : public detail::TrainableTerm<TimeDecay<Element, Time>, Element> {
 public:
  template <detail::StoredMatrix Rates, detail::StoredMatrix QueryTimes,
            detail::StoredMatrix KeyTimes>
  TimeDecay(const Rates& rates, const QueryTimes& query_times, const KeyTimes& key_times)
      : detail::TrainableTerm<TimeDecay<Element, Time>, Element>(rates),
        query_times_(detail::view(query_times)),
        key_times_(detail::view(key_times)) {}

  /// A temporary would be gone before it is used.
  template <class Rates, class QueryTimes, class KeyTimes>
  requires(detail::TemporaryMatrix<Rates> || detail::TemporaryMatrix<QueryTimes> ||
           detail::TemporaryMatrix<KeyTimes>) TimeDecay(Rates&&, QueryTimes&&, KeyTimes&&)
  = delete;

  TimeDecay bind(const detail::Shape& shape, const detail::Require& require) const {
    this->check_one_per_head(require, "TimeDecay", shape);
    TimeDecay bound = *this;
    bound.query_times_ = times_of(require, "query_times", query_times_, shape.queries,
                                  shape.first_query, shape.packed_queries);
    bound.key_times_ =
        times_of(require, "key_times", key_times_, shape.keys, shape.first_key, shape.packed_keys);
    return bound;
  }

  template <class Accumulator>
  void add_to(const Tile& tile, detail::simd::Tile<Accumulator> scores) const {
    const auto rate = static_cast<Accumulator>(detail::entry(this->parameters_, tile.head)) *
                      detail::simd::log2_e<Accumulator>;
    for (Index i = 0; i < tile.queries; ++i) {
      Accumulator* row = scores.data + i * scores.row_stride;
      for_each_distance<Accumulator>(
          tile, i, [&](Index j, Accumulator distance) { row[j] -= rate * distance; });
    }
  }

  template <class Accumulator>
  void add_gradient(const Tile& tile, detail::simd::Tile<Accumulator> gradients,
                    detail::ItemSums<Accumulator> sums) const {
    for (Index i = 0; i < tile.queries; ++i) {
      const Accumulator* row = gradients.data + i * gradients.row_stride;
      Accumulator total(0);
      for_each_distance<Accumulator>(tile, i, [&](Index j, Accumulator distance) {
        total += row[j] == Accumulator(0) ? Accumulator(0) : row[j] * distance;
      });
      sums.sums[sums.member] -= total;
    }
  }

  Index sums_per_item(const detail::Shape& shape) const { return shape.group(); }
  bool wants_row_sums() const { return false; }
  bool wants_column_sums() const { return false; }

  template <class Accumulator>
  void finish_gradient(const detail::GradientSums<Accumulator>& sums) const {
    for (Index head = 0; head < sums.shape.query_heads; ++head)
      detail::add_to_entry(detail::entry(this->gradient_, head), sums.of_head(head, 0, 1));
  }

 private:
  using Times = detail::MatrixView<const Time>;

  /// The times of a sequence, of which there are `count`, out of these or of those of a batch.
  static Times times_of(const detail::Require& require, const char* name, Times times, Index count,
                        Index first, Index packed_count) {
    const detail::Extent actual = detail::extent(times);
    if (times.rows == 1 && times.cols != 1)
      times = {times.data, times.cols, 1, times.col_stride, times.col_stride};
    if (times.cols == 1 && (times.rows == count || times.rows == packed_count))
      return detail::sequence_rows(times, count, first);
    require.fail("TimeDecay's ", name, " must be ", detail::words_of_either({count, 1}, {1, count}),
                 ", but it is ", actual);
  }

  /// Calls use(j, |t_i − t_j|), the difference formed in the precision of the times.
  template <class Accumulator, class Use>
  void for_each_distance(const Tile& tile, Index i, const Use& use) const {
    const Time at_query = query_times_(tile.first_query + i, 0);
    for (Index j = 0; j < tile.keys; ++j) {
      const Time difference = at_query - key_times_(tile.first_key + j, 0);
      use(j, static_cast<Accumulator>(std::abs(difference)));
    }
  }

  Times query_times_;
  Times key_times_;
};

template <detail::StoredMatrix Rates, detail::StoredMatrix QueryTimes,
          detail::StoredMatrix KeyTimes>
TimeDecay(const Rates&, const QueryTimes&, const KeyTimes&)
    -> TimeDecay<detail::scalar_t<Rates>, detail::scalar_t<QueryTimes>>;

}  // namespace surfattn
