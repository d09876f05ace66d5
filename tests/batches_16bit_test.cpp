// Numbers of 16 bits, through batches, masks, merging and inspection: what float gives for the same
// numbers, to their precision.
#include <Eigen/Core>
#include <cmath>
#include <surfattn/surfattn.hpp>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using namespace surfattn;
using surfattn::test::random_matrix;
using surfattn::test::seeded_random;

TEMPLATE_TEST_CASE("16 bits agree with float", "[half]", Eigen::half, Eigen::bfloat16) {
  using Small = TestType;
  std::mt19937_64 random = seeded_random();
  const auto make = [&](Index rows, Index cols) {
    return Matrix<Small>(random_matrix<float>(rows, cols, random).template cast<Small>());
  };
  const Matrix<Small> q = make(30, 8), k = make(40, 8), g = make(30, 8);
  const Matrix<float> dl = random_matrix<float>(30, 2, random);
  const Matrix<float> qf = q.template cast<float>(), kf = k.template cast<float>(),
                      gf = g.template cast<float>();
  const std::vector<int> query_offsets{0, 12, 30}, key_offsets{0, 25, 40};
  const Options options{.heads = {.query = 2}, .sequences = {query_offsets, key_offsets}};
  const auto mask = any_of(SlidingWindow{.left = 9, .right = 3, .align = Align::bottom_right},
                           MaskFunction([](Index i, Index j) { return (i + j) % 4 == 0; }));
  const double unit = std::is_same_v<Small, Eigen::half> ? 1.0 / 1024 : 1.0 / 128;
  const auto close = [&](const auto& a, const Matrix<float>& b) {
    const float largest = 1 + b.cwiseAbs().maxCoeff();
    return (a.template cast<float>() - b).cwiseAbs().maxCoeff() <= 4 * unit * largest;
  };
  const auto f = attention_forward(q, k, k, options, mask);
  const auto ff = attention_forward(qf, kf, kf, options, mask);
  CHECK(close(f.out, ff.out));
  CHECK((f.log_sum_exp - ff.log_sum_exp).cwiseAbs().maxCoeff() <= 1e-5f);
  const auto b = attention_backward(q, k, k, f, ForwardGradients{g, dl}, options, mask);
  const auto bf = attention_backward(qf, kf, kf, ff, ForwardGradients{gf, dl}, options, mask);
  CHECK(close(b.queries, bf.queries));
  CHECK(close(b.keys, bf.keys));
  const auto merged = merge_partials(f, f);
  CHECK(close(merged.out, ff.out));
  CHECK((merged.log_sum_exp.array() - ff.log_sum_exp.array() - std::log(2.f)).abs().maxCoeff() <=
        1e-5f);
  const auto grad_parts =
      merge_partials_backward(std::vector{f, f}, merged, ForwardGradients{g, dl});
  CHECK(close(grad_parts[0].out, gf / 2));
  CHECK((attention_scores(q, k, {}, options, mask) - attention_scores(qf, kf, {}, options, mask))
            .cwiseAbs()
            .maxCoeff() <= 1e-6f);
  CHECK((attention_entropy(q, k, options, mask) - attention_entropy(qf, kf, options, mask))
            .cwiseAbs()
            .maxCoeff() <= 1e-5f);
  CHECK(attention_neighbours(q, k, 3, options, mask).keys ==
        attention_neighbours(qf, kf, 3, options, mask).keys);
  const auto columns = attention_backward(
      q, k, LeftColumns{3}, attention_forward(q, k, LeftColumns{3}), Matrix<Small>(g.leftCols(3)));
  CHECK(columns.keys.cols() == 8);
}

}  // namespace
