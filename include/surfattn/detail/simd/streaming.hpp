// surfattn layer 2: products with rows as they lie in memory, for few queries

#pragma once

#include <algorithm>
#include <surfattn/detail/simd/packing.hpp>
#include <surfattn/detail/simd/row_operations.hpp>
#include <surfattn/detail/simd/tile_products.hpp>
#include <surfattn/detail/view.hpp>

/// With few queries, every key and value is used a few times only and packing it would cost more
/// than using it. These functions read each row once, from memory, in its natural layout.
///
/// How fast they read depends on how far the processor works ahead, and so on how few instructions
/// there are for each line of memory and on that no address waits for what was loaded before:
/// - They take what they are told by reference. A copy that is assembled in memory from parts is read
///   again when the parts have left the store buffer, which is not before all earlier loads have
///   arrived.
/// - Loops are small functions of their own. In a large one compilers run out of registers for
///   addresses and keep some in vector registers, where they queue behind sums that wait for memory.
/// - Loops of a single query over packets or rows take four in a turn: keys that are values are then read
///   in a tenth less time on Zen 5, and so are keys by packets of half a line. Rows of 16 packets are
///   long enough one at a time, and so are those of 8 that ask for memory: requests do less, or nothing,
///   where those of four rows come together.
/// - A query of several heads takes eight keys at a time: a third less time for two heads of 8 packets, as
///   much for eight heads of keys and values. With norms, four and requests for the next four are faster.
/// - Products with keys of 4, 8 or 16 packets, the usual widths of a head, have no loop over these: that
///   saves a twentieth of the time, and a fifth where a single head has keys of 8 packets. With norms, keys
///   of 8 packets take a seventh less, of 16 a twentieth more; and where keys of 4 packets are asked for,
///   requests follow each other too fast: a tenth more.
namespace surfattn::detail::simd {

/// Fewer rows of queries are taken one by one.
inline constexpr Index fewest_rows_of_blocks = 4;

/// How many rows are taken in blocks; one may be left.
constexpr Index rows_in_blocks(Index rows) {
  return rows < fewest_rows_of_blocks ? 0 : rows / 2 * 2;
}

/// How many of `count` numbers fill whole packets.
template <class Scalar>
constexpr Index in_whole_packets(Index count) {
  return count / lanes<Scalar> * lanes<Scalar>;
}

/// Rows of contiguous numbers.
template <class Element>
struct ContiguousRows {
  Element* data;
  Index stride;

  Element* row(Index index) const { return data + index * stride; }
  ContiguousRows from(Index row, Index col = 0) const {
    return {data + row * stride + col, stride};
  }
};

/// Where `Count` of them begin.
template <int Count, class Element>
struct RowPointers {
  Element* at[Count];
};
template <int Count, class Element>
SURFATTN_ALWAYS_INLINE RowPointers<Count, Element> pointers_to(ContiguousRows<Element> rows) {
  RowPointers<Count, Element> pointers;
  pointers.at[0] = rows.data;
  SURFATTN_UNROLL
  for (int n = 1; n < Count; ++n) pointers.at[n] = pointers.at[n - 1] + rows.stride;
  return pointers;
}

/// The same of several heads, each `head_stride` after the one before.
template <class Element>
struct HeadRows {
  ContiguousRows<Element> first;
  Index head_stride;

  ContiguousRows<Element> of(Index head) const {
    return {first.data + head * head_stride, first.stride};
  }
};

/// Asks for rows that are needed after a product while it is computed, those of two matrices by turns
/// and as much of them as the product has advanced. Line after line, since rows begin far from each
/// other, and a few lines at a time, as many as a processor waits for without being held up or
/// forgetting them.
template <class Source>
class ProductAhead {
 public:
  ProductAhead() = default;
  /// `work`: that of the product, in any unit.
  ProductAhead(const MatrixView<const Source>& a, const MatrixView<const Source>& b, Index work)
      : a_(asked_of(a)), b_(asked_of(b)), width_(std::max(a_.cols, b_.cols)), work_(work) {
    pieces_ = std::max(a_.rows, b_.rows) * (rounded_up(width_, piece) / piece);
  }

  /// Before so much of the work is done.
  SURFATTN_ALWAYS_INLINE void begin(Index part) {
    begun_ += part;
    if (asked_ * work_ < begun_ * pieces_) ask();
  }

 private:
  static constexpr Index line = simd::line<Source>, piece = 8 * line;

  /// Rows whose numbers do not follow each other have too many lines to ask for.
  static MatrixView<const Source> asked_of(const MatrixView<const Source>& rows) {
    return rows.col_stride == 1 ? rows : MatrixView<const Source>{};
  }

  /// Apart from the loops of the product, which need the registers.
  SURFATTN_NEVER_INLINE void ask() {
    for (; asked_ * work_ < begun_ * pieces_; ++asked_) {
      ask_piece(a_);
      ask_piece(b_);
      col_ += piece;
      if (col_ >= width_) col_ = 0, ++row_;
    }
  }

  /// Inlined: compilers take a function that only prefetches for one without effect, and drop the call.
  SURFATTN_ALWAYS_INLINE void ask_piece(const MatrixView<const Source>& rows) const {
    if (row_ >= rows.rows) return;
    constexpr Index some = 4;
    const Source* const row = rows.row(row_);
    const Index end = std::min(col_ + piece, rows.cols);
    Index c = col_;
    for (; c + some * line <= end; c += some * line) {
      SURFATTN_UNROLL
      for (Index i = 0; i < some; ++i) __builtin_prefetch(row + c + i * line);
    }
    for (; c < end; c += line) __builtin_prefetch(row + c);
  }

  MatrixView<const Source> a_{}, b_{};
  Index width_ = 0, pieces_ = 0;
  Index work_ = 0, begun_ = 0;
  Index asked_ = 0, row_ = 0, col_ = 0;
};

/// Asks for the beginnings of as many rows as these, after them; of several in a line, once.
template <class Scalar>
SURFATTN_ALWAYS_INLINE void ask_for_rows_after(const MatrixView<const Scalar>& rows) {
  const Index step = std::max<Index>(1, line<Scalar> / std::max<Index>(1, rows.row_stride));
  for (Index i = rows.rows; i < 2 * rows.rows; i += step) __builtin_prefetch(rows.row(i));
}

/// Products of `Rows` queries with `Keys` keys on their way.
template <int Rows, int Keys, class Scalar>
struct DotSums {
  Packet<Scalar> sums[Rows][Keys];

  SURFATTN_ALWAYS_INLINE DotSums() {
    SURFATTN_UNROLL
    for (int i = 0; i < Rows; ++i) {
      SURFATTN_UNROLL
      for (int j = 0; j < Keys; ++j) sums[i][j] = broadcast(Scalar(0));
    }
  }

  /// Adds the products of a packet of columns, of the queries from `queries` on and of the keys, as
  /// `take(j)` reads them.
  template <class Take>
  SURFATTN_ALWAYS_INLINE void add(ContiguousRows<const Scalar> queries, const Take& take) {
    Packet<Scalar> key[Keys];
    SURFATTN_UNROLL
    for (int j = 0; j < Keys; ++j) key[j] = Rows > 1 ? in_register(take(j)) : take(j);
    SURFATTN_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const auto query = in_register(load_unaligned(queries.row(i)));
      SURFATTN_UNROLL
      for (int j = 0; j < Keys; ++j) sums[i][j] = multiply_add(query, key[j], sums[i][j]);
    }
  }

  /// Adds the square of a packet of key j to the sums of the first row, and returns the packet.
  SURFATTN_ALWAYS_INLINE Packet<Scalar> add_square(Index j, const Packet<Scalar>& loaded) {
    const auto key = in_register(loaded);
    sums[0][j] = multiply_add(key, key, sums[0][j]);
    return key;
  }

  SURFATTN_ALWAYS_INLINE void store(ContiguousRows<Scalar> to) {
    SURFATTN_UNROLL
    for (int i = 0; i < Rows; ++i) store_sums<Scalar>(to.row(i), sums[i]);
  }
};

/// What a query asks memory for: what it reads soon; or, while its rows are in the first-level cache, what is
/// read first of those after them: a quarter, which is about what memory sends meanwhile.
enum class Ask { nothing, soon, after_rows };

/// How far ahead is soon: beyond the `rows` rows at hand at least.
template <class Source>
Index distance_ahead(Index rows, Index row_stride) {
  return std::max(8192 / static_cast<Index>(sizeof(Source)), rows * row_stride);
}

/// Whether a query of a single head asks for what is read soon. Where a line is several packets that
/// costs up to a third of the time.
inline constexpr Ask ask_in_single_head = packets_are_lines ? Ask::soon : Ask::nothing;

/// Whether the products of a query of one of several heads do so where there is more to do for each line
/// than to multiply and add: numbers to be converted, norms to be formed, or other queries to be
/// multiplied with the same keys. Else the processor works ahead far enough, and Intel's prefetchers do
/// in any case. On Zen 5 it saves a third of the time of bfloat16 and of three queries, and a tenth of
/// that of norms.
inline constexpr Ask ask_beside_work =
    packets_are_lines && !SURFATTN_TARGETS_INTEL_AVX512 ? Ask::soon : Ask::nothing;

/// Whether several queries of a head, which take longer than the memory of their keys, ask for the rows of
/// the next run or head meanwhile. Intel's prefetchers go from row to row by themselves where rows are
/// read in the order in which they lie: short sequences take a tenth more time with asking, and 4 queries
/// of each of 8 heads 1.7 times as much head by head.
inline constexpr bool blocks_ask_ahead = !SURFATTN_TARGETS_INTEL_AVX512;

/// C = Q·Kᵀ for each of `heads` heads: `rows` queries, `keys` keys, of `width` numbers. The rows of Q
/// end with whole packets (packed ones are padded with zeros), those of K are as they lie. Where queries
/// are taken one by one, the squared norms of the keys too, one row for each head, unless there is no
/// place for them: formed while the keys are on their way from memory.
template <class Scalar, class Source>
struct DotProducts {
  Index heads, rows, keys, width;
  HeadRows<const Scalar> queries_of;
  HeadRows<const Source> keys_of;
  HeadRows<Scalar> products_of;
  HeadRows<Scalar> norms_of;

  bool wants_norms() const { return norms_of.first.data; }
};

/// One query of each head against `Keys` keys from `key` on, over whole packets, of which there are
/// `Packets` unless that is 0, and `norms` of these keys if they are wanted.
template <int Keys, int Packets, Ask ask, bool norms, class Scalar, class Source>
SURFATTN_NEVER_INLINE void set_packets_of_query(Index row, Index key,
                                                const DotProducts<Scalar, Source>& all) {
  const Index whole = in_whole_packets<Scalar>(all.width);
  auto query = all.queries_of.first.from(row);
  auto keys = all.keys_of.first.from(key);
  auto products = all.products_of.first.from(row, key);
  auto norms_to = all.norms_of.first;
  if constexpr (norms) norms_to = norms_to.from(0, key);
  const Index ahead = distance_ahead<Source>(Keys, keys.stride);
  for (Index head = all.heads; head > 0; --head) {
    const auto key_rows = pointers_to<Keys>(keys);
    DotSums<1, Keys, Scalar> sums, squares;
    Index c = 0;
    const auto add = [&] {
      sums.add({query.data + c, 0}, [&](Index j) {
        if constexpr (ask == Ask::soon) __builtin_prefetch(key_rows.at[j] + c + ahead);
        if constexpr (norms) return squares.add_square(j, load_as<Scalar>(key_rows.at[j] + c));
        return load_as<Scalar>(key_rows.at[j] + c);
      });
      c += lanes<Scalar>;
    };
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p) add();
    while (Packets == 0 && c + 4 * lanes<Scalar> <= whole) {
      add(), add();
      add(), add();
    }
    while (Packets == 0 && c < whole) add();
    sums.store(products);
    if constexpr (norms) {
      squares.store(norms_to);
      norms_to.data += all.norms_of.head_stride;
    }
    query.data += all.queries_of.head_stride;
    keys.data += all.keys_of.head_stride;
    products.data += all.products_of.head_stride;
  }
}

/// The same for as many packets as there are.
template <int Keys, Ask ask, bool norms, class Scalar, class Source>
void set_products_of_query(Index row, Index key, const DotProducts<Scalar, Source>& all) {
  const Index packets = all.width / lanes<Scalar>;
  if constexpr (Keys > 1) {
    if (packets == 8) return set_packets_of_query<Keys, 8, ask, norms>(row, key, all);
    if constexpr (Keys == 4 && ask == Ask::nothing) {
      if (packets == 4) return set_packets_of_query<Keys, 4, ask, norms>(row, key, all);
    }
    if constexpr (!norms) {
      if (packets == 16) return set_packets_of_query<Keys, 16, ask, norms>(row, key, all);
    }
  }
  set_packets_of_query<Keys, 0, ask, norms>(row, key, all);
}

/// The query `first` against `Keys` keys from `key` on, with their norms if they are wanted.
template <int Keys, Ask ask, class Scalar, class Source>
void set_products_of_first(Index first, Index key, const DotProducts<Scalar, Source>& all) {
  constexpr Ask ask_beside = Keys == 1 ? Ask::nothing : ask == Ask::nothing ? ask_beside_work : ask;
  const bool has_work_beside = !std::is_same_v<Scalar, Source> || all.rows - first > 1;
  if (all.wants_norms()) {
    set_products_of_query<Keys, ask_beside, true>(first, key, all);
  } else if (has_work_beside) {
    set_products_of_query<Keys, ask_beside, false>(first, key, all);
  } else {
    set_products_of_query<Keys, ask, false>(first, key, all);
  }
}

/// The queries from `first` on, one after the other while the keys are in the first-level cache, against
/// the keys from `key` on, in steps of `Keys` and then one by one.
template <int Keys, Ask ask, class Scalar, class Source>
void set_products_one_by_one(Index first, Index key, const DotProducts<Scalar, Source>& all) {
  for (; key + Keys <= all.keys; key += Keys) {
    set_products_of_first<Keys, ask>(first, key, all);
    for (Index row = first + 1; row < all.rows; ++row)
      set_products_of_query<Keys, Ask::nothing, false>(row, key, all);
  }
  if constexpr (Keys > 1) set_products_one_by_one<1, Ask::nothing>(first, key, all);
}

/// A single query of each of several heads against eight keys at a time, as many as there are; returns how
/// many keys that are.
template <class Scalar>
Index set_products_by_eights(const DotProducts<Scalar, Scalar>& all) {
  Index key = 0;
  for (; key + 8 <= all.keys; key += 8) set_products_of_query<8, Ask::nothing, false>(0, key, all);
  return key;
}

/// The same of a single head: every `Keys` of its keys are taken for those of a head of their own.
template <int Keys, class Scalar, class Source>
void set_products_of_single_head(Index first, const DotProducts<Scalar, Source>& all) {
  const Index groups = all.keys / Keys;
  auto as_heads = all;
  as_heads.heads = groups, as_heads.keys = Keys;
  as_heads.queries_of.head_stride = 0;
  as_heads.keys_of.head_stride = Keys * all.keys_of.first.stride;
  as_heads.products_of.head_stride = Keys;
  as_heads.norms_of.head_stride = Keys;
  set_products_one_by_one<Keys, ask_in_single_head>(first, 0, as_heads);
  set_products_one_by_one<1, Ask::nothing>(first, groups * Keys, all);
}

/// `Rows` queries against `Keys` keys over whole packets.
template <int Rows, int Keys, class Scalar, class Source, class Ahead>
SURFATTN_ALWAYS_INLINE void dot_block(Index whole, ContiguousRows<const Scalar> queries,
                                      ContiguousRows<const Source> keys,
                                      ContiguousRows<Scalar> products, Ahead& ahead) {
  ahead.begin(Rows * Keys);
  DotSums<Rows, Keys, Scalar> sums;
  for (Index c = 0; c < whole; c += lanes<Scalar>) {
    sums.add(queries.from(0, c), [&](Index j) { return load_as<Scalar>(keys.row(j) + c); });
  }
  sums.store(products);
}

/// The queries from `row` on, in pairs at least, against `Keys` keys, in blocks of `Rows` and then of
/// half as many.
template <int Rows, int Keys, class Scalar, class Source, class Ahead>
SURFATTN_ALWAYS_INLINE void dot_column(Index row, Index rows, Index whole,
                                       ContiguousRows<const Scalar> queries,
                                       ContiguousRows<const Source> keys,
                                       ContiguousRows<Scalar> products, Ahead& ahead) {
  for (; row + Rows <= rows; row += Rows)
    dot_block<Rows, Keys>(whole, queries.from(row), keys, products.from(row), ahead);
  if constexpr (Rows > 2) {
    if (row + 2 <= rows)
      dot_column<Rows / 2, Keys>(row, rows, whole, queries, keys, products, ahead);
  }
}

/// Those queries of one head against its keys from `key` on, in steps of `Keys` and then of half as many.
template <int Rows, int Keys, class Scalar, class Source, class Ahead>
SURFATTN_ALWAYS_INLINE void dot_columns(Index key, Index head,
                                        const DotProducts<Scalar, Source>& all, Ahead& ahead) {
  const Index whole = in_whole_packets<Scalar>(all.width);
  for (; key + Keys <= all.keys; key += Keys) {
    dot_column<Rows, Keys>(0, all.rows, whole, all.queries_of.of(head),
                           all.keys_of.of(head).from(key), all.products_of.of(head).from(0, key),
                           ahead);
  }
  if constexpr (Keys > 1) {
    if (key < all.keys) dot_columns<Rows, Keys / 2>(key, head, all, ahead);
  }
}

template <class Scalar, class Source, class Ahead>
SURFATTN_NEVER_INLINE void set_products_in_blocks(const DotProducts<Scalar, Source>& all,
                                                  Ahead& ahead) {
  constexpr int rows = registers >= 32 ? 4 : 2;  // room for all sums, the keys, and a query
  for (Index head = 0; head < all.heads; ++head) dot_columns<rows, 4>(0, head, all, ahead);
}

/// Adds what the last numbers, which fill no packet, contribute.
template <class Scalar, class Source>
SURFATTN_NEVER_INLINE void add_products_of_rest(const DotProducts<Scalar, Source>& all) {
  const Index first = in_whole_packets<Scalar>(all.width);
  for (Index head = 0; head < all.heads; ++head) {
    const auto queries = all.queries_of.of(head);
    const auto products = all.products_of.of(head);
    for (Index j = 0; j < all.keys; ++j) {
      const auto key = gather<Scalar>(all.keys_of.of(head).row(j) + first, 1, all.width - first);
      for (Index i = 0; i < all.rows; ++i)
        products.row(i)[j] += sum(multiply(load_unaligned(queries.row(i) + first), key));
      if (all.wants_norms()) all.norms_of.of(head).data[j] += sum(multiply(key, key));
    }
  }
}

/// `ahead`: what several queries, which take longer than the memory of their keys, ask for meanwhile.
template <class Scalar, class Source, class Ahead>
void set_dot_products(const DotProducts<Scalar, Source>& all, Ahead& ahead) {
  const Index in_blocks = rows_in_blocks(all.rows);
  if (in_blocks > 0) set_products_in_blocks(all, ahead);
  if (in_blocks < all.rows) {
    Index key = 0;
    if constexpr (std::is_same_v<Scalar, Source>) {
      if (all.rows == 1 && all.heads > 1 && !all.wants_norms()) key = set_products_by_eights(all);
    }
    all.heads == 1 ? set_products_of_single_head<4>(in_blocks, all)
                   : set_products_one_by_one<4, Ask::nothing>(in_blocks, key, all);
  }
  if (all.width % lanes<Scalar> != 0) add_products_of_rest(all);
}

/// For each of `heads` heads C = A·B or C += A·B, of `rows` rows, where B are `depth` rows of `width`
/// numbers as they lie. The rows of C end with whole packets.
template <class Scalar, class Source>
struct RowsProducts {
  Store mode;
  Index heads, rows, depth, width;
  HeadRows<const Scalar> a;
  HeadRows<const Source> b;
  HeadRows<Scalar> c;
  bool follow_each_other = false;  ///< rows of B in the first-level cache: more of them follow
  bool past_caches = false;        ///< C is lines of memory that are set, and not read soon
};

/// One row of C of each head over `Packets` packets of columns from `col` on.
template <int Packets, Ask ask, class Scalar, class Source>
SURFATTN_NEVER_INLINE void set_packets_of_row(Index row, Index col,
                                              const RowsProducts<Scalar, Source>& all) {
  auto a = all.a.first.from(row);
  auto b = all.b.first.from(0, col);
  auto c = all.c.first.from(row, col);
  const Index ahead = distance_ahead<Source>(1, all.b.first.stride);
  constexpr Index quarter = std::max<Index>(1, Packets * lanes<Scalar> / line<Source> / 4);
  for (Index head = 0; head < all.heads; ++head) {
    Packet<Scalar> sums[Packets];
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p) {
      sums[p] = all.mode == Store::set ? broadcast(Scalar(0))
                                       : load_unaligned(c.data + p * lanes<Scalar>);
    }
    const Source* from = b.data;
    const Source* after = all.b.first.row(all.depth) +
                          (head * all.b.head_stride + col) / (4 * line<Source>)*line<Source>;
    Index k = 0;
    const auto add = [&] {
      const auto factor = broadcast(a.data[k]);
      SURFATTN_UNROLL
      for (Index l = 0; ask == Ask::after_rows && l < quarter; ++l)
        __builtin_prefetch(after + l * line<Source>);
      SURFATTN_UNROLL
      for (int p = 0; p < Packets; ++p) {
        if constexpr (ask == Ask::soon) __builtin_prefetch(from + p * lanes<Scalar> + ahead);
        sums[p] = multiply_add(factor, load_as<Scalar>(from + p * lanes<Scalar>), sums[p]);
      }
      ++k, from += b.stride, after += b.stride;
    };
    constexpr int longest_of_four = ask == Ask::nothing ? 8 : ask == Ask::soon ? 4 : 0;
    while (Packets <= longest_of_four && k + 4 <= all.depth) {
      add(), add();
      add(), add();
    }
    while (k < all.depth) add();
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p) store_unaligned(c.data + p * lanes<Scalar>, sums[p]);
    a.data += all.a.head_stride;
    b.data += all.b.head_stride;
    c.data += all.c.head_stride;
  }
}

/// The whole packets of a row of C from `col` on, in steps of `Packets` and then of half as many.
template <int Packets, Ask ask, class Scalar, class Source>
void set_row(Index row, Index col, const RowsProducts<Scalar, Source>& all) {
  constexpr Index step = Packets * lanes<Scalar>;
  for (; col + step <= all.width; col += step) set_packets_of_row<Packets, ask>(row, col, all);
  if constexpr (Packets > 1) {
    constexpr Ask ask_for_rest = ask == Ask::after_rows && Packets <= 4 ? Ask::nothing : ask;
    if (col < all.width) set_row<Packets / 2, ask_for_rest>(row, col, all);
  }
}

/// The rows of C from `row` on, one after the other while the rows of B are in the first-level cache.
template <Ask ask, class Scalar, class Source>
void set_rows_one_by_one(Index row, const RowsProducts<Scalar, Source>& all) {
  constexpr int most = registers >= 32 && ask != Ask::after_rows ? 16 : 8;
  for (; row < all.rows; ++row) set_row<most, ask>(row, 0, all);
}

/// `Rows` rows of C over `Packets` packets of columns.
template <int Rows, int Packets, class Scalar, class Source, class Ahead>
SURFATTN_ALWAYS_INLINE void rows_block(const RowsProducts<Scalar, Source>& all,
                                       ContiguousRows<const Scalar> a,
                                       ContiguousRows<const Source> b, ContiguousRows<Scalar> c,
                                       Ahead& ahead) {
  const Index depth = all.depth;
  constexpr Index some = 8;  // rows of B
  Packet<Scalar> sums[Rows][Packets];
  SURFATTN_UNROLL
  for (int i = 0; i < Rows; ++i) {
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p) {
      sums[i][p] = all.mode == Store::set ? broadcast(Scalar(0))
                                          : load_unaligned(c.row(i) + p * lanes<Scalar>);
    }
  }
  for (Index k = 0; k < depth; ++k) {
    if (k % some == 0) ahead.begin(Rows * Packets * lanes<Scalar> * std::min(some, depth - k));
    Packet<Scalar> row[Packets];
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p)
      row[p] = in_register(load_as<Scalar>(b.row(k) + p * lanes<Scalar>));
    SURFATTN_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const auto factor = broadcast(a.row(i)[k]);
      SURFATTN_UNROLL
      for (int p = 0; p < Packets; ++p) sums[i][p] = multiply_add(factor, row[p], sums[i][p]);
    }
  }
  SURFATTN_UNROLL
  for (int i = 0; i < Rows; ++i) {
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p) {
      Scalar* const to = c.row(i) + p * lanes<Scalar>;
      all.past_caches ? store_past_caches(to, sums[i][p]) : store_unaligned(to, sums[i][p]);
    }
  }
}

/// `Rows` rows of C over the whole packets of columns from `col` on, in steps of `Packets` packets and
/// then of half as many.
template <int Rows, int Packets, class Scalar, class Source, class Ahead>
SURFATTN_ALWAYS_INLINE void rows_columns(Index row, Index col, Index head,
                                         const RowsProducts<Scalar, Source>& all, Ahead& ahead) {
  constexpr Index step = Packets * lanes<Scalar>;
  for (; col + step <= all.width; col += step) {
    rows_block<Rows, Packets>(all, all.a.of(head).from(row), all.b.of(head).from(0, col),
                              all.c.of(head).from(row, col), ahead);
  }
  if constexpr (Packets > 1) rows_columns<Rows, Packets / 2>(row, col, head, all, ahead);
}

/// The rows of C from `row` on, in pairs at least, in blocks of `Rows` and then of half as many: the
/// fewer the rows, the wider the block of columns, so that there are always as many sums under way.
template <int Rows, class Scalar, class Source, class Ahead>
SURFATTN_ALWAYS_INLINE void rows_of_product(Index row, Index head,
                                            const RowsProducts<Scalar, Source>& all, Ahead& ahead) {
  constexpr int packets = (registers >= 32 ? 16 : 8) / Rows;
  for (; row + Rows <= all.rows; row += Rows) rows_columns<Rows, packets>(row, 0, head, all, ahead);
  if constexpr (Rows > 2) {
    if (row + 2 <= all.rows) rows_of_product<Rows / 2>(row, head, all, ahead);
  }
}

/// The columns that fill no packet.
template <class Scalar, class Source>
SURFATTN_NEVER_INLINE void set_rest_of_rows(const RowsProducts<Scalar, Source>& all) {
  const Index first = in_whole_packets<Scalar>(all.width);
  for (Index head = 0; head < all.heads; ++head) {
    for (Index i = 0; i < all.rows; ++i) {
      Scalar* const to = all.c.of(head).row(i) + first;
      auto sum = all.mode == Store::set ? broadcast(Scalar(0)) : load_unaligned(to);
      for (Index k = 0; k < all.depth; ++k) {
        const auto row = gather<Scalar>(all.b.of(head).row(k) + first, 1, all.width - first);
        sum = multiply_add(broadcast(all.a.of(head).row(i)[k]), row, sum);
      }
      store_unaligned(to, sum);
    }
  }
}

/// Rows from `first` on.
template <class Scalar, class Source, class Ahead>
SURFATTN_NEVER_INLINE void set_rows_in_blocks(Index first, const RowsProducts<Scalar, Source>& all,
                                              Ahead& ahead) {
  for (Index head = 0; head < all.heads; ++head) rows_of_product<4>(first, head, all, ahead);
}

inline constexpr int large_block = 8;

/// The rows that make up large blocks, which read those of B half as often. A function of its own, so that
/// the loops of smaller blocks keep their registers.
template <class Scalar, class Source, class Ahead>
SURFATTN_NEVER_INLINE void set_rows_in_large_blocks(const RowsProducts<Scalar, Source>& all,
                                                    Ahead& ahead) {
  for (Index head = 0; head < all.heads; ++head) {
    for (Index row = 0; row + large_block <= all.rows; row += large_block)
      rows_columns<large_block, 2>(row, 0, head, all, ahead);
  }
}

/// `ahead` as for `set_dot_products`.
template <class Scalar, class Source, class Ahead>
void set_rows_products(const RowsProducts<Scalar, Source>& all, Ahead& ahead) {
  const Index in_blocks = rows_in_blocks(all.rows);
  Index first = 0;
  if constexpr (registers >= 32) {
    // What is added to is a buffer, whose rows follow each other. Elsewhere so many rows of C compete with
    // those of B for lines of the cache.
    if (all.mode == Store::add) first = all.rows / large_block * large_block;
    if (first > 0) set_rows_in_large_blocks(all, ahead);
  }
  if (in_blocks > first) set_rows_in_blocks(first, all, ahead);
  if (in_blocks < all.rows) {
    all.heads == 1          ? set_rows_one_by_one<ask_in_single_head>(in_blocks, all)
    : all.follow_each_other ? set_rows_one_by_one<Ask::after_rows>(in_blocks, all)
                            : set_rows_one_by_one<Ask::nothing>(in_blocks, all);
  }
  if (all.width % lanes<Scalar> != 0) set_rest_of_rows(all);
}

/// ‖row‖² of each row of a matrix that is stored by columns, the bits of its product with itself over whole
/// packets of rows.
template <class Scalar, class Source>
SURFATTN_NEVER_INLINE void squared_norms_by_columns(MatrixView<const Source> rows, Scalar* to) {
  constexpr Index packets = 4;
  for (Index first = 0; first < rows.rows; first += packets * lanes<Scalar>) {
    Packet<Scalar> sums[packets];
    SURFATTN_UNROLL
    for (auto& sum : sums) sum = broadcast(Scalar(0));
    for (Index c = 0; c < rows.cols; ++c) {
      SURFATTN_UNROLL
      for (Index p = 0; p < packets; ++p) {
        const Index row = first + p * lanes<Scalar>;
        const auto x = gather<Scalar>(&rows(row, c), 1, rows.rows - row);
        sums[p] = multiply_add(x, x, sums[p]);
      }
    }
    for (Index p = 0; p < packets && first + p * lanes<Scalar> < rows.rows; ++p)
      store_unaligned(to + first + p * lanes<Scalar>, sums[p]);
  }
}

}  // namespace surfattn::detail::simd
