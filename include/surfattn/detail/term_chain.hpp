// surfattn layer 3: a list of terms, bound to a problem, answering as one

#pragma once

#include <algorithm>
#include <surfattn/terms/term.hpp>
#include <tuple>

namespace surfattn::detail {

template <RangeMask Mask>
bool allows(const Mask& mask, Index, Index query, Index key) {
  const KeyRange range = mask.range(query);
  return range.first <= key && key < range.last;
}

template <SharedPairMask Mask>
bool allows(const Mask& mask, Index, Index query, Index key) {
  return mask.allows(query, key);
}

template <HeadPairMask Mask>
bool allows(const Mask& mask, Index head, Index query, Index key) {
  return mask.allows(head, query, key);
}

template <RangeMask Mask>
Coverage coverage(const Mask& mask, const Tile& tile) {
  const Index end = tile.first_key + tile.keys;
  bool any = false, all = true;
  for (Index i = tile.first_query; i < tile.first_query + tile.queries; ++i) {
    const KeyRange range = mask.range(i);
    any |= std::max(range.first, tile.first_key) < std::min(range.last, end);
    all &= range.first <= tile.first_key && end <= range.last;
  }
  return all ? Coverage::full : any ? Coverage::partial : Coverage::empty;
}

/// The keys of the tile outside which its queries see nothing.
template <RangeMask Mask>
KeyRange seen_keys(const Mask& mask, const Tile& tile) {
  KeyRange seen{tile.first_key + tile.keys, tile.first_key};
  for (Index i = tile.first_query; i < tile.first_query + tile.queries; ++i) {
    const KeyRange range = mask.range(i);
    if (range.first >= range.last) continue;
    seen = {std::min(seen.first, range.first), std::max(seen.last, range.last)};
  }
  return seen;
}

template <PairMask Mask>
KeyRange seen_keys(const Mask&, const Tile& tile) {
  return {tile.first_key, tile.first_key + tile.keys};
}

template <PairMask Mask>
Coverage coverage(const Mask& mask, const Tile& tile) {
  return mask.coverage(tile);
}

/// Writes `value` over the entries of a row-major tile that the mask hides.
template <RangeMask Mask, class Scalar>
void hide(const Mask& mask, const Tile& tile, Scalar* data, Index row_stride, Scalar value) {
  for (Index i = 0; i < tile.queries; ++i, data += row_stride) {
    const KeyRange range = mask.range(tile.first_query + i);
    const Index first = std::clamp<Index>(range.first - tile.first_key, 0, tile.keys);
    const Index last = std::clamp<Index>(range.last - tile.first_key, first, tile.keys);
    std::fill(data, data + first, value);
    std::fill(data + last, data + tile.keys, value);
  }
}

template <PairMask Mask, class Scalar>
void hide(const Mask& mask, const Tile& tile, Scalar* data, Index row_stride, Scalar value) {
  for (Index i = 0; i < tile.queries; ++i, data += row_stride) {
    for (Index j = 0; j < tile.keys; ++j) {
      if (!allows(mask, tile.head, tile.first_query + i, tile.first_key + j)) data[j] = value;
    }
  }
}

/// Terms bound to one problem. A query sees a key where every term lets it.
template <class... Bound>
class TermChain {
 public:
  explicit TermChain(const Bound&... bound) : terms_(bound...) {}

  bool allows(Index head, Index query, Index key) const {
    return every([&](const auto& term) { return detail::allows(term, head, query, key); });
  }

  Coverage coverage(const Tile& tile) const {
    bool full = true;
    const bool possible = every([&](const auto& term) {
      const Coverage answer = detail::coverage(term, tile);
      full = full && answer == Coverage::full;
      return answer != Coverage::empty;
    });
    return !possible ? Coverage::empty : full ? Coverage::full : Coverage::partial;
  }

  /// The tile without the keys at its sides that none of its queries sees, as far as whole groups
  /// of `step` keys can be left out.
  Tile trim(const Tile& tile, Index step) const {
    Index first = tile.first_key, last = tile.first_key + tile.keys;
    every([&](const auto& term) {
      const KeyRange seen = detail::seen_keys(term, tile);
      first = std::max(first, seen.first);
      last = std::min(last, seen.last);
      return true;
    });
    Tile trimmed = tile;
    trimmed.first_key = first - (first - tile.first_key) % step;
    trimmed.keys = std::max<Index>(0, last - trimmed.first_key);
    return trimmed;
  }

  template <class Scalar>
  void hide(const Tile& tile, Scalar* data, Index row_stride, Scalar value) const {
    every(
        [&](const auto& term) { return detail::hide(term, tile, data, row_stride, value), true; });
  }

 private:
  /// Whether the predicate holds for every term; stops at the first for which it does not.
  template <class Predicate>
  bool every(Predicate&& predicate) const {
    return std::apply([&](const Bound&... terms) { return (predicate(terms) && ...); }, terms_);
  }

  std::tuple<Bound...> terms_;
};

template <class... Terms>
auto bind_terms(const Shape& shape, const Require& require, const Terms&... terms) {
  static_assert((Term<Terms> && ...),
                "surfattn: after the options come terms, such as Causal{Align::top_left}; an "
                "argument is not a term");
  return TermChain<decltype(terms.bind(shape, require))...>(terms.bind(shape, require)...);
}

}  // namespace surfattn::detail
