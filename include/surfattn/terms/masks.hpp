// surfattn layer 3: masks, the terms that say which keys a query sees

#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <surfattn/detail/bound_masks.hpp>
#include <surfattn/detail/view.hpp>
#include <surfattn/sequences.hpp>
#include <surfattn/terms/term.hpp>
#include <type_traits>

namespace surfattn {
namespace detail {

struct CausalRange {
  static constexpr bool is_monotone = true;
  Index first_position;
  Index keys;
  KeyRange range(Index query) const { return {0, std::min(keys, first_position + query + 1)}; }
};

struct WindowRange {
  static constexpr bool is_monotone = true;
  Index first_position;
  Index left;
  Index right;
  Index keys;
  KeyRange range(Index query) const {
    const Index position = first_position + query;
    return {std::max<Index>(0, position - left), std::min(keys, position + right + 1)};
  }
};

struct LengthRange {
  static constexpr bool is_monotone = true;
  Index length;
  KeyRange range(Index) const { return {0, length}; }
};

struct QueryLengthRange {
  Index length;
  Index keys;
  KeyRange range(Index query) const { return {0, query < length ? keys : 0}; }
};

/// One length for all sequences, or one for each. A view.
class SequenceLengths {
 public:
  constexpr explicit SequenceLengths(Index length) : length_(length) {}
  template <OffsetRange Range>
  explicit SequenceLengths(const Range& lengths) : lengths_(lengths), is_shared_(false) {}

  /// Temporary lengths would be gone before they are used.
  template <TemporaryRange Range>
  requires OffsetRange<Range>
  explicit SequenceLengths(const Range&&) = delete;

  /// The length of one sequence, checked to be at most `most`.
  Index of_sequence(const char* term, const Shape& shape, Extent most, const char* of_what,
                    const Require& require) const {
    if (!is_shared_ && lengths_.size() != shape.sequences.count()) {
      require.fail(term, " must have one length for each sequence, but it has ", lengths_.size(),
                   " and there are ", shape.sequences.count(), " sequences");
    }
    const Index length = is_shared_ ? length_ : lengths_[shape.sequence];
    if (length < 0 || length > most.rows) {
      require.fail(term, " must lie between 0 and the number of ", of_what, ", but it is ", length,
                   " and ", of_what, " is ", most);
    }
    return length;
  }

 private:
  Index length_ = 0;
  IntegerView lengths_;
  bool is_shared_ = true;
};

}  // namespace detail

/// Query i sees the keys j ≤ i + offset, where the offset is 0 (Align::top_left) or Tk − Tq
/// (Align::bottom_right). The alignment is always named: where Tq ≠ Tk neither is a safe default.
/// Queries before the first key see nothing.
struct Causal {
  Align align;

  constexpr explicit Causal(Align alignment) : align(alignment) {}

  detail::CausalRange bind(const detail::Shape& shape, const detail::Require&) const {
    return {detail::first_position(align, shape), shape.keys};
  }
};

/// A query at position p sees the keys from p − left to p + right. Position p = i + offset as for
/// Causal; `align` may be left out only where Tq = Tk. For a causal window: right = 0.
struct SlidingWindow {
  static constexpr Index unlimited = std::numeric_limits<Index>::max() / 4;

  Index left = unlimited;   ///< keys before the query's own position, ≥ 0
  Index right = unlimited;  ///< keys after it, ≥ 0
  std::optional<Align> align = {};

  detail::WindowRange bind(const detail::Shape& shape, const detail::Require& require) const {
    if (left < 0 || right < 0) {
      require.fail("SlidingWindow must reach 0 or more keys to each side, but left is ", left,
                   " and right is ", right);
    }
    return {detail::first_position("SlidingWindow", align, shape, require),
            std::min(left, unlimited), std::min(right, unlimited), shape.keys};
  }
};

/// Of each sequence only the first keys are there; the rest is padding that nobody sees, whatever
/// it holds. One length for all sequences, or a range (vector, array, span) of one for each, of
/// signed 32- or 64-bit integers: a view, which must outlive the call.
class KeyLengths : private detail::SequenceLengths {
 public:
  using SequenceLengths::SequenceLengths;

  detail::LengthRange bind(const detail::Shape& shape, const detail::Require& require) const {
    return {of_sequence("KeyLengths", shape, shape.keys_extent(), "keys", require)};
  }
};

/// Of each sequence only the first queries are there; the rest is padding that sees nothing: its
/// output is 0, and so are the gradients from and to it. Lengths as for KeyLengths.
class QueryLengths : private detail::SequenceLengths {
 public:
  using SequenceLengths::SequenceLengths;

  detail::QueryLengthRange bind(const detail::Shape& shape, const detail::Require& require) const {
    return {of_sequence("QueryLengths", shape, shape.queries_extent(), "queries", require),
            shape.keys};
  }
};

/// A dense mask: true where the query sees the key. A view of any stored Eigen matrix of bool or of
/// an integer type (0 is false) that outlives the call, of
///
///  * Tq × Tk, for all heads and sequences, or
///  * Tq × (Hq·Tk), a block of columns for each query head, or
///  * (Hq·Tq) × Tk, a block of rows for each query head, as in a tensor (heads, queries, keys),
///
/// where instead of Tq rows there may be 1, for all queries, or, in a batch, one for each query of
/// all its sequences, which then differ in their masks: a tensor (batch, heads, queries, keys) is
/// such a matrix of B·Hq·Tq rows. In a ragged batch Tq and Tk are those of its longest sequences,
/// and what lies beyond a shorter one is not read. A number of rows that can be read in two ways is
/// the same for all heads. Tiles are read before they are computed, and those that are empty are
/// skipped. Time O(1) for each pair.
template <class Element>
class BoolMask {
 public:
  template <detail::StoredMatrix Derived>
  explicit BoolMask(const Derived& mask) : mask_(detail::view(mask)) {}

  /// A temporary matrix would be gone before the mask is used.
  template <detail::OwningMatrix Derived>
  explicit BoolMask(const Derived&&) = delete;

  /// An expression has no numbers to be viewed, and an Array is no matrix.
  template <class Derived>
  requires(!detail::StoredMatrix<Derived>) explicit BoolMask(const Eigen::DenseBase<Derived>&) {
    static_assert(
        detail::StoredMatrix<Derived>,
        "surfattn: a BoolMask is a view: pass a stored matrix, with .matrix() of an Array, not "
        "an expression");
  }

  BoolMask bind(const detail::Shape& shape, const detail::Require& require) const {
    check_shape(shape, require);
    BoolMask bound = *this;
    const Index heads = shape.query_heads;
    const bool in_columns = mask_.cols == heads * shape.longest_keys && heads > 1;
    const bool in_rows = !in_columns && !is_shared(shape);
    const Index blocks = in_rows ? heads : 1;
    const bool of_batch = mask_.rows == blocks * shape.packed_queries && mask_.rows > 1;
    const Index rows = of_batch ? shape.queries : shape.longest_queries;  // of a block
    bound.head_stride_ = in_columns ? shape.longest_keys * mask_.col_stride
                         : in_rows  ? rows * mask_.row_stride
                                    : 0;
    if (mask_.rows == 1) bound.mask_.row_stride = 0;
    if (of_batch)
      bound.mask_ = bound.mask_.block_rows(blocks * shape.first_query, blocks * shape.queries);
    return bound;
  }

  bool allows(Index head, Index query, Index key) const {
    return static_cast<bool>(
        mask_.data[head * head_stride_ + query * mask_.row_stride + key * mask_.col_stride]);
  }

  Coverage coverage(const Tile& tile) const { return detail::read_coverage(*this, tile); }

  void see_rows(const Tile& block, detail::SeenByte* seen, Index seen_stride) const {
    auto of_head = mask_;
    of_head.data += block.head * head_stride_;
    detail::see_entries(of_head.block_rows(block.first_query, block.queries)
                            .block_cols(block.first_key, block.keys),
                        seen, seen_stride, [](Element number) { return number != Element(0); });
  }

 private:
  /// Whether the rows are those of `blocks` blocks of queries.
  bool is_rows_of(const detail::Shape& shape, Index blocks) const {
    return mask_.rows == blocks * shape.longest_queries ||
           mask_.rows == blocks * shape.packed_queries;
  }
  /// Whether the rows are the same for all heads; where they can be read either way, they are.
  bool is_shared(const detail::Shape& shape) const {
    return mask_.rows == 1 || is_rows_of(shape, 1);
  }

  void check_shape(const detail::Shape& shape, const detail::Require& require) const {
    const Index heads = shape.query_heads;
    const Index keys = shape.longest_keys;
    if (is_shared(shape) && (mask_.cols == keys || mask_.cols == heads * keys)) return;
    if (is_rows_of(shape, heads) && mask_.cols == keys) return;
    require.shape("BoolMask", detail::extent(mask_), {shape.longest_queries, keys},
                  "queries × keys, or so for each query head, or 1 row for all queries");
  }

  static_assert(std::is_integral_v<Element>,
                "surfattn: a BoolMask must be a matrix of bool or of an integer type");
  detail::MatrixView<const Element> mask_;
  Index head_stride_ = 0;
};

template <detail::StoredMatrix Derived>
explicit BoolMask(const Derived&) -> BoolMask<detail::scalar_t<Derived>>;
template <detail::OwningMatrix Derived>
explicit BoolMask(const Derived&&) -> BoolMask<detail::scalar_t<Derived>>;
template <class Derived>
requires(!detail::StoredMatrix<Derived>) explicit BoolMask(const Eigen::DenseBase<Derived>&)
    ->BoolMask<typename Derived::Scalar>;

}  // namespace surfattn
