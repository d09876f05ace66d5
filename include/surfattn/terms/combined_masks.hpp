// surfattn layer 3: masks made of masks

#pragma once

#include <algorithm>
#include <limits>
#include <surfattn/detail/bound_masks.hpp>
#include <surfattn/terms/term.hpp>
#include <tuple>

namespace surfattn {
namespace detail {

/// What an engine's questions have in common for any combination of bound masks.
template <class... Bound>
struct BoundMasks {
  std::tuple<Bound...> masks;

  template <class Predicate>
  bool any(const Predicate& predicate) const {
    return std::apply([&](const Bound&... bound) { return (predicate(bound) || ...); }, masks);
  }
  template <class Use>
  void each(const Use& use) const {
    std::apply([&](const Bound&... bound) { (use(bound), ...); }, masks);
  }
  bool slants(const Tile& tile) const {
    return any([&](const auto& mask) { return detail::slants(mask, tile); });
  }
  Index next_edge(Index query) const {
    Index edge = std::numeric_limits<Index>::max();
    each([&](const auto& mask) { edge = std::min(edge, detail::next_edge(mask, query)); });
    return edge;
  }
};

/// Sees what any of the masks sees, or with `inverted` what none of them sees.
template <bool inverted, class... Bound>
struct Union : BoundMasks<Bound...> {
  bool allows(Index head, Index query, Index key) const {
    return inverted !=
           this->any([&](const auto& mask) { return detail::allows(mask, head, query, key); });
  }

  Coverage coverage(const Tile& tile) const {
    bool some = false;
    const bool all = this->any([&](const auto& mask) {
      const Coverage answer = detail::coverage(mask, tile);
      some |= answer != Coverage::empty;
      return answer == Coverage::full;
    });
    const Coverage of_all = inverted ? Coverage::empty : Coverage::full,
                   of_none = inverted ? Coverage::full : Coverage::empty;
    return all ? of_all : some ? Coverage::partial : of_none;
  }

  /// The earliest run, and with it those that begin within it.
  KeyRange first_run(const Tile& tile) const {
    const Index end = tile.first_key + tile.keys;
    if constexpr (inverted) return {tile.first_key, end};
    KeyRange earliest{end, end};
    this->each([&](const auto& mask) {
      const KeyRange run = detail::first_run(mask, tile);
      if (run.first < earliest.first) earliest = run;
    });
    this->each([&](const auto& mask) {
      const KeyRange run = detail::first_run(mask, tile);
      if (run.first <= earliest.last) earliest.last = std::max(earliest.last, run.last);
    });
    return earliest;
  }

  void see_row(const Tile& row, SeenByte* seen) const {
    std::fill(seen, seen + row.keys, SeenByte(inverted));
    combine_rows(*this, row, [&](const SeenByte* other, Index offset, Index keys) {
      for (Index j = 0; j < keys; ++j) {
        if (inverted) {
          seen[offset + j] &= SeenByte(other[j] ^ 1);
        } else {
          seen[offset + j] |= other[j];
        }
      }
    });
  }

  template <class Combine>
  static void combine_rows(const BoundMasks<Bound...>& all, const Tile& row,
                           const Combine& combine) {
    constexpr Index most = 256;
    SeenByte other[most];
    all.each([&](const auto& mask) {
      for (Index offset = 0; offset < row.keys; offset += most) {
        const Tile part{row.head, row.first_query, 1, row.first_key + offset,
                        std::min(most, row.keys - offset)};
        detail::see_row(mask, part, other);
        combine(other, offset, part.keys);
      }
    });
  }
};

/// Sees what all of the masks see.
template <class... Bound>
struct Intersection : BoundMasks<Bound...> {
  bool allows(Index head, Index query, Index key) const {
    return !this->any([&](const auto& mask) { return !detail::allows(mask, head, query, key); });
  }

  Coverage coverage(const Tile& tile) const {
    bool all = true;
    const bool none = this->any([&](const auto& mask) {
      const Coverage answer = detail::coverage(mask, tile);
      all &= answer == Coverage::full;
      return answer == Coverage::empty;
    });
    return none ? Coverage::empty : all ? Coverage::full : Coverage::partial;
  }

  KeyRange first_run(const Tile& tile) const {
    return common_run(tile, tile.first_key, [&](const auto& use) { this->each(use); });
  }

  void see_row(const Tile& row, SeenByte* seen) const {
    std::fill(seen, seen + row.keys, SeenByte(1));
    Union<false, Bound...>::combine_rows(*this, row,
                                         [&](const SeenByte* other, Index offset, Index keys) {
                                           for (Index j = 0; j < keys; ++j)
                                             seen[offset + j] &= other[j];
                                         });
  }
};

/// A combination that is not yet bound.
template <template <class...> class Combined, class... Masks>
class MaskCombination {
 public:
  explicit MaskCombination(const Masks&... masks) : masks_(masks...) {}

  auto bind(const Shape& shape, const Require& require) const {
    return std::apply(
        [&](const Masks&... masks) {
          return Combined<decltype(masks.bind(shape, require))...>{
              {{masks.bind(shape, require)...}}};
        },
        masks_);
  }

 private:
  static_assert(sizeof...(Masks) > 0, "surfattn: a combination of masks needs at least one");
  static_assert(
      (MaskTerm<Masks> && ...),
      "surfattn: only masks can be combined, such as Causal and BoolMask; other terms are "
      "listed");
  std::tuple<Masks...> masks_;
};

template <class... Bound>
using AnyOf = Union<false, Bound...>;
template <class... Bound>
using NoneOf = Union<true, Bound...>;

}  // namespace detail

/// A mask that sees what at least one of the masks sees:
///
///     attention(q, k, v, {}, any_of(SlidingWindow{.left = 128, .right = 128}, Documents(ids)));
///
/// A tile that every mask leaves empty is skipped, one that any of them fills pays nothing. Masks
/// are copied, and those that are views must outlive the call.
template <class... Masks>
auto any_of(const Masks&... masks) {
  return detail::MaskCombination<detail::AnyOf, Masks...>(masks...);
}

/// A mask that sees what every one of the masks sees: what listing them does too, for use within
/// any_of and none_of.
template <class... Masks>
auto all_of(const Masks&... masks) {
  return detail::MaskCombination<detail::Intersection, Masks...>(masks...);
}

/// A mask that sees what none of the masks sees; of one mask, its negation.
template <class... Masks>
auto none_of(const Masks&... masks) {
  return detail::MaskCombination<detail::NoneOf, Masks...>(masks...);
}

}  // namespace surfattn
