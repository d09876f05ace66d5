// Keys in two parts: a past in a cache, and new tokens. Attention over each part and merge_partials
// give attention over both, and the past is not copied next to the new tokens.
#include <iostream>
#include <surfattn/surfattn.hpp>

int main() {
  using namespace surfattn;
  const Matrix<float> past_keys = Matrix<float>::Random(1000, 8), past_values = past_keys;
  const Matrix<float> queries = Matrix<float>::Random(3, 8), keys = queries, values = keys;

  const auto past = attention_forward(queries, past_keys, past_values);  // all of it is seen
  const auto present = attention_forward(queries, keys, values, {}, Causal{Align::top_left});
  const Forward<float> merged = merge_partials(past, present);

  Matrix<float> all_keys(1003, 8), all_values(1003, 8);  // the comparison does copy
  all_keys << past_keys, keys;
  all_values << past_values, values;
  const auto whole =
      attention_forward(queries, all_keys, all_values, {}, Causal{Align::bottom_right});
  const float difference = (merged.out - whole.out).cwiseAbs().maxCoeff();
  std::cout << "merged parts differ from the whole by less than a millionth: "
            << (difference < 1e-6f ? "yes" : "no") << '\n';
  return difference < 1e-6f ? 0 : 1;
}
