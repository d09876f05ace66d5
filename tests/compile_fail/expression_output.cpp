// expect: surfattn: an output must be a stored, writable Eigen matrix, map or block
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<double> points = surfattn::Matrix<double>::Ones(4, 3);
  surfattn::Matrix<double> out(4, 3);
  surfattn::project_into(points, points, 2 * out, surfattn::Workspace(1 << 20));
}
