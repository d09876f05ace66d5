// Random weights of layers.
#pragma once

#include <cmath>
#include <random>

#include "support/problem.hpp"

namespace surfattn::test {

inline StandardWeights<double> random_weights(Index x_width, Index y_width, Index out_width,
                                              const Sizes& s, std::mt19937_64& random) {
  const auto weight = [&](Index rows, Index cols) {
    return Matrix<double>(random_matrix<double>(rows, cols, random) / std::sqrt(double(rows)));
  };
  StandardWeights<double> w{weight(x_width, s.query_heads * s.head_dim),
                            weight(y_width, s.key_value_heads * s.head_dim),
                            weight(y_width, s.key_value_heads * s.value_dim),
                            weight(s.query_heads * s.value_dim, out_width)};
  w.query_bias = random_matrix<double>(1, w.query.cols(), random);
  w.key_bias = random_matrix<double>(1, w.key.cols(), random);
  w.value_bias = random_matrix<double>(1, w.value.cols(), random);
  w.output_bias = random_matrix<double>(1, out_width, random);
  w.heads = {s.query_heads, s.key_value_heads};
  return w;
}

/// Makes the values the keys as projected.
inline void share_keys(StandardWeights<double>& w) {
  w.k_equals_v = true;
  w.value.resize(0, 0);
  w.value_bias.resize(0);
}

}  // namespace surfattn::test
