// surfattn layer 3: a bias for each pair of a query and a key

#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <surfattn/detail/bound_masks.hpp>
#include <surfattn/detail/simd/term_rows.hpp>
#include <surfattn/terms/parameter.hpp>
#include <surfattn/terms/term.hpp>
#include <type_traits>

namespace surfattn {

/// S_ij ← S_ij + B_ij, in natural units, with gradient dB = dS. A view of a matrix that is
///
///  * Tq × Tk, for all heads (its gradient is the sum over heads), or
///  * Tq × (Hq·Tk), a block of columns for each query head: B(i, h·Tk + j), or
///  * 1 × Tk or 1 × (Hq·Tk), for all queries (summed over queries).
///
/// Sequences of a batch share it (its gradient is the sum over them), if they have one length; or, if
/// they have as many keys, it has a row for each query of the whole batch, packed as the queries are.
///
/// A bias of −∞ hides the pair as a mask does, by selection: nothing behind it reaches a result, its
/// gradient is 0, and tiles that it leaves empty are skipped. (Scores are held in units of ln 2, where what
/// is below −2.35·10³⁸ in float is −∞ too: in rows of nothing else but the lowest float all weights are 0,
/// not equal.) A NaN, or +∞, gives NaN to the whole row. The gradient is a matrix of the bias's shape; of
/// 16-bit numbers it is summed over heads in that type. Time O(1) for each pair.
template <class Element>
class AdditiveBias : public detail::TrainableTerm<AdditiveBias<Element>, Element> {
  using Base = detail::TrainableTerm<AdditiveBias<Element>, Element>;

 public:
  using Base::Base;

  AdditiveBias bind(const detail::Shape& shape, const detail::Require& require) const {
    check_shape(shape, require);
    this->check_gradient_shape(require, "AdditiveBias");
    AdditiveBias bound = *this;
    bound.has_queries_ =
        this->parameters_.rows == shape.queries || this->parameters_.rows == shape.packed_queries;
    bound.has_sequences_ = this->parameters_.rows == shape.packed_queries;
    if (bound.has_queries_) {
      bound.parameters_ =
          detail::sequence_rows(this->parameters_, shape.queries, shape.first_query);
      if (this->wants_gradient())
        bound.gradient_ = detail::sequence_rows(this->gradient_, shape.queries, shape.first_query);
    }
    bound.has_heads_ = this->parameters_.cols == shape.query_heads * shape.keys;
    bound.shape_ = shape;
    return bound;
  }

  bool allows(Index head, Index query, Index key) const {
    return block(this->parameters_, {head, query, 1, key, 1})(0, 0) != hidden();
  }

  /// Reads the tile's part of the bias, in the order in which it is stored, until it has met both a
  /// pair that is seen and one that is not.
  Coverage coverage(const Tile& tile) const {
    auto lines = block(this->parameters_, tile);
    if (!has_queries_) lines = lines.block_rows(0, 1);
    if (lines.is_stored_by_columns()) lines = lines.transposed();
    bool any = false, all = true;
    for (Index i = 0; i < lines.rows; ++i) {
      const Index count = lines.col_stride == 1
                              ? count_hidden(lines.row(i), 1, lines.cols)
                              : count_hidden(lines.row(i), lines.col_stride, lines.cols);
      any |= count < lines.cols;
      all &= count == 0;
      if (any && !all) return Coverage::partial;
    }
    return all ? Coverage::full : Coverage::empty;
  }

  void see_rows(const Tile& tile, detail::SeenByte* seen, Index seen_stride) const {
    detail::see_entries(block(this->parameters_, tile), seen, seen_stride,
                        [](Element bias) { return bias != hidden(); });
  }

  template <class Accumulator>
  void add_to(const Tile& tile, detail::simd::Tile<Accumulator> scores) const {
    detail::simd::add_scaled_source(block(this->parameters_, tile),
                                    detail::simd::log2_e<Accumulator>, scores);
  }

  Index sums_per_item(const detail::Shape&) const { return 0; }
  bool wants_row_sums() const { return false; }
  bool wants_column_sums() const { return !has_queries_; }
  bool adds_across_heads() const {
    return has_queries_ && !has_heads_ && shape_.key_value_heads > 1;
  }
  bool adds_across_sequences() const {
    return has_queries_ && !has_sequences_ && shape_.sequences.count() > 1;
  }

  template <class Accumulator>
  void add_gradient(const Tile& tile, detail::simd::Tile<Accumulator> gradients,
                    detail::ItemSums<Accumulator>) const {
    if (!has_queries_) return;  // from the column sums, at the end
    const auto target = block(this->gradient_, tile);
    for (Index i = 0; i < tile.queries; ++i) {
      detail::simd::store_row<detail::simd::Store::add>(
          gradients.data + i * gradients.row_stride, target.row(i), target.col_stride, tile.keys);
    }
  }

  template <class Accumulator>
  void finish_gradient(const detail::GradientSums<Accumulator>& sums) const {
    if (has_queries_) return;
    const Index heads = has_heads_ ? shape_.query_heads : 1, summed = shape_.query_heads / heads;
    for (Index head = 0; head < heads; ++head) {
      for (Index j = 0; j < shape_.keys; ++j) {
        Accumulator total(0);
        for (Index h = head * summed; h < (head + 1) * summed; ++h)
          total += sums.of_columns[h * shape_.keys + j];
        detail::add_to_entry(this->gradient_(0, head * shape_.keys + j), total);
      }
    }
  }

 private:
  static Element hidden() { return -std::numeric_limits<Element>::infinity(); }

  /// How many of the numbers are −∞. Counted in integers as wide as they are, for vectors.
  SURFATTN_ALWAYS_INLINE static Index count_hidden(const Element* from, Index stride, Index count) {
    using Counter = std::conditional_t<sizeof(Element) == 4, std::uint32_t, std::uint64_t>;
    const Element minus_infinity = hidden();
    Counter total = 0;
    for (Index j = 0; j < count; ++j) total += from[j * stride] == minus_infinity;
    return static_cast<Index>(total);
  }

  void check_shape(const detail::Shape& shape, const detail::Require& require) const {
    const detail::Extent actual = this->parameter_extent();
    const bool rows = actual.rows == shape.queries || actual.rows == shape.packed_queries ||
                      actual.rows == 1,
               cols = actual.cols == shape.keys || actual.cols == shape.query_heads * shape.keys;
    if (rows && cols) return check_lengths(shape, actual, require);
    require.fail(
        "AdditiveBias is ", actual, " but must be ",
        detail::words_of_either({shape.queries, shape.keys},
                                {shape.queries, shape.query_heads * shape.keys}),
        " (queries × keys, for all heads or for each), or one row of these for all queries",
        (shape.sequences.count() > 1 ? ", or one for each query of the batch, where all sequences "
                                       "have as many keys"
                                     : ""));
  }

  /// A bias that all sequences of a batch share has one shape, and so have they.
  static void check_lengths(const detail::Shape& shape, detail::Extent actual,
                            const detail::Require& require) {
    const Index count = shape.sequences.count();
    const bool is_shared = actual.rows == shape.queries && actual.rows != shape.packed_queries;
    const bool have_one_length =
        shape.queries * count == shape.packed_queries && shape.keys * count == shape.packed_keys;
    if (!is_shared || have_one_length) return;
    require.fail("AdditiveBias is ", actual,
                 ", one bias for all sequences, but these differ in length");
  }

  /// The tile's part of the bias or of its gradient.
  template <class Number>
  detail::MatrixView<Number> block(detail::MatrixView<Number> matrix, const Tile& tile) const {
    if (!has_queries_) matrix.row_stride = 0;
    return matrix.block_rows(has_queries_ ? tile.first_query : 0, tile.queries)
        .block_cols((has_heads_ ? tile.head * shape_.keys : 0) + tile.first_key, tile.keys);
  }

  bool has_queries_ = false;    ///< differs from query to query
  bool has_heads_ = false;      ///< differs from head to head
  bool has_sequences_ = false;  ///< has rows of its own for each sequence
  detail::Shape shape_;
};

template <detail::StoredMatrix Derived>
explicit AdditiveBias(const Derived&) -> AdditiveBias<detail::scalar_t<Derived>>;

}  // namespace surfattn
