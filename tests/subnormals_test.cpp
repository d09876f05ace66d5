// Subnormal numbers count as zeros while a call runs, and threads keep their mode.
#include <array>
#include <limits>
#include <surfattn/executors/thread_pool.hpp>
#include <surfattn/surfattn.hpp>

#include "support/random.hpp"
#include "support/same_bits.hpp"

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

#if SURFATTN_SUBNORMALS_AS_ZEROS && defined(__SSE2__)

TEST_CASE("subnormal values count as zeros") {
  const Matrix<float> queries = Matrix<float>::Zero(32, 8),
                      values = Matrix<float>::Constant(32, 8, subnormal);
  CHECK(attention(queries, queries, values).isZero(0));
  CHECK(attention(queries.topRows(1), queries, values).isZero(0));
}

TEST_CASE("gradients that are subnormal are zeros, on every thread") {
  std::mt19937_64 random = seeded_random();
  const auto q = random_matrix<double>(200, 16, random),
             k = random_matrix<double>(1100, 16, random),
             grad = random_matrix<double>(200, 16, random);
  constexpr double smallest = std::numeric_limits<float>::min();
  const auto gradients = [&]<class Scalar>(Scalar, Executor* executor) {
    const Options options{.scale = 24, .executor = executor};  // scores lie far apart
    const Matrix<Scalar> queries = q.template cast<Scalar>(), keys = k.template cast<Scalar>();
    const auto forward = attention_forward(queries, keys, keys, options);
    return attention_backward(queries, keys, keys, forward,
                              Matrix<Scalar>(grad.template cast<Scalar>()), options);
  };
  const Matrix<double> exact = gradients(double(), nullptr).values.cwiseAbs();
  REQUIRE((exact.array() > 0 && exact.array() < smallest).any());
  const auto alone = gradients(float(), nullptr);
  for (const auto* gradient : {&alone.queries, &alone.keys, &alone.values}) {
    const auto magnitudes = gradient->array().abs();
    CHECK((magnitudes == 0 || magnitudes >= std::numeric_limits<float>::min()).all());
    CHECK((magnitudes > 0).any());
  }
  ThreadPool pool(3);
  const auto shared = gradients(float(), &pool);
  CHECK(same_bits(alone.queries, shared.queries));
  CHECK(same_bits(alone.keys, shared.keys));
  CHECK(same_bits(alone.values, shared.values));
}

#endif
