// surfattn layer 2: what terms do to the rows of score tiles

#pragma once

#include <cstdint>
#include <surfattn/detail/simd/packing.hpp>
#include <surfattn/detail/simd/row_operations.hpp>
#include <surfattn/detail/simd/tanh.hpp>
#include <surfattn/detail/view.hpp>

namespace surfattn::detail::simd {

/// row ← cap·tanh(row/cap) over a whole number of panels, and `derivatives` ← 1 − tanh²(row/cap).
template <bool with_derivatives, class Scalar>
void soft_cap_row(Scalar* row, Scalar cap, Scalar* derivatives, Index count) {
  const auto factor = broadcast(cap), inverse = broadcast(1 / cap), one = broadcast(Scalar(1));
  for (Index j = 0; j < count; j += lanes<Scalar>) {
    const auto t = tanh<Scalar>(multiply(load(row + j), inverse));
    store(row + j, multiply(factor, t));
    if constexpr (with_derivatives) store(derivatives + j, multiply(subtract(one, t), add(one, t)));
  }
}

/// row_j ← value where byte j is 0 and not 1, for `count` numbers.
template <class Scalar>
void hide_in_row(const std::uint8_t* bytes, Scalar value, Scalar* row, Index count) {
  const auto hidden = broadcast(value);
  Index j = 0;
  for (; j + lanes<Scalar> <= count; j += lanes<Scalar>)
    store_unaligned(row + j, select<Scalar>(bytes + j, load_unaligned(row + j), hidden));
  for (; j < count; ++j) row[j] = bytes[j] ? row[j] : value;
}

/// row ← row + addend over a whole number of panels.
template <class Scalar>
void add_to_row(Scalar* row, Scalar addend, Index count) {
  const auto packet = broadcast(addend);
  for (Index j = 0; j < count; j += lanes<Scalar>) store(row + j, add(load(row + j), packet));
}

/// row ← row∘factors over a whole number of panels, where a zero in the row hides whatever stands
/// in `factors`.
template <class Scalar>
void multiply_where_not_zero(const Scalar* factors, Scalar* row, Index count) {
  for (Index j = 0; j < count; j += lanes<Scalar>) {
    const auto x = load(row + j);
    store(row + j, zero_where_zero<Scalar>(x, multiply(x, load(factors + j))));
  }
}

/// row ← row∘factors, where a zero in `factors` hides whatever stands in the row.
template <class Scalar>
void select_and_multiply(const Scalar* factors, Scalar* row, Index count) {
  for (Index j = 0; j < count; j += lanes<Scalar>) {
    const auto f = load(factors + j);
    store(row + j, zero_where_zero<Scalar>(f, multiply(f, load(row + j))));
  }
}

/// Σ row∘factors over `count` numbers, where a zero in the row hides whatever stands in `factors`.
template <class Scalar>
Scalar sum_of_row_products(const Scalar* row, const Scalar* factors, Index count) {
  auto total = broadcast(Scalar(0));
  Index j = 0;
  for (; j + lanes<Scalar> <= count; j += lanes<Scalar>) {
    const auto x = load(row + j);
    total = add(total, zero_where_zero<Scalar>(x, multiply(x, load(factors + j))));
  }
  Scalar rest(0);
  for (; j < count; ++j) rest += row[j] == Scalar(0) ? Scalar(0) : row[j] * factors[j];
  return sum(total) + rest;
}

/// Σ row over `count` numbers.
template <class Scalar>
Scalar row_sum(const Scalar* row, Index count) {
  auto total = broadcast(Scalar(0));
  Index j = 0;
  for (; j + lanes<Scalar> <= count; j += lanes<Scalar>) total = add(total, load(row + j));
  Scalar rest(0);
  for (; j < count; ++j) rest += row[j];
  return sum(total) + rest;
}

/// row_j ← row_j + factor·source_j for `count` numbers that lie `stride` apart.
template <class Scalar, class Source>
void add_scaled_source(const Source* source, Index stride, Scalar factor, Scalar* row,
                       Index count) {
  Index j = 0;
  const auto multiplier = broadcast(factor);
  for (; stride == 1 && j + lanes<Scalar> <= count; j += lanes<Scalar>)
    store(row + j, multiply_add(load_as<Scalar>(source + j), multiplier, load(row + j)));
  for (; j < count; ++j) row[j] += factor * static_cast<Scalar>(source[j * stride]);
}

/// rows ← rows + factor·source. A source that is stored by columns is read by columns; one line of each
/// row, which takes the sums of several columns, stays in the first-level cache.
template <class Scalar, class Source>
void add_scaled_source(MatrixView<const Source> source, Scalar factor, Tile<Scalar> rows) {
  if (!source.is_stored_by_columns()) {
    for (Index i = 0; i < source.rows; ++i)
      add_scaled_source(source.row(i), source.col_stride, factor, rows.from(i).data, source.cols);
    return;
  }
  for (Index j = 0; j < source.cols; ++j) {
    const Source* const column = &source(0, j);
    for (Index i = 0; i < source.rows; ++i)
      rows.from(i).data[j] += factor * static_cast<Scalar>(column[i]);
  }
}

/// target_j ← target_j + row_j, or row_j alone, for `count` numbers that lie `stride` apart.
template <Store mode, class Scalar, class Target>
void store_row(const Scalar* row, Target* target, Index stride, Index count) {
  Index j = 0;
  for (; stride == 1 && j + lanes<Scalar> <= count; j += lanes<Scalar>) {
    const auto x = load(row + j);
    store_as<Scalar>(target + j, mode == Store::set ? x : add(load_as<Scalar>(target + j), x));
  }
  for (; j < count; ++j) write_entry<mode>(row[j], target[j * stride]);
}

}  // namespace surfattn::detail::simd
