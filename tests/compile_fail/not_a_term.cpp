// expect: surfattn: after the options come terms, such as Causal
#include <surfattn/surfattn.hpp>

int main() {
  const surfattn::Matrix<double> points = surfattn::Matrix<double>::Ones(4, 3);
  return static_cast<int>(
      surfattn::attention(points, points, points, {}, surfattn::Align::top_left).rows());
}
