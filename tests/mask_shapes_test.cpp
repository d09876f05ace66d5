// Dense masks and lengths that differ from head to head and from sequence to sequence, and mistakes
// in masks.
#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <utility>

#include "support/patterns.hpp"

namespace {

using namespace surfattn;
using namespace surfattn::test;

// ---- A mask for each head ----------------------------------------------------------------------

TEST_CASE("a head's mask is that head's alone", "[patterns]") {
  std::mt19937_64 random = seeded_random();
  for (const Index queries : {2, 70}) {
    const Problem<double> p(Sizes{queries, 90, 5, 3, 4, 4}, random);
    const Bools mask = random_bools(queries, 4 * 90, random);
    const auto whole = run(p, {}, nullptr, BoolMask{mask});
    for (Index h = 0; h < 4; ++h) {
      Problem<double> one = p;
      one.heads = {1, 1};
      one.queries = p.queries.middleCols(5 * h, 5);
      one.keys = p.keys.middleCols(5 * h, 5);
      one.values = p.values.middleCols(3 * h, 3);
      one.grad_out = p.grad_out.middleCols(3 * h, 3);
      const Bools of_head = mask.middleCols(90 * h, 90);
      const auto part = run(one, {}, nullptr, BoolMask{of_head});
      CHECK(same_bits(whole.forward.out.middleCols(3 * h, 3), part.forward.out));
      CHECK(same_bits(whole.forward.log_sum_exp.col(h), part.forward.log_sum_exp));
      CHECK(same_bits(whole.gradients.queries.middleCols(5 * h, 5), part.gradients.queries));
      CHECK(same_bits(whole.gradients.keys.middleCols(5 * h, 5), part.gradients.keys));
      CHECK(same_bits(whole.gradients.values.middleCols(3 * h, 3), part.gradients.values));
    }
  }
}

TEST_CASE("a dense mask may be shared by queries, heads and sequences, or by none", "[patterns]") {
  std::mt19937_64 random = seeded_random();
  const Index queries = 7, keys = 9, count = 3;
  const Problem<double> p(Sizes{count * queries, count * keys, 5, 3, 4, 2}, random);
  const auto batch = Sequences::equal(count);
  const Bools full =
      random_bools(count * 4 * queries, keys, random);  // (batch, heads, queries, keys)
  // its copy in which a head is a block of columns
  const auto in_columns = [&](Index rows, auto row) {
    Bools mask(rows, 4 * keys);
    for (Index i = 0; i < rows; ++i) {
      for (Index h = 0; h < 4; ++h) mask.block(i, h * keys, 1, keys) = full.row(row(i, h));
    }
    return mask;
  };
  const auto full_columns = in_columns(count * queries, [&](Index i, Index h) {
    return (i / queries * 4 + h) * queries + i % queries;
  });
  check_same_bits(run(p, batch, nullptr, BoolMask{full}),
                  run(p, batch, nullptr, BoolMask{full_columns}));
  // (heads, queries, keys), for all sequences
  const Bools of_heads = full.topRows(4 * queries);
  const Bools of_heads_columns =
      in_columns(queries, [&](Index i, Index h) { return h * queries + i; });
  const Bools of_heads_repeated = of_heads_columns.replicate(count, 1);
  const auto expected = run(p, batch, nullptr, BoolMask{of_heads_repeated});
  check_same_bits(run(p, batch, nullptr, BoolMask{of_heads}), expected);
  check_same_bits(run(p, batch, nullptr, BoolMask{of_heads_columns}), expected);
  // one row for all queries, with and without heads
  const Bools row = of_heads_columns.topRows(1);
  const Bools row_repeated = row.replicate(count * queries, 1);
  check_same_bits(run(p, batch, nullptr, BoolMask{row}),
                  run(p, batch, nullptr, BoolMask{row_repeated}));
  const Bools shared_row = full.topRows(1);
  const Bools shared = shared_row.replicate(queries, 1);
  check_same_bits(run(p, batch, nullptr, BoolMask{shared_row}),
                  run(p, batch, nullptr, BoolMask{shared}));
}

// ---- Lengths -----------------------------------------------------------------------------------

TEST_CASE("lengths may differ from sequence to sequence", "[patterns]") {
  for (const Batch& batch : batches) {
    std::vector<std::int32_t> of_keys;
    std::vector<Index> of_queries;
    for (std::size_t s = 0; s < batch.keys.size(); ++s) {
      of_keys.push_back(std::int32_t(batch.keys[s] - batch.keys[s] / 3));
      of_queries.push_back(batch.queries[s] / 2);
    }
    const auto in = [](const auto& lengths, Index s, Index place) {
      return place < Index(lengths[std::size_t(s)]);
    };
    check_pattern(
        batch, [&](Index s, Index, Index, Index j) { return in(of_keys, s, j); },
        KeyLengths(of_keys));
    check_pattern(
        batch, [&](Index s, Index, Index i, Index) { return in(of_queries, s, i); },
        QueryLengths(of_queries));
    check_pattern(
        batch,
        [&](Index s, Index, Index i, Index j) {
          return in(of_queries, s, i) && in(of_keys, s, j) && j <= i;
        },
        KeyLengths(of_keys), Causal{Align::top_left}, QueryLengths(of_queries));
    check_pattern(
        batch, [&](Index s, Index, Index i, Index j) { return in(of_keys, s, j) || j <= i; },
        PrefixCausal(of_keys, Align::top_left));
  }
  check_pattern(
      batches[0], [](Index, Index, Index i, Index) { return i < 20; }, QueryLengths(20));
}

TEST_CASE("padding queries get nothing and give nothing", "[patterns]") {
  std::mt19937_64 random = seeded_random();
  Problem<float> p(Sizes{20, 20, 5, 3}, random);
  const auto clean = run(p, {}, nullptr, QueryLengths(12));
  p.queries.bottomRows(8).setConstant(NAN);
  p.grad_out.bottomRows(8).setConstant(NAN);
  check_same_bits(run(p, {}, nullptr, QueryLengths(12)), clean);
  CHECK(clean.forward.out.bottomRows(8).isZero(0));
  CHECK(clean.gradients.queries.bottomRows(8).isZero(0));
}

// ---- Mistakes ----------------------------------------------------------------------------------

template <class... Terms>
std::string message_of(const Sequences& sequences, const Terms&... terms) {
  const Matrix<float> q = Matrix<float>::Zero(6, 8), k = Matrix<float>::Zero(10, 8);
  Matrix<float> out = Matrix<float>::Constant(6, 8, -7);
  try {
    attention_into(q, k, k, out, Workspace(1 << 20),
                   {.heads = {.query = 2}, .sequences = sequences}, terms...);
  } catch (const std::invalid_argument& error) {
    CHECK((out.array() == -7).all());
    return error.what();
  }
  return "";
}

TEST_CASE("masks that do not fit are named", "[patterns][errors]") {
  const auto two = Sequences::equal(2);
  const std::vector<int> three{1, 2, 3}, long_key{5, 6}, negative{-1, 2};
  CHECK_THAT(message_of(two, KeyLengths(three)),
             contains_text("KeyLengths must have one length for each sequence, but it has 3 and "
                           "there are 2 sequences"));
  CHECK_THAT(message_of(two, KeyLengths(long_key)),
             contains_text("it is 6 and keys is 5×8 (sequence 1)"));
  CHECK_THAT(
      message_of(two, QueryLengths(negative)),
      contains_text("QueryLengths must lie between 0 and the number of queries, but it is -1 "
                    "and queries is 3×8 (sequence 0)"));
  CHECK_THAT(message_of({}, PrefixCausal(11, Align::top_left)),
             contains_text("PrefixCausal must lie between 0 and the number of keys, but it is 11"));
  CHECK_THAT(message_of({}, Dilated{0, Align::top_left}),
             contains_text("Dilated must have a stride of at least 1, but it is 0"));
  CHECK_THAT(message_of({}, Dilated{2}), contains_text("Dilated must name its alignment"));
  CHECK_THAT(
      message_of({}, Documents(three)),
      contains_text("Documents must have one query id for each of the 6 queries, but it has 3"));
  const Eigen::VectorXi eigen = Eigen::VectorXi::Zero(3);
  CHECK(message_of({}, Documents(eigen)) == message_of({}, Documents(three)));
  const std::vector<int> six(6);
  CHECK_THAT(message_of({}, Documents(six)),
             contains_text("one key id for each of the 10 keys, but it has 6"));
  const Bools blocks = Bools::Constant(3, 5, true);
  CHECK(message_of({}, BlockSparse(blocks, 2, 2)).empty());
  CHECK_THAT(message_of({}, BlockSparse(blocks, 2, 3)),
             contains_text("BlockSparse is 3×5 but must be 3×4"));
  CHECK_THAT(message_of({}, BlockSparse(blocks, 0, 2)), contains_text("they are of 0×2"));
  CHECK_THAT(message_of({}, BoolMask{blocks}), contains_text("BoolMask is 3×5 but must be 6×10"));
  CHECK_THAT(message_of({}, any_of(Causal{Align::top_left}, BoolMask{blocks})),
             contains_text("BoolMask is 3×5 but must be 6×10"));
  const Bools of_batch = Bools::Constant(6, 5, true), too_many = Bools::Constant(24, 5, true);
  CHECK(message_of(two, BoolMask{of_batch}).empty());
  CHECK_THAT(message_of(two, BoolMask{too_many}),
             contains_text("BoolMask is 24×5 but must be 3×5"));
}

}  // namespace
