// expect: surfattn: outputs must be of the scalar type of the inputs
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<double> points = surfattn::Matrix<double>::Ones(4, 3);
  surfattn::Matrix<float> out(4, 3);
  surfattn::attention_into(points, points, points, out, surfattn::Workspace(1 << 20));
}
