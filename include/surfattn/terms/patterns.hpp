// surfattn layer 3: masks of a regular pattern, which skip what they leave empty

#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <surfattn/detail/bound_masks.hpp>
#include <surfattn/detail/view.hpp>
#include <surfattn/sequences.hpp>
#include <surfattn/terms/masks.hpp>
#include <surfattn/terms/term.hpp>
#include <type_traits>

namespace surfattn {
namespace detail {

struct PrefixRange {
  static constexpr bool is_monotone = true;
  Index prefix;
  Index first_position;
  Index keys;
  KeyRange range(Index query) const {
    return {0, std::max(prefix, std::min(keys, first_position + query + 1))};
  }
};

struct DilatedPairs {
  Index stride;
  Index first_position;

  bool allows(Index query, Index key) const { return phase(query, key) == 0; }

  Coverage coverage(const Tile& tile) const {
    if (stride == 1) return Coverage::full;
    return tile.queries == 1 && first_run(tile).first == tile.first_key + tile.keys
               ? Coverage::empty
               : Coverage::partial;
  }

  KeyRange first_run(const Tile& tile) const {
    const Index end = tile.first_key + tile.keys;
    if (tile.queries > 1) return {tile.first_key, end};
    const Index past = phase(tile.first_query, tile.first_key);
    const Index first = past == 0 ? tile.first_key : std::min(end, tile.first_key + stride - past);
    return {first, end};
  }

  void see_row(const Tile& row, SeenByte* seen) const {
    std::fill(seen, seen + row.keys, SeenByte(0));
    const Index past = phase(row.first_query, row.first_key);
    for (Index j = past == 0 ? 0 : stride - past; j < row.keys; j += stride) seen[j] = 1;
  }

 private:
  /// How far a key lies behind the last one before it, or at it, that the query sees: 0 … stride −
  /// 1.
  Index phase(Index query, Index key) const {
    const Index behind = (key - first_position - query) % stride;
    return behind < 0 ? behind + stride : behind;
  }
};

/// Ids of the queries and keys of one sequence.
struct DocumentPairs {
  IntegerView query_ids, key_ids;
  bool are_sorted;

  bool allows(Index query, Index key) const { return query_ids[query] == key_ids[key]; }

  Coverage coverage(const Tile& tile) const {
    const IdRange queries = ids_of(query_ids, tile.first_query, tile.queries),
                  keys = ids_of(key_ids, tile.first_key, tile.keys);
    if (queries.largest < keys.smallest || keys.largest < queries.smallest) return Coverage::empty;
    const bool one = queries.smallest == queries.largest && keys.smallest == keys.largest;
    return one ? Coverage::full : Coverage::partial;
  }

  /// From the first to the last key of the tile whose id lies among those of its queries.
  KeyRange first_run(const Tile& tile) const {
    const IdRange seen = ids_of(query_ids, tile.first_query, tile.queries);
    Index first = tile.first_key, last = first + tile.keys;
    if (are_sorted) return keys_within(seen, tile);
    const auto is_seen = [&](Index key) {
      return seen.smallest <= key_ids[key] && key_ids[key] <= seen.largest;
    };
    while (first < last && !is_seen(first)) ++first;
    while (first < last && !is_seen(last - 1)) --last;
    return {first, last};
  }

  /// Where the next document begins; ids that are not sorted may change with every query.
  Index next_edge(Index query) const {
    const Index end = query_ids.size();
    if (!are_sorted || query >= end) return end;
    const Index id = query_ids[query];
    return end_of_run(query, end, [&](Index later) { return query_ids[later] == id; });
  }

  void see_row(const Tile& row, SeenByte* seen) const {
    const Index id = query_ids[row.first_query];
    if (are_sorted) return see_range(keys_within({id, id}, row), row, seen);
    key_ids.with_reader([&](const auto& read) {
      for (Index j = 0; j < row.keys; ++j) seen[j] = read(row.first_key + j) == id;
    });
  }

 private:
  struct IdRange {
    Index smallest, largest;
  };

  IdRange ids_of(const IntegerView& ids, Index first, Index count) const {
    if (are_sorted) return {ids[first], ids[first + count - 1]};
    IdRange range{ids[first], ids[first]};
    for (Index i = first + 1; i < first + count; ++i)
      range = {std::min(range.smallest, ids[i]), std::max(range.largest, ids[i])};
    return range;
  }

  /// The keys of the tile with an id among these, where ids are sorted; at its end, where there are none.
  KeyRange keys_within(IdRange ids, const Tile& tile) const {
    const Index end = tile.first_key + tile.keys;
    const Index first =
        end_of_run(tile.first_key, end, [&](Index key) { return key_ids[key] < ids.smallest; });
    const Index last =
        end_of_run(first, end, [&](Index key) { return key_ids[key] <= ids.largest; });
    return first < last ? KeyRange{first, last} : KeyRange{end, end};
  }

  /// The first place in [first, last) for which `is_before` does not hold, as for all behind it.
  template <class Before>
  static Index end_of_run(Index first, Index last, const Before& is_before) {
    while (first < last) {
      const Index middle = first + (last - first) / 2;
      if (is_before(middle)) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    return first;
  }
};

}  // namespace detail

/// Prefix language model (Raffel et al. 2020, arXiv:1910.10683, figure 4): every query sees the
/// first keys of its sequence, the prefix, and after it the keys up to its own position, as under
/// Causal. One length for all sequences, or one for each, as for KeyLengths.
class PrefixCausal {
 public:
  constexpr PrefixCausal(Index prefix, Align align) : prefix_(prefix), align_(align) {}
  template <detail::OffsetRange Range>
  PrefixCausal(const Range& prefixes, Align align) : prefix_(prefixes), align_(align) {}
  template <detail::TemporaryRange Range>
  requires detail::OffsetRange<Range> PrefixCausal(const Range&&, Align)
  = delete;

  detail::PrefixRange bind(const detail::Shape& shape, const detail::Require& require) const {
    return {prefix_.of_sequence("PrefixCausal", shape, shape.keys_extent(), "keys", require),
            detail::first_position(align_, shape), shape.keys};
  }

 private:
  detail::SequenceLengths prefix_;
  Align align_;
};

/// A query at position p sees every `stride`-th key: those j with j ≡ p modulo the stride. Position
/// p = i + offset as for Causal; `align` may be left out only where Tq = Tk. With SlidingWindow a
/// dilated window (Beltagy et al. 2020, arXiv:2004.05150, section 3.1); any_of(SlidingWindow, …,
/// Dilated) is a strided pattern (Child et al. 2019, arXiv:1904.10509). Keys between those that are
/// seen are computed and hidden, so a dilation alone saves no time: to save it, give each of the
/// stride's residue classes as a sequence of its own.
struct Dilated {
  Index stride;
  std::optional<Align> align = {};

  detail::DilatedPairs bind(const detail::Shape& shape, const detail::Require& require) const {
    if (stride < 1) require.fail("Dilated must have a stride of at least 1, but it is ", stride);
    if (!align && shape.queries != shape.keys) {
      require.fail(
          "Dilated must name its alignment (Align::top_left or Align::bottom_right) where "
          "queries and keys differ in number, but queries is ",
          shape.queries_extent(), " and keys is ", shape.keys_extent());
    }
    return {stride, detail::first_position(align.value_or(Align::top_left), shape)};
  }
};

/// A query sees the keys of its own document: those with the same id. Ids of queries and keys are
/// ranges (vector, array, span) of signed 32- or 64-bit integers with one number for each row, of
/// all sequences of a batch; one range serves both where there are as many keys as queries. Views,
/// which must outlive the call. Ids need not be sorted; where they are (documents packed one after
/// the other) each tile costs O(log Tk) to place and those between different documents are skipped.
/// Otherwise O(tile), and a tile is skipped where the ids of its queries and keys do not
/// interleave.
class Documents {
 public:
  template <detail::OffsetRange Ids>
  explicit Documents(const Ids& ids) : Documents(ids, ids) {}
  template <detail::OffsetRange QueryIds, detail::OffsetRange KeyIds>
  Documents(const QueryIds& query_ids, const KeyIds& key_ids)
      : query_ids_(query_ids), key_ids_(key_ids) {}

  /// Temporary ids would be gone before they are used.
  template <detail::TemporaryRange Ids>
  requires detail::OffsetRange<Ids>
  explicit Documents(const Ids&&) = delete;
  template <detail::OffsetRange QueryIds, detail::OffsetRange KeyIds>
  requires(detail::TemporaryRange<QueryIds> || detail::TemporaryRange<KeyIds>)
      Documents(QueryIds&&, KeyIds&&)
  = delete;

  detail::DocumentPairs bind(const detail::Shape& shape, const detail::Require& require) const {
    check_size("query", query_ids_, shape.packed_queries, "queries", require);
    check_size("key", key_ids_, shape.packed_keys, "keys", require);
    const auto queries = query_ids_.part(shape.first_query, shape.queries),
               keys = key_ids_.part(shape.first_key, shape.keys);
    return {queries, keys, queries.is_sorted() && keys.is_sorted()};
  }

 private:
  static void check_size(const char* ids, const detail::IntegerView& given, Index rows,
                         const char* of_what, const detail::Require& require) {
    if (given.size() == rows) return;
    require.fail("Documents must have one ", ids, " id for each of the ", rows, " ", of_what,
                 ", but it has ", given.size());
  }

  detail::IntegerView query_ids_, key_ids_;
};

/// A mask of blocks: query i sees key j where blocks(i / block_queries, j / block_keys) is true (as
/// in Child et al. 2019, arXiv:1904.10509). A view of any stored Eigen matrix of bool or of an
/// integer type with ⌈Tq/block_queries⌉ × ⌈Tk/block_keys⌉ blocks, for all heads, or that many
/// columns for each query head, side by side. In a batch the same blocks serve every sequence,
/// counted from its first query and key; they are as many as the longest one has. Empty blocks are
/// skipped; to skip nearly all of them, let block_queries be a power of two of at least 16 and
/// block_keys a multiple of 32: beside an edge up to 7 queries may be taken with the block before.
template <class Element>
class BlockSparse {
 public:
  template <detail::StoredMatrix Derived>
  BlockSparse(const Derived& blocks, Index block_queries, Index block_keys)
      : blocks_(detail::view(blocks)), block_queries_(block_queries), block_keys_(block_keys) {}

  /// A temporary matrix would be gone before the mask is used.
  template <detail::OwningMatrix Derived>
  BlockSparse(const Derived&&, Index, Index) = delete;

  BlockSparse bind(const detail::Shape& shape, const detail::Require& require) const {
    if (block_queries_ < 1 || block_keys_ < 1) {
      require.fail("BlockSparse must have blocks of at least 1 query and 1 key, but they are of ",
                   detail::Extent{block_queries_, block_keys_});
    }
    const detail::Extent blocks{number_of(shape.longest_queries, block_queries_),
                                number_of(shape.longest_keys, block_keys_)};
    BlockSparse bound = *this;
    if (detail::extent(blocks_) == detail::Extent{blocks.rows, shape.query_heads * blocks.cols}) {
      bound.head_columns_ = shape.query_heads > 1 ? blocks.cols : 0;
      return bound;
    }
    require.shape("BlockSparse", detail::extent(blocks_), blocks,
                  "blocks of queries × blocks of keys, or that many columns for each query head");
    return bound;
  }

  bool allows(Index head, Index query, Index key) const {
    return block(head, query / block_queries_, key / block_keys_);
  }

  Coverage coverage(const Tile& tile) const {
    bool any = false, all = true;
    each_block_column(tile, [&](Index column) {
      const Coverage of_column = column_coverage(tile, column);
      any |= of_column != Coverage::empty;
      all &= of_column == Coverage::full;
    });
    return !any ? Coverage::empty : all ? Coverage::full : Coverage::partial;
  }

  KeyRange first_run(const Tile& tile) const {
    const Index end = tile.first_key + tile.keys;
    Index column = tile.first_key / block_keys_;
    const auto is_empty = [&] { return column_coverage(tile, column) == Coverage::empty; };
    while (column * block_keys_ < end && is_empty()) ++column;
    const Index first = std::clamp(column * block_keys_, tile.first_key, end);
    while (column * block_keys_ < end && !is_empty()) ++column;
    return {first, std::min(end, column * block_keys_)};
  }

  /// Where the next row of blocks begins.
  Index next_edge(Index query) const { return (query / block_queries_ + 1) * block_queries_; }

  void see_row(const Tile& row, detail::SeenByte* seen) const {
    each_block_column(row, [&](Index column) {
      const Index first = std::max<Index>(0, column * block_keys_ - row.first_key),
                  last = std::min(row.keys, (column + 1) * block_keys_ - row.first_key);
      std::fill(seen + first, seen + last,
                detail::SeenByte(block(row.head, row.first_query / block_queries_, column)));
    });
  }

 private:
  static Index number_of(Index count, Index size) { return (count + size - 1) / size; }

  bool block(Index head, Index row, Index column) const {
    return static_cast<bool>(blocks_(row, head * head_columns_ + column));
  }

  template <class Use>
  void each_block_column(const Tile& tile, const Use& use) const {
    for (Index column = tile.first_key / block_keys_;
         column * block_keys_ < tile.first_key + tile.keys; ++column) {
      use(column);
    }
  }

  Coverage column_coverage(const Tile& tile, Index column) const {
    bool any = false, all = true;
    for (Index row = tile.first_query / block_queries_;
         row * block_queries_ < tile.first_query + tile.queries; ++row) {
      const bool seen = block(tile.head, row, column);
      any |= seen;
      all &= seen;
    }
    return !any ? Coverage::empty : all ? Coverage::full : Coverage::partial;
  }

  static_assert(
      std::is_integral_v<Element>,
      "surfattn: the blocks of BlockSparse must be a matrix of bool or of an integer type");
  detail::MatrixView<const Element> blocks_;
  Index block_queries_, block_keys_;
  Index head_columns_ = 0;
};

template <detail::StoredMatrix Derived>
BlockSparse(const Derived&, Index, Index) -> BlockSparse<detail::scalar_t<Derived>>;
template <detail::OwningMatrix Derived>
BlockSparse(const Derived&&, Index, Index) -> BlockSparse<detail::scalar_t<Derived>>;

}  // namespace surfattn
