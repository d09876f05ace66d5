// surfattn layer 2: copies strided rows into the aligned, padded layouts of the tile products

#pragma once

#include <algorithm>
#include <surfattn/detail/simd/tile_products.hpp>
#include <surfattn/detail/view.hpp>
#include <surfattn/workspace.hpp>
#include <type_traits>

namespace surfattn::detail::simd {

/// Rows of an operand that hold an infinity or a NaN once they are scaled. They are packed as
/// zeros, because a product over a tile would carry 0·NaN into rows that a mask keeps from seeing
/// them; `add_non_finite_rows` adds what they contribute where no mask stands in front of them. So
/// finite rows give the same bits whatever lies behind a mask.
struct NonFiniteRows {
  Index* rows = nullptr;
  Index count = 0;
};

/// `count` ≤ lanes numbers, `stride` apart, and zeros in the remaining lanes.
template <class Scalar, class Source>
SURFATTN_ALWAYS_INLINE Packet<Scalar> gather(const Source* from, Index stride, Index count) {
  if (stride == 1 && count >= lanes<Scalar>) return load_as<Scalar>(from);
  alignas(Arena::alignment) Scalar numbers[lanes<Scalar>] = {};
  for (Index c = 0; c < std::min(count, lanes<Scalar>); ++c) {
    numbers[c] = static_cast<Scalar>(from[c * stride]);
  }
  return load(numbers);
}

/// How many rows ahead to ask for.
inline constexpr Index prefetch_distance = 16;

/// Asks for rows that will be read soon. Rows of one head lie as far apart as the whole token is
/// wide, where no prefetcher of the hardware follows.
template <class Source>
SURFATTN_ALWAYS_INLINE void prefetch_rows(MatrixView<const Source> rows, Index first, Index count) {
  constexpr Index line = std::max<Index>(1, 64 / static_cast<Index>(sizeof(Source)));
  for (Index i = first; i < std::min(first + count, rows.rows); ++i) {
    for (Index c = 0; c < rows.cols; c += line) __builtin_prefetch(&rows(i, c));
  }
}

/// source·factor, row by row, as a left operand: rows are padded(source.cols) apart, padded with
/// zeros.
template <class Scalar, class Source>
void pack_rows(MatrixView<const Source> source, Scalar factor, Scalar* to) {
  const auto multiplier = broadcast(factor);
  const Index stride = padded<Scalar>(source.cols);
  for (Index i = 0; i < source.rows; ++i, to += stride) {
    const Source* from = source.row(i);
    for (Index c = 0; c < stride; c += lanes<Scalar>) {
      store(to + c, multiply(multiplier, gather<Scalar>(from + c * source.col_stride,
                                                        source.col_stride, source.cols - c)));
    }
  }
}

/// source·factor by columns, in panels of `width` rows, a multiple of lanes, the last one padded
/// with zeros: row r and column c goes to `to` + r / width·width·source.cols + c·width + r % width.
/// Works in square blocks of packets.
template <Index width, class Scalar, class Source>
void pack_columns(MatrixView<const Source> source, Scalar factor, Scalar* to) {
  constexpr Index side = lanes<Scalar>;
  const auto multiplier = broadcast(factor);
  for (Index first = 0; first < rounded_up(source.rows, width); first += side) {
    prefetch_rows(source, first + side, side);
    Scalar* column = to + first / width * width * source.cols + first % width;
    for (Index c = 0; c < source.cols; c += side) {
      SquareBlock<Scalar> block;
      for (Index row = 0; row < side; ++row) {
        block[row] = first + row < source.rows
                         ? multiply(multiplier, gather<Scalar>(&source(first + row, c),
                                                               source.col_stride, source.cols - c))
                         : broadcast(Scalar(0));
      }
      block.transpose();
      const Index count = std::min(side, source.cols - c);
      for (Index row = 0; row < count; ++row) store(column + (c + row) * width, block[row]);
    }
  }
}

/// The transpose of `source` as a right operand: depth = source.cols, one column for each of its
/// rows.
template <class Scalar, class Source>
void pack_transposed(MatrixView<const Source> source, Scalar* to) {
  pack_columns<panel_width<Scalar>>(source, Scalar(1), to);
}

/// source·factor as a left operand, by columns; takes `packed_left_size` numbers.
template <class Scalar, class Source>
void pack_left(MatrixView<const Source> source, Scalar factor, Scalar* to) {
  pack_columns<left_width<Scalar>>(source, factor, to);
}

template <class Scalar>
constexpr Index packed_left_size(Index rows, Index cols) {
  return rounded_up(rows, left_width<Scalar>) * cols;
}

/// `rows` rows, from `row` on, of what `pack_left` has packed: from the first of a panel on, or all in
/// one panel.
template <class Scalar>
ColumnsOperand<Scalar> packed_left(const Scalar* packed, Index cols, Index row,
                                   [[maybe_unused]] Index rows) {
  constexpr Index width = left_width<Scalar>;
  eigen_assert(row % width == 0 || row % width + rows <= width);
  const ColumnsOperand<Scalar> all{packed, width, width * cols};
  return {all.from(row), all.stride, all.panel_stride};
}

/// source·factor as a right operand: depth = source.rows. Row k of panel p goes to `to` +
/// p·panel_stride + k·panel_width. Rows that are not finite become zeros and are listed.
template <class Scalar, class Source>
void pack_panels(MatrixView<const Source> source, Scalar factor, Scalar* to, Index panel_stride,
                 NonFiniteRows& non_finite) {
  constexpr Index width = panel_width<Scalar>;
  const auto multiplier = broadcast(factor), zero = broadcast(Scalar(0));
  non_finite.count = 0;
  for (Index k = 0; k < source.rows; ++k, to += width) {
    prefetch_rows(source, k + prefetch_distance, 1);
    const Source* from = source.row(k);
    const auto at = [&](Index c) { return to + c / width * panel_stride + c % width; };
    auto zeros = zero;  // x·0 is 0 for every finite x and NaN for the others
    for (Index c = 0; c < padded<Scalar>(source.cols); c += lanes<Scalar>) {
      const auto x = multiply(multiplier, gather<Scalar>(from + c * source.col_stride,
                                                         source.col_stride, source.cols - c));
      zeros = multiply_add(x, zero, zeros);
      store(at(c), x);
    }
    if (sum(zeros) == Scalar(0)) continue;
    non_finite.rows[non_finite.count++] = k;
    for (Index c = 0; c < padded<Scalar>(source.cols); c += lanes<Scalar>) store(at(c), zero);
  }
}

/// Row `row` of a result, set to factor·from or added to.
template <Store mode, class Scalar, class Result>
void write_row(const Scalar* from, Scalar factor, MatrixView<Result> to, Index row) {
  Result* out = to.row(row);
  Index c = 0;
  const auto multiplier = broadcast(factor);
  for (; to.col_stride == 1 && c + lanes<Scalar> <= to.cols; c += lanes<Scalar>) {
    const auto product = multiply(multiplier, load(from + c));
    store_as<Scalar>(out + c,
                     mode == Store::set ? product : add(load_as<Scalar>(out + c), product));
  }
  for (; c < to.cols; ++c) {
    Result& entry = out[c * to.col_stride];
    const Scalar product = factor * from[c];
    entry =
        static_cast<Result>(mode == Store::set ? product : static_cast<Scalar>(entry) + product);
  }
}

/// a·b for `Rows` rows of both, from `first` on, into to[first], …
template <int Rows, class Scalar, class Source>
SURFATTN_ALWAYS_INLINE void row_products(MatrixView<const Source> a, MatrixView<const Source> b,
                                         Index first, Scalar* to) {
  Packet<Scalar> products[Rows];
  for (auto& product : products) product = broadcast(Scalar(0));
  for (Index c = 0; c < a.cols; c += lanes<Scalar>) {
    SURFATTN_UNROLL
    for (int i = 0; i < Rows; ++i) {
      products[i] =
          multiply_add(gather<Scalar>(&a(first + i, c), a.col_stride, a.cols - c),
                       gather<Scalar>(&b(first + i, c), b.col_stride, b.cols - c), products[i]);
    }
  }
  if constexpr (Rows == 4) {
    store_sums(to + first, products[0], products[1], products[2], products[3]);
  } else {
    for (int i = 0; i < Rows; ++i) to[first + i] = sum(products[i]);
  }
}

/// a·b for each of the rows of both.
template <class Scalar, class Source>
void row_products(MatrixView<const Source> a, MatrixView<const Source> b, Scalar* to) {
  Index i = 0;
  for (; i + 4 <= a.rows; i += 4) row_products<4>(a, b, i, to);
  for (; i < a.rows; ++i) row_products<1>(a, b, i, to);
}

/// Σ_ij a_ij·(b_ij − origin_j), where a zero in `a` (a query that took no part) hides whatever
/// stands in `b`. `origin` is one row.
template <class Scalar, class Source>
Scalar sum_of_products(MatrixView<const Scalar> a, MatrixView<const Source> b,
                       MatrixView<const Source> origin) {
  auto total = broadcast(Scalar(0));
  for (Index i = 0; i < a.rows; ++i) {
    for (Index c = 0; c < a.cols; c += lanes<Scalar>) {
      const auto take = [&](const auto& view, Index row) {
        return gather<Scalar>(&view(row, c), view.col_stride, a.cols - c);
      };
      const auto x = take(a, i);
      total = add(total,
                  zero_where_zero<Scalar>(x, multiply(x, subtract(take(b, i), take(origin, 0)))));
    }
  }
  return sum(total);
}

/// ‖row − origin‖² of each row of `source`; `origin` is one row.
template <class Scalar, class Source>
void squared_distances(MatrixView<const Source> source, MatrixView<const Source> origin,
                       Scalar* to) {
  for (Index i = 0; i < source.rows; ++i) {
    auto squares = broadcast(Scalar(0));
    for (Index c = 0; c < source.cols; c += lanes<Scalar>) {
      const auto difference =
          subtract(gather<Scalar>(&source(i, c), source.col_stride, source.cols - c),
                   gather<Scalar>(&origin(0, c), origin.col_stride, source.cols - c));
      squares = multiply_add(difference, difference, squares);
    }
    to[i] = sum(squares);
  }
}

/// ‖row‖² of each row of `source`.
template <class Scalar, class Source>
void squared_norms(MatrixView<const Source> source, Scalar* to) {
  row_products(source, source, to);
}

}  // namespace surfattn::detail::simd
