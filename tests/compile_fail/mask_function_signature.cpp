// expect: surfattn: the function of a MaskFunction must take
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<double> points = surfattn::Matrix<double>::Ones(4, 3);
  const surfattn::MaskFunction mask([](surfattn::Index i) { return i > 0; });
  return static_cast<int>(surfattn::attention(points, points, points, {}, mask).rows());
}
