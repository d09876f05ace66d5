// expect: surfattn: queries, keys, values and gradients must be dense Eigen matrices
#include <surfattn/surfattn.hpp>
#include <vector>

int main() {
  const surfattn::Matrix<double> queries = surfattn::Matrix<double>::Ones(2, 3);
  const std::vector<double> keys(12);
  return static_cast<int>(surfattn::attention(queries, keys, keys).rows());
}
