// expect: surfattn: queries, keys, values and gradients must be dense Eigen matrices
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<double> keys = surfattn::Matrix<double>::Ones(4, 3);
  return static_cast<int>(surfattn::project(keys.array(), keys.array()).rows());
}
