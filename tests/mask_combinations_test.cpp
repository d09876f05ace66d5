// Masks from functions and masks of masks: each is the dense mask of its definition; and masks that
// leave tiles empty skip them.
#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <utility>

#include "support/patterns.hpp"

namespace {

using namespace surfattn;
using namespace surfattn::test;

// ---- A function of the user's ------------------------------------------------------------------

TEST_CASE("a function says what is seen", "[patterns]") {
  for (const Batch& batch : batches) {
    const auto pairs = [](Index i, Index j) { return (i ^ j) % 3 != 0; };
    check_pattern(
        batch, [&](Index, Index, Index i, Index j) { return pairs(i, j); }, MaskFunction(pairs));
    const auto of_heads = [](Index h, Index i, Index j) { return j / 40 == h || i == j; };
    check_pattern(
        batch, [&](Index, Index h, Index i, Index j) { return of_heads(h, i, j); },
        MaskFunction(of_heads));
    const auto of_tile = [](const Tile& tile) {
      return tile.first_key > tile.first_query + tile.queries - 1 ? Coverage::empty
             : tile.first_key + tile.keys - 1 <= tile.first_query ? Coverage::full
                                                                  : Coverage::partial;
    };
    check_pattern(
        batch, [&](Index, Index, Index i, Index j) { return j <= i; },
        MaskFunction([](Index i, Index j) { return j <= i; }, of_tile));
  }
}

// ---- Masks of masks ----------------------------------------------------------------------------

TEST_CASE("masks combine", "[patterns]") {
  const auto function = [](Index i, Index j) { return (i * 7 + j * 5) % 11 < 4; };
  const auto window = [](Index i, Index j) { return i - 9 <= j && j <= i + 2; };
  const SlidingWindow window_term{.left = 9, .right = 2, .align = Align::top_left};
  for (const Batch& batch : batches) {
    check_pattern(
        batch, [&](Index, Index, Index i, Index j) { return window(i, j) || j < 0; },
        any_of(window_term));
    check_pattern(
        batch, [&](Index, Index, Index i, Index j) { return window(i, j) || (i - j) % 16 == 0; },
        any_of(window_term, Dilated{16, Align::top_left}));
    check_pattern(
        batch, [&](Index, Index, Index i, Index j) { return !window(i, j) && !function(i, j); },
        none_of(window_term, MaskFunction(function)));
    check_pattern(
        batch,
        [&](Index, Index h, Index i, Index j) {
          return (window(i, j) && function(i, j)) || !(j <= i) || (h == 2 && j % 2 == 0);
        },
        any_of(all_of(window_term, MaskFunction(function)), none_of(Causal{Align::top_left}),
               MaskFunction([](Index h, Index, Index j) { return h == 2 && j % 2 == 0; })));
    check_pattern(
        batch,
        [&](Index, Index, Index i, Index j) { return window(i, j) && !(j <= i) && function(i, j); },
        none_of(Causal{Align::top_left}), all_of(MaskFunction(function), window_term));
  }
}

TEST_CASE("what any mask fills is full, and what all leave empty is empty", "[patterns]") {
  const detail::Require require("patterns_test");
  detail::Shape shape;
  shape.queries = shape.keys = shape.packed_queries = shape.packed_keys = 100;
  const SlidingWindow window{.left = 5, .right = 5};
  const auto cover = [&](const auto& term, const Tile& tile) {
    return detail::coverage(term.bind(shape, require), tile);
  };
  const Tile below{0, 50, 10, 0, 20}, within{0, 50, 2, 49, 3}, across{0, 50, 10, 40, 20};
  CHECK(cover(any_of(window, KeyLengths(20)), below) == Coverage::full);
  CHECK(cover(any_of(window, KeyLengths(10)), below) == Coverage::partial);
  CHECK(cover(any_of(window, KeyLengths(0)), below) == Coverage::empty);
  CHECK(cover(any_of(window, KeyLengths(0)), within) == Coverage::full);
  CHECK(cover(none_of(window), within) == Coverage::empty);
  CHECK(cover(none_of(window), below) == Coverage::full);
  CHECK(cover(none_of(window), across) == Coverage::partial);
  CHECK(cover(all_of(window, KeyLengths(100)), within) == Coverage::full);
  CHECK(cover(all_of(window, KeyLengths(40)), within) == Coverage::empty);
  CHECK(cover(all_of(window, KeyLengths(50)), across) == Coverage::partial);
}

// ---- Skipping ----------------------------------------------------------------------------------

/// How many pairs the engine forms scores of under the terms: a mask that is asked about each.
template <class... Terms>
Index pairs_computed(const Problem<float>& p, bool backward, const Terms&... terms) {
  std::atomic<Index> pairs{0};
  const auto count = [&pairs](Index, Index) { return ++pairs, true; };
  const auto partial = [](const Tile&) { return Coverage::partial; };
  const MaskFunction counter(count, partial);
  const Forward<float> f = attention_forward(p.queries, p.keys, p.values, {}, terms..., counter);
  if (!backward) return pairs;
  pairs = 0;
  attention_backward(p.queries, p.keys, p.values, f, p.grad_out, {}, terms..., counter);
  return pairs / 2;  // it hides weights and gradients of scores
}

/// The queries of a tile, all of them against every key that any of them sees, over all tiles.
template <class Sees>
Index pairs_of_tiles(Index tokens, Index query_tile, const Sees& sees) {
  Index pairs = 0;
  for (Index first = 0, end; first < tokens; first = end) {
    end = std::min(first + query_tile, tokens);
    for (Index j = 0; j < tokens; ++j) {
      bool is_seen = false;
      for (Index i = first; i < end && !is_seen; ++i) is_seen = sees(i, j);
      if (is_seen) pairs += end - first;
    }
  }
  return pairs;
}

TEST_CASE("what a pattern leaves empty is not computed", "[patterns]") {
  std::mt19937_64 random = seeded_random();
  const Index tokens = 2048;
  const Problem<float> p(Sizes{tokens, tokens, 4, 4}, random);
  const Index step = detail::simd::panel_width<float>;
  detail::Shape shape;
  shape.queries = shape.keys = tokens;
  shape.head_dim = shape.value_dim = 4;
  for (const bool backward : {false, true}) {
    CAPTURE(backward);
    const Index query_tile = backward ? detail::backward_tiling<float>(shape, 1).query_tile
                                      : detail::forward_tiling<float>(shape, 1).query_tile;
    REQUIRE(query_tile < 256);
    const auto expected = [&](const auto& sees) {
      return pairs_of_tiles(tokens, query_tile, sees);
    };
    CHECK(pairs_computed(p, backward) == tokens * tokens);
    // documents: each for itself, to whole groups of keys at its left; a few queries beside an edge see
    // the document before as well
    const Index beside = 8;
    std::vector<int> long_ones, short_ones;
    for (Index i = 0; i < tokens; ++i) {
      long_ones.push_back(int(i / 256));
      short_ones.push_back(int(i / 77));
    }
    CHECK(pairs_computed(p, backward, Documents(long_ones)) == tokens * 256);
    CHECK(pairs_computed(p, backward, Documents(short_ones)) <= tokens * (77 + step + beside));
    CHECK(pairs_computed(p, backward, all_of(Documents(short_ones), KeyLengths(2000))) <=
          tokens * (77 + step + beside));
    // blocks of a checkerboard
    for (const Index side : {128, 32}) {
      Bools board(tokens / side, tokens / side);
      for (Index i = 0; i < board.rows(); ++i) {
        for (Index j = 0; j < board.cols(); ++j) board(i, j) = (i + j) % 2 == 0;
      }
      const Index pairs = pairs_computed(p, backward, BlockSparse(board, side, side));
      const Index half = tokens * tokens / 2;
      CHECK(pairs >= half);
      CHECK(pairs <= half + (side == 128 ? 0 : half / 16));  // a few queries beside an edge
    }
    // what slants: the union over a few queries, to whole groups of keys at its left
    const Index few = 32;
    const SlidingWindow window{.left = 100, .right = 50};
    CHECK(pairs_computed(p, backward, window) <= tokens * (151 + few + step));
    CHECK(pairs_computed(p, backward, any_of(window, KeyLengths(16))) <=
          tokens * (151 + few + 2 * step + 16));
    CHECK(pairs_computed(p, backward, Causal{Align::top_left}) <= tokens * (tokens / 2 + few));
    CHECK(pairs_computed(p, backward, KeyLengths(1000)) == tokens * 1000);
    // a function without an answer for tiles
    const auto same_half = [](Index i, Index j) { return i / 1024 == j / 1024; };
    CHECK(pairs_computed(p, backward, MaskFunction(same_half)) == expected(same_half));
  }
}

}  // namespace
