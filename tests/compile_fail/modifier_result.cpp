// expect: surfattn: the function of a Modifier must return a ValueAndDerivative
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<double> points = surfattn::Matrix<double>::Ones(4, 3);
  const surfattn::Modifier square{[](auto score, surfattn::Position) { return score * score; }};
  return static_cast<int>(surfattn::attention(points, points, points, {}, square).rows());
}
