// expect success

// Were this rejected, every case of this folder would be rejected for the wrong reason.
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<double> queries = surfattn::Matrix<double>::Ones(2, 3);
  const surfattn::Matrix<double> keys = surfattn::Matrix<double>::Ones(4, 3);
  return static_cast<int>(surfattn::attention(queries, keys, keys).rows()) - 2;
}
