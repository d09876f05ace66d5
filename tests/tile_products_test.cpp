// Products of tiles give exactly what plain loops give, on whole numbers, which no rounding touches.
#include <algorithm>
#include <surfattn/detail/simd/packing.hpp>

#include "support/catch.hpp"
#include "support/random.hpp"

using namespace surfattn;
using namespace surfattn::detail;

namespace {

template <class Scalar>
Matrix<Scalar> whole_numbers(Index rows, Index cols, std::mt19937_64& random) {
  std::uniform_int_distribution<int> number(-8, 8);
  return Matrix<Scalar>::NullaryExpr(rows, cols, [&] { return Scalar(number(random)); });
}

/// Both products, with A as a left operand that `left` makes.
template <class Scalar, class Left>
void check_products(const Matrix<Scalar>& a, const Matrix<Scalar>& b, const Left& left,
                    std::mt19937_64& random) {
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
  Eigen::Map<Matrix<Scalar>> c(result, rows, width);
  const Matrix<Scalar> first = whole_numbers<Scalar>(rows, width, random);
  Matrix<Scalar> product = Matrix<Scalar>::Zero(rows, width);  // its columns padded with zeros
  product.leftCols(cols) = a.lazyProduct(b);
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
  auto random = surfattn::test::seeded_random();
  const Index panel = simd::panel_width<Scalar>, kernel = simd::kernel_rows;
  for (const Index rows : {Index(1), kernel - 1, kernel, 2 * kernel + 3}) {
    for (const Index cols : {Index(0), Index(1), panel, panel + 1, 3 * panel - 1}) {
      for (const Index depth : {0, 1, 7, 127, 128, 129, 300}) {
        INFO(rows << " x " << depth << " by " << depth << " x " << cols);
        const Matrix<Scalar> a = whole_numbers<Scalar>(rows, depth, random),
                             b = whole_numbers<Scalar>(depth, cols, random);
        check_products<Scalar>(a, b, simd::RowsOperand<Scalar>{a.data(), depth}, random);
        const Workspace workspace(1 << 20);
        Arena arena(workspace);
        Scalar* const packed = arena.take<Scalar>(simd::packed_left_size<Scalar>(rows, depth));
        simd::pack_left(view(a), Scalar(1), packed);
        check_products<Scalar>(a, b, simd::packed_left(packed, depth, 0, rows), random);
      }
    }
  }
}
