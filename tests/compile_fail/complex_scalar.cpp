// expect: surfattn: the scalar must be float, double, long double
#include <complex>
#include <surfattn/surfattn.hpp>

int main() {
  using Complex = std::complex<float>;
  const surfattn::Matrix<Complex> points = surfattn::Matrix<Complex>::Ones(2, 3);
  return static_cast<int>(surfattn::attention(points, points, points).rows());
}
