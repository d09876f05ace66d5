// expect: surfattn: offsets of sequences must be contiguous signed 32- or 64-bit integers
#include <surfattn/surfattn.hpp>
#include <vector>

int main() {
  const surfattn::Matrix<float> points = surfattn::Matrix<float>::Ones(4, 3);
  const std::vector<unsigned> offsets{0, 2, 4};
  return static_cast<int>(
      surfattn::attention(points, points, points, {.sequences = offsets}).rows());
}
