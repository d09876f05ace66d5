// The random numbers of dropout: those that the authors of Philox publish, in every lane.
#include <array>
#include <surfattn/detail/philox.hpp>
#include <surfattn/reference_terms.hpp>
#include <surfattn/terms/dropout.hpp>
#include <vector>

#include "support/catch.hpp"

using namespace surfattn;
using Block = std::array<std::uint32_t, 4>;

namespace {

/// The blocks of as many counters as there are lanes, beside whatever stands in the upper halves.
std::vector<Block> blocks_of(const std::vector<Block>& counters, detail::PhiloxKey key) {
  detail::WordLanes words[4];
  for (int w = 0; w < 4; ++w) {
    for (int n = 0; n < detail::word_lanes; ++n)
      words[w][n] = std::uint64_t(0x9abcdef0u) << 32 | counters[std::size_t(n)][std::size_t(w)];
  }
  detail::philox(detail::PhiloxKeys(key), words);
  std::uint32_t stored[4 * detail::word_lanes];
  detail::store_words(stored, words);
  std::vector<Block> blocks(counters.size());
  for (std::size_t n = 0; n < blocks.size(); ++n)
    std::copy(stored + 4 * n, stored + 4 * n + 4, blocks[n].begin());
  return blocks;
}

}  // namespace

TEST_CASE("Philox4x32-10 gives the numbers that its authors publish") {
  const auto block = [](const Block& counter, detail::PhiloxKey key) {
    return blocks_of(std::vector<Block>(detail::word_lanes, counter), key).back();
  };
  const std::uint32_t ones = 0xffffffffu;
  const Block of_zeros{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u},
      of_ones{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu},
      of_pi{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u};
  CHECK(block({0, 0, 0, 0}, {0, 0}) == of_zeros);
  CHECK(block({ones, ones, ones, ones}, {ones, ones}) == of_ones);
  const Block pi{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u};
  CHECK(block(pi, {0xa4093822u, 0x299f31d0u}) == of_pi);
  CHECK(reference::philox(pi, {0xa4093822u, 0x299f31d0u}) == of_pi);
}

TEST_CASE("every lane of Philox has the block of its own counter") {
  std::vector<Block> counters;
  for (std::uint32_t n = 0; n < std::uint32_t(detail::word_lanes); ++n)
    counters.push_back({7 * n + 1, 0xfffffff0u + n, n * n, 5});
  const auto blocks = blocks_of(counters, {0x12345678u, 0x9abcdef0u});
  for (std::size_t n = 0; n < blocks.size(); ++n)
    CHECK(blocks[n] == reference::philox(counters[n], {0x12345678u, 0x9abcdef0u}));
}

TEMPLATE_TEST_CASE("dropout's factors are those of the reference, from every key on", "", float,
                   double, long double) {
  constexpr Index heads = 2, queries = 3, keys = 150;
  const double p = 0.3;
  const Dropout dropout{
      .probability = p, .seed = 1234567890123u, .offset = 42, .first_sequence = 6};
  detail::Shape shape{};
  shape.queries = queries, shape.keys = keys, shape.sequence = 1;
  const auto bound = dropout.bind(shape, detail::Require("philox_test"));
  const auto expected = reference::dropout_factors<TestType>(p, dropout.seed, dropout.offset, 7,
                                                             heads, queries, keys);
  for (const Index first : {0, 1, 2, 3, 4, 61, 64, 66}) {
    for (const Index count : {0, 1, 5, 63, 64, 65, 84}) {
      std::vector<TestType> factors(std::size_t(count) + 1, TestType(77));
      bound.factors({1, 2, first}, count, factors.data());
      for (Index j = 0; j < count; ++j) CHECK(factors[std::size_t(j)] == expected[1](2, first + j));
      CHECK(factors.back() == 77);
    }
  }
}
