// The same bits under every executor and every number of threads.
#include <surfattn/executors/eigen_thread_pool.hpp>
#include <surfattn/executors/thread_pool.hpp>
#ifdef _OPENMP
#include <surfattn/executors/openmp.hpp>
#endif

#include <cstring>
#include <vector>

#include "support/problem.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

/// Everything that both forms compute, one matrix after the other.
using Results = std::vector<Matrix<float>>;

Results compute(const Problem<float>& p, MaskKind mask, Executor* executor) {
  Results results;
  with_terms(mask, p.sizes.queries, p.sizes.keys, [&](const auto&... terms) {
    const Options options{.heads = p.heads, .executor = executor};
    const auto f = attention_forward(p.queries, p.keys, p.values, options, terms...);
    const auto g =
        attention_backward(p.queries, p.keys, p.values, f, p.grad_out, options, terms...);
    const SurfaceOptions surface{
        .heads = p.heads, .executor = executor, .bandwidth = 1.5, .prior = p.log_prior};
    const auto pf = project_forward(p.queries, p.keys, surface, terms...);
    const auto pg = project_backward(p.queries, p.keys, pf, p.grad_projection, surface, terms...);
    results = {f.out,   f.log_sum_exp,  g.queries,
               g.keys,  g.values,       Matrix<float>::Constant(1, 1, pg.bandwidth),
               pf.out,  pf.log_sum_exp, pg.queries,
               pg.keys, pg.log_prior};
  });
  return results;
}

bool same_bits(const Results& a, const Results& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i].size() != b[i].size()) return false;
    if (a[i].size() == 0) continue;
    if (std::memcmp(a[i].data(), b[i].data(), std::size_t(a[i].size()) * sizeof(float)) != 0)
      return false;
  }
  return true;
}

/// Runs tasks one after the other, from the last to the first: the contract allows any order.
struct Backwards final : Executor {
  Index concurrency() const override { return 3; }
  void run(Index count, Task task) override {
    for (Index number = count - 1; number >= 0; --number) task(number);
  }
};

const Sizes shared_sizes[] = {{1100, 1300, 8, 6}, {600, 2100, 4, 4, 4, 2},
                              {3, 5, 2, 2, 2, 2}, {0, 7, 2, 2},
                              {7, 0, 2, 2},       {1700, 40, 8, 8, 2, 1}};

}  // namespace

TEST_CASE("the same bits on any number of threads, forward and backward") {
  std::mt19937_64 random = seeded_random();
  for (const Sizes& s : shared_sizes) {
    const Problem<float> p(s, random);
    for (const MaskKind mask : {MaskKind::none, MaskKind::causal_bottom_right, MaskKind::window}) {
      CAPTURE(seed(), s.queries, s.keys, int(mask));
      const Results alone = compute(p, mask, nullptr);
      for (const Index threads : {1, 2, 3, 7}) {
        ThreadPool pool(threads);
        CAPTURE(threads);
        CHECK(pool.concurrency() == threads);
        CHECK(same_bits(alone, compute(p, mask, &pool)));
      }
    }
  }
}

TEST_CASE("the same bits under every executor") {
  std::mt19937_64 random = seeded_random();
  const Problem<float> p(shared_sizes[1], random);
  const Results alone = compute(p, MaskKind::causal_bottom_right, nullptr);
  Backwards backwards;
  CHECK(same_bits(alone, compute(p, MaskKind::causal_bottom_right, &backwards)));
  Eigen::ThreadPool eigen_pool(3);
  EigenThreadPoolExecutor eigen(eigen_pool);
  CHECK(same_bits(alone, compute(p, MaskKind::causal_bottom_right, &eigen)));
#ifdef _OPENMP
  OpenMpExecutor open_mp(3);
  CHECK(same_bits(alone, compute(p, MaskKind::causal_bottom_right, &open_mp)));
#endif
}

TEST_CASE("a thread pool serves many calls, and calls from many threads") {
  ThreadPool pool(3);
  std::atomic<Index> sum{0};
  const auto add = [&](Index number) { sum += number; };
  for (int call = 0; call < 2000; ++call) pool.run(5, add);
  CHECK(sum == 2000 * (0 + 1 + 2 + 3 + 4));

  sum = 0;
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int call = 0; call < 500; ++call) pool.run(3, add);
    });
  }
  for (auto& caller : callers) caller.join();
  CHECK(sum == 4 * 500 * (0 + 1 + 2));
}

TEST_CASE(
    "a workspace made for a longer sequence serves a shorter one, on as many threads as fit") {
  std::mt19937_64 random = seeded_random();
  ThreadPool pool(4);
  const Options options{.executor = &pool};
  const auto x = random_matrix<float>(1028, 4, random);
  const Workspace forward_workspace(workspace_size(Pass::forward, x, x, x, options));
  const Workspace backward_workspace(workspace_size(Pass::backward, x, x, x, options));
  for (const Index tokens : {1027, 900, 513, 257, 64, 20}) {
    CAPTURE(tokens);
    const Matrix<float> part = x.topRows(tokens);
    Forward<float> f{part, Matrix<float>(tokens, 1)};
    attention_forward_into(part, part, part, f.out, f.log_sum_exp, forward_workspace, options);
    Matrix<float> grad_q = part, grad_k = part, grad_v = part;
    attention_backward_into(part, part, part, f.out, f.log_sum_exp, part, grad_q, grad_k, grad_v,
                            backward_workspace, options);
    const auto alone = attention_forward(part, part, part);
    CHECK((f.out.array() == alone.out.array()).all());
    CHECK((grad_k.array() == attention_backward(part, part, part, alone, part).keys.array()).all());
  }
}

TEST_CASE("a workspace for more threads is as much larger") {
  const Eigen::Map<const Matrix<float>> x(nullptr, 4096, 64);
  ThreadPool pool(2);
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    const auto one = workspace_size(pass, x, x, x),
               two = workspace_size(pass, x, x, x, {.executor = &pool});
    CHECK(two > one);
    CHECK(two < 2 * one + 4096);
  }
}
