// surfattn layer 2: Cholesky factor of a small matrix in memory that the caller owns

#pragma once

#include <cmath>
#include <surfattn/types.hpp>

namespace surfattn::detail {

/// M + ridge·I = L·Lᵀ for a positive semidefinite M, of which the lower triangle is read and
/// overwritten by L: row i begins at matrix + i·stride. (Eigen::LLT would do, but for the memory
/// that its blocked products take.)
///
/// Every pivot, a Schur complement of M + ridge·I, is at least `ridge`; one that rounding has made
/// smaller is set to that, so that the factor exists for every normal ridge > 0. A NaN stays.
template <class Scalar>
void factorise(Index size, Scalar* matrix, Index stride, Scalar ridge) {
  using Row = Eigen::Map<const Eigen::Matrix<Scalar, Eigen::Dynamic, 1>>;
  for (Index i = 0; i < size; ++i) {
    Scalar* row = matrix + i * stride;
    for (Index j = 0; j < i; ++j) {
      const Scalar* other = matrix + j * stride;
      row[j] = (row[j] - Row(row, j).dot(Row(other, j))) / other[j];
    }
    const Scalar pivot = row[i] + ridge - Row(row, i).squaredNorm();
    row[i] = std::sqrt(pivot < ridge ? ridge : pivot);
  }
}

/// x ← (L·Lᵀ)⁻¹·x.
template <class Scalar>
void solve(Index size, const Scalar* factor, Index stride, Scalar* x) {
  using Row = Eigen::Map<const Eigen::Matrix<Scalar, Eigen::Dynamic, 1>>;
  using Vector = Eigen::Map<Eigen::Matrix<Scalar, Eigen::Dynamic, 1>>;
  for (Index i = 0; i < size; ++i) {
    const Scalar* row = factor + i * stride;
    x[i] = (x[i] - Row(row, i).dot(Row(x, i))) / row[i];
  }
  for (Index i = size - 1; i >= 0; --i) {
    const Scalar* row = factor + i * stride;
    x[i] /= row[i];
    Vector(x, i) -= x[i] * Row(row, i);
  }
}

}  // namespace surfattn::detail
