// surfattn layer 2: products with rows as they lie in memory, for few queries

#pragma once

#include <algorithm>
#include <surfattn/detail/simd/packing.hpp>
#include <surfattn/detail/simd/row_operations.hpp>
#include <surfattn/detail/simd/tile_products.hpp>
#include <surfattn/detail/view.hpp>

/// With few queries, every key and value is used a few times only and packing it would cost more
/// than using it. These functions read each row once, from memory, in its natural layout.
namespace surfattn::detail::simd {

/// Asks for rows that are needed later, cache line by cache line and in the order of memory, in
/// which the prefetchers of the hardware follow: `lines` of them for every key that is being worked
/// on. Does nothing for rows whose numbers are not contiguous.
template <class Source>
class RowsAhead {
 public:
  RowsAhead() = default;
  RowsAhead(MatrixView<const Source> rows, Index lines) : lines_(lines) {
    if (rows.col_stride != 1 || rows.cols == 0 || rows.rows == 0) return;
    row_ = rows;
    rows_ = rows.rows;
    next_ = rows.data;
    end_ = next_ + rows.cols;
  }

  /// How many lines to ask for at each of `steps` steps that are spent on some keys.
  Index lines_of(Index keys, Index steps) const { return (keys * lines_ + steps - 1) / steps; }

  SURFATTN_ALWAYS_INLINE void ask(Index lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      __builtin_prefetch(next_, 0, 1);  // not into the first-level cache, which is in use
      next_ += line;
      if (next_ >= end_) begin_row();
    }
  }

 private:
  static constexpr Index line = std::max<Index>(1, 64 / static_cast<Index>(sizeof(Source)));

  void begin_row() {
    row_.data += row_.row_stride;
    next_ = row_.data;
    end_ = next_ + row_.cols;
    --rows_;
  }

  const Source* next_ = nullptr;
  const Source* end_ = nullptr;  ///< of the row
  MatrixView<const Source> row_{};
  Index rows_ = 0;
  Index lines_ = 0;
};

/// Asks for the rows of two matrices that the next of several products needs, while one is computed:
/// as many of them before each block of it as the block is a part of the product. Whole rows, which
/// begin far from each other, line after line: the loops of the blocks stay as they are.
template <class Source>
class ProductAhead {
 public:
  ProductAhead() = default;
  /// `size`: the numbers of the product that is computed meanwhile.
  ProductAhead(MatrixView<const Source> a, MatrixView<const Source> b, Index size)
      : a_(a), b_(b), rows_(std::max(a.rows, b.rows)), size_(size) {}

  /// Before a block of so many numbers of the product.
  SURFATTN_ALWAYS_INLINE void begin_block(Index numbers) {
    done_ += numbers;
    for (; asked_ * size_ < done_ * rows_; ++asked_) {
      ask_row(a_, asked_);
      ask_row(b_, asked_);
    }
  }

 private:
  /// Inlined: compilers take a function that only prefetches for one without effect, and drop the call.
  SURFATTN_ALWAYS_INLINE static void ask_row(MatrixView<const Source> rows, Index row) {
    if (row >= rows.rows || rows.col_stride != 1) return;
    constexpr Index line = std::max<Index>(1, 64 / static_cast<Index>(sizeof(Source))), some = 4;
    const Source* const first = rows.row(row);
    Index c = 0;
    for (; c + some * line <= rows.cols; c += some * line) {
      SURFATTN_UNROLL
      for (Index i = 0; i < some; ++i) __builtin_prefetch(first + c + i * line, 0, 1);
    }
    for (; c < rows.cols; c += line) __builtin_prefetch(first + c, 0, 1);
  }

  MatrixView<const Source> a_{}, b_{};
  Index rows_ = 0, size_ = 0, asked_ = 0, done_ = 0;
};

/// What is asked for during a product: lines at its steps, or rows between its blocks.
template <class Source>
struct AskAhead {
  RowsAhead<Source> at_steps;
  ProductAhead<Source> between_blocks;

  Index lines_of(Index keys, Index steps) const { return at_steps.lines_of(keys, steps); }
  SURFATTN_ALWAYS_INLINE void ask(Index lines) { at_steps.ask(lines); }
  SURFATTN_ALWAYS_INLINE void begin_block(Index numbers) { between_blocks.begin_block(numbers); }
};

/// Products of `Rows` queries with `Keys` keys on their way, and, `with_norms`, of each key with
/// itself.
template <int Rows, int Keys, bool with_norms, class Scalar>
struct DotSums {
  Packet<Scalar> products[Rows][Keys], squares[Keys];

  SURFATTN_ALWAYS_INLINE DotSums() {
    SURFATTN_UNROLL
    for (int j = 0; j < Keys; ++j) {
      squares[j] = broadcast(Scalar(0));
      SURFATTN_UNROLL
      for (int i = 0; i < Rows; ++i) products[i][j] = squares[j];
    }
  }

  /// Adds those of the columns [first, first + lanes) of queries, whose rows end with whole packets,
  /// and of rows of keys, as `take(j)` reads them.
  template <class Take>
  SURFATTN_ALWAYS_INLINE void add(RowsOperand<Scalar> q, Index first, const Take& take) {
    Packet<Scalar> key[Keys];
    SURFATTN_UNROLL
    for (int j = 0; j < Keys; ++j) {
      key[j] = in_register(take(j));
      if constexpr (with_norms) squares[j] = multiply_add(key[j], key[j], squares[j]);
    }
    SURFATTN_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const auto query = in_register(load_unaligned(q.data + i * q.stride + first));
      SURFATTN_UNROLL
      for (int j = 0; j < Keys; ++j) products[i][j] = multiply_add(query, key[j], products[i][j]);
    }
  }

  SURFATTN_ALWAYS_INLINE static void store(const Packet<Scalar> (&packets)[Keys], Scalar* to) {
    if constexpr (Keys % 4 == 0) {
      SURFATTN_UNROLL
      for (int j = 0; j < Keys; j += 4)
        store_sums(to + j, packets[j], packets[j + 1], packets[j + 2], packets[j + 3]);
    } else {
      SURFATTN_UNROLL
      for (int j = 0; j < Keys; ++j) to[j] = sum(packets[j]);
    }
  }
};

/// out_ij = q_i·k_j for `Rows` queries and `Keys` rows of keys, and ‖k_j‖². Asks for `lines` at each
/// step.
template <int Rows, int Keys, bool with_norms, class Scalar, class Source, class Ahead>
SURFATTN_ALWAYS_INLINE void dot_block(RowsOperand<Scalar> q, MatrixView<const Source> keys,
                                      Tile<Scalar> out, Scalar* norms, Ahead& ahead, Index lines) {
  ahead.begin_block(Rows * Keys);
  DotSums<Rows, Keys, with_norms, Scalar> sums;
  Index c = 0;
  for (; keys.col_stride == 1 && c + lanes<Scalar> <= keys.cols; c += lanes<Scalar>) {
    ahead.ask(lines);
    sums.add(q, c, [&](Index j) { return load_as<Scalar>(keys.row(j) + c); });
  }
  for (; c < keys.cols; c += lanes<Scalar>) {
    sums.add(q, c,
             [&](Index j) { return gather<Scalar>(&keys(j, c), keys.col_stride, keys.cols - c); });
  }
  SURFATTN_UNROLL
  for (int i = 0; i < Rows; ++i) sums.store(sums.products[i], out.from(i).data);
  if constexpr (with_norms) sums.store(sums.squares, norms);
}

/// The queries from `row` on against `Keys` rows of keys, in steps of `Rows` and then of half as many.
template <int Rows, int Keys, class Scalar, class Source, class Ahead>
SURFATTN_ALWAYS_INLINE void dot_column(Index row, Index rows, RowsOperand<Scalar> q,
                                       MatrixView<const Source> keys, Tile<Scalar> out,
                                       Ahead& ahead) {
  const Index steps = std::max<Index>(1, keys.cols / lanes<Scalar>);
  for (; row + Rows <= rows; row += Rows) {
    dot_block<Rows, Keys, false, Scalar>({q.from(row), q.stride}, keys, out.from(row), nullptr,
                                         ahead, row == 0 ? ahead.lines_of(Keys, steps) : 0);
  }
  if constexpr (Rows > 1) {
    if (row < rows) dot_column<Rows / 2, Keys>(row, rows, q, keys, out, ahead);
  }
}

/// ‖k_j‖² of `Keys` rows of keys, together with their products with the first query where queries are
/// taken one by one. Returns how many queries are done.
template <int Rows, int Keys, class Scalar, class Source, class Ahead>
SURFATTN_ALWAYS_INLINE Index set_norms(RowsOperand<Scalar> q, MatrixView<const Source> keys,
                                       Tile<Scalar> out, Scalar* norms, Ahead& ahead) {
  if constexpr (Rows == 1) {
    const Index steps = std::max<Index>(1, keys.cols / lanes<Scalar>);
    dot_block<1, Keys, true>(q, keys, out, norms, ahead, ahead.lines_of(Keys, steps));
    return 1;
  } else {
    squared_norms(keys, norms);
    return 0;
  }
}

/// All queries, one or more, against the rows of keys from `key` on, in steps of `Keys` and then of
/// half as many; with queries taken one by one, the last keys are as well.
template <int Rows, int Keys, class Scalar, class Source, class Ahead>
SURFATTN_ALWAYS_INLINE void dot_columns(Index key, Index rows, RowsOperand<Scalar> q,
                                        MatrixView<const Source> keys, Tile<Scalar> c,
                                        Scalar* norms, Ahead& ahead) {
  for (; key + Keys <= keys.rows; key += Keys) {
    const auto some = keys.block_rows(key, Keys);
    const Tile<Scalar> out{c.data + key, c.row_stride};
    const Index done = norms ? set_norms<Rows, Keys>(q, some, out, norms + key, ahead) : 0;
    dot_column<Rows, Keys>(done, rows, q, some, out, ahead);
  }
  if constexpr (Keys > 1) {
    constexpr int fewer = Rows == 1 ? 1 : Keys / 2;
    if (key < keys.rows) dot_columns<Rows, fewer>(key, rows, q, keys, c, norms, ahead);
  }
}

/// C = Q·Kᵀ: the rows of Q whole packets wide (packed ones are padded with zeros), K the rows of an
/// input as they lie. Writes ‖k_j‖² to `norms` too, unless that is null.
template <class Scalar, class Source, class Ahead>
SURFATTN_NEVER_INLINE void set_dot_products(Index rows, RowsOperand<Scalar> q,
                                            MatrixView<const Source> keys, Tile<Scalar> c,
                                            Scalar* norms, Ahead& ahead) {
  constexpr bool wide = registers >= 32;  // room for all sums, the keys, and a query
  if (rows >= 4) {
    dot_columns<wide ? 4 : 2, 4>(0, rows, q, keys, c, norms, ahead);
  } else {
    dot_columns<1, wide ? 8 : 4>(0, rows, q, keys, c, norms, ahead);
  }
}

/// Where a product of rows goes: rows of whole packets.
template <class Scalar>
struct RowsResult {
  Scalar* data;
  Index stride;
  Store mode;

  RowsResult from(Index row, Index col) const { return {data + row * stride + col, stride, mode}; }
};

/// `Rows` rows of C = A·B or C += A·B over `Packets` packets of columns, where B are rows of an input
/// as they lie. Asks for `lines` at each of them.
template <int Rows, int Packets, class Scalar, class Source, class Ahead>
SURFATTN_ALWAYS_INLINE void rows_block(RowsOperand<Scalar> a, MatrixView<const Source> b,
                                       RowsResult<Scalar> c, Ahead& ahead, Index lines) {
  ahead.begin_block(Rows * Packets * lanes<Scalar>);
  Packet<Scalar> sums[Rows][Packets];
  SURFATTN_UNROLL
  for (int i = 0; i < Rows; ++i) {
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p) {
      sums[i][p] = c.mode == Store::set ? broadcast(Scalar(0))
                                        : load_unaligned(c.data + i * c.stride + p * lanes<Scalar>);
    }
  }
  for (Index k = 0; k < b.rows; ++k) {
    ahead.ask(lines);
    Packet<Scalar> row[Packets];
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p)
      row[p] = in_register(load_as<Scalar>(b.row(k) + p * lanes<Scalar>));
    SURFATTN_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const auto factor = broadcast(a.from(i)[k]);
      SURFATTN_UNROLL
      for (int p = 0; p < Packets; ++p) sums[i][p] = multiply_add(factor, row[p], sums[i][p]);
    }
  }
  SURFATTN_UNROLL
  for (int i = 0; i < Rows; ++i) {
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p)
      store_unaligned(c.data + i * c.stride + p * lanes<Scalar>, sums[i][p]);
  }
}

/// The columns of C from `col` on, in steps of `Packets` packets and then of half as many; they are
/// a whole number of packets.
template <int Rows, int Packets, class Scalar, class Source, class Ahead>
SURFATTN_ALWAYS_INLINE void rows_columns(Index col, RowsOperand<Scalar> a,
                                         MatrixView<const Source> b, RowsResult<Scalar> c,
                                         Ahead& ahead, Index lines) {
  constexpr Index width = Packets * lanes<Scalar>;
  for (; col + width <= b.cols; col += width) {
    rows_block<Rows, Packets>(a, b.block_cols(col, width), c.from(0, col), ahead, lines);
  }
  if constexpr (Packets > 1) {
    if (col < b.cols) rows_columns<Rows, Packets / 2>(col, a, b, c, ahead, lines);
  }
}

/// The rows of C from `row` on, in steps of `Rows` and then of half as many: the fewer the rows,
/// the wider the block of columns, so that there are always as many sums under way.
template <int Rows, class Scalar, class Source, class Ahead>
SURFATTN_ALWAYS_INLINE void rows_of_product(Index row, Index rows, RowsOperand<Scalar> a,
                                            MatrixView<const Source> b, RowsResult<Scalar> c,
                                            Ahead& ahead) {
  constexpr int packets = (registers >= 32 ? 16 : 8) / Rows;
  const Index passes = std::max<Index>(1, rows * b.cols / (Rows * packets * lanes<Scalar>));
  for (; row + Rows <= rows; row += Rows) {
    rows_columns<Rows, packets>(0, {a.from(row), a.stride}, b, c.from(row, 0), ahead,
                                ahead.lines_of(1, passes));
  }
  if constexpr (Rows > 1) {
    if (row < rows) rows_of_product<Rows / 2>(row, rows, a, b, c, ahead);
  }
}

/// C = A·B or C += A·B for `rows` rows, where B are rows of an input as they lie.
template <class Scalar, class Source, class Ahead>
SURFATTN_NEVER_INLINE void rows_product(Index rows, RowsOperand<Scalar> a,
                                        MatrixView<const Source> b, RowsResult<Scalar> c,
                                        Ahead& ahead) {
  rows_of_product<4>(0, rows, a, b, c, ahead);
}

}  // namespace surfattn::detail::simd
