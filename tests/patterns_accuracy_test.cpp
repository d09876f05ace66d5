// Masks of a pattern, of the user's own and of other masks: both forms against the reference with
// the dense mask of the definition.
#include <cstdlib>
#include <vector>

#include "support/accuracy.hpp"

namespace {

using namespace surfattn;
using namespace surfattn::test;

/// The dense mask of a definition, pair by pair.
template <class Sees>
reference::Mask pattern_of(const Sizes& s, const Sees& sees) {
  reference::Mask mask(s.queries, s.keys);
  for (Index i = 0; i < s.queries; ++i) {
    for (Index j = 0; j < s.keys; ++j) mask(i, j) = sees(i, j);
  }
  return mask;
}

const Sizes all_sizes[] = {{1, 1, 3, 2},
                           {3, 600, 5, 3, 4, 2},
                           {65, 33, 17, 8, 2, 1},
                           {200, 530, 8, 5, 2, 2},
                           {130, 130, 9, 4}};

template <class Sees, class... Terms>
void check_pattern(const Sizes& s, const Sees& sees, const Terms&... terms) {
  std::mt19937_64 random = seeded_random();
  CAPTURE(seed(), s.queries, s.keys);
  const Problem<float> p(s, random);
  const auto mask = pattern_of(s, sees);
  const auto with = [&](const auto& use) { use(terms...); };
  check_standard_form<float, double>(p, mask, Loss::of_out_and_log_sum_exp, with);
  check_surface_form<float, double>(p, mask, PriorKind::explicit_weights, Loss::of_out, with);
}

/// Ids that repeat every `cycle` rows where they are not sorted.
std::vector<int> ids_of(Index rows, bool sorted, int cycle) {
  std::vector<int> ids;
  for (Index i = 0; i < rows; ++i) ids.push_back(sorted ? int(i / 37) : int(i) * 5 % cycle);
  return ids;
}

TEST_CASE("documents are their dense mask", "[patterns]") {
  for (const Sizes& s : all_sizes) {
    for (const bool sorted : {true, false}) {
      const auto of_queries = ids_of(s.queries, sorted, 7), of_keys = ids_of(s.keys, sorted, 5);
      check_pattern(
          s,
          [&](Index i, Index j) { return of_queries[std::size_t(i)] == of_keys[std::size_t(j)]; },
          Documents(of_queries, of_keys));
    }
  }
}

TEST_CASE("block-sparse masks are their dense mask", "[patterns]") {
  for (const Sizes& s : all_sizes) {
    const Index block_queries = 13, block_keys = 50;
    Matrix<bool> blocks((s.queries + 12) / 13, (s.keys + 49) / 50);
    for (Index i = 0; i < blocks.rows(); ++i) {
      for (Index j = 0; j < blocks.cols(); ++j) blocks(i, j) = (i / 2 * 5 + j * 3) % 7 < 3;
    }
    check_pattern(
        s, [&](Index i, Index j) { return blocks(i / block_queries, j / block_keys); },
        BlockSparse(blocks, block_queries, block_keys));
  }
}

TEST_CASE("any_of masks is their dense mask", "[patterns]") {
  for (const Sizes& s : all_sizes) {
    const Index offset = s.keys - s.queries;
    check_pattern(
        s,
        [&](Index i, Index j) {
          const Index behind = i + offset - j;
          return (0 <= behind && behind <= 20) || (behind % 8 == 0 && j < s.keys / 2);
        },
        any_of(SlidingWindow{.left = 20, .right = 0, .align = Align::bottom_right},
               all_of(Dilated{8, Align::bottom_right}, KeyLengths(s.keys / 2))));
  }
}

}  // namespace
