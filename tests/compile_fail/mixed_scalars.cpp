// expect: surfattn: queries, keys, values and gradients must be of one scalar type
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<float> queries = surfattn::Matrix<float>::Ones(2, 3);
  const surfattn::Matrix<double> keys = surfattn::Matrix<double>::Ones(4, 3);
  return static_cast<int>(surfattn::attention(queries, keys, keys).rows());
}
