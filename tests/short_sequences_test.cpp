// Sequences so short that all keys are one run: read and written where they lie, where storage and widths allow. And long
// ones that one query of each head visits in short runs, since their keys are the values.
#include <surfattn/executors/thread_pool.hpp>

#include "support/accuracy.hpp"
#include "support/same_bits.hpp"

using namespace surfattn;
using namespace surfattn::test;

namespace {

/// Queries, keys, widths and heads on both sides of what can be read in place: whole packets and others, one query of
/// several heads to a key head, and several queries of them; and one or two queries, which are not taken head by head.
const std::vector<Sizes> short_sizes = {
    {10, 10, 256, 256, 2, 2}, {1, 7, 32, 16, 4, 2},  {1, 7, 32, 16, 8, 2}, {3, 5, 32, 32, 4, 2},
    {7, 15, 24, 40, 2, 2},    {9, 16, 16, 64, 1, 1}, {2, 0, 16, 16, 2, 2}, {16, 13, 48, 16, 3, 3}};

}  // namespace

TEST_CASE("short sequences are as accurate as a plain evaluation, behind every mask") {
  std::mt19937_64 random = seeded_random();
  for (const Sizes& s : short_sizes) {
    const Problem<float> p(s, random);
    for (const MaskKind mask : all_masks) {
      CAPTURE(seed(), s.queries, s.keys, s.head_dim, s.value_dim, int(mask));
      const auto with = [&](const auto& use) { with_terms(mask, s.queries, s.keys, use); };
      const auto dense = dense_mask(mask, s.queries, s.keys);
      check_standard_form<float, double>(p, dense, Loss::of_out, with);
      check_surface_form<float, double>(p, dense, PriorKind::uniform, Loss::of_out, with);
    }
  }
}

TEST_CASE("queries and results of short sequences have the same bits in any storage") {
  using ColumnMajor = Eigen::MatrixXf;
  std::mt19937_64 random = seeded_random();
  for (const Sizes& s : short_sizes) {
    CAPTURE(seed(), s.queries, s.keys, s.head_dim, s.value_dim);
    const Problem<float> p(s, random);
    const Options options{.heads = p.heads};
    const auto forward = attention_forward(p.queries, p.keys, p.values, options);
    const Workspace workspace(workspace_size(Pass::forward, p.queries, p.keys, p.values, options));
    const ColumnMajor q = p.queries;
    CHECK(same_bits(attention(q, p.keys, p.values, options), forward.out));
    ColumnMajor out(forward.out.rows(), forward.out.cols()), log_sum_exp = forward.log_sum_exp;
    log_sum_exp.setConstant(7);
    attention_forward_into(p.queries, p.keys, p.values, out, log_sum_exp, workspace, options);
    CHECK(same_bits(out, forward.out));
    CHECK(same_bits(log_sum_exp, forward.log_sum_exp));
  }
}

TEST_CASE("short sequences of a batch that no cache holds have the bits that they have alone") {
  std::mt19937_64 random = seeded_random();
  const std::vector<Index> lengths{10, 3, 0, 16, 1};
  std::vector<Index> offsets{0};
  for (int repeated = 0; repeated < 24; ++repeated)
    for (const Index length : lengths) offsets.push_back(offsets.back() + length);
  const Index rows = offsets.back();
  for (const Index key_value_heads : {4, 8}) {  // results of the latter pass the caches
    const Problem<float> p({rows, rows, 128, 144, 8, key_value_heads}, random);  // more than 8 MiB
    const auto batch = attention_forward(
        p.queries, p.keys, p.values, {.heads = p.heads, .sequences = Sequences(offsets, offsets)});
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      const auto of = [&](const Matrix<float>& matrix) -> Matrix<float> {
        return matrix.middleRows(offsets[s], offsets[s + 1] - offsets[s]);
      };
      CAPTURE(seed(), key_value_heads, s);
      const auto alone =
          attention_forward(of(p.queries), of(p.keys), of(p.values), {.heads = p.heads});
      CHECK(same_bits(of(batch.out), alone.out));
      CHECK(same_bits(of(batch.log_sum_exp), alone.log_sum_exp));
    }
  }
}

namespace {

/// One query of each head; runs of 64, 40 and 8 keys, all heads of which fill whole packets or do not; keys on both sides
/// of a run and of some, and of two parts.
const std::vector<Sizes> sizes_of_short_runs = {{1, 1, 16, 16, 1, 1},    {1, 130, 16, 16, 1, 1},
                                                {1, 2055, 32, 32, 1, 1}, {1, 63, 19, 19, 3, 3},
                                                {1, 65, 48, 48, 4, 4},   {1, 81, 100, 100, 2, 2},
                                                {1, 7, 256, 256, 3, 3},  {1, 8, 130, 130, 8, 8},
                                                {1, 25, 128, 128, 8, 8}, {1, 1030, 200, 200, 5, 5}};

/// Keys that grow, or shrink, from one to the next: their scores pass those before in many runs, or in none.
template <class Scalar>
void make_keys_grow(Problem<Scalar>& p, bool shrink) {
  const Index keys = p.keys.rows();
  for (Index j = 0; j < keys; ++j)
    p.keys.row(j) *= Scalar(0.05 + 3 * double(shrink ? keys - j : j) / double(keys));
}

}  // namespace

TEST_CASE("short runs are as accurate as a plain evaluation, behind every mask and prior") {
  std::mt19937_64 random = seeded_random();
  int turn = 0;
  for (const Sizes& s : sizes_of_short_runs) {
    Problem<float> p(s, random);
    if (turn % 3 != 0) make_keys_grow(p, turn % 3 == 1);
    for (const MaskKind mask : all_masks) {
      const PriorKind prior = PriorKind(turn++ % 3);
      CAPTURE(seed(), s.keys, s.head_dim, s.query_heads, int(mask), int(prior));
      check_surface_form<float, double>(p, dense_mask(mask, 1, s.keys), prior, Loss::of_out,
                                        [&](const auto& use) { with_terms(mask, 1, s.keys, use); });
    }
  }
}

TEST_CASE("a NaN among short runs reaches the heads that see it and no bit of others") {
  constexpr auto nan = std::numeric_limits<float>::quiet_NaN();
  std::mt19937_64 random = seeded_random();
  const Sizes s{1, 30, 64, 64, 16, 16};
  const Problem<float> p(s, random);
  const SurfaceOptions options{.heads = p.heads};
  const auto whole = project_forward(p.queries, p.keys, options);
  for (const Index key : {0, 7, 8, 29}) {
    CAPTURE(seed(), key);
    Matrix<float> spoilt = p.keys;
    spoilt.row(key).segment(3 * 64, 64).setConstant(nan);
    const auto seen = project_forward(p.queries, spoilt, options);
    CHECK(seen.out.middleCols(3 * 64, 64).array().isNaN().all());
    CHECK(std::isnan(seen.log_sum_exp(0, 3)));
    CHECK(same_bits(seen.out.leftCols(3 * 64), whole.out.leftCols(3 * 64)));
    CHECK(same_bits(seen.out.rightCols(12 * 64), whole.out.rightCols(12 * 64)));

    Eigen::Matrix<bool, 1, Eigen::Dynamic> all_but_one(s.keys);
    all_but_one.setConstant(true);
    all_but_one(key) = false;
    const auto hidden = project_forward(p.queries, spoilt, options, BoolMask{all_but_one});
    CHECK(hidden.out.allFinite());
    CHECK(hidden.log_sum_exp.allFinite());
  }
}

TEST_CASE("short runs of a batch, on several threads, have the bits that they have alone") {
  std::mt19937_64 random = seeded_random();
  const std::vector<Index> queries{0, 1, 1, 2, 3}, keys{0, 2500, 2500, 2509, 2600};
  const Problem<float> p({3, 2600, 128, 128, 8, 8}, random);
  ThreadPool pool(3);
  const auto batch =
      project_forward(p.queries, p.keys,
                      {.heads = p.heads, .executor = &pool, .sequences = Sequences(queries, keys)});
  for (std::size_t b = 0; b + 1 < keys.size(); ++b) {
    CAPTURE(seed(), b);
    const Matrix<float> q = p.queries.middleRows(queries[b], queries[b + 1] - queries[b]),
                        k = p.keys.middleRows(keys[b], keys[b + 1] - keys[b]);
    const auto alone = project_forward(q, k, {.heads = p.heads});
    CHECK(same_bits(batch.out.middleRows(queries[b], q.rows()), alone.out));
    CHECK(same_bits(batch.log_sum_exp.middleRows(queries[b], q.rows()), alone.log_sum_exp));
  }
}
