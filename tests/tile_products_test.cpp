// Products of tiles give exactly what plain loops give, on whole numbers, which no rounding touches;
// operands are packed as their layouts say.
#include <algorithm>
#include <cmath>
#include <limits>
#include <surfattn/detail/simd/packing.hpp>
#include <surfattn/detail/simd/softmax_gradients.hpp>
#include <surfattn/detail/simd/weight_products.hpp>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"

using namespace surfattn;
using namespace surfattn::detail;
using surfattn::test::whole_numbers;

namespace {

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
    for (const Index cols :
         {Index(0), Index(1), panel / 2, panel / 2 + 1, panel, panel + 1, 3 * panel - 1}) {
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

namespace {

/// Few small scores, whose powers of two and the sums of these are exact, however deep the product is.
template <class Scalar>
Matrix<Scalar> rows_of_small_products(Index rows, Index depth, std::mt19937_64& random) {
  Matrix<Scalar> matrix = Matrix<Scalar>::Zero(rows, depth);
  for (Index i = 0; i < rows; ++i) {
    for (Index k = 0; k < std::min<Index>(depth, 2); ++k)
      matrix(i, k) = Scalar(Index(random() % 5) - 2);
  }
  return matrix;
}

/// A and Bᵀ, packed for a product.
template <class Scalar>
struct PackedOperands {
  PackedOperands(const Matrix<Scalar>& a, const Matrix<Scalar>& b)
      : rows(a.rows()), cols(b.rows()), depth(a.cols()), width(simd::padded<Scalar>(cols)) {
    simd::pack_left(view(a), Scalar(1), left);
    simd::pack_transposed(view(b), right);
  }

  simd::ColumnsOperand<Scalar> a() const { return simd::packed_left(left, depth, 0, rows); }
  simd::Panels<Scalar> b() const { return {right, depth * simd::panel_width<Scalar>}; }

  Index rows, cols, depth, width;
  Workspace workspace{1 << 20};
  Arena arena{workspace};
  Scalar* left = arena.take<Scalar>(simd::packed_left_size<Scalar>(rows, depth));
  Scalar* right = arena.take<Scalar>(width * depth);
};

template <class Scalar>
void check_weights(const Matrix<Scalar>& a, const Matrix<Scalar>& b) {
  PackedOperands<Scalar> p(a, b);
  const Index rows = p.rows, cols = p.cols, width = p.width;
  Scalar* const bias = p.arena.template take<Scalar>(width);
  Scalar* const weights = p.arena.template take<Scalar>(rows * width);
  auto* const weighed = p.arena.template take<simd::WeighedRow<Scalar>>(rows);
  for (Index j = 0; j < width; ++j) bias[j] = Scalar(j % 3);
  for (Index i = 0; i < rows; ++i) weighed[i].start(Scalar(i % 4));
  simd::set_weights<Scalar>(rows, cols, p.depth, p.a(), p.b(), {weights, width}, {bias}, weighed,
                            weights, 64);
  Matrix<Scalar> expected = surfattn::test::times(a, Matrix<Scalar>(b.transpose()));
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j)
      expected(i, j) = std::exp2(expected(i, j) + Scalar(j % 3) - Scalar(i % 4));
  }
  const Eigen::Map<const Matrix<Scalar>> result(weights, rows, width);
  CHECK(result.leftCols(cols) == expected);
  CHECK(result.rightCols(width - cols).isZero(0));
  for (Index i = 0; i < rows; ++i) CHECK(weighed[i].sum() == expected.row(i).sum());
}

}  // namespace

TEMPLATE_TEST_CASE("products become powers of two and their sums", "", float, double) {
  if constexpr (simd::overlaps_exponentials<TestType>) {
    auto random = surfattn::test::seeded_random();
    const Index panel = simd::panel_width<TestType>, kernel = simd::kernel_rows;
    for (const Index rows : {kernel, 5 * kernel}) {
      for (const Index cols : {Index(1), panel - 1, panel, panel + panel / 2, 3 * panel + 1}) {
        for (const Index depth : {2, 31, 32, 33, 100}) {
          INFO(rows << " x " << depth << " by " << depth << " x " << cols);
          check_weights<TestType>(rows_of_small_products<TestType>(rows, depth, random),
                                  rows_of_small_products<TestType>(cols, depth, random));
        }
      }
    }
  }
}

namespace {

/// All numbers are integers or powers of two, and so exact.
template <class Scalar>
void check_softmax_gradients(const Matrix<Scalar>& a, const Matrix<Scalar>& b,
                             std::mt19937_64& random) {
  PackedOperands<Scalar> p(a, b);
  const Index rows = p.rows, cols = p.cols, width = p.width;
  Scalar* const totals = p.arena.template take<Scalar>(width);
  Scalar* const numbers = p.arena.template take<Scalar>(2 * rows * width);
  auto* const of_rows = p.arena.template take<simd::SoftmaxGradientRow<Scalar>>(rows);
  Eigen::Map<Matrix<Scalar>> gradients(numbers, rows, width),
      scores(numbers + rows * width, rows, width);
  const auto small = [&](Index count) { return Scalar(Index(random() % count) - 2); };
  Matrix<Scalar> raw(rows, width), weights(rows, width);
  Matrix<Scalar> expected = surfattn::test::times(a, Matrix<Scalar>(b.transpose()));
  for (Index i = 0; i < rows; ++i) {
    of_rows[i] = {small(4), small(5)};
    for (Index j = 0; j < width; ++j) {
      raw(i, j) = small(4);
      weights(i, j) = std::exp2(raw(i, j) - of_rows[i].log_sum);
      if (j < cols) expected(i, j) = weights(i, j) * (expected(i, j) - of_rows[i].mean);
    }
  }
  for (const bool sums : {false, true}) {
    std::fill(totals, totals + width, Scalar(3));
    scores = raw;
    simd::set_softmax_gradients<Scalar>(rows, cols, p.depth, p.a(), p.b(),
                                        {gradients.data(), width}, of_rows,
                                        {rows * width, sums ? totals : nullptr});
    CHECK(scores.leftCols(cols) == weights.leftCols(cols));
    CHECK(gradients.leftCols(cols) == expected);
    for (Index j = 0; j < cols; ++j)
      CHECK(totals[j] == (sums ? expected.col(j).sum() : Scalar(0)) + 3);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("the backward of a softmax follows its product", "", float, double) {
  auto random = surfattn::test::seeded_random();
  const Index panel = simd::panel_width<TestType>, kernel = simd::kernel_rows;
  for (const Index rows : {Index(1), kernel - 1, kernel, kernel + 1, 5 * kernel + 2}) {
    for (const Index cols : {Index(1), panel - 1, panel, panel + panel / 2, 3 * panel + 1}) {
      for (const Index depth : {0, 2, 31, 33, 100}) {
        INFO(rows << " x " << depth << " by " << depth << " x " << cols);
        check_softmax_gradients<TestType>(rows_of_small_products<TestType>(rows, depth, random),
                                          rows_of_small_products<TestType>(cols, depth, random),
                                          random);
      }
    }
  }
}

namespace {

/// The rows of `source` times `factor` by columns in panels of `width` rows, padded with zeros.
template <class Scalar>
void check_columns(MatrixView<const Scalar> source, Scalar factor, const Scalar* packed,
                   Index width) {
  INFO(source.rows << " x " << source.cols << ", strides " << source.row_stride << " and "
                   << source.col_stride);
  Index differing = 0;
  for (Index r = 0; r < simd::rounded_up(source.rows, width); ++r) {
    for (Index c = 0; c < source.cols; ++c) {
      const Scalar wanted = r < source.rows ? factor * source(r, c) : Scalar(0);
      differing += packed[r / width * width * source.cols + c * width + r % width] != wanted;
    }
  }
  CHECK(differing == 0);
}

}  // namespace

TEMPLATE_TEST_CASE("operands are packed by columns in any storage", "", float, double,
                   long double) {
  using Scalar = TestType;
  auto random = surfattn::test::seeded_random();
  const Index side = simd::lanes<Scalar>, panel = simd::panel_width<Scalar>;
  for (const Index rows : {Index(1), side - 1, side, side + 1, 2 * panel + side, 3 * panel - 1}) {
    for (const Index cols : {Index(1), Index(2), Index(3), side, side + 3, 2 * side + 5}) {
      const Matrix<Scalar> wide = whole_numbers<Scalar>(rows, cols + 3, random);
      const Eigen::Matrix<Scalar, -1, -1> by_columns = wide.leftCols(cols);
      const Matrix<Scalar> adjacent = by_columns;
      const Workspace workspace(1 << 20);
      Arena arena(workspace);
      Scalar* const packed = arena.take<Scalar>(std::max(
          simd::rounded_up(rows, panel) * cols, simd::packed_left_size<Scalar>(rows, cols)));
      for (const MatrixView<const Scalar> source :
           {view(wide).block_cols(1, cols), view(adjacent), view(by_columns)}) {
        simd::pack_transposed(source, packed);
        check_columns<Scalar>(source, Scalar(1), packed, panel);
        simd::pack_left(source, Scalar(3), packed);
        check_columns<Scalar>(source, Scalar(3), packed, simd::left_width<Scalar>);
      }
    }
  }
}

TEMPLATE_TEST_CASE("rows that are not finite are packed as zeros and listed", "", float, double,
                   long double) {
  using Scalar = TestType;
  using Limits = std::numeric_limits<Scalar>;
  auto random = surfattn::test::seeded_random();
  const Scalar large = Limits::max() / 4, root = std::sqrt(Limits::max()) / 2;
  for (const Index cols : {Index(1), simd::lanes<Scalar> + 1, 2 * simd::panel_width<Scalar>}) {
    Matrix<Scalar> rows = whole_numbers<Scalar>(11, cols, random);
    rows(1, cols - 1) = Limits::infinity();
    rows(2, 0) = large;
    rows(4, 0) = root;
    rows(6, cols / 2) = Limits::quiet_NaN();
    rows(9, 0) = -Limits::infinity();
    rows(10, cols - 1) = -large;
    const std::vector<Index> always{1, 6, 9}, with_large{1, 2, 6, 9, 10},
        with_root{1, 2, 4, 6, 9, 10};
    for (const auto& [factor, wanted] :
         {std::pair(Scalar(1), always), std::pair(Scalar(-2), always),
          std::pair(Scalar(8), with_large), std::pair(16 * root, with_root)}) {
      INFO(cols << " columns, factor " << factor);
      const Workspace workspace(1 << 20);
      Arena arena(workspace);
      const Index width = simd::panel_width<Scalar>, stride = rows.rows() * width;
      Scalar* const panels = arena.take<Scalar>(rows.rows() * simd::padded<Scalar>(cols));
      Scalar *const norms = arena.take<Scalar>(11), *const expected = arena.take<Scalar>(11);
      simd::NonFiniteRows found{arena.take<Index>(11), 0};
      simd::pack_panels(view(std::as_const(rows)), factor, panels, stride, found, norms);
      const std::vector<Index> listed(found.rows, found.rows + found.count);
      CHECK(listed == wanted);
      Index differing = 0;
      for (Index k = 0; k < rows.rows(); ++k) {
        const bool is_listed = std::count(listed.begin(), listed.end(), k) > 0;
        for (Index c = 0; c < simd::padded<Scalar>(cols); ++c) {
          const Scalar packed = panels[c / width * stride + k * width + c % width];
          differing += packed != (is_listed || c >= cols ? Scalar(0) : factor * rows(k, c));
        }
      }
      CHECK(differing == 0);
      simd::squared_norms(view(std::as_const(rows)), expected);
      for (Index k = 0; k < rows.rows(); ++k)
        CHECK((norms[k] == expected[k] || (std::isnan)(expected[k])));
    }
  }
}
