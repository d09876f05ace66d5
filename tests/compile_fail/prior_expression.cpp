// expect: surfattn: an explicit key prior is a view: pass a stored matrix of log-weights
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<double> points = surfattn::Matrix<double>::Ones(4, 3);
  const surfattn::Matrix<double> prior = surfattn::Matrix<double>::Ones(4, 1);
  return static_cast<int>(surfattn::project(points, points, {.prior = 2 * prior}).rows());
}
