// Seven shapes of practice, from long prompts to decoding and many short sequences: the standard form beside naive Eigen code
// on the same data, and the surface form where the values are the keys.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <limits>
#include <surfattn/surfattn.hpp>
#include <vector>

#include "support/naive.hpp"

namespace {

using namespace surfattn;

struct Case {
  const char* name;
  Index sequences, query_heads, key_value_heads, queries, keys, width;
  bool causal;
};

const Case cases[] = {
    {"A_prompt", 1, 8, 8, 1024, 1024, 64, false},
    {"B_prompt_causal", 1, 8, 8, 1024, 1024, 64, true},
    {"C_long_causal", 1, 2, 2, 4096, 4096, 128, true},
    {"D_decode", 1, 8, 8, 1, 16384, 128, false},
    {"E_decode_grouped", 1, 32, 4, 1, 8192, 128, false},
    {"F_many_short", 64, 8, 8, 10, 10, 256, false},
    {"G_small", 1, 1, 1, 64, 64, 64, false},
};

struct Sequence {
  Matrix<float> queries, keys, values, out, log_sum_exp;
};

/// The inputs of one case, and outputs to write into.
struct Problem {
  Case shape;
  std::vector<Sequence> sequences;
  Options options;
  Workspace workspace;

  explicit Problem(const Case& c) : shape(c) {
    std::srand(1);
    options.heads = {.query = c.query_heads, .key_value = c.key_value_heads};
    for (Index s = 0; s < c.sequences; ++s) {
      const Matrix<float> keys = Matrix<float>::Random(c.keys, c.key_value_heads * c.width);
      const Matrix<float> queries = Matrix<float>::Random(c.queries, c.query_heads * c.width);
      sequences.push_back({queries, keys,
                           Matrix<float>::Random(c.keys, c.key_value_heads * c.width), queries,
                           Matrix<float>(c.queries, c.query_heads)});
    }
    const Sequence& s = sequences.front();
    workspace = Workspace(workspace_size(Pass::forward, s.queries, s.keys, s.values, options));
  }

  void naive() {
    for (Sequence& s : sequences) {
      s.out = bench::naive_attention(s.queries, s.keys, s.values, shape.query_heads,
                                     shape.key_value_heads, shape.causal);
    }
  }

  void standard() {
    for (Sequence& s : sequences) {
      if (shape.causal) {
        attention_into(s.queries, s.keys, s.values, s.out, workspace, options,
                       Causal{Align::bottom_right});
      } else {
        attention_into(s.queries, s.keys, s.values, s.out, workspace, options);
      }
    }
  }

  void surface() {
    const SurfaceOptions surface_options{.heads = options.heads, .prior = KeyPrior::sdpa};
    for (Sequence& s : sequences) {
      if (shape.causal) {
        project_into(s.queries, s.keys, s.out, workspace, surface_options,
                     Causal{Align::bottom_right});
      } else {
        project_into(s.queries, s.keys, s.out, workspace, surface_options);
      }
    }
  }

  bool is_right() {
    naive();
    const Matrix<float> expected = sequences.back().out;
    standard();
    return (sequences.back().out - expected).cwiseAbs().maxCoeff() <=
           100 * std::numeric_limits<float>::epsilon();
  }
};

void run(benchmark::State& state, const Case& c, void (Problem::*compute)()) {
  Problem problem(c);
  if (!problem.is_right()) return state.SkipWithError("the result is wrong");
  for (auto _ : state) (problem.*compute)();
  const double pairs =
      double(c.queries) * double(c.keys) * double(c.query_heads * c.sequences) / (c.causal ? 2 : 1);
  state.counters["flops"] = benchmark::Counter(
      4 * pairs * double(c.width) * double(state.iterations()), benchmark::Counter::kIsRate);
}

const bool registered = [] {
  for (const Case& c : cases) {
    const auto add = [&](const char* form, void (Problem::*compute)()) {
      benchmark::RegisterBenchmark(
          (std::string(c.name) + "/" + form).c_str(),
          [&c, compute](benchmark::State& state) { run(state, c, compute); })
          ->Unit(benchmark::kMicrosecond);
    };
    add("naive", &Problem::naive);
    add("standard", &Problem::standard);
    add("surface", &Problem::surface);
  }
  return true;
}();

}  // namespace
