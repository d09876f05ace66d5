// surfattn layer 2: products of small tiles, C = A·B and C += A·B, with the accumulators in
// registers

#pragma once

#include <algorithm>
#include <numeric>
#include <surfattn/detail/simd/packet.hpp>
#include <type_traits>

namespace surfattn::detail::simd {

/// Packets side by side in one panel.
inline constexpr int panel_packets = 2;

/// Columns of one panel of a right operand.
template <class Scalar>
inline constexpr Index panel_width = lanes<Scalar>* panel_packets;

/// Rows of C that one kernel holds in registers: rows · panel_packets accumulators, one row of the
/// panel and one broadcast must fit.
inline constexpr int kernel_rows = registers >= 32 ? 8 : 6;

constexpr Index rounded_up(Index count, Index multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

template <class Scalar>
constexpr Index padded(Index cols) {
  return rounded_up(cols, panel_width<Scalar>);
}

/// Rows of one panel of a left operand that is packed by columns: whole packets and whole kernels.
template <class Scalar>
inline constexpr Index left_width = std::lcm(lanes<Scalar>, Index(kernel_rows));

/// A, row by row: element (i, k) is data[i·stride + k].
template <class Scalar>
struct RowsOperand {
  const Scalar* data;
  Index stride;

  const Scalar* from(Index row) const { return data + row * stride; }
  static constexpr Index depth_stride() { return 1; }
  SURFATTN_ALWAYS_INLINE auto factor(const Scalar* step, int row) const {
    return broadcast(step[row * stride]);
  }
};

/// A, column by column, in panels of `left_width` rows: row i % left_width of panel i / left_width
/// and column k is data[i / left_width·panel_stride + i % left_width + k·stride]. The numbers that a
/// kernel takes at a time lie side by side.
template <class Scalar>
struct ColumnsOperand {
  const Scalar* data;
  Index stride;
  Index panel_stride;

  const Scalar* from(Index row) const {
    return data + row / left_width<Scalar> * panel_stride + row % left_width<Scalar>;
  }
  Index depth_stride() const { return stride; }
  SURFATTN_ALWAYS_INLINE auto factor(const Scalar* step, int row) const {
    return broadcast(step[row]);
  }
};

/// Steps along the depth for which a left operand is spread at a time: what it then takes, 12 KiB,
/// stays in a first-level cache beside a panel.
inline constexpr Index spread_depth = 128;

/// `Rows` rows of A, each number spread over a packet: element (i, k) is the packet at data +
/// (k·Rows + i)·lanes.
template <int Rows, class Scalar>
struct SpreadOperand {
  const Scalar* data;

  const Scalar* from(Index) const { return data; }
  static constexpr Index depth_stride() { return Rows * lanes<Scalar>; }
  SURFATTN_ALWAYS_INLINE auto factor(const Scalar* step, int row) const {
    return in_register(load(step + row * lanes<Scalar>));
  }
};

/// The same numbers as `Left`, which it spreads to `to` in the order in which they are asked for.
template <class Left, class Scalar>
struct SpreadingOperand {
  const Left& left;
  Scalar* to;

  const Scalar* from(Index row) const { return left.from(row); }
  Index depth_stride() const { return left.depth_stride(); }
  SURFATTN_ALWAYS_INLINE auto factor(const Scalar* step, int row) {
    const auto packet = left.factor(step, row);
    store(to, packet);
    to += lanes<Scalar>;
    return packet;
  }
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

  Tile from(Index row) const { return {data + row * row_stride, row_stride}; }
};

enum class Store { set, add };

/// The accumulators of `Rows` rows of C in one panel, or in the first packet of it.
template <int Rows, int Packets, class Element>
struct Accumulators {
  using Sum = sum_t<Element>;

  Packet<Sum> at[Rows][Packets];

  /// Every row starts as `bias`, or as 0 where there is none.
  SURFATTN_ALWAYS_INLINE void start(const Sum* bias) {
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p) {
      const auto first = bias ? load(bias + p * lanes<Sum>) : broadcast(Sum(0));
      SURFATTN_UNROLL
      for (int i = 0; i < Rows; ++i) at[i][p] = first;
    }
  }

  SURFATTN_ALWAYS_INLINE void load_from(const Tile<Sum>& c) {
    SURFATTN_UNROLL
    for (int i = 0; i < Rows; ++i) {
      SURFATTN_UNROLL
      for (int p = 0; p < Packets; ++p) at[i][p] = load(c.data + i * c.row_stride + p * lanes<Sum>);
    }
  }

  SURFATTN_ALWAYS_INLINE void store_to(const Tile<Sum>& c) const {
    SURFATTN_UNROLL
    for (int i = 0; i < Rows; ++i) {
      SURFATTN_UNROLL
      for (int p = 0; p < Packets; ++p) store(c.data + i * c.row_stride + p * lanes<Sum>, at[i][p]);
    }
  }

  /// at ← factor·at + bias
  SURFATTN_ALWAYS_INLINE void scale(Sum factor, const Sum* bias) {
    const auto multiplier = broadcast(factor);
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p) {
      const auto addend = bias ? load(bias + p * lanes<Sum>) : broadcast(Sum(0));
      SURFATTN_UNROLL
      for (int i = 0; i < Rows; ++i) at[i][p] = multiply_add(at[i][p], multiplier, addend);
    }
  }

  /// at += a·b over the whole depth, for the rows of A from `a` on. Full kernels take several steps to a
  /// turn of the loop: a core that another thread shares fetches instructions every other cycle, and turns
  /// of one step are then short of them, by a tenth. Finished products, whose depth is that of a head, take
  /// so many that the processor foresees the end of the loop: 2 % for 64. With 16 registers never more than
  /// two beside each other, where compilers mix the instructions of all.
  template <Store store, class Left, class Finishing>
  SURFATTN_ALWAYS_INLINE void add_product(Index depth, Left left, const Element* a,
                                          const Element* b, Index b_stride, Finishing& finish) {
    const auto step = [&] {
      add_step(left, a, b);
      a += left.depth_stride(), b += b_stride;
    };
    if constexpr (Rows == kernel_rows && registers >= 32) {
      for (constexpr Index turn = store == Store::set ? 4 : 2; depth >= turn; depth -= turn) {
        finish.work();
        SURFATTN_UNROLL
        for (Index k = 0; k < turn; ++k) step();
      }
    } else if constexpr (Rows == kernel_rows) {
      for (constexpr Index turn = 8; depth >= turn; depth -= turn) {
        finish.work();
        SURFATTN_UNROLL_TWICE
        for (Index k = 0; k < turn; ++k) step();
      }
    }
    for (; depth > 0; --depth) step();
  }

  template <class Left>
  SURFATTN_ALWAYS_INLINE void add_step(Left& left, const Element* a, const Element* b) {
    using Operand = decltype(load_unaligned(b));
    Operand row[Packets];
    SURFATTN_UNROLL
    for (int p = 0; p < Packets; ++p) row[p] = load_unaligned(b + p * lanes<Element>);
    SURFATTN_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const auto factor = left.factor(a, i);
      SURFATTN_UNROLL
      for (int p = 0; p < Packets; ++p) at[i][p] = multiply_add(factor, row[p], at[i][p]);
    }
  }
};

/// What becomes of a product: it is stored, as factor·A·B + bias, the bias one number for each column or
/// none. The factor counts for pairs alone; other operands have it packed into them, where it costs
/// nothing.
///
/// Another finish may take whole kernels of rows only, and leave work for later: a product asks for a
/// piece of it every few steps, and for all that is left at its end.
template <class Element>
struct Finish {
  using Sum = sum_t<Element>;
  static constexpr bool whole_kernels = false, has_factor = !std::is_same_v<Element, Sum>;

  const Sum* bias = nullptr;
  Sum factor{1};

  /// What sums begin with.
  SURFATTN_ALWAYS_INLINE const Sum* start() const { return has_factor ? nullptr : bias; }

  /// The rows from `row` on.
  template <int Rows, int Packets>
  SURFATTN_ALWAYS_INLINE void take(Index, Accumulators<Rows, Packets, Element>& product,
                                   const Tile<Sum>& c) const {
    if constexpr (has_factor) product.scale(factor, bias);
    product.store_to(c);
  }

  SURFATTN_ALWAYS_INLINE void work() const {}
  SURFATTN_ALWAYS_INLINE void complete() const {}
  SURFATTN_ALWAYS_INLINE void to_next_panel() {
    if (bias) bias += panel_width<Element>;
  }
};

template <class Element, class Finishing>
SURFATTN_ALWAYS_INLINE void to_next_panel(Panels<Element>& b, Tile<sum_t<Element>>& c,
                                          Finishing& finish) {
  b.data += b.panel_stride;
  c.data += panel_width<Element>;
  finish.to_next_panel();
}

/// `Rows` rows, from `row` on, of `Packets` packets of one panel of a finished product (Store::set) or
/// of C += A·B (Store::add).
template <int Rows, int Packets, Store store, class Left, class Element, class Finishing>
SURFATTN_ALWAYS_INLINE void panel_rows(Index row, Index depth, const Left& a, Panels<Element> b,
                                       Tile<sum_t<Element>> c, Finishing& finish) {
  c = c.from(row);
  Accumulators<Rows, Packets, Element> accumulators;
  if constexpr (store == Store::add) {
    accumulators.load_from(c);
  } else {
    accumulators.start(finish.start());
  }
  accumulators.template add_product<store>(depth, a, a.from(row), b.data, b.row_stride, finish);
  if constexpr (store == Store::add) {
    accumulators.store_to(c);
  } else {
    finish.take(row, accumulators, c);
  }
}

/// `Rows` rows, from `row` on, of all panels: the first spreads the numbers of A for the others.
template <int Rows, Store store, class Left, class Element, class Finishing>
SURFATTN_ALWAYS_INLINE void spread_rows(Index row, Index cols, Index depth, const Left& a,
                                        Panels<Element> b, Tile<Element> c, Finishing finish) {
  alignas(64) Element spread[spread_depth * Rows * lanes<Element>];
  panel_rows<Rows, panel_packets, store>(row, depth, SpreadingOperand<Left, Element>{a, spread}, b,
                                         c, finish);
  for (Index first = panel_width<Element>; first < cols; first += panel_width<Element>) {
    to_next_panel(b, c, finish);
    panel_rows<Rows, panel_packets, store>(row, depth, SpreadOperand<Rows, Element>{spread}, b, c,
                                           finish);
  }
}

/// Goes down the rows of one panel, or, where A is spread, of all panels, from `row` on in steps of
/// `Rows`, and what remains in steps of half as many. `cols` columns are left, from this panel on.
template <int Rows, Store store, class Left, class Element, class Finishing>
SURFATTN_ALWAYS_INLINE void panel(Index row, Index rows, Index cols, Index depth, const Left& a,
                                  Panels<Element> b, Tile<sum_t<Element>> c, Finishing& finish) {
  constexpr bool spreads = broadcasts_by_shuffling<Element>;
  const auto step = [&]<int Packets>(std::integral_constant<int, Packets>) {
    panel_rows<Rows, Packets, store>(row, depth, a, b, c, finish);
    row += Rows;
  };
  // To what pads the columns of a sum nothing needs adding. Not for the rows that remain: kernels for
  // these would take longer to compile than they save.
  if constexpr (store == Store::add && Rows == kernel_rows && !spreads) {
    if (cols <= lanes<Element>) {
      while (row + Rows <= rows) step(std::integral_constant<int, 1>());
    }
  }
  while (row + Rows <= rows) {
    if constexpr (spreads) {
      spread_rows<Rows, store>(row, cols, depth, a, b, c, finish);
      row += Rows;
    } else {
      step(std::integral_constant<int, panel_packets>());
    }
  }
  if constexpr (Rows > 1 && !Finishing::whole_kernels) {
    if (row < rows) panel<Rows / 2, store>(row, rows, cols, depth, a, b, c, finish);
  }
}

template <Store store, class Left, class Element, class Finishing = Finish<Element>>
SURFATTN_NEVER_INLINE void product(Index rows, Index cols, Index depth, const Left& a,
                                   Panels<Element> b, Tile<sum_t<Element>> c,
                                   const Finishing& finishing = {}) {
  Finishing finish = finishing;  // a variable of its own, which compilers keep in registers
  if constexpr (broadcasts_by_shuffling<Element>) {
    if (cols == 0) return;
    const Index steps = std::min(depth, spread_depth);
    panel<kernel_rows, store>(0, rows, cols, steps, a, b, c, finish);
    if (steps == depth) return;
    Left rest = a;
    rest.data += steps * a.depth_stride();
    b.data += steps * b.row_stride;
    product<Store::add, Left, Element>(rows, cols, depth - steps, rest, b, c);
    return;
  }
  for (Index first = 0; first < cols; first += panel_width<Element>) {
    panel<kernel_rows, store>(0, rows, cols - first, depth, a, b, c, finish);
    to_next_panel(b, c, finish);
  }
  finish.complete();
}

/// C = A·B, or bias + A·B where there is a bias, one number for each column: for `rows` rows of A
/// and C and the whole panels that hold `cols` columns of B. Of pairs, factor·A·B + bias.
template <class Element, class Left>
void set_product(Index rows, Index cols, Index depth, const Left& a, Panels<Element> b,
                 Tile<sum_t<Element>> c, const sum_t<Element>* bias = nullptr,
                 sum_t<Element> factor = sum_t<Element>(1)) {
  product<Store::set>(rows, cols, depth, a, b, c, Finish<Element>{bias, factor});
}

/// C += A·B, likewise. B is padded with zeros, and so what pads C stays as it is.
template <class Element, class Left>
void add_product(Index rows, Index cols, Index depth, const Left& a, Panels<Element> b,
                 Tile<sum_t<Element>> c) {
  product<Store::add, Left, Element>(rows, cols, depth, a, b, c);
}

}  // namespace surfattn::detail::simd
