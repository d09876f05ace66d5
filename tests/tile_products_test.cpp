// Products of tiles give exactly what plain loops give, on whole numbers, which no rounding touches.
#include <algorithm>
#include <cstdlib>
#include <surfattn/detail/simd/packing.hpp>

#include "support/catch.hpp"

using namespace surfattn;
using namespace surfattn::detail;

namespace {

template <class Scalar>
using Dense = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <class Scalar>
Dense<Scalar> whole_numbers(Index rows, Index cols) {
  return Dense<Scalar>::NullaryExpr(rows, cols, [] { return Scalar(std::rand() % 17 - 8); });
}

/// A·B, its columns padded with zeros.
template <class Scalar>
Dense<Scalar> plain_product(const Dense<Scalar>& a, const Dense<Scalar>& b, Index padded_cols) {
  Dense<Scalar> c = Dense<Scalar>::Zero(a.rows(), padded_cols);
  for (Index i = 0; i < a.rows(); ++i)
    for (Index j = 0; j < b.cols(); ++j)
      for (Index k = 0; k < a.cols(); ++k) c(i, j) += a(i, k) * b(k, j);
  return c;
}

/// Both products, with A as a left operand that `left` makes.
template <class Scalar, class Left>
void check_products(const Dense<Scalar>& a, const Dense<Scalar>& b, const Left& left) {
  const Index rows = a.rows(), cols = b.cols(), depth = a.cols(),
              width = simd::padded<Scalar>(cols);
  const Workspace workspace(1 << 20);
  Arena arena(workspace);
  Scalar* const panels = arena.take<Scalar>(depth * width);
  Scalar* const result = arena.take<Scalar>(rows * width);
  Scalar* const behind = arena.take<Scalar>(simd::panel_width<Scalar>);  // belongs to nobody
  std::fill_n(behind, simd::panel_width<Scalar>, Scalar(77));
  Scalar* const bias = arena.take<Scalar>(width);
  const Index panel_stride = depth * simd::panel_width<Scalar>;
  simd::NonFiniteRows non_finite{arena.take<Index>(depth), 0};
  simd::pack_panels(view(b), Scalar(1), panels, panel_stride, non_finite);
  Eigen::Map<Dense<Scalar>> c(result, rows, width);
  const Dense<Scalar> first = whole_numbers<Scalar>(rows, width),
                      product = plain_product<Scalar>(a, b, width);
  c = first;
  simd::add_product<Scalar>(rows, cols, depth, left, {panels, panel_stride}, {result, width});
  CHECK(c == first + product);
  c = first;
  simd::set_product<Scalar>(rows, cols, depth, left, {panels, panel_stride}, {result, width});
  CHECK(c == product);
  for (Index j = 0; j < width; ++j) bias[j] = Scalar(j);
  simd::set_product<Scalar>(rows, cols, depth, left, {panels, panel_stride}, {result, width}, bias);
  CHECK(std::count(behind, behind + simd::panel_width<Scalar>, Scalar(77)) ==
        simd::panel_width<Scalar>);
  CHECK(c == product.rowwise() + Eigen::Map<Eigen::RowVectorX<Scalar>>(bias, width));
}

}  // namespace

TEMPLATE_TEST_CASE("tile products are those of plain loops", "", float, double) {
  using Scalar = TestType;
  const Index panel = simd::panel_width<Scalar>, kernel = simd::kernel_rows;
  for (const Index rows : {Index(1), kernel - 1, kernel, 2 * kernel + 3}) {
    for (const Index cols : {Index(0), Index(1), panel, panel + 1, 3 * panel - 1}) {
      for (const Index depth : {0, 1, 7, 127, 128, 129, 300}) {
        INFO(rows << " x " << depth << " by " << depth << " x " << cols);
        const Dense<Scalar> a = whole_numbers<Scalar>(rows, depth),
                            b = whole_numbers<Scalar>(depth, cols);
        check_products<Scalar>(a, b, simd::RowsOperand<Scalar>{a.data(), depth});
        const Workspace workspace(1 << 20);
        Arena arena(workspace);
        Scalar* const packed = arena.take<Scalar>(simd::packed_left_size<Scalar>(rows, depth));
        simd::pack_left(view(a), Scalar(1), packed);
        check_products<Scalar>(a, b, simd::packed_left(packed, depth, 0, rows));
      }
    }
  }
}
