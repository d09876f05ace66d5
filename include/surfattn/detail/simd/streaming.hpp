// surfattn layer 2: products with rows as they lie in memory, for few queries

#pragma once

#include <algorithm>
#include <surfattn/detail/simd/packing.hpp>
#include <surfattn/detail/simd/row_operations.hpp>
#include <surfattn/detail/simd/tile_products.hpp>
#include <surfattn/detail/view.hpp>
#include <type_traits>

/// With few queries, every key and value is used a few times only and packing it would cost more
/// than using it. These functions read each row once, from memory, in its natural layout.
namespace surfattn::detail::simd {

/// sums_ij += q_i·k_j over the columns [first, first + lanes) of packed queries and of rows of
/// keys, the latter as `take(j)` reads them.
template <int Rows, int Keys, class Scalar, class Take>
SURFATTN_ALWAYS_INLINE void add_dot_step(RowsOperand<Scalar> q, Index first,
                                         Packet<Scalar> (&sums)[Rows][Keys], const Take& take) {
  Packet<Scalar> key[Keys];
  SURFATTN_UNROLL
  for (int j = 0; j < Keys; ++j) key[j] = take(j);
  SURFATTN_UNROLL
  for (int i = 0; i < Rows; ++i) {
    const auto query = load(q.data + i * q.stride + first);
    SURFATTN_UNROLL
    for (int j = 0; j < Keys; ++j) sums[i][j] = multiply_add(query, key[j], sums[i][j]);
  }
}

/// out_ij = q_i·k_j for `Rows` packed queries and `Keys` rows of keys.
template <int Rows, int Keys, class Scalar, class Source>
SURFATTN_ALWAYS_INLINE void dot_block(RowsOperand<Scalar> q, MatrixView<const Source> keys,
                                      Tile<Scalar> out) {
  Packet<Scalar> sums[Rows][Keys];
  SURFATTN_UNROLL
  for (int i = 0; i < Rows; ++i) {
    SURFATTN_UNROLL
    for (int j = 0; j < Keys; ++j) sums[i][j] = broadcast(Scalar(0));
  }
  Index c = 0;
  if constexpr (std::is_same_v<Scalar, Source>) {
    for (; keys.col_stride == 1 && c + lanes<Scalar> <= keys.cols; c += lanes<Scalar>) {
      add_dot_step<Rows, Keys>(q, c, sums,
                               [&](Index j) { return load_unaligned(keys.row(j) + c); });
    }
  }
  for (; c < keys.cols; c += lanes<Scalar>) {
    add_dot_step<Rows, Keys>(q, c, sums, [&](Index j) {
      return gather<Scalar>(&keys(j, c), keys.col_stride, keys.cols - c);
    });
  }
  SURFATTN_UNROLL
  for (int i = 0; i < Rows; ++i) {
    SURFATTN_UNROLL
    for (int j = 0; j < Keys; ++j) out.data[i * out.row_stride + j] = sum(sums[i][j]);
  }
}

/// All `rows` queries against `Keys` rows of keys, in steps of `Rows` and then of half as many.
template <int Rows, int Keys, class Scalar, class Source>
SURFATTN_ALWAYS_INLINE void dot_column(Index rows, RowsOperand<Scalar> q,
                                       MatrixView<const Source> keys, Tile<Scalar> out) {
  for (; rows >= Rows; rows -= Rows) {
    dot_block<Rows, Keys>(q, keys, out);
    q.data += Rows * q.stride;
    out.data += Rows * out.row_stride;
  }
  if constexpr (Rows > 1) {
    if (rows > 0) dot_column<Rows / 2, Keys>(rows, q, keys, out);
  }
}

/// C = Q·Kᵀ + bias, the bias one number for each key: Q packed (rows padded with zeros), K the rows of an input as they lie.
template <class Scalar, class Source>
void set_dot_products(Index rows, RowsOperand<Scalar> q, MatrixView<const Source> keys,
                      Tile<Scalar> c, const Scalar* bias) {
  constexpr Index step = 4;
  Index j = 0;
  for (; j + step <= keys.rows; j += step) {
    prefetch_rows(keys, j + prefetch_distance, step);
    dot_column<4, step>(rows, q, keys.block_rows(j, step), {c.data + j, c.row_stride});
  }
  for (; j < keys.rows; ++j)
    dot_column<4, 1>(rows, q, keys.block_rows(j, 1), {c.data + j, c.row_stride});
  for (Index i = 0; i < rows; ++i) add_row(bias, c.data + i * c.row_stride, keys.rows);
}

/// Whether the rows of `source` can be the panels of a right operand as they lie: contiguous, whole
/// panels wide and finite.
template <class Scalar>
bool are_panels(MatrixView<const Scalar> source) {
  if (source.col_stride != 1 || source.cols % panel_width<Scalar> != 0) return false;
  const auto zero = broadcast(Scalar(0));
  Packet<Scalar> zeros[panel_packets];  // x·0 is 0 for every finite x and NaN for the others
  for (auto& packet : zeros) packet = zero;
  for (Index i = 0; i < source.rows; ++i) {
    prefetch_rows(source, i + prefetch_distance, 1);
    const Scalar* row = source.row(i);
    for (Index c = 0; c < source.cols; c += panel_width<Scalar>) {
      SURFATTN_UNROLL
      for (int p = 0; p < panel_packets; ++p) {
        zeros[p] = multiply_add(load_unaligned(row + c + p * lanes<Scalar>), zero, zeros[p]);
      }
    }
  }
  return sum(add(zeros[0], zeros[1])) == Scalar(0);
}

}  // namespace surfattn::detail::simd
