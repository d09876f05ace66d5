// surfattn layer 2: copies strided rows into the aligned, padded layouts of the tile products

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
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

/// The first `count` of the numbers that lie `stride` apart, a packet of them at most, and zeros in
/// the remaining lanes.
template <class Scalar, class Source>
SURFATTN_ALWAYS_INLINE Packet<Scalar> gather(const Source* from, Index stride, Index count) {
  if (stride == 1 && count >= lanes<Scalar>) return load_as<Scalar>(from);
  if constexpr (std::is_same_v<Scalar, Source> && loads_parts<Scalar>) {
    if (stride == 1) return load_part(from, std::max<Index>(count, 0));
  }
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
  for (Index i = first; i < std::min(first + count, rows.rows); ++i) {
    for (Index c = 0; c < rows.cols; c += line<Source>) __builtin_prefetch(&rows(i, c));
  }
}

/// Calls use(rows, first) for runs of the rows of `source`, from number `first` on, that make it up: for
/// all of them, or, where they are stored by columns, of which there are up to 256, for copies of a few.
/// The numbers of such a row lie in as many lines, which may all compete for one place of a cache: each
/// is read once, for all rows that it holds.
template <class Source, class Use>
void for_contiguous_rows(MatrixView<const Source> source, const Use& use) {
  constexpr Index most_rows = line<Source>, most_cols = 256;
  if (!source.is_stored_by_columns() || source.cols > most_cols) return use(source, Index(0));
  alignas(Arena::alignment) Source numbers[most_rows * most_cols];
  for (Index first = 0; first < source.rows; first += most_rows) {
    const auto some = source.block_rows(first, std::min(most_rows, source.rows - first));
    for (Index c = 0; c < some.cols; ++c) {
      const Source* const column = &some(0, c);
      for (Index i = 0; i < some.rows; ++i) numbers[i * some.cols + c] = column[i];
    }
    use(MatrixView<const Source>{numbers, some.rows, some.cols, some.cols, 1}, first);
  }
}

/// source·factor, row by row, as a left operand: rows are padded(source.cols) apart, padded with
/// zeros.
template <class Scalar, class Source>
void pack_rows(MatrixView<const Source> source, Scalar factor, Scalar* to) {
  const auto multiplier = broadcast(factor);
  const Index stride = padded<Scalar>(source.cols);
  for_contiguous_rows(source, [&](const MatrixView<const Source>& rows, Index) {
    for (Index i = 0; i < rows.rows; ++i, to += stride) {
      const Source* from = rows.row(i);
      for (Index c = 0; c < stride; c += lanes<Scalar>) {
        store(to + c, multiply(multiplier, gather<Scalar>(from + c * rows.col_stride,
                                                          rows.col_stride, rows.cols - c)));
      }
    }
  });
}

/// How many elements of a packed operand hold `count` numbers along the depth.
template <class Element>
constexpr Index depth_of(Index count) {
  return std::is_same_v<Element, BFloat16Pair> ? (count + 1) / 2 : count;
}

/// The elements [first, first + lanes) of a row, times `factor`, with zeros beyond its end.
template <class Element, class Source>
SURFATTN_ALWAYS_INLINE Packet<Element> row_elements(MatrixView<const Source> source, Index row,
                                                    Index first, Packet<Element> factor) {
  return multiply(factor,
                  gather<Element>(&source(row, first), source.col_stride, source.cols - first));
}

/// Pairs, as packets of 32 bits each and without a factor.
template <class Element>
SURFATTN_ALWAYS_INLINE Packet<float> row_elements(
    MatrixView<const Eigen::bfloat16> source, Index row, Index first,
    Packet<float>) requires std::is_same_v<Element, BFloat16Pair> {
  constexpr Index width = 2 * lanes<float>;
  const Eigen::bfloat16* from = &source(row, 2 * first);
  const Index count = std::min(width, source.cols - 2 * first);
  if (source.col_stride == 1 && count == width)
    return load_unaligned(reinterpret_cast<const float*>(from));
  alignas(Arena::alignment) std::uint16_t bits[width] = {};
  for (Index c = 0; c < count; ++c)
    bits[c] = Eigen::numext::bit_cast<std::uint16_t>(from[c * source.col_stride]);
  return load(reinterpret_cast<const float*>(bits));
}

/// Columns of `lanes` whole rows, from `first` on, times `factor`, each to the next `width` numbers;
/// returns how many of them, from the first on, could be taken together.
template <Index width, class Scalar, class Source>
SURFATTN_ALWAYS_INLINE Index pack_whole_columns(MatrixView<const Source> source, Index first,
                                                Packet<Scalar> factor, Scalar* to) {
  Index c = 0;
  const bool is_whole = source.rows - first >= lanes<Scalar>;
  if constexpr (std::is_same_v<Scalar, Source>) {
    for (; is_whole && source.is_stored_by_columns() && c < source.cols; ++c)
      store(to + c * width, multiply(factor, load_unaligned(&source(first, c))));
  }
  if constexpr (std::is_same_v<Scalar, Source> && loaded_columns<Scalar> != 0) {
    constexpr int count = loaded_columns<Scalar>;
    const bool can_load = is_whole && source.col_stride == 1;
    for (; can_load && c + count <= source.cols; c += count) {
      Packet<Scalar> columns[count];
      load_columns(source.row(first) + c, source.row_stride, columns);
      SURFATTN_UNROLL
      for (int i = 0; i < count; ++i) store(to + (c + i) * width, multiply(factor, columns[i]));
    }
  }
  return c;
}

/// source·factor by columns, in panels of `width` rows, a multiple of lanes, the last one padded
/// with zeros: with depth = depth_of(source.cols), row r and element c of its depth go to `to` + r /
/// width·width·depth + c·width + r % width. Where columns cannot be taken together, works in square
/// blocks of packets.
template <Index width, class Element, class Source>
SURFATTN_NEVER_INLINE void pack_columns(MatrixView<const Source> source, sum_t<Element> factor,
                                        Element* to) {
  using Lane = sum_t<Element>;  // as wide as an element
  constexpr Index side = lanes<Element>;
  const auto multiplier = broadcast(factor);
  const Index depth = depth_of<Element>(source.cols);
  for (Index first = 0; first < rounded_up(source.rows, width); first += side) {
    prefetch_rows(source, first + side, side);
    Lane* column = reinterpret_cast<Lane*>(to) + first / width * width * depth + first % width;
    for (Index c = pack_whole_columns<width, Lane>(source, first, multiplier, column); c < depth;
         c += side) {
      SquareBlock<Lane> block;
      for (Index row = 0; row < side; ++row) {
        block[row] = first + row < source.rows
                         ? row_elements<Element>(source, first + row, c, multiplier)
                         : broadcast(Lane(0));
      }
      block.transpose();
      const Index count = std::min(side, depth - c);
      for (Index row = 0; row < count; ++row) store(column + (c + row) * width, block[row]);
    }
  }
}

/// The transpose of `source` as a right operand: depth_of(source.cols) deep, one column for each of
/// its rows.
template <class Element, class Source>
void pack_transposed(MatrixView<const Source> source, Element* to) {
  pack_columns<panel_width<Element>>(source, sum_t<Element>(1), to);
}

/// source·factor as a left operand, by columns; takes `packed_left_size` elements. Pairs are packed
/// as they are, without the factor.
template <class Element, class Source>
void pack_left(MatrixView<const Source> source, sum_t<Element> factor, Element* to) {
  pack_columns<left_width<Element>>(source, factor, to);
}

template <class Element>
constexpr Index packed_left_size(Index rows, Index cols) {
  return rounded_up(rows, left_width<Element>) * depth_of<Element>(cols);
}

/// `rows` rows, from `row` on, of what `pack_left` has packed: from the first of a panel on, or all in
/// one panel.
template <class Element>
ColumnsOperand<Element> packed_left(const Element* packed, Index cols, Index row,
                                    [[maybe_unused]] Index rows) {
  constexpr Index width = left_width<Element>;
  eigen_assert(row % width == 0 || row % width + rows <= width);
  const ColumnsOperand<Element> all{packed, width, width * depth_of<Element>(cols)};
  return {all.from(row), all.stride, all.panel_stride};
}

/// Two rows of bfloat16 as one row of pairs in panels that are `panel_stride` apart; what is null
/// counts as zeros.
inline void pack_pair_of_rows(const Eigen::bfloat16* even, const Eigen::bfloat16* odd, Index cols,
                              Index col_stride, BFloat16Pair* to, Index panel_stride) {
  constexpr Index width = panel_width<BFloat16Pair>;
  const auto bits = [&](const Eigen::bfloat16* row, Index c) -> std::uint32_t {
    return row ? Eigen::numext::bit_cast<std::uint16_t>(row[c * col_stride]) : 0u;
  };
  for (Index first = 0; first < rounded_up(cols, width); first += width, to += panel_stride) {
    const Index count = std::min(width, cols - first);
    for (Index c = 0; c < count; ++c)
      to[c].bits = bits(even, first + c) | bits(odd, first + c) << 16;
    for (Index c = count; c < width; ++c) to[c].bits = 0;
  }
}

/// Whether `rows` hold no infinity and no NaN.
template <class Scalar, class Source>
bool are_finite(MatrixView<const Source> rows) {
  const auto zero = broadcast(Scalar(0));
  auto zeros = zero;  // x·0 is 0 for every finite x and NaN for the others
  for (Index i = 0; i < rows.rows; ++i) {
    for (Index c = 0; c < rows.cols; c += lanes<Scalar>) {
      zeros =
          multiply_add(gather<Scalar>(&rows(i, c), rows.col_stride, rows.cols - c), zero, zeros);
    }
  }
  return sum(zeros) == Scalar(0);
}

/// Calls step(take, c) for every packet of columns from c on, up to `end`, where take(view, row, c) loads
/// it, with zeros beyond the `cols` columns of the view.
template <class Scalar, class Step>
SURFATTN_ALWAYS_INLINE void for_row_packets(bool are_contiguous, Index cols, Index end,
                                            const Step& step) {
  Index c = 0;
  for (; are_contiguous && c + lanes<Scalar> <= cols; c += lanes<Scalar>) {
    step(
        [](const auto& view, Index row, Index col) { return load_as<Scalar>(view.row(row) + col); },
        c);
  }
  for (; c < end; c += lanes<Scalar>) {
    step(
        [](const auto& view, Index row, Index col) {
          return gather<Scalar>(view.row(row) + col * view.col_stride, view.col_stride,
                                view.cols - col);
        },
        c);
  }
}

/// For each of `Rows` rows i, the sum of the lanes of what step(take, i, c, before) makes of 0 from one
/// packet of columns to the next; `take`, `cols` and `end` as above.
template <int Rows, class Scalar, class Step>
SURFATTN_ALWAYS_INLINE void row_sums(bool are_contiguous, Index cols, Index end, Scalar* to,
                                     const Step& step) {
  Packet<Scalar> sums[Rows];
  for (auto& packet : sums) packet = broadcast(Scalar(0));
  for_row_packets<Scalar>(are_contiguous, cols, end, [&](const auto& take, Index c) {
    SURFATTN_UNROLL
    for (int i = 0; i < Rows; ++i) sums[i] = step(take, i, c, sums[i]);
  });
  store_sums<Scalar>(to, sums);
}

/// Calls use(first, count) with 4 or 1, as a constant, for runs of rows that make up all `rows`.
template <class Use>
SURFATTN_ALWAYS_INLINE void for_runs_of_rows(Index rows, const Use& use) {
  Index i = 0;
  for (; i + 4 <= rows; i += 4) use(i, std::integral_constant<int, 4>());
  for (; i < rows; ++i) use(i, std::integral_constant<int, 1>());
}

/// a·b for each of the rows of both: the same bits for a row alone as among others.
template <class Scalar, class Source>
SURFATTN_NEVER_INLINE void row_products(MatrixView<const Source> a, MatrixView<const Source> b,
                                        Scalar* to) {
  const bool are_contiguous = a.col_stride == 1 && b.col_stride == 1;
  for_runs_of_rows(a.rows, [&]<int Rows>(Index first, std::integral_constant<int, Rows>) {
    row_sums<Rows>(are_contiguous, a.cols, a.cols, to + first,
                   [&](const auto& take, int i, Index c, const Packet<Scalar>& before) {
                     return multiply_add(take(a, first + i, c), take(b, first + i, c), before);
                   });
  });
}

/// ‖row‖² of each row of `source`, the bits of its product with itself.
template <class Scalar, class Source>
SURFATTN_NEVER_INLINE void squared_norms(MatrixView<const Source> source, Scalar* to) {
  for_contiguous_rows(source, [&](const MatrixView<const Source>& rows, Index start) {
    for_runs_of_rows(rows.rows, [&]<int Rows>(Index first, std::integral_constant<int, Rows>) {
      row_sums<Rows>(rows.col_stride == 1, rows.cols, rows.cols, to + start + first,
                     [&](const auto& take, int i, Index c, const Packet<Scalar>& before) {
                       const auto x = take(rows, first + i, c);
                       return multiply_add(x, x, before);
                     });
    });
  });
}

/// The rows of `source` as a right operand of pairs, rows 2k and 2k + 1 in one: depth =
/// depth_of(source.rows). Rows that are not finite become zeros and are listed. Writes ‖row‖² of all
/// rows to `norms` too, unless that is null.
inline SURFATTN_NEVER_INLINE void pack_panels(MatrixView<const Eigen::bfloat16> source, float,
                                              BFloat16Pair* to, Index panel_stride,
                                              NonFiniteRows& non_finite, float* norms = nullptr) {
  if (norms) squared_norms(source, norms);
  non_finite.count = 0;
  const auto finite_row = [&](Index k) -> const Eigen::bfloat16* {
    if (k >= source.rows) return nullptr;
    if (are_finite<float>(source.block_rows(k, 1))) return source.row(k);
    non_finite.rows[non_finite.count++] = k;
    return nullptr;
  };
  for (Index k = 0; k < source.rows; k += 2, to += panel_width<BFloat16Pair>) {
    const auto* even = finite_row(k);
    const auto* odd = finite_row(k + 1);
    pack_pair_of_rows(even, odd, source.cols, source.col_stride, to, panel_stride);
  }
}

/// `Rows` rows of source·factor, from `first` on, into rows of panels, and the squared norms of the rows
/// of `source`.
template <int Rows, class Scalar, class Source>
SURFATTN_ALWAYS_INLINE void pack_panel_rows(MatrixView<const Source> source, Index first,
                                            Scalar factor, Scalar* to, Index panel_stride,
                                            Scalar* norms) {
  constexpr Index width = panel_width<Scalar>;
  const auto multiplier = broadcast(factor);
  row_sums<Rows>(source.col_stride == 1, source.cols, padded<Scalar>(source.cols), norms,
                 [&](const auto& take, int i, Index c, const Packet<Scalar>& before) {
                   const auto x = take(source, first + i, c);
                   store(to + c / width * panel_stride + i * width + c % width,
                         multiply(multiplier, x));
                   return multiply_add(x, x, before);
                 });
}

/// Makes one row of panels zeros if it is not finite, and says whether it was not.
template <class Scalar>
bool drop_if_not_finite(Scalar* row, Index cols, Index panel_stride) {
  const auto at = [&](Index c) {
    return row + c / panel_width<Scalar> * panel_stride + c % panel_width<Scalar>;
  };
  bool is_finite = true;
  for (Index c = 0; c < padded<Scalar>(cols); ++c) is_finite = is_finite && (std::isfinite)(*at(c));
  for (Index c = 0; !is_finite && c < padded<Scalar>(cols); ++c) *at(c) = Scalar(0);
  return !is_finite;
}

/// source·factor as a right operand: depth = source.rows. Row k of panel p goes to `to` +
/// p·panel_stride + k·panel_width. Rows that are not finite become zeros and are listed. Writes
/// ‖row‖² of all rows of `source` to `norms` too, unless that is null.
///
/// A row whose norm is finite, scaled, is finite itself; others are looked at one by one.
template <class Scalar, class Source>
SURFATTN_NEVER_INLINE void pack_panels(MatrixView<const Source> source, Scalar factor, Scalar* to,
                                       Index panel_stride, NonFiniteRows& non_finite,
                                       Scalar* norms = nullptr) {
  non_finite.count = 0;
  for_contiguous_rows(source, [&](const MatrixView<const Source>& rows, Index start) {
    for_runs_of_rows(rows.rows, [&]<int Rows>(Index row, std::integral_constant<int, Rows>) {
      prefetch_rows(rows, row + prefetch_distance, Rows);
      const Index first = start + row;
      Scalar* const packed = to + first * panel_width<Scalar>;
      Scalar some[Rows];
      Scalar* const squares = norms ? norms + first : some;
      pack_panel_rows<Rows>(rows, row, factor, packed, panel_stride, squares);
      for (Index i = 0; i < Rows; ++i) {
        if (squares[i] * factor * factor <= std::numeric_limits<Scalar>::max()) continue;
        if (drop_if_not_finite(packed + i * panel_width<Scalar>, rows.cols, panel_stride))
          non_finite.rows[non_finite.count++] = first + i;
      }
    });
  });
}

/// An entry of a result, set to a number or added to.
template <Store mode, class Scalar, class Result>
SURFATTN_ALWAYS_INLINE void write_entry(Scalar number, Result& entry) {
  entry = static_cast<Result>(mode == Store::set ? number : static_cast<Scalar>(entry) + number);
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
  for (; c < to.cols; ++c) write_entry<mode>(factor * from[c], out[c * to.col_stride]);
}

/// `to.rows` rows of a result, set to factor(i)·from or added to, from rows that are `stride` apart. A
/// result that is stored by columns is written by columns, a line of each at a time.
template <Store mode, class Scalar, class Result, class Factor>
void write_rows(const Scalar* from, Index stride, MatrixView<Result> to, const Factor& factor) {
  if (!to.is_stored_by_columns()) {
    for (Index i = 0; i < to.rows; ++i) write_row<mode>(from + i * stride, factor(i), to, i);
    return;
  }
  constexpr Index most = line<Result>;
  Scalar factors[most];
  for (Index first = 0; first < to.rows; first += most) {
    const Index count = std::min(most, to.rows - first);
    for (Index i = 0; i < count; ++i) factors[i] = factor(first + i);
    for (Index c = 0; c < to.cols; ++c) {
      for (Index i = 0; i < count; ++i)
        write_entry<mode>(factors[i] * from[(first + i) * stride + c], to(first + i, c));
    }
  }
}

/// The same without a factor.
template <Store mode, class Scalar, class Result>
void write_rows(const Scalar* from, Index stride, MatrixView<Result> to) {
  write_rows<mode>(from, stride, to, [](Index) { return Scalar(1); });
}

/// Σ_ij a_ij·(b_ij − origin_j), where a zero in `a` (a query that took no part) hides whatever
/// stands in `b`. `origin` is one row.
template <class Scalar, class Source>
Scalar sum_of_products(MatrixView<const Scalar> a, MatrixView<const Source> b,
                       MatrixView<const Source> origin) {
  auto total = broadcast(Scalar(0));
  const bool are_contiguous = a.col_stride == 1 && b.col_stride == 1 && origin.col_stride == 1;
  for (Index i = 0; i < a.rows; ++i) {
    auto products = broadcast(Scalar(0));  // of one row, so that rows do not wait for each other
    for_row_packets<Scalar>(are_contiguous, a.cols, a.cols, [&](const auto& take, Index c) {
      const auto x = take(a, i, c);
      const auto product = multiply(x, subtract(take(b, i, c), take(origin, 0, c)));
      products = add(products, zero_where_zero<Scalar>(x, product));
    });
    total = add(total, products);
  }
  return sum(total);
}

/// Σ_i weight(i)·‖row i − origin‖² over the rows of `source` whose weight is not 0; `origin` is one
/// row.
template <class Scalar, class Source, class Weight>
Scalar sum_of_squared_distances(MatrixView<const Source> source, MatrixView<const Source> origin,
                                const Weight& weight) {
  auto total = broadcast(Scalar(0));
  for (Index i = 0; i < source.rows; ++i) {
    const Scalar factor = weight(i);
    if (factor == Scalar(0)) continue;
    auto squares = broadcast(Scalar(0));
    for (Index c = 0; c < source.cols; c += lanes<Scalar>) {
      const auto difference =
          subtract(gather<Scalar>(&source(i, c), source.col_stride, source.cols - c),
                   gather<Scalar>(&origin(0, c), origin.col_stride, source.cols - c));
      squares = multiply_add(difference, difference, squares);
    }
    total = multiply_add(broadcast(factor), squares, total);
  }
  return sum(total);
}

}  // namespace surfattn::detail::simd
