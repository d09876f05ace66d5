// surfattn layer 3: what a term is

#pragma once

#include <concepts>
#include <surfattn/detail/require.hpp>
#include <surfattn/types.hpp>

/// A term is named after the options of a public function: `attention(q, k, v, {},
/// Causal{Align::top_left})`. Terms compose: a query sees the keys that every term lets it see. The
/// engine asks a term about whole tiles first; an empty tile is never computed and a full one pays
/// nothing for the mask.
namespace surfattn {

/// A rectangle of scores: queries [first_query, first_query + queries) of one query head against
/// keys [first_key, first_key + keys).
struct Tile {
  Index head = 0;
  Index first_query = 0;
  Index queries = 0;
  Index first_key = 0;
  Index keys = 0;
};

/// How much of a tile a mask lets through.
enum class Coverage { empty, partial, full };

/// Keys [first, last).
struct KeyRange {
  Index first = 0;
  Index last = 0;
};

/// How positions of queries and keys correspond where Tq ≠ Tk.
enum class Align {
  top_left,      ///< query 0 stands at key 0
  bottom_right,  ///< the last query stands at the last key, as when earlier keys come from a cache
};

namespace detail {

/// The key position at which query 0 stands.
inline Index first_position(Align align, const Shape& shape) {
  return align == Align::top_left ? 0 : shape.keys - shape.queries;
}

/// A mask bound to the sizes of a problem that lets each query see one run of keys: `range(query)`.
template <class Mask>
concept RangeMask = requires(const Mask& mask, Index query) {
  { mask.range(query) } -> std::same_as<KeyRange>;
};

/// A mask bound to the sizes of a problem that answers pair by pair and tile by tile, the same for
/// every head.
template <class Mask>
concept SharedPairMask = requires(const Mask& mask, const Tile& tile, Index query, Index key) {
  { mask.allows(query, key) } -> std::same_as<bool>;
  { mask.coverage(tile) } -> std::same_as<Coverage>;
};

/// The same for a mask that differs from head to head.
template <class Mask>
concept HeadPairMask = requires(const Mask& mask, const Tile& tile, Index head, Index query,
                                Index key) {
  { mask.allows(head, query, key) } -> std::same_as<bool>;
  { mask.coverage(tile) } -> std::same_as<Coverage>;
};

template <class Mask>
concept PairMask = SharedPairMask<Mask> || HeadPairMask<Mask>;

template <class T>
concept Term = requires(const T& term, const Shape& shape, const Require& require) {
  {term.bind(shape, require)};
};

}  // namespace detail
}  // namespace surfattn
