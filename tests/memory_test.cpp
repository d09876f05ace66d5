// 65,536 queries and keys: the memory beyond inputs and outputs stays small, forward and backward.
#include <sys/resource.h>

#include "support/problem.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

constexpr Index tokens = 65536, width = 64;
constexpr std::size_t allowed = std::size_t(64) << 20;

/// Largest resident memory of this process so far, in bytes.
std::size_t peak_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::size_t>(usage.ru_maxrss) * 1024;
}

}  // namespace

TEST_CASE("workspaces for 65,536 queries and keys are below 64 MiB and hardly grow with them") {
  const auto bytes = [](Pass pass, Index count) {
    const Eigen::Map<const Matrix<float>> x(nullptr, count, width);
    return std::max(workspace_size(pass, x, x, x), workspace_size(pass, x, x));
  };
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    CHECK(bytes(pass, tokens) < allowed);
    CHECK(bytes(pass, 16 * tokens) < bytes(pass, tokens) + 65536);  // a counter for each block
  }
}

TEST_CASE("a workspace serves fewer queries and keys") {
  constexpr Index head_dim = 64;
  const auto bytes = [](Pass pass, const Heads& heads, Index queries, Index keys) {
    const Index key_value_heads = heads.key_value.value_or(heads.query);
    const Eigen::Map<const Matrix<float>> q(nullptr, queries, heads.query * head_dim),
        k(nullptr, keys, key_value_heads * head_dim);
    return workspace_size(pass, q, k, k, {.heads = heads});
  };
  const std::vector<Index> sizes{0,   1,   2,    15,   16,   17,    31,    33,   64,
                                 65,  127, 128,  129,  255,  256,   257,   500,  511,
                                 512, 513, 1000, 1025, 5000, 16384, 16385, 99999};
  for (const Heads& heads : {Heads{1}, Heads{8}, Heads{16, 2}}) {
    for (const Pass pass : {Pass::forward, Pass::backward}) {
      Index too_small = 0;
      for (const Index queries : sizes) {
        for (const Index keys : sizes) {
          const std::size_t all = bytes(pass, heads, queries, keys);
          for (const Index fewer : sizes) {
            too_small += fewer <= queries && bytes(pass, heads, fewer, keys) > all;
            too_small += fewer <= keys && bytes(pass, heads, queries, fewer) > all;
          }
        }
      }
      CHECK(too_small == 0);
    }
  }
}

TEST_CASE("a workspace with sums of a term's gradient serves fewer keys") {
  const auto bytes = [](const Heads& heads, Index head_dim, Index keys) {
    const Matrix<float> table = Matrix<float>::Zero(32, heads.query);
    Matrix<float> gradient = table;
    const Eigen::Map<const Matrix<float>> q(nullptr, 8, heads.query * head_dim),
        k(nullptr, keys, *heads.key_value * head_dim);
    return workspace_size(
        Pass::backward, q, k, k, {.heads = heads},
        RelativePositionBias{table, {.align = Align::top_left}}.gradient_into(gradient));
  };
  for (const Heads& heads : {Heads{1, 1}, Heads{6, 2}, Heads{3, 3}, Heads{16, 1}}) {
    for (const Index head_dim : {4, 64, 200}) {
      Index shrinking = 0;
      for (Index keys = 1; keys < 5000; keys += 3)
        shrinking += bytes(heads, head_dim, keys + 3) < bytes(heads, head_dim, keys);
      CAPTURE(heads.query, *heads.key_value, head_dim);
      CHECK(shrinking == 0);
    }
  }
}

TEST_CASE("workspaces of small problems are small") {
  const auto bytes = [](Index count, Index columns) {
    const Eigen::Map<const Matrix<float>> x(nullptr, count, columns);
    return std::max({workspace_size(Pass::forward, x, x, x),
                     workspace_size(Pass::backward, x, x, x),
                     workspace_size(Pass::backward, x, x)});
  };
  CHECK(bytes(7, 8) < 32 << 10);
  CHECK(bytes(16, 16) < 64 << 10);
  CHECK(bytes(40, 16) < 128 << 10);
}

TEST_CASE(
    "peak memory for 65,536 queries and keys, forward and backward, is below 64 MiB more than "
    "inputs and outputs") {
  // The window leaves nearly all tiles empty, which changes the time and not the memory.
  const SlidingWindow window{.left = 100, .right = 0};
  std::mt19937_64 random = seeded_random();
  const auto q = random_matrix<float>(tokens, width, random),
             k = random_matrix<float>(tokens, width, random),
             v = random_matrix<float>(tokens, width, random),
             grad = random_matrix<float>(tokens, width, random);
  Matrix<float> out = Matrix<float>::Ones(tokens, width),
                log_sum_exp = Matrix<float>::Ones(tokens, 1), grad_q = out, grad_k = out,
                grad_v = out, grad_prior = log_sum_exp;
  float grad_bandwidth = 0;

  const std::size_t before = peak_memory();
  attention_forward_into(q, k, v, out, log_sum_exp,
                         Workspace(workspace_size(Pass::forward, q, k, v)), {}, window);
  attention_backward_into(q, k, v, out, log_sum_exp, grad, grad_q, grad_k, grad_v,
                          Workspace(workspace_size(Pass::backward, q, k, v)), {}, window);
  project_forward_into(q, k, out, log_sum_exp, Workspace(workspace_size(Pass::forward, q, k)), {},
                       window);
  project_backward_into(q, k, out, log_sum_exp, grad, grad_q, grad_k, grad_bandwidth, grad_prior,
                        Workspace(workspace_size(Pass::backward, q, k)), {}, window);
  const std::size_t more = peak_memory() - before;
  INFO("peak grew by " << more / 1024 << " KiB");
  CHECK(more < allowed);
  CHECK(out.allFinite());
  CHECK(grad_k.allFinite());
}
