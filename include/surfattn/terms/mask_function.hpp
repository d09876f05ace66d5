// surfattn layer 3: a mask of the user's own, from one function

#pragma once

#include <concepts>
#include <surfattn/detail/bound_masks.hpp>
#include <surfattn/terms/term.hpp>
#include <type_traits>

namespace surfattn {
namespace detail {

/// Stands for the tile answer that a mask's user did not give.
struct NoTileAnswer {};

}  // namespace detail

/// A mask from a function of a query and a key, counted within their sequence, or of a query head,
/// a query and a key, that says whether the query sees the key:
///
///     attention(q, k, v, {}, MaskFunction([](Index i, Index j) { return (i ^ j) % 3 != 0; }));
///
/// A second function, if given, answers for a whole Tile: `empty` and `full` only where that is
/// certain, `partial` otherwise. Without it the engine calls the first one for every pair of a tile
/// until it has met both answers, so that empty tiles are skipped here too. The functions are
/// called from several threads where there are several, in any order and any number of times; they
/// must always give the same answer for the same pair, and must not throw.
template <class Allows, class TileCoverage = detail::NoTileAnswer>
class MaskFunction {
  static constexpr bool takes_pairs = std::is_invocable_r_v<bool, const Allows&, Index, Index>;
  static constexpr bool takes_heads =
      std::is_invocable_r_v<bool, const Allows&, Index, Index, Index>;
  static constexpr bool answers_for_tiles = !std::is_same_v<TileCoverage, detail::NoTileAnswer>;

 public:
  explicit MaskFunction(const Allows& allows, const TileCoverage& coverage = {})
      : allows_(allows), coverage_(coverage) {}

  MaskFunction bind(const detail::Shape&, const detail::Require&) const { return *this; }

  bool allows(Index query, Index key) const requires takes_pairs { return allows_(query, key); }
  bool allows(Index head, Index query, Index key) const requires takes_heads {
    return allows_(head, query, key);
  }

  Coverage coverage(const Tile& tile) const {
    if constexpr (answers_for_tiles) {
      return coverage_(tile);
    } else {
      return detail::read_coverage(*this, tile);
    }
  }

 private:
  static_assert(takes_pairs != takes_heads,
                "surfattn: the function of a MaskFunction must take (query, key) or (head, query, "
                "key), without being mutable, and return whether the query sees the key");
  static_assert(!answers_for_tiles ||
                    std::is_invocable_r_v<Coverage, const TileCoverage&, const Tile&>,
                "surfattn: the second function of a MaskFunction must take a Tile and return its "
                "Coverage");
  Allows allows_;
  TileCoverage coverage_;
};

template <class Allows>
MaskFunction(const Allows&) -> MaskFunction<Allows>;
template <class Allows, class TileCoverage>
MaskFunction(const Allows&, const TileCoverage&) -> MaskFunction<Allows, TileCoverage>;

}  // namespace surfattn
