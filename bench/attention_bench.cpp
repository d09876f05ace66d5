// Forward and backward of both forms beside naive Eigen code, on one core. `peak` is the share of the flops that a loop of
// fused multiply-adds reaches in the same process.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <limits>
#include <surfattn/surfattn.hpp>

#include "support/naive.hpp"
#include "support/peak.hpp"

namespace {

using namespace surfattn;
using bench::naive_attention;

template <class Scalar>
struct Inputs {
  Matrix<Scalar> queries, keys, values, grad_out;
  explicit Inputs(const benchmark::State& state) {
    const Index tokens = state.range(0), width = state.range(1);
    std::srand(1);
    for (auto* m : {&queries, &keys, &values, &grad_out})
      *m = Matrix<Scalar>::Random(tokens, width);
  }
};

/// A result is compared with naive Eigen's before it is timed.
template <class Scalar>
bool agrees(benchmark::State& state, const Matrix<Scalar>& result, const Matrix<Scalar>& expected) {
  const Scalar tolerance = 100 * std::numeric_limits<Scalar>::epsilon();
  if ((result - expected).cwiseAbs().maxCoeff() <= tolerance) return true;
  state.SkipWithError("the result is wrong");
  return false;
}

template <class Scalar>
void count(benchmark::State& state, double products) {
  static const double peak = surfattn::bench::fma_peak<Scalar>();
  const auto tokens = double(state.range(0)), width = double(state.range(1));
  const double flops = 2 * products * tokens * tokens * width * double(state.iterations());
  state.counters["flops"] = benchmark::Counter(flops, benchmark::Counter::kIsRate);
  state.counters["peak"] = benchmark::Counter(flops / peak, benchmark::Counter::kIsRate);
}

template <class Scalar>
void naive_forward(benchmark::State& state) {
  const Inputs<Scalar> in(state);
  for (auto _ : state) benchmark::DoNotOptimize(naive_attention(in.queries, in.keys, in.values));
  count<Scalar>(state, 2);
}

template <class Scalar>
void standard_forward(benchmark::State& state) {
  const Inputs<Scalar> in(state);
  const auto expected = naive_attention(in.queries, in.keys, in.values);
  if (!agrees<Scalar>(state, attention(in.queries, in.keys, in.values), expected)) return;
  for (auto _ : state) benchmark::DoNotOptimize(attention_forward(in.queries, in.keys, in.values));
  count<Scalar>(state, 2);
}

template <class Scalar>
void surface_forward(benchmark::State& state) {
  const Inputs<Scalar> in(state);
  const auto expected = naive_attention(in.queries, in.keys, in.keys);
  if (!agrees<Scalar>(state, project(in.queries, in.keys, {.prior = KeyPrior::sdpa}), expected))
    return;
  for (auto _ : state) benchmark::DoNotOptimize(project_forward(in.queries, in.keys));
  count<Scalar>(state, 2);
}

template <class Scalar>
void causal_forward(benchmark::State& state) {
  const Inputs<Scalar> in(state);
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        attention_forward(in.queries, in.keys, in.values, {}, Causal{Align::top_left}));
  }
  count<Scalar>(state, 1);
}

template <class Scalar>
void standard_backward(benchmark::State& state) {
  const Inputs<Scalar> in(state);
  const auto forward = attention_forward(in.queries, in.keys, in.values);
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        attention_backward(in.queries, in.keys, in.values, forward, in.grad_out));
  }
  count<Scalar>(state, 5);
}

template <class Scalar>
void surface_backward(benchmark::State& state) {
  const Inputs<Scalar> in(state);
  const auto forward = project_forward(in.queries, in.keys);
  for (auto _ : state)
    benchmark::DoNotOptimize(project_backward(in.queries, in.keys, forward, in.grad_out));
  count<Scalar>(state, 5);
}

void sizes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"T", "d"})
      ->Args({1024, 64})
      ->Args({1024, 128})
      ->Args({4096, 64})
      ->Args({4096, 128});
  bench->Unit(benchmark::kMillisecond);
}

BENCHMARK(naive_forward<float>)->Apply(sizes);
BENCHMARK(standard_forward<float>)->Apply(sizes);
BENCHMARK(surface_forward<float>)->Apply(sizes);
BENCHMARK(causal_forward<float>)->Apply(sizes);
BENCHMARK(standard_backward<float>)->Apply(sizes);
BENCHMARK(surface_backward<float>)->Apply(sizes);
BENCHMARK(standard_forward<double>)->Apply(sizes);
BENCHMARK(standard_backward<double>)->Apply(sizes);

}  // namespace
