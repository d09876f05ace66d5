// expect: surfattn: the scalar must be float, double, long double
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<int> points = surfattn::Matrix<int>::Ones(2, 3);
  return static_cast<int>(surfattn::project(points, points).rows());
}
