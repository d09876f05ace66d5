// expect: surfattn: a BoolMask must be a matrix of bool or of an integer type
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<float> points = surfattn::Matrix<float>::Ones(4, 3);
  const surfattn::Matrix<float> mask = surfattn::Matrix<float>::Ones(4, 4);
  return static_cast<int>(
      surfattn::attention(points, points, points, {}, surfattn::BoolMask{mask}).rows());
}
