// Batches of sequences in one call: the same bits as a call for each sequence, forward and backward,
// on any number of threads; and offsets that do not fit.
#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <surfattn/executors/thread_pool.hpp>
#include <surfattn/surfattn.hpp>
#include <vector>

#include "support/catch.hpp"
#include "support/problem.hpp"
#include "support/random.hpp"
#include "support/same_bits.hpp"

namespace {

using namespace surfattn;
using surfattn::test::Problem;
using surfattn::test::same_bits;
using surfattn::test::seed;
using surfattn::test::seeded_random;
using surfattn::test::Sizes;

using Offsets = std::vector<Index>;
using Random = std::mt19937_64;

Offsets offsets_of(const std::vector<Index>& lengths) {
  Offsets offsets{0};
  for (const Index length : lengths) offsets.push_back(offsets.back() + length);
  return offsets;
}

// ---- Batches -----------------------------------------------------------------------------------

/// Lengths that straddle what the passes do differently for few and many, long and short.
struct Batch {
  std::vector<Index> queries, keys;
};

const Batch ragged{{3, 0, 65, 17, 129, 1, 5, 300, 16, 0}, {7, 5, 65, 0, 300, 2500, 1, 257, 4, 0}};
const Batch many_short{std::vector<Index>(40, 10), std::vector<Index>(40, 10)};
const Batch decoding{{1, 1, 2, 1}, {1500, 30, 4100, 0}};
/// Of two heads more than a cache holds, but no sequence alone.
const Batch some_queries{{5, 2, 4, 9}, {1500, 3300, 130, 130}};
const Batch alone{{40}, {50}};
const Batch nothing{{}, {}};

template <class Scalar>
struct Run {
  Forward<Scalar> attention;
  AttentionGradients<Scalar> gradients;
  Forward<Scalar> projection;
  SurfaceGradients<Scalar> surface_gradients;
};

/// All functions of both forms, with the terms that `call` is given.
template <class Scalar, class... Terms>
Run<Scalar> run(const Problem<Scalar>& p, const Sequences& sequences, Executor* executor,
                const Terms&... terms) {
  const Options options{.heads = p.heads, .executor = executor, .sequences = sequences};
  const SurfaceOptions surface{.heads = p.heads,
                               .executor = executor,
                               .sequences = sequences,
                               .bandwidth = 1.5,
                               .prior = p.log_prior};
  Run<Scalar> r;
  r.attention = attention_forward(p.queries, p.keys, p.values, options, terms...);
  r.gradients =
      attention_backward(p.queries, p.keys, p.values, r.attention, p.grad_out, options, terms...);
  r.projection = project_forward(p.queries, p.keys, surface, terms...);
  r.surface_gradients =
      project_backward(p.queries, p.keys, r.projection, p.grad_projection, surface, terms...);
  return r;
}

template <class Scalar>
Problem<Scalar> problem_of(const Batch& batch, const Heads& heads, Index head_dim, Index value_dim,
                           Random& random) {
  return Problem<Scalar>(Sizes{offsets_of(batch.queries).back(), offsets_of(batch.keys).back(),
                               head_dim, value_dim, heads.query, *heads.key_value},
                         random);
}

/// The rows of one sequence as a problem of their own.
template <class Scalar>
Problem<Scalar> sequence_of(const Problem<Scalar>& p, Index first_query, Index queries,
                            Index first_key, Index keys) {
  Problem<Scalar> one = p;
  one.sizes.queries = queries;
  one.sizes.keys = keys;
  one.queries = p.queries.middleRows(first_query, queries);
  one.grad_out = p.grad_out.middleRows(first_query, queries);
  one.grad_projection = p.grad_projection.middleRows(first_query, queries);
  one.keys = p.keys.middleRows(first_key, keys);
  one.values = p.values.middleRows(first_key, keys);
  one.log_prior = p.log_prior.middleRows(first_key, keys);
  return one;
}

template <class Scalar>
void check_rows(const Run<Scalar>& batch, const Run<Scalar>& one, Index first_query,
                Index first_key) {
  const auto queries = [&](const Matrix<Scalar>& m, const Matrix<Scalar>& like) {
    return m.middleRows(first_query, like.rows());
  };
  const auto keys = [&](const Matrix<Scalar>& m, const Matrix<Scalar>& like) {
    return m.middleRows(first_key, like.rows());
  };
  CHECK(same_bits(queries(batch.attention.out, one.attention.out), one.attention.out));
  CHECK(same_bits(queries(batch.attention.log_sum_exp, one.attention.log_sum_exp),
                  one.attention.log_sum_exp));
  CHECK(same_bits(queries(batch.gradients.queries, one.gradients.queries), one.gradients.queries));
  CHECK(same_bits(keys(batch.gradients.keys, one.gradients.keys), one.gradients.keys));
  CHECK(same_bits(keys(batch.gradients.values, one.gradients.values), one.gradients.values));
  CHECK(same_bits(queries(batch.projection.out, one.projection.out), one.projection.out));
  CHECK(same_bits(queries(batch.projection.log_sum_exp, one.projection.log_sum_exp),
                  one.projection.log_sum_exp));
  CHECK(same_bits(queries(batch.surface_gradients.queries, one.surface_gradients.queries),
                  one.surface_gradients.queries));
  CHECK(same_bits(keys(batch.surface_gradients.keys, one.surface_gradients.keys),
                  one.surface_gradients.keys));
  CHECK(same_bits(keys(batch.surface_gradients.log_prior, one.surface_gradients.log_prior),
                  one.surface_gradients.log_prior));
}

template <class Scalar>
void check_whole(const Run<Scalar>& a, const Run<Scalar>& b) {
  check_rows(a, b, 0, 0);
  CHECK(a.attention.out.rows() == b.attention.out.rows());
  CHECK(a.surface_gradients.bandwidth == b.surface_gradients.bandwidth);
}

/// A batch against a call for each sequence and against itself on three threads. `term` makes the
/// terms of all sequences.
template <class Scalar, class... Terms>
void check_batch(const Batch& batch, const Heads& heads, const Terms&... terms) {
  Random random = seeded_random();
  CAPTURE(seed());
  const auto p = problem_of<Scalar>(batch, heads, 20, 9, random);
  const Offsets query_offsets = offsets_of(batch.queries), key_offsets = offsets_of(batch.keys);
  const Sequences sequences(query_offsets, key_offsets);
  const auto whole = run(p, sequences, nullptr, terms...);
  double bandwidth = 0, magnitude = 0;
  for (std::size_t s = 0; s < batch.queries.size(); ++s) {
    CAPTURE(s);
    const auto part =
        run(sequence_of(p, query_offsets[s], batch.queries[s], key_offsets[s], batch.keys[s]),
            Sequences(), nullptr, terms...);
    check_rows(whole, part, query_offsets[s], key_offsets[s]);
    bandwidth += static_cast<double>(part.surface_gradients.bandwidth);
    magnitude += std::abs(static_cast<double>(part.surface_gradients.bandwidth));
  }
  // the one gradient that is a sum over the sequences
  const double floor = static_cast<double>(std::numeric_limits<Scalar>::epsilon()) *
                       static_cast<double>(batch.queries.size()) * magnitude;
  CHECK(std::abs(static_cast<double>(whole.surface_gradients.bandwidth) - bandwidth) <= floor);

  ThreadPool pool(3);
  check_whole(run(p, sequences, &pool, terms...), whole);
}

const Heads grouped{.query = 6, .key_value = 2}, single{.query = 1, .key_value = 1};

TEMPLATE_TEST_CASE("A batch gives the bits of a call for each sequence", "[sequences]", float,
                   double) {
  for (const Batch* batch : {&ragged, &many_short, &decoding, &some_queries, &alone, &nothing}) {
    for (const Heads& heads : {grouped, single}) {
      INFO("sequences " << batch->queries.size() << ", heads " << heads.query);
      check_batch<TestType>(*batch, heads);
    }
  }
}

TEST_CASE("Terms count queries and keys within each sequence", "[sequences]") {
  check_batch<float>(ragged, grouped, Causal{Align::bottom_right});
  check_batch<float>(ragged, single, Causal{Align::top_left});
  check_batch<double>(ragged, grouped,
                      SlidingWindow{.left = 40, .right = 3, .align = Align::top_left});
  check_batch<float>(many_short, grouped, Causal{Align::top_left}, KeyLengths{7});
  Matrix<bool> dense(10, 10);
  for (Index i = 0; i < 10; ++i) {
    for (Index j = 0; j < 10; ++j) dense(i, j) = (i * 7 + j * 5) % 11 < 6;
  }
  check_batch<double>(many_short, grouped, BoolMask{dense});
}

TEST_CASE("A batch is the block-diagonal mask over all of its rows", "[sequences]") {
  Random random = seeded_random();
  CAPTURE(seed());
  const Batch batch{{4, 0, 9, 2}, {6, 3, 0, 5}};
  const auto p = problem_of<double>(batch, grouped, 5, 3, random);
  const Offsets query_offsets = offsets_of(batch.queries), key_offsets = offsets_of(batch.keys);
  reference::Mask mask = reference::Mask::Constant(p.queries.rows(), p.keys.rows(), false);
  for (std::size_t s = 0; s < batch.queries.size(); ++s) {
    mask.block(query_offsets[s], key_offsets[s], batch.queries[s], batch.keys[s]).setConstant(true);
  }
  const auto actual = run(p, {query_offsets, key_offsets}, nullptr);
  const double scale = 1 / std::sqrt(5.0);
  const reference::Heads heads{6, 2};
  const auto expected =
      reference::attention_forward<double>(p.queries, p.keys, p.values, scale, heads, mask);
  CHECK(actual.attention.out.isApprox(expected.out, 1e-12));
  CHECK((actual.attention.log_sum_exp.array() == expected.log_sum_exp.array() ||
         (actual.attention.log_sum_exp - expected.log_sum_exp).array().abs() < 1e-12)
            .all());
  const auto gradients = reference::attention_backward<double>(p.queries, p.keys, p.values, scale,
                                                               heads, mask, p.grad_out);
  CHECK(actual.gradients.queries.isApprox(gradients.queries, 1e-12));
  CHECK(actual.gradients.keys.isApprox(gradients.keys, 1e-12));
  CHECK(actual.gradients.values.isApprox(gradients.values, 1e-12));
  const auto surface = reference::project_backward<double>(p.queries, p.keys, 1.5, p.log_prior,
                                                           heads, mask, p.grad_projection);
  CHECK(actual.surface_gradients.queries.isApprox(surface.queries, 1e-12));
  CHECK(actual.surface_gradients.keys.isApprox(surface.keys, 1e-12));
  CHECK(actual.surface_gradients.log_prior.isApprox(surface.log_prior, 1e-12));
  CHECK(actual.surface_gradients.bandwidth == Approx(surface.bandwidth).epsilon(1e-12));
}

TEST_CASE("Offsets of any width, shared or not, and equal lengths say the same", "[sequences]") {
  Random random = seeded_random();
  CAPTURE(seed());
  const auto p = problem_of<float>({{8, 8, 8}, {8, 8, 8}}, grouped, 5, 3, random);
  const Offsets offsets{0, 8, 16, 24};
  const std::array<std::int32_t, 4> narrow{0, 8, 16, 24};
  const long long wide[] = {0, 8, 16, 24};
  const auto expected = run(p, offsets, nullptr);
  check_whole(run(p, Sequences::equal(3), nullptr), expected);
  check_whole(run(p, narrow, nullptr), expected);
  check_whole(run(p, {narrow, wide}, nullptr), expected);
  check_whole(run(p, std::span<const Index>(offsets), nullptr), expected);
  const Eigen::VectorXi vector{{0, 8, 16, 24}};
  const Eigen::RowVector<Index, 4> row(0, 8, 16, 24);
  check_whole(run(p, {vector, row}, nullptr), expected);
}

TEST_CASE("Equal lengths may differ between queries and keys", "[sequences]") {
  Random random = seeded_random();
  const Batch batch{{4, 4, 4}, {7, 7, 7}};
  const auto p = problem_of<double>(batch, grouped, 5, 3, random);
  const Offsets query_offsets = offsets_of(batch.queries), key_offsets = offsets_of(batch.keys);
  check_whole(run(p, Sequences::equal(3), nullptr), run(p, {query_offsets, key_offsets}, nullptr));
}

TEST_CASE("A value that is not finite has the same bits in a batch that no cache holds",
          "[sequences]") {
  Random random = seeded_random();
  constexpr Index queries = 5, keys = 384, count = 8;
  auto p = problem_of<float>({Offsets(count, queries), Offsets(count, keys)},
                             {.query = 2, .key_value = 2}, 64, 64, random);
  for (Index s = 0; s < count; ++s) p.values(s * keys + 300, 1) = std::nanf("");
  const Causal causal{Align::bottom_right};
  const auto batch = attention(p.queries, p.keys, p.values,
                               {.heads = p.heads, .sequences = Sequences::equal(count)}, causal);
  for (Index s = 0; s < count; ++s) {
    const auto one = sequence_of(p, s * queries, queries, s * keys, keys);
    CAPTURE(seed(), s);
    CHECK(same_bits(Matrix<float>(batch.middleRows(s * queries, queries)),
                    attention(one.queries, one.keys, one.values, {.heads = p.heads}, causal)));
  }
}

TEST_CASE("A NaN stays within its sequence", "[sequences]") {
  Random random = seeded_random();
  const Batch batch{{30, 20, 3}, {30, 20, 25}};
  auto p = problem_of<float>(batch, grouped, 5, 3, random);
  const Offsets query_offsets = offsets_of(batch.queries), key_offsets = offsets_of(batch.keys);
  const auto clean = run(p, {query_offsets, key_offsets}, nullptr);
  p.keys.middleRows(30, 20).setConstant(NAN);
  p.values.middleRows(30, 20).setConstant(NAN);
  p.queries.middleRows(30, 20).setConstant(NAN);
  const auto spoiled = run(p, {query_offsets, key_offsets}, nullptr);
  CHECK(same_bits(spoiled.attention.out.topRows(30), clean.attention.out.topRows(30)));
  CHECK(same_bits(spoiled.gradients.keys.topRows(30), clean.gradients.keys.topRows(30)));
  CHECK(same_bits(spoiled.gradients.queries.bottomRows(3), clean.gradients.queries.bottomRows(3)));
  CHECK(same_bits(spoiled.surface_gradients.keys.bottomRows(25),
                  clean.surface_gradients.keys.bottomRows(25)));
  CHECK(spoiled.attention.out.middleRows(30, 20).array().isNaN().all());
}

TEST_CASE("A workspace of the stated size serves, and one worker's is enough", "[sequences]") {
  Random random = seeded_random();
  const auto p = problem_of<float>(ragged, grouped, 20, 9, random);
  const Offsets query_offsets = offsets_of(ragged.queries), key_offsets = offsets_of(ragged.keys);
  ThreadPool pool(2);
  const Options serial{.heads = p.heads, .sequences = {query_offsets, key_offsets}};
  const Options parallel{
      .heads = p.heads, .executor = &pool, .sequences = {query_offsets, key_offsets}};
  const auto expected = attention(p.queries, p.keys, p.values, serial);
  for (const Options* sized : {&serial, &parallel}) {
    const auto bytes = workspace_size(Pass::forward, p.queries, p.keys, p.values, *sized);
    std::vector<unsigned char> memory(bytes + 64, 0xA5);
    Matrix<float> out(p.queries.rows(), p.grad_out.cols());
    attention_into(p.queries, p.keys, p.values, out, Workspace(memory.data(), bytes), parallel);
    CHECK(same_bits(out, expected));
    CHECK(std::all_of(memory.begin() + static_cast<std::ptrdiff_t>(bytes), memory.end(),
                      [](unsigned char byte) { return byte == 0xA5; }));
  }
}

// ---- Mistakes ----------------------------------------------------------------------------------

std::string message_of(const Sequences& sequences) {
  const Matrix<float> q = Matrix<float>::Zero(6, 4), k = Matrix<float>::Zero(8, 4);
  try {
    attention(q, k, k, {.sequences = sequences});
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST_CASE("Offsets that do not fit are named", "[sequences][errors]") {
  using surfattn::test::contains_text;
  const Offsets queries{0, 2, 6}, keys{0, 3, 8};
  CHECK(message_of({queries, keys}).empty());
  const auto of_queries = [&](const Offsets& offsets) { return message_of({offsets, keys}); };
  CHECK_THAT(of_queries({1, 2, 6}),
             contains_text("offsets of queries must begin at 0") && contains_text("begin at 1"));
  CHECK_THAT(of_queries({0, 2, 5}), contains_text("must end at the number of rows") &&
                                        contains_text("end at 5") && contains_text("6×4"));
  CHECK_THAT(of_queries({0, 7, 6}), contains_text("must not decrease") &&
                                        contains_text("offset 1 is 7 and offset 2 is 6"));
  CHECK_THAT(of_queries({0, -1, 6}), contains_text("offset 0 is 0 and offset 1 is -1"));
  CHECK_THAT(of_queries({0, 6}), contains_text("2 of queries and 3 of keys"));
  const Offsets no_offsets;
  CHECK_THAT(message_of(no_offsets), contains_text("there are none"));
  CHECK_THAT(message_of(queries), contains_text("offsets of keys must end") &&
                                      contains_text("end at 6 and keys is 8×4"));
  CHECK_THAT(message_of(Sequences::equal(4)),
             contains_text("queries is 6×4") && contains_text("4 equal sequences"));
  CHECK_THAT(message_of(Sequences::equal(3)),
             contains_text("keys is 8×4") && contains_text("3 equal sequences"));
  CHECK_THAT(message_of(Sequences::equal(0)), contains_text("0 equal sequences"));
  CHECK_THAT(message_of(Sequences::equal(-2)), contains_text("-2 equal sequences"));
}

TEST_CASE("A term that does not fit one sequence is named with it, before anything is written",
          "[sequences][errors]") {
  using surfattn::test::contains_text;
  const Matrix<float> q = Matrix<float>::Ones(6, 4), k = Matrix<float>::Ones(8, 4);
  const Offsets queries{0, 2, 6}, keys{0, 5, 8};
  Matrix<float> out = Matrix<float>::Constant(6, 4, -7);
  const Options options{.sequences = {queries, keys}};
  std::string message;
  try {
    attention_into(q, k, k, out, Workspace(1 << 20), options, KeyLengths{4});
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  CHECK_THAT(message, contains_text("KeyLengths") && contains_text("(sequence 1)"));
  CHECK((out.array() == -7).all());
}

}  // namespace
