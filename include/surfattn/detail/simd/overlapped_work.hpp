// surfattn layer 2: work on what a product gives, done while the product goes on

#pragma once

#include <surfattn/detail/simd/tile_products.hpp>

namespace surfattn::detail::simd {

/// The finish of a product whose numbers are worked on once more, a row of a panel at a time. While a kernel
/// multiplies and adds, the rows of the one before, which are in the first-level cache, are worked on: most
/// of that are operations that other parts of a core do meanwhile. Where another thread shares the core
/// every instruction counts: rows are counted by one pointer.
///
/// `Work` is called with what belongs to the row, a `Work::Row`, its numbers in one panel, and the first
/// column of that panel.
template <class Element, class Work>
class OverlappedFinish {
  using Sum = sum_t<Element>;
  using Row = typename Work::Row;

 public:
  static constexpr bool whole_kernels = true;

  OverlappedFinish(const Finish<Element>& finish, Row* rows, const Work& work)
      : finish_(finish), rows_(rows), work_(work) {}

  SURFATTN_ALWAYS_INLINE const Sum* start() const { return finish_.start(); }

  template <int Rows, int Packets>
  SURFATTN_ALWAYS_INLINE void take(Index row, Accumulators<Rows, Packets, Element>& product,
                                   const Tile<Sum>& c) {
    complete();
    finish_.take(row, product, c);
    left_ = c, column_left_ = column_, next_ = rows_ + row, end_ = next_ + Rows;
  }

  SURFATTN_ALWAYS_INLINE void work() {
    if (next_ == end_) return;
    work_(*next_, left_.data, column_left_);
    left_.data += left_.row_stride, ++next_;
  }

  SURFATTN_ALWAYS_INLINE void complete() {
    if (next_ == end_) return;
    work_ = work_on(work_, left_, column_left_, next_, end_);
    next_ = end_;
  }

  SURFATTN_ALWAYS_INLINE void to_next_panel() {
    finish_.to_next_panel();
    column_ += panel_width<Element>;
  }

 private:
  /// Takes copies, so that the members can stay in registers.
  SURFATTN_NEVER_INLINE static Work work_on(Work work, Tile<Sum> c, Index column, Row* row,
                                            Row* end) {
    for (; row != end; ++row, c.data += c.row_stride) work(*row, c.data, column);
    return work;
  }

  Finish<Element> finish_;
  Row* rows_;
  Work work_;
  Index column_ = 0;
  Tile<Sum> left_{};  ///< the numbers that are left to work on, in the panel of column_left_
  Index column_left_ = 0;
  Row *next_ = nullptr, *end_ = nullptr;
};

/// Whether work that takes exponentials overlaps with products: not where these are summed in parts, on
/// targets whose exponentials take longer than what they wait for, nor without vectors, where the origin of
/// an exponential does not only scale it.
template <class Element>
inline constexpr bool overlaps_exponentials =
    !broadcasts_by_shuffling<Element> && lanes<sum_t<Element>> > 1;

}  // namespace surfattn::detail::simd
