// Subnormal numbers count as zeros while a call runs, and threads keep their mode.
#include <surfattn/executors/thread_pool.hpp>
#include <surfattn/surfattn.hpp>

#include "support/random.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

using namespace surfattn;
using namespace surfattn::test;

namespace {

constexpr float subnormal = 0x1p-140f;

/// Whether a thread's arithmetic keeps subnormal operands and subnormal results.
struct Mode {
  bool keeps_operands, keeps_results;

  bool operator==(const Mode&) const = default;
};

Mode mode() {
  volatile float operand = subnormal, smallest = std::numeric_limits<float>::min();
  return {operand * 0x1p20f != 0, smallest * 0.5f != 0};
}

/// Every pass, on tiles and on single queries, alone and on several threads.
void run_all_passes(Executor* executor) {
  std::mt19937_64 random = seeded_random();
  for (const Index queries : {1, 300}) {
    const auto q = random_matrix<float>(queries, 8, random),
               k = random_matrix<float>(2100, 8, random);
    const auto grad = random_matrix<float>(queries, 8, random);
    const Options options{.heads = {2, 2}, .executor = executor};
    const auto forward = attention_forward(q, k, k, options);
    attention_backward(q, k, k, forward, grad, options);
    local_linear(q, k, 0.1, {.heads = {2, 2}, .executor = executor, .bandwidth = 1.5});
  }
}

}  // namespace

TEST_CASE("a call leaves the mode of its thread as it was") {
  const Mode before = mode();
  run_all_passes(nullptr);
  CHECK(mode() == before);
#if defined(__SSE2__)
  CHECK(before == Mode{true, true});
  const unsigned csr = _mm_getcsr();
  for (const unsigned bits : {0x8000u, 0x40u, 0x8040u, 0x6000u}) {
    _mm_setcsr(csr | bits);
    run_all_passes(nullptr);
    const unsigned after = _mm_getcsr();
    _mm_setcsr(csr);
    constexpr unsigned flags = 0x3f;  // of what has happened
    CHECK((after & ~flags) == ((csr | bits) & ~flags));
  }
#endif
}

TEST_CASE("a call leaves the mode of an executor's threads as it was") {
  ThreadPool pool(3);
  const Mode before = mode();
  run_all_passes(&pool);
  std::array<Mode, 24> modes;
  pool.run(Index(modes.size()), [&](Index task) { modes[std::size_t(task)] = mode(); });
  for (const Mode& after : modes) CHECK(after == before);
}

#if defined(__SSE2__)

TEST_CASE("subnormal values count as zeros") {
  const Matrix<float> queries = Matrix<float>::Zero(32, 8),
                      values = Matrix<float>::Constant(32, 8, subnormal);
  CHECK(attention(queries, queries, values).isZero(0));
  CHECK(attention(queries.topRows(1), queries, values).isZero(0));
}

TEST_CASE("gradients that are subnormal are zeros") {
  std::mt19937_64 random = seeded_random();
  const auto q = random_matrix<float>(70, 16, random), k = random_matrix<float>(90, 16, random);
  const Options options{.scale = 24};  // most weights are too small to be normal, or 0
  const auto forward = attention_forward(q, k, k, options);
  const auto gradients =
      attention_backward(q, k, k, forward, random_matrix<float>(70, 16, random), options);
  for (const auto* gradient : {&gradients.queries, &gradients.keys, &gradients.values}) {
    const auto magnitudes = gradient->array().abs();
    CHECK((magnitudes == 0 || magnitudes >= std::numeric_limits<float>::min()).all());
    CHECK((magnitudes > 0).any());
  }
}

#endif
