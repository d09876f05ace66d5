// expect: the gradient of a term would go into a temporary matrix
// Where a gradient goes must be there when it arrives.
#include <surfattn/surfattn.hpp>

auto lost(const Eigen::VectorXf& logits) {
  return surfattn::Sink(logits).gradient_into(Eigen::VectorXf(2));
}
