// A term in a batch against the dense mask of its definition.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <surfattn/executors/thread_pool.hpp>
#include <surfattn/surfattn.hpp>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "support/random.hpp"
#include "support/same_bits.hpp"

namespace surfattn::test {

using Bools = Matrix<bool>;
using Offsets = std::vector<Index>;

template <class Scalar>
struct Run {
  Forward<Scalar> forward;
  AttentionGradients<Scalar> gradients;
};

template <class Scalar, class... Terms>
Run<Scalar> run(const Problem<Scalar>& p, const Sequences& sequences, Executor* executor,
                const Terms&... terms) {
  const Options options{.heads = p.heads, .executor = executor, .sequences = sequences};
  Run<Scalar> r;
  r.forward = attention_forward(p.queries, p.keys, p.values, options, terms...);
  r.gradients =
      attention_backward(p.queries, p.keys, p.values, r.forward, p.grad_out, options, terms...);
  return r;
}

template <class Scalar>
void check_same_bits(const Run<Scalar>& a, const Run<Scalar>& b) {
  CHECK(same_bits(a.forward.out, b.forward.out));
  CHECK(same_bits(a.forward.log_sum_exp, b.forward.log_sum_exp));
  CHECK(same_bits(a.gradients.queries, b.gradients.queries));
  CHECK(same_bits(a.gradients.keys, b.gradients.keys));
  CHECK(same_bits(a.gradients.values, b.gradients.values));
}

/// To 1e-12 of the largest: sums of a few hundred numbers in another order, but no pair more or less.
inline void check_agreement(const Run<double>& a, const Run<double>& b) {
  const auto agree = [](const Matrix<double>& x, const Matrix<double>& y) {
    double largest = 1, difference = 0;
    for (Index n = 0; n < x.size(); ++n) {
      if (x.data()[n] == y.data()[n]) continue;
      largest = std::max(largest, std::abs(y.data()[n]));
      difference = std::max(difference, std::abs(x.data()[n] - y.data()[n]));
      if (std::isnan(x.data()[n] - y.data()[n])) return false;
    }
    return difference <= 1e-12 * largest;
  };
  CHECK(agree(a.forward.out, b.forward.out));
  CHECK(agree(a.forward.log_sum_exp, b.forward.log_sum_exp));
  CHECK(agree(a.gradients.queries, b.gradients.queries));
  CHECK(agree(a.gradients.keys, b.gradients.keys));
  CHECK(agree(a.gradients.values, b.gradients.values));
}

/// The lengths of the sequences of a batch.
struct Batch {
  Offsets queries, keys;

  Offsets offsets(const Offsets& lengths) const {
    Offsets result{0};
    for (const Index length : lengths) result.push_back(result.back() + length);
    return result;
  }
};

inline const Batch batches[] = {{{70}, {70}},
                                {{3}, {400}},
                                {{90, 0, 7, 300, 1}, {90, 4, 600, 300, 0}},
                                {{10, 10, 10}, {10, 10, 10}}};
inline const Heads heads{.query = 4, .key_value = 2};

/// A dense mask with one row for each query of the batch and head, and columns for the keys of the
/// longest sequence: what `sees(sequence, head, query, key)` says.
template <class Sees>
struct Dense {
  const Batch& batch;
  Sees sees;

  Bools of_sequence(std::size_t s) const {
    Bools mask(batch.queries[s], heads.query * batch.keys[s]);
    for (Index h = 0; h < heads.query; ++h) {
      for (Index i = 0; i < batch.queries[s]; ++i) {
        for (Index j = 0; j < batch.keys[s]; ++j)
          mask(i, h * batch.keys[s] + j) = sees(Index(s), h, i, j);
      }
    }
    return mask;
  }
};

/// Every sequence alone with its dense mask.
template <class Sees>
Run<double> run_dense(const Problem<double>& p, const Batch& batch, const Sees& sees) {
  Run<double> whole{{Matrix<double>(p.grad_out.rows(), p.grad_out.cols()),
                     Matrix<double>(p.queries.rows(), heads.query)},
                    {p.queries, p.keys, p.values}};
  const Offsets query_offsets = batch.offsets(batch.queries),
                key_offsets = batch.offsets(batch.keys);
  for (std::size_t s = 0; s < batch.queries.size(); ++s) {
    const auto of_queries = [&](auto& m) {
      return m.middleRows(query_offsets[s], batch.queries[s]);
    };
    const auto of_keys = [&](auto& m) { return m.middleRows(key_offsets[s], batch.keys[s]); };
    Problem<double> one = p;
    one.queries = of_queries(p.queries);
    one.keys = of_keys(p.keys);
    one.values = of_keys(p.values);
    one.grad_out = of_queries(p.grad_out);
    const Bools mask = Dense<Sees>{batch, sees}.of_sequence(s);
    const auto part = run(one, {}, nullptr, BoolMask{mask});
    of_queries(whole.forward.out) = part.forward.out;
    of_queries(whole.forward.log_sum_exp) = part.forward.log_sum_exp;
    of_queries(whole.gradients.queries) = part.gradients.queries;
    of_keys(whole.gradients.keys) = part.gradients.keys;
    of_keys(whole.gradients.values) = part.gradients.values;
  }
  return whole;
}

/// A term in a batch against the dense masks of its definition, and with three threads.
template <class Sees, class... Terms>
void check_pattern(const Batch& batch, const Sees& sees, const Terms&... terms) {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed(), batch.queries.size(), batch.queries.front());
  const Offsets query_offsets = batch.offsets(batch.queries),
                key_offsets = batch.offsets(batch.keys);
  const Problem<double> p(Sizes{query_offsets.back(), key_offsets.back(), 5, 3, 4, 2}, random);
  const Sequences sequences(query_offsets, key_offsets);
  const auto actual = run(p, sequences, nullptr, terms...);
  check_agreement(actual, run_dense(p, batch, sees));
  ThreadPool pool(3);
  check_same_bits(run(p, sequences, &pool, terms...), actual);
}

inline Bools random_bools(Index rows, Index cols, std::mt19937_64& random) {
  Bools mask(rows, cols);
  for (Index n = 0; n < mask.size(); ++n) mask.data()[n] = random() % 3 != 0;
  return mask;
}

}  // namespace surfattn::test
