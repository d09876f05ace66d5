// surfattn layer 1: a strided view of any stored Eigen matrix

#pragma once

#include <concepts>
#include <surfattn/types.hpp>
#include <type_traits>
#include <utility>

namespace surfattn::detail {

/// A matrix in memory: element (i, j) is data[i·row_stride + j·col_stride]. Row- and column-major
/// matrices, maps with strides, blocks and transposes all become this one type, so that the engine
/// is compiled once for all of them.
template <class Scalar>
struct MatrixView {
  Scalar* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index row_stride = 0;
  Index col_stride = 0;

  Scalar& operator()(Index row, Index col) const {
    return data[row * row_stride + col * col_stride];
  }
  Scalar* row(Index index) const { return data + index * row_stride; }

  MatrixView block_rows(Index first, Index count) const {
    return {data ? data + first * row_stride : nullptr, count, cols, row_stride, col_stride};
  }
  MatrixView block_cols(Index first, Index count) const {
    return {data ? data + first * col_stride : nullptr, rows, count, row_stride, col_stride};
  }

  /// Whether the numbers of a column lie side by side and those of a row do not.
  bool is_stored_by_columns() const { return row_stride == 1 && col_stride != 1; }
  MatrixView transposed() const { return {data, cols, rows, col_stride, row_stride}; }

  operator MatrixView<const Scalar>() const requires(!std::is_const_v<Scalar>) {
    return {data, rows, cols, row_stride, col_stride};
  }
};

template <class T>
using plain_t = std::remove_cv_t<std::remove_reference_t<T>>;

template <class Derived>
void accept_matrix(const Eigen::MatrixBase<Derived>&);

/// A matrix or vector expression of Eigen's, or one of its parts, such as vector.head(3).
template <class T>
concept DenseMatrix = requires(const plain_t<T>& matrix) {
  accept_matrix(matrix);
};

// clang-format off
template <class T>
concept StoredMatrix = DenseMatrix<T> && (plain_t<T>::Flags & Eigen::DirectAccessBit) != 0;
// clang-format on

/// Owns its numbers, as Matrix does and Map and Block do not.
template <class T>
concept OwningMatrix =
    DenseMatrix<T> && std::is_base_of_v<Eigen::PlainObjectBase<plain_t<T>>, plain_t<T>>;

/// Can be written through: stored, and not a view of constants.
template <class T>
concept WritableMatrix = StoredMatrix<T> && requires(std::remove_reference_t<T>& matrix) {
  { matrix.data() } -> std::same_as<typename plain_t<T>::Scalar*>;
};

/// The scalar of a matrix. Of anything else, float, so that the one error a caller sees is the
/// sentence of a static_assert.
template <class T>
struct scalar_of {
  using type = float;
};
template <DenseMatrix T>
struct scalar_of<T> {
  using type = typename plain_t<T>::Scalar;
};
template <class T>
using scalar_t = typename scalar_of<T>::type;

/// The matrix itself where it lies in memory; an expression (2 * Q, A * B) is evaluated, once.
template <DenseMatrix T>
decltype(auto) stored(const T& matrix) {
  if constexpr (StoredMatrix<T>) {
    return (matrix);
  } else {
    return Matrix<scalar_t<T>>(matrix);
  }
}

template <StoredMatrix T>
auto view(T&& matrix) {
  using Element = std::remove_pointer_t<decltype(matrix.data())>;
  const bool row_major = plain_t<T>::IsRowMajor;
  // Where there are no numbers there may be no memory either, which has no place behind its beginning.
  if (matrix.size() == 0)
    return MatrixView<Element>{matrix.data(), matrix.rows(), matrix.cols(), 0, 1};
  return MatrixView<Element>{matrix.data(), matrix.rows(), matrix.cols(),
                             row_major ? matrix.outerStride() : matrix.innerStride(),
                             row_major ? matrix.innerStride() : matrix.outerStride()};
}

template <class T>
inline constexpr bool is_left_columns_v = std::is_same_v<plain_t<T>, LeftColumns>;

/// The matrix that holds the values.
template <class Keys, class Values>
using value_matrix_t = std::conditional_t<is_left_columns_v<Values>, Keys, Values>;

/// `stored`, but for what only says where in the keys the values are.
template <class T>
decltype(auto) stored_values(const T& values) {
  if constexpr (is_left_columns_v<T>) {
    return (values);
  } else {
    return stored(values);
  }
}

/// The gradients of both results of a forward pass.
template <class T>
concept GradientPair = requires(const T& gradient) {
  requires DenseMatrix<decltype(gradient.out)> && DenseMatrix<decltype(gradient.log_sum_exp)>;
};

/// ∂loss/∂out of what a backward pass is given: a matrix, or the gradients of both results.
template <class T>
const auto& grad_out_of(const T& gradient) {
  if constexpr (GradientPair<T>) {
    return gradient.out;
  } else {
    return gradient;
  }
}

/// ∂loss/∂log_sum_exp, or a matrix of no size.
template <class T>
decltype(auto) grad_log_sum_exp_of(const T& gradient) {
  if constexpr (GradientPair<T>) {
    return (gradient.log_sum_exp);
  } else {
    return Matrix<accumulator_t<scalar_t<T>>>();
  }
}

template <class T>
using grad_out_t = plain_t<decltype(grad_out_of(std::declval<const T&>()))>;
template <class T>
using grad_log_sum_exp_t = plain_t<decltype(grad_log_sum_exp_of(std::declval<const T&>()))>;

}  // namespace surfattn::detail
