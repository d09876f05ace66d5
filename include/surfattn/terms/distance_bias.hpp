// surfattn layer 3: biases that depend on how far a query and a key are apart

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <string>
#include <surfattn/detail/simd/term_rows.hpp>
#include <surfattn/terms/parameter.hpp>
#include <surfattn/terms/term.hpp>

namespace surfattn {
namespace detail {

/// A bound bias that is a function of head and distance, key position − query position. Of
/// `Function`:
///
///     value<Accumulator>(head, distance)         in natural units
///     add_gradient(distance, sum, item's sums)   `sum` is that of dS over pairs at that distance
///
/// and what else a trainable term has. A tile is cut into squares; a square has few distances, for
/// each of which the function is asked once.
template <class Function>
struct DistanceBias : Function {
  Index first_position;

  template <class Accumulator>
  void add_to(const Tile& tile, simd::Tile<Accumulator> scores) const {
    for_each_square(tile, [&](Index row, Index rows, Index col, Index cols, Index first_distance) {
      Accumulator biases[2 * side];
      for (Index n = 0; n < rows + cols - 1; ++n) {
        biases[n] = this->template value<Accumulator>(tile.head, first_distance + n) *
                    simd::log2_e<Accumulator>;
      }
      for (Index i = 0; i < rows; ++i) {
        Accumulator* to = scores.data + (row + i) * scores.row_stride + col;
        const Accumulator* from = biases + rows - 1 - i;
        for (Index j = 0; j < cols; ++j) to[j] += from[j];
      }
    });
  }

  template <class Accumulator>
  void add_gradient(const Tile& tile, simd::Tile<Accumulator> gradients,
                    ItemSums<Accumulator> sums) const {
    for_each_square(tile, [&](Index row, Index rows, Index col, Index cols, Index first_distance) {
      Accumulator totals[2 * side] = {};
      for (Index i = 0; i < rows; ++i) {
        const Accumulator* from = gradients.data + (row + i) * gradients.row_stride + col;
        Accumulator* to = totals + rows - 1 - i;
        for (Index j = 0; j < cols; ++j) to[j] += from[j];
      }
      for (Index n = 0; n < rows + cols - 1; ++n)
        Function::add_gradient_at(tile.head, first_distance + n, totals[n], sums);
    });
  }

 private:
  static constexpr Index side = 64;

  /// Calls use(first row, rows, first column, columns, distance of the last row and first column)
  /// for the squares of a tile.
  template <class Use>
  void for_each_square(const Tile& tile, const Use& use) const {
    for (Index row = 0; row < tile.queries; row += side) {
      const Index rows = std::min(side, tile.queries - row);
      const Index last_position = first_position + tile.first_query + row + rows - 1;
      for (Index col = 0; col < tile.keys; col += side) {
        use(row, rows, col, std::min(side, tile.keys - col), tile.first_key + col - last_position);
      }
    }
  }
};

template <class Element>
struct AlibiFunction {
  MatrixView<const Element> slopes;
  MatrixView<Element> gradient;

  template <class Accumulator>
  Accumulator value(Index head, Index distance) const {
    return -static_cast<Accumulator>(entry(slopes, head)) *
           static_cast<Accumulator>(std::abs(distance));
  }

  template <class Accumulator>
  void add_gradient_at(Index, Index distance, Accumulator sum, ItemSums<Accumulator> sums) const {
    sums.sums[sums.member] -= sum * static_cast<Accumulator>(std::abs(distance));
  }

  bool wants_gradient() const { return gradient.data != nullptr; }
  Index sums_per_item(const Shape& shape) const { return shape.group(); }
  bool wants_row_sums() const { return false; }
  bool wants_column_sums() const { return false; }

  template <class Accumulator>
  void finish_gradient(const GradientSums<Accumulator>& sums) const {
    for (Index head = 0; head < sums.shape.query_heads; ++head)
      add_to_entry(entry(gradient, head), sums.of_head(head, 0, 1));
  }
};

/// The bucket of a distance, as in T5: half of the buckets (or all, where only keys before the query
/// count) are for one direction; the first half of these for one distance each, the others for
/// ranges that grow like the distance, up to `max_distance`, and the last for all beyond.
struct DistanceBuckets {
  Index buckets;
  Index max_distance;
  bool bidirectional;

  Index operator()(Index distance) const {
    const Index per_side = bidirectional ? buckets / 2 : buckets, exact = per_side / 2;
    const Index first = bidirectional && distance > 0 ? per_side : 0;
    const Index steps = bidirectional ? std::abs(distance) : std::max<Index>(0, -distance);
    if (steps < exact) return first + steps;
    if (steps >= max_distance) return first + per_side - 1;
    const double growth = std::log(static_cast<double>(steps) / static_cast<double>(exact)) /
                          std::log(static_cast<double>(max_distance) / static_cast<double>(exact));
    const auto beyond = static_cast<Index>(growth * static_cast<double>(per_side - exact));
    return first + std::min(exact + beyond, per_side - 1);
  }
};

template <class Element>
struct RelativePositionFunction {
  MatrixView<const Element> table;
  MatrixView<Element> gradient;
  DistanceBuckets bucket_of;

  template <class Accumulator>
  Accumulator value(Index head, Index distance) const {
    return static_cast<Accumulator>(table(bucket_of(distance), head));
  }

  template <class Accumulator>
  void add_gradient_at(Index, Index distance, Accumulator sum, ItemSums<Accumulator> sums) const {
    sums.sums[sums.member * table.rows + bucket_of(distance)] += sum;
  }

  bool wants_gradient() const { return gradient.data != nullptr; }
  Index sums_per_item(const Shape& shape) const { return shape.group() * table.rows; }
  bool wants_row_sums() const { return false; }
  bool wants_column_sums() const { return false; }

  template <class Accumulator>
  void finish_gradient(const GradientSums<Accumulator>& sums) const {
    for (Index head = 0; head < sums.shape.query_heads; ++head) {
      for (Index bucket = 0; bucket < table.rows; ++bucket)
        add_to_entry(gradient(bucket, head), sums.of_head(head, bucket, table.rows));
    }
  }
};

}  // namespace detail

/// Attention with linear biases (Press et al. 2022, arXiv:2108.12409): S_ij ← S_ij − m_h·|p_i − j|
/// with a slope m_h for each query head, where query i stands at position p_i = i + offset as for
/// Causal; `align` may be left out only where Tq = Tk. The gradient of the slopes is
/// dm_h = −Σ_ij dS_ij·|p_i − j|. A view of a row or column of Hq numbers (`alibi_slopes` makes those of
/// the paper); the gradient has its shape.
template <class Element>
class Alibi : public detail::TrainableTerm<Alibi<Element>, Element> {
 public:
  template <detail::StoredMatrix Derived>
  explicit Alibi(const Derived& slopes, std::optional<Align> align = {})
      : detail::TrainableTerm<Alibi<Element>, Element>(slopes), align_(align) {}

  /// A temporary would be gone before it is used.
  template <detail::OwningMatrix Derived>
  explicit Alibi(const Derived&&, std::optional<Align> = {}) = delete;

  detail::DistanceBias<detail::AlibiFunction<Element>> bind(const detail::Shape& shape,
                                                            const detail::Require& require) const {
    this->check_one_per_head(require, "Alibi", shape);
    return {{this->parameters_, this->gradient_},
            detail::first_position("Alibi", align_, shape, require)};
  }

 private:
  std::optional<Align> align_;
};

template <detail::StoredMatrix Derived>
explicit Alibi(const Derived&, std::optional<Align> = {}) -> Alibi<detail::scalar_t<Derived>>;
template <detail::OwningMatrix Derived>
explicit Alibi(const Derived&&, std::optional<Align> = {}) -> Alibi<detail::scalar_t<Derived>>;

/// The slopes of the ALiBi paper for `heads` heads: 2^(−8h/n), h = 1, …, n, where n is the largest
/// power of two ≤ heads, and then every other one of those for 2n. Allocates 1 × heads.
template <class Scalar>
RowVector<Scalar> alibi_slopes(Index heads) {
  Index power = 1;
  while (2 * power <= heads) power *= 2;
  RowVector<Scalar> slopes(heads);
  for (Index head = 0; head < heads; ++head) {
    const double exponent = head < power
                                ? 8.0 * static_cast<double>(head + 1) / double(power)
                                : 4.0 * static_cast<double>(2 * (head - power) + 1) / double(power);
    slopes(head) = static_cast<Scalar>(std::exp2(-exponent));
  }
  return slopes;
}

/// Which distances share a number of a RelativePositionBias.
struct RelativePositionBuckets {
  bool bidirectional =
      true;  ///< half of the buckets for keys after the query; else all of those share the first
  Index max_distance = 128;         ///< from here on, all distances share a bucket
  std::optional<Align> align = {};  ///< as for SlidingWindow
};

/// The relative position bias of T5 (Raffel et al. 2020, arXiv:1910.10683, §2.1):
/// S_ij ← S_ij + table(bucket(j − p_i), h), where query i stands at position p_i. Small distances have a
/// bucket each, larger ones share buckets that grow like the distance. `table` is a view of a matrix
/// buckets × Hq; its gradient, of the same shape, is the sum of dS_ij over the pairs of each bucket
/// and head.
template <class Element>
class RelativePositionBias : public detail::TrainableTerm<RelativePositionBias<Element>, Element> {
 public:
  template <detail::StoredMatrix Derived>
  explicit RelativePositionBias(const Derived& table, const RelativePositionBuckets& buckets = {})
      : detail::TrainableTerm<RelativePositionBias<Element>, Element>(table), buckets_(buckets) {}

  /// A temporary would be gone before it is used.
  template <detail::OwningMatrix Derived>
  explicit RelativePositionBias(const Derived&&, const RelativePositionBuckets& = {}) = delete;

  detail::DistanceBias<detail::RelativePositionFunction<Element>> bind(
      const detail::Shape& shape, const detail::Require& require) const {
    const detail::Extent actual = this->parameter_extent();
    const Index most_exact = actual.rows / (buckets_.bidirectional ? 4 : 2);
    if (actual.cols != shape.query_heads || most_exact < 1) {
      require.fail("RelativePositionBias must have one column for each query head and at least ",
                   buckets_.bidirectional ? "4" : "2", " rows of buckets, but it is ", actual,
                   " for ", shape.query_heads, " heads");
    }
    if (buckets_.max_distance <= most_exact) {
      require.fail("the max_distance of RelativePositionBias must exceed the ", most_exact,
                   " distances that have a bucket each, but it is ", buckets_.max_distance);
    }
    this->check_gradient_shape(require, "RelativePositionBias");
    return {{this->parameters_,
             this->gradient_,
             {actual.rows, buckets_.max_distance, buckets_.bidirectional}},
            detail::first_position("RelativePositionBias", buckets_.align, shape, require)};
  }

 private:
  RelativePositionBuckets buckets_;
};

template <detail::StoredMatrix Derived>
explicit RelativePositionBias(const Derived&, const RelativePositionBuckets& = {})
    -> RelativePositionBias<detail::scalar_t<Derived>>;
template <detail::OwningMatrix Derived>
explicit RelativePositionBias(const Derived&&, const RelativePositionBuckets& = {})
    -> RelativePositionBias<detail::scalar_t<Derived>>;

}  // namespace surfattn
