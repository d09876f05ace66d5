// A program of someone who uses the library: keys of one width, values of another, one query.
#include <cmath>
#include <iostream>
#include <surfattn/surfattn.hpp>

int main() {
  static_assert(surfattn::version == SURFATTN_VERSION);
  const surfattn::Matrix<float> queries = surfattn::Matrix<float>::Zero(1, 2);
  const surfattn::Matrix<float> keys = surfattn::Matrix<float>::Identity(2, 2);
  const surfattn::Matrix<float> values{{1.0f}, {3.0f}};
  const surfattn::Matrix<float> out = surfattn::attention(queries, keys, values);
  std::cout << "mean of 1 and 3: " << out(0, 0) << '\n';
  return std::abs(out(0, 0) - 2.0f) < 1e-6f ? 0 : 1;
}
