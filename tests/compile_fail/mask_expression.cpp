// expect: surfattn: a BoolMask is a view: pass a stored matrix
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<float> points = surfattn::Matrix<float>::Ones(4, 3);
  const surfattn::Matrix<float> distances = surfattn::Matrix<float>::Ones(4, 4);
  return static_cast<int>(
      surfattn::attention(points, points, points, {}, surfattn::BoolMask(distances.array() < 2))
          .rows());
}
