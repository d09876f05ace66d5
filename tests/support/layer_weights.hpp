// Random weights of layers, and all their numbers by name.
#pragma once

#include <cmath>
#include <surfattn/weights.hpp>

#include "support/problem.hpp"

namespace surfattn::test {

template <class Scalar>
StandardWeights<Scalar> random_weights(Index x_width, Index y_width, Index out_width,
                                       const Sizes& s, std::mt19937_64& random,
                                       bool biases = true) {
  const auto weight = [&](Index rows, Index cols) {
    return Matrix<Scalar>(random_matrix<Scalar>(rows, cols, random) /
                          Scalar(std::sqrt(double(rows))));
  };
  const auto bias = [&](Index cols) {
    return biases ? RowVector<Scalar>(random_matrix<Scalar>(1, cols, random)) : RowVector<Scalar>();
  };
  StandardWeights<Scalar> w;
  w.query = weight(x_width, s.query_heads * s.head_dim);
  w.key = weight(y_width, s.key_value_heads * s.head_dim);
  w.value = weight(y_width, s.key_value_heads * s.value_dim);
  w.output = weight(s.query_heads * s.value_dim, out_width);
  w.query_bias = bias(w.query.cols());
  w.key_bias = bias(w.key.cols());
  w.value_bias = bias(w.value.cols());
  w.output_bias = bias(out_width);
  w.heads = {s.query_heads, s.key_value_heads};
  return w;
}

template <class Scalar>
void share_keys(StandardWeights<Scalar>& w) {
  w.k_equals_v = true;
  w.value.resize(0, 0);
  w.value_bias.resize(0);
}

/// Calls visit(name, of_a, of_b) with every trainable number of two sets of weights, pairwise.
template <class A, class B, class Visit>
void for_each_weight(A& a, B& b, const Visit& visit) requires requires {
  a.query;
}
{
  visit("Wq", a.query, b.query);
  visit("Wk", a.key, b.key);
  visit("Wv", a.value, b.value);
  visit("Wo", a.output, b.output);
  visit("bq", a.query_bias, b.query_bias);
  visit("bk", a.key_bias, b.key_bias);
  visit("bv", a.value_bias, b.value_bias);
  visit("bo", a.output_bias, b.output_bias);
  visit("query gain", a.query_norm_weights.gain, b.query_norm_weights.gain);
  visit("query norm bias", a.query_norm_weights.bias, b.query_norm_weights.bias);
  visit("key gain", a.key_norm_weights.gain, b.key_norm_weights.gain);
  visit("key norm bias", a.key_norm_weights.bias, b.key_norm_weights.bias);
}
template <class A, class B, class Visit>
void for_each_weight(A& a, B& b, const Visit& visit) requires requires {
  a.metric;
}
{
  visit("A", a.metric, b.metric);
  visit("B", a.readout, b.readout);
  visit("g", a.metric_bias, b.metric_bias);
  visit("r", a.readout_bias, b.readout_bias);
  visit("bo", a.output_bias, b.output_bias);
}

}  // namespace surfattn::test
