// surfattn layer 3: what the engine asks a mask that is bound to a problem

#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <limits>
#include <surfattn/detail/simd/term_rows.hpp>
#include <surfattn/detail/view.hpp>
#include <surfattn/terms/term.hpp>

/// A mask answers pair by pair (`range` or `allows`), and for whole tiles (`coverage`). It may
/// answer more questions, for which there are answers that always serve: `first_run`, `see_row`,
/// `see_rows`, `next_edge` and `slants`.
namespace surfattn::detail {

/// Bytes, 1 where a key is seen.
using SeenByte = std::uint8_t;

/// A mask of which no query sees a key before the first of an earlier query, nor stops seeing
/// before it does: its first and last query speak for all between.
template <class Mask>
concept MonotoneMask = RangeMask<Mask> && requires {
  requires Mask::is_monotone;
};

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

/// The keys that some query of the tile sees, and those that every query sees.
struct SeenKeys {
  KeyRange by_some, by_all;
};

template <RangeMask Mask>
SeenKeys seen_keys(const Mask& mask, const Tile& tile) {
  const Index end = tile.first_key + tile.keys;
  const auto range = [&](Index i) {
    const KeyRange seen = mask.range(tile.first_query + i);
    const Index first = std::clamp(seen.first, tile.first_key, end);
    return KeyRange{first, std::clamp(seen.last, first, end)};
  };
  if constexpr (MonotoneMask<Mask>) {
    const KeyRange top = range(0), bottom = range(tile.queries - 1);
    return {{top.first, bottom.last}, {bottom.first, top.last}};
  } else {
    SeenKeys seen{{end, tile.first_key}, {tile.first_key, end}};
    for (Index i = 0; i < tile.queries; ++i) {
      const KeyRange one = range(i);
      seen.by_all = {std::max(seen.by_all.first, one.first), std::min(seen.by_all.last, one.last)};
      if (one.first < one.last) {
        seen.by_some = {std::min(seen.by_some.first, one.first),
                        std::max(seen.by_some.last, one.last)};
      }
    }
    return seen;
  }
}

/// Whether some query of the tile sees keys of it that another does not, as under a causal mask those on
/// the diagonal do: parts of fewer queries then compute fewer pairs in vain.
template <class Mask>
bool slants(const Mask& mask, const Tile& tile) {
  if constexpr (RangeMask<Mask>) {
    const SeenKeys seen = seen_keys(mask, tile);
    return seen.by_some.first < seen.by_all.first || seen.by_all.last < seen.by_some.last;
  } else if constexpr (requires {
                         { mask.slants(tile) } -> std::same_as<bool>;
                       }) {
    return mask.slants(tile);
  } else {
    return false;
  }
}

/// `partial` is always a true answer; `empty` and `full` save work.
template <RangeMask Mask>
Coverage coverage(const Mask& mask, const Tile& tile) {
  const SeenKeys seen = seen_keys(mask, tile);
  if (seen.by_some.first >= seen.by_some.last) return Coverage::empty;
  const bool all =
      seen.by_all.first == tile.first_key && seen.by_all.last == tile.first_key + tile.keys;
  return all ? Coverage::full : Coverage::partial;
}

template <PairMask Mask>
Coverage coverage(const Mask& mask, const Tile& tile) {
  return mask.coverage(tile);
}

/// The first run of keys of the tile that a query may see: no query sees a key before it. Empty,
/// and at the tile's end, where there is none. What lies behind it is asked for with the rest of
/// the tile.
template <RangeMask Mask>
KeyRange first_run(const Mask& mask, const Tile& tile) {
  const Index end = tile.first_key + tile.keys;
  const KeyRange seen = seen_keys(mask, tile).by_some;
  return seen.first < seen.last ? seen : KeyRange{end, end};
}

template <PairMask Mask>
KeyRange first_run(const Mask& mask, const Tile& tile) {
  if constexpr (requires {
                  { mask.first_run(tile) } -> std::same_as<KeyRange>;
                }) {
    return mask.first_run(tile);
  } else {
    return {tile.first_key, tile.first_key + tile.keys};
  }
}

/// The first run of keys from `from` on that every mask lets some query see, likewise. each(use)
/// calls `use` with each mask.
template <class Each>
KeyRange common_run(Tile tile, Index from, const Each& each) {
  const Index end = tile.first_key + tile.keys;
  for (KeyRange run{from, from}; run.first < end;) {
    tile.first_key = run.first;
    tile.keys = end - run.first;
    run.last = end;
    each([&](const auto& mask) {
      const KeyRange of_mask = first_run(mask, tile);
      run = {std::max(run.first, of_mask.first), std::min(run.last, of_mask.last)};
    });
    if (run.first < run.last) return run;
  }
  return {end, end};
}

/// The first query after `query` that sees keys of its own, such as those of the next document: tiles
/// that end before it compute fewer pairs in vain. Behind all queries where there is none.
template <class Mask>
Index next_edge(const Mask& mask, Index query) {
  if constexpr (requires {
                  { mask.next_edge(query) } -> std::same_as<Index>;
                }) {
    return mask.next_edge(query);
  } else {
    return std::numeric_limits<Index>::max();
  }
}

/// The first row of a tile, byte by byte, of which the keys in the range are seen.
inline void see_range(const KeyRange& range, const Tile& row, SeenByte* seen) {
  const Index first = std::clamp<Index>(range.first - row.first_key, 0, row.keys);
  const Index last = std::clamp<Index>(range.last - row.first_key, first, row.keys);
  std::fill(seen, seen + first, SeenByte(0));
  std::fill(seen + first, seen + last, SeenByte(1));
  std::fill(seen + last, seen + row.keys, SeenByte(0));
}

/// The first row of a tile, byte by byte.
template <RangeMask Mask>
void see_row(const Mask& mask, const Tile& row, SeenByte* seen) {
  see_range(mask.range(row.first_query), row, seen);
}

template <PairMask Mask>
void see_row(const Mask& mask, const Tile& row, SeenByte* seen) {
  if constexpr (requires { mask.see_row(row, seen); }) {
    mask.see_row(row, seen);
  } else if constexpr (requires { mask.see_rows(row, seen, row.keys); }) {
    mask.see_rows(row, seen, row.keys);
  } else {
    for (Index j = 0; j < row.keys; ++j)
      seen[j] = allows(mask, row.head, row.first_query, row.first_key + j);
  }
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

/// Bytes of a block of pairs, `seen_stride` from row to row, from the numbers that stand for them: read in
/// the order in which they are stored.
template <class Element, class IsSeen>
void see_entries(MatrixView<const Element> entries, SeenByte* seen, Index seen_stride,
                 const IsSeen& is_seen) {
  if (entries.is_stored_by_columns()) {
    for (Index j = 0; j < entries.cols; ++j) {
      const Element* const column = &entries(0, j);
      for (Index i = 0; i < entries.rows; ++i) seen[i * seen_stride + j] = is_seen(column[i]);
    }
    return;
  }
  for (Index i = 0; i < entries.rows; ++i, seen += seen_stride) {
    const Element* const row = entries.row(i);
    if (entries.col_stride == 1) {
      for (Index j = 0; j < entries.cols; ++j) seen[j] = is_seen(row[j]);
    } else {
      for (Index j = 0; j < entries.cols; ++j) seen[j] = is_seen(row[j * entries.col_stride]);
    }
  }
}

/// A block of pairs that is looked at together: seen(i, j) is byte i·most_keys + j.
struct SeenBlock {
  static constexpr Index most_queries = 16, most_keys = 128;
  SeenByte bytes[most_queries * most_keys];

  const SeenByte* row(Index i) const { return bytes + i * most_keys; }

  template <class Mask>
  void see(const Mask& mask, const Tile& block) {
    if constexpr (requires { mask.see_rows(block, bytes, most_keys); }) {
      mask.see_rows(block, bytes, most_keys);
    } else {
      for (Index i = 0; i < block.queries; ++i) {
        const Tile row{block.head, block.first_query + i, 1, block.first_key, block.keys};
        see_row(mask, row, bytes + i * most_keys);
      }
    }
  }
};

/// Calls use(block, seen) for every block of a tile, as long as it returns true.
template <class Mask, class Use>
void each_seen_block(const Mask& mask, const Tile& tile, const Use& use) {
  SeenBlock seen;
  for (Index j = 0; j < tile.keys; j += SeenBlock::most_keys) {
    for (Index i = 0; i < tile.queries; i += SeenBlock::most_queries) {
      const Tile block{tile.head, tile.first_query + i,
                       std::min(SeenBlock::most_queries, tile.queries - i), tile.first_key + j,
                       std::min(SeenBlock::most_keys, tile.keys - j)};
      seen.see(mask, block);
      if (!use(block, seen)) return;
    }
  }
}

template <PairMask Mask, class Scalar>
void hide(const Mask& mask, const Tile& tile, Scalar* data, Index row_stride, Scalar value) {
  each_seen_block(mask, tile, [&](const Tile& block, const SeenBlock& seen) {
    Scalar* row = data + (block.first_query - tile.first_query) * row_stride +
                  (block.first_key - tile.first_key);
    for (Index i = 0; i < block.queries; ++i, row += row_stride)
      simd::hide_in_row(seen.row(i), value, row, block.keys);
    return true;
  });
}

/// Coverage by reading the tile until it has met both a pair that is seen and one that is not.
template <class Mask>
Coverage read_coverage(const Mask& mask, const Tile& tile) {
  Index all = 0, any = 0;
  each_seen_block(mask, tile, [&](const Tile& block, const SeenBlock& seen) {
    for (Index i = 0; i < block.queries; ++i) {
      for (Index j = 0; j < block.keys; ++j) any += seen.row(i)[j];
    }
    all += block.queries * block.keys;
    return any == 0 || any == all;
  });
  return any == 0 ? Coverage::empty : any == all ? Coverage::full : Coverage::partial;
}

/// A bound term that hides keys, whatever else it does.
template <class T>
concept Mask = RangeMask<T> || PairMask<T>;

/// A term that acts as a mask and as nothing else.
template <class T>
concept MaskTerm = requires(const T& term, const Shape& shape, const Require& require) {
  requires Mask<decltype(term.bind(shape, require))>;
  requires !ScoreBias<decltype(term.bind(shape, require))>;
  requires !ScoreModifier<decltype(term.bind(shape, require))>;
};

}  // namespace surfattn::detail
