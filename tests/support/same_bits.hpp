// Equality of matrices bit by bit, whatever their storage.
#pragma once

#include <cstring>
#include <surfattn/types.hpp>

namespace surfattn::test {

template <class A, class B>
bool same_bits(const A& a, const B& b) {
  using Scalar = typename A::Scalar;
  const Matrix<Scalar> x = a, y = b;
  if (x.rows() != y.rows() || x.cols() != y.cols()) return false;
  return x.size() == 0 ||
         std::memcmp(x.data(), y.data(), static_cast<std::size_t>(x.size()) * sizeof(Scalar)) == 0;
}

}  // namespace surfattn::test
