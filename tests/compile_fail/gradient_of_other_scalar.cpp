// expect: the gradient of a term must be of the scalar type of its parameters
// Slopes in float have a gradient in float.
#include <surfattn/surfattn.hpp>

auto mixed(const Eigen::VectorXf& slopes, Eigen::VectorXd& gradient) {
  return surfattn::Alibi(slopes).gradient_into(gradient);
}
