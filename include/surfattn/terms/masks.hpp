// surfattn layer 3: masks, the terms that say which keys a query sees

#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <surfattn/detail/view.hpp>
#include <surfattn/terms/term.hpp>
#include <type_traits>

namespace surfattn {
namespace detail {

struct CausalRange {
  Index first_position;
  Index keys;
  KeyRange range(Index query) const { return {0, std::min(keys, first_position + query + 1)}; }
};

struct WindowRange {
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
  Index length;
  KeyRange range(Index) const { return {0, length}; }
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
      require.fail("SlidingWindow must reach 0 or more keys to each side, but left is " +
                   std::to_string(left) + " and right is " + std::to_string(right));
    }
    return {detail::first_position("SlidingWindow", align, shape, require),
            std::min(left, unlimited), std::min(right, unlimited), shape.keys};
  }
};

/// Only the first `length` keys are there; the rest is padding that nobody sees, whatever it holds.
struct KeyLengths {
  Index length;

  constexpr explicit KeyLengths(Index keys) : length(keys) {}

  detail::LengthRange bind(const detail::Shape& shape, const detail::Require& require) const {
    if (length < 0 || length > shape.keys) {
      require.fail("KeyLengths must lie between 0 and the number of keys, but it is " +
                   std::to_string(length) + " and keys is " + detail::words(shape.keys_extent()));
    }
    return {length};
  }
};

/// A dense mask, Tq × Tk, for all heads: true where the query sees the key. A view: the matrix must
/// outlive the call. Any stored Eigen matrix of bool or of an integer type (0 is false).
template <class Element>
class BoolMask {
 public:
  template <detail::StoredMatrix Derived>
  explicit BoolMask(const Derived& mask) : mask_(detail::view(mask)) {}

  /// A temporary matrix would be gone before the mask is used.
  template <detail::OwningMatrix Derived>
  explicit BoolMask(const Derived&&) = delete;

  BoolMask bind(const detail::Shape& shape, const detail::Require& require) const {
    require.shape("BoolMask", detail::extent(mask_), {shape.queries, shape.keys}, "queries × keys");
    return *this;
  }

  bool allows(Index query, Index key) const { return static_cast<bool>(mask_(query, key)); }

  /// Reads the tile's part of the mask until it has met both a pair that is seen and one that is
  /// not.
  Coverage coverage(const Tile& tile) const {
    bool any = false, all = true;
    for (Index i = tile.first_query; i < tile.first_query + tile.queries; ++i) {
      for (Index j = tile.first_key; j < tile.first_key + tile.keys; ++j) {
        if (allows(i, j)) {
          any = true;
        } else {
          all = false;
        }
      }
      if (any && !all) return Coverage::partial;
    }
    return all ? Coverage::full : Coverage::empty;
  }

 private:
  static_assert(std::is_integral_v<Element>,
                "surfattn: a BoolMask must be a matrix of bool or of an integer type");
  detail::MatrixView<const Element> mask_;
};

template <detail::StoredMatrix Derived>
explicit BoolMask(const Derived&) -> BoolMask<detail::scalar_t<Derived>>;
template <detail::OwningMatrix Derived>
explicit BoolMask(const Derived&&) -> BoolMask<detail::scalar_t<Derived>>;

}  // namespace surfattn
