// expect: surfattn: this function takes float, double or long double
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<Eigen::bfloat16> points(4, 3);
  return static_cast<int>(surfattn::project_iterated(points, points, {.steps = 2}).rows());
}
