// Sequences so short that all keys are one run: read and written where they lie, where storage and widths allow.
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
  const Problem<float> p({rows, rows, 128, 144, 8, 4}, random);  // more than 8 MiB
  const auto batch = attention_forward(
      p.queries, p.keys, p.values, {.heads = p.heads, .sequences = Sequences(offsets, offsets)});
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const auto of = [&](const Matrix<float>& matrix) -> Matrix<float> {
      return matrix.middleRows(offsets[s], offsets[s + 1] - offsets[s]);
    };
    CAPTURE(seed(), s);
    const auto alone =
        attention_forward(of(p.queries), of(p.keys), of(p.values), {.heads = p.heads});
    CHECK(same_bits(of(batch.out), alone.out));
    CHECK(same_bits(of(batch.log_sum_exp), alone.log_sum_exp));
  }
}
