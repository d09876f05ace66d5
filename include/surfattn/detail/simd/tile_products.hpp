// surfattn layer 2: products of small tiles, C = A·B and C += A·B, with the accumulators in
// registers

#pragma once

#include <surfattn/detail/simd/packet.hpp>

namespace surfattn::detail::simd {

/// Packets side by side in one panel.
inline constexpr int panel_packets = 2;

/// Columns of one panel of a right operand.
template <class Scalar>
inline constexpr Index panel_width = lanes<Scalar>* panel_packets;

/// Rows of C that one kernel holds in registers: rows · panel_packets accumulators, one row of the
/// panel and one broadcast must fit.
inline constexpr int kernel_rows = registers >= 32 ? 8 : 4;

template <class Scalar>
constexpr Index padded(Index cols) {
  return (cols + panel_width<Scalar> - 1) / panel_width<Scalar> * panel_width<Scalar>;
}

/// A: element (i, k) is data[i·row_stride + k·depth_stride]. Strides (1, s) read a row-major tile
/// as its transpose.
template <class Scalar>
struct LeftOperand {
  const Scalar* data;
  Index row_stride;
  Index depth_stride;
};

/// B, cut into panels of `panel_width` columns: row k of panel p is contiguous at data +
/// p·panel_stride + k·row_stride. Packed panels are zero-padded and one row follows the other; rows
/// of an input that are contiguous and whole panels wide are panels as they lie.
template <class Scalar>
struct Panels {
  const Scalar* data;
  Index panel_stride;
  Index row_stride = panel_width<Scalar>;
};

/// C: row-major and aligned, its rows padded to whole panels.
template <class Scalar>
struct Tile {
  Scalar* data;
  Index row_stride;
};

/// The accumulators of `Rows` rows of C in one panel.
template <int Rows, class Scalar>
struct Accumulators {
  Packet<Scalar> at[Rows][panel_packets];

  /// Every row starts as `bias`, or as 0 where there is none.
  SURFATTN_ALWAYS_INLINE void start(const Scalar* bias) {
    SURFATTN_UNROLL
    for (int p = 0; p < panel_packets; ++p) {
      const auto first = bias ? load(bias + p * lanes<Scalar>) : broadcast(Scalar(0));
      SURFATTN_UNROLL
      for (int i = 0; i < Rows; ++i) at[i][p] = first;
    }
  }

  SURFATTN_ALWAYS_INLINE void load_from(const Tile<Scalar>& c) {
    SURFATTN_UNROLL
    for (int i = 0; i < Rows; ++i) {
      SURFATTN_UNROLL
      for (int p = 0; p < panel_packets; ++p)
        at[i][p] = load(c.data + i * c.row_stride + p * lanes<Scalar>);
    }
  }

  SURFATTN_ALWAYS_INLINE void store_to(const Tile<Scalar>& c) const {
    SURFATTN_UNROLL
    for (int i = 0; i < Rows; ++i) {
      SURFATTN_UNROLL
      for (int p = 0; p < panel_packets; ++p)
        store(c.data + i * c.row_stride + p * lanes<Scalar>, at[i][p]);
    }
  }

  /// at += a·b over the whole depth.
  SURFATTN_ALWAYS_INLINE void add_product(Index depth, LeftOperand<Scalar> a, const Scalar* b,
                                          Index b_stride) {
    for (Index k = 0; k < depth; ++k, a.data += a.depth_stride, b += b_stride) {
      Packet<Scalar> row[panel_packets];
      SURFATTN_UNROLL
      for (int p = 0; p < panel_packets; ++p) row[p] = load_unaligned(b + p * lanes<Scalar>);
      SURFATTN_UNROLL
      for (int i = 0; i < Rows; ++i) {
        const auto factor = broadcast(a.data[i * a.row_stride]);
        SURFATTN_UNROLL
        for (int p = 0; p < panel_packets; ++p) at[i][p] = multiply_add(factor, row[p], at[i][p]);
      }
    }
  }
};

enum class Store { set, add };

/// `Rows` rows of one panel of C = bias + A·B (Store::set) or C += A·B (Store::add).
template <int Rows, Store store, class Scalar>
SURFATTN_ALWAYS_INLINE void panel_rows(Index depth, LeftOperand<Scalar> a, Panels<Scalar> b,
                                       Tile<Scalar> c, const Scalar* bias) {
  Accumulators<Rows, Scalar> accumulators;
  if constexpr (store == Store::set) {
    accumulators.start(bias);
  } else {
    accumulators.load_from(c);
  }
  accumulators.add_product(depth, a, b.data, b.row_stride);
  accumulators.store_to(c);
}

/// Goes down the rows of one panel in steps of `Rows`, and what remains in steps of half as many.
template <int Rows, Store store, class Scalar>
SURFATTN_ALWAYS_INLINE void panel(Index rows, Index depth, LeftOperand<Scalar> a, Panels<Scalar> b,
                                  Tile<Scalar> c, const Scalar* bias) {
  while (rows >= Rows) {
    panel_rows<Rows, store>(depth, a, b, c, bias);
    a.data += Rows * a.row_stride;
    c.data += Rows * c.row_stride;
    rows -= Rows;
  }
  if constexpr (Rows > 1) {
    if (rows > 0) panel<Rows / 2, store>(rows, depth, a, b, c, bias);
  }
}

template <Store store, class Scalar>
void product(Index rows, Index cols, Index depth, LeftOperand<Scalar> a, Panels<Scalar> b,
             Tile<Scalar> c, const Scalar* bias = nullptr) {
  for (Index first = 0; first < cols; first += panel_width<Scalar>) {
    panel<kernel_rows, store>(rows, depth, a, b, c, bias);
    b.data += b.panel_stride;
    c.data += panel_width<Scalar>;
    if (bias) bias += panel_width<Scalar>;
  }
}

/// C = A·B, or bias + A·B where there is a bias, one number for each column: for `rows` rows of A
/// and C and the whole panels that hold `cols` columns of B.
template <class Scalar>
void set_product(Index rows, Index cols, Index depth, LeftOperand<Scalar> a, Panels<Scalar> b,
                 Tile<Scalar> c, const Scalar* bias = nullptr) {
  product<Store::set>(rows, cols, depth, a, b, c, bias);
}

/// C += A·B, likewise.
template <class Scalar>
void add_product(Index rows, Index cols, Index depth, LeftOperand<Scalar> a, Panels<Scalar> b,
                 Tile<Scalar> c) {
  product<Store::add>(rows, cols, depth, a, b, c);
}

}  // namespace surfattn::detail::simd
