// Seeded random matrices.
#pragma once

#include <cstdlib>
#include <random>
#include <surfattn/types.hpp>
#include <type_traits>

#include "support/catch.hpp"

namespace surfattn::test {

/// A generator seeded from SURFATTN_TEST_SEED, or else with a fixed number; a failure of the test case prints the seed.
inline std::uint64_t seed() {
  const char* given = std::getenv("SURFATTN_TEST_SEED");
  return given ? std::strtoull(given, nullptr, 10) : 20260207;
}

inline std::mt19937_64 seeded_random() {
  UNSCOPED_INFO("SURFATTN_TEST_SEED=" << seed());
  return std::mt19937_64(seed());
}

/// a·b of whole matrices: blocks and transposes are copied, so that the compiler meets one product in the place of many.
template <class Dense>
Dense times(const Dense& a, const std::type_identity_t<Dense>& b) {
  Dense product(a.rows(), b.cols());
  product.noalias() = a * b;
  return product;
}

/// Independent standard normal numbers.
template <class Scalar>
Matrix<Scalar> random_matrix(Index rows, Index cols, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  Matrix<Scalar> matrix(rows, cols);
  for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = static_cast<Scalar>(normal(random));
  return matrix;
}

/// Small whole numbers, whose products and sums no rounding touches.
template <class Scalar>
Matrix<Scalar> whole_numbers(Index rows, Index cols, std::mt19937_64& random) {
  std::uniform_int_distribution<int> number(-8, 8);
  return Matrix<Scalar>::NullaryExpr(rows, cols, [&] { return Scalar(number(random)); });
}

}  // namespace surfattn::test
