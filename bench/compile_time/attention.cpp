#include <surfattn/surfattn.hpp>

using Numbers = surfattn::Matrix<float>;

Numbers gradient(const Numbers& queries, const Numbers& keys, const Numbers& values,
                 const Numbers& grad_out) {
  const auto forward = surfattn::attention_forward(queries, keys, values);
  return surfattn::attention_backward(queries, keys, values, forward, grad_out).keys;
}
