// expect: surfattn: an output must be a stored, writable Eigen matrix, map or block
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<double> points = surfattn::Matrix<double>::Ones(4, 3);
  const double memory[12] = {};
  surfattn::project_into(points, points, Eigen::Map<const surfattn::Matrix<double>>(memory, 4, 3),
                         surfattn::Workspace(1 << 20));
}
