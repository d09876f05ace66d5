// Masks of a pattern: each is the dense mask of its definition, within a batch too.
#include "support/patterns.hpp"

#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

namespace {

using namespace surfattn;
using namespace surfattn::test;

// ---- Patterns ----------------------------------------------------------------------------------

TEST_CASE("a causal mask may have a prefix", "[patterns]") {
  for (const Batch& batch : batches) {
    for (const Align align : {Align::top_left, Align::bottom_right}) {
      const Index prefix = *std::min_element(batch.keys.begin(), batch.keys.end()) / 2;
      check_pattern(
          batch,
          [&](Index s, Index, Index i, Index j) {
            const auto n = std::size_t(s);
            const Index offset = align == Align::top_left ? 0 : batch.keys[n] - batch.queries[n];
            return j < prefix || j <= i + offset;
          },
          PrefixCausal(prefix, align));
    }
  }
}

TEST_CASE("a dilated mask sees every n-th key", "[patterns]") {
  for (const Batch& batch : batches) {
    for (const Index stride : {1, 2, 7, 1000}) {
      check_pattern(
          batch, [&](Index, Index, Index i, Index j) { return (i - j) % stride == 0; },
          Dilated{stride, Align::top_left});
      check_pattern(
          batch,
          [&](Index s, Index, Index i, Index j) {
            const auto n = std::size_t(s);
            return (i + batch.keys[n] - batch.queries[n] - j) % stride == 0;
          },
          Dilated{stride, Align::bottom_right});
    }
  }
}

TEST_CASE("documents may be packed or mixed, and their ids of any width", "[patterns]") {
  for (const Batch& batch : batches) {
    const Offsets query_offsets = batch.offsets(batch.queries),
                  key_offsets = batch.offsets(batch.keys);
    for (const bool sorted : {true, false}) {
      std::vector<std::int32_t> of_queries(std::size_t(query_offsets.back()));
      std::vector<long long> of_keys(std::size_t(key_offsets.back()));
      for (std::size_t i = 0; i < of_queries.size(); ++i)
        of_queries[i] = std::int32_t(sorted ? i / 33 : i * 5 % 7);
      for (std::size_t j = 0; j < of_keys.size(); ++j)
        of_keys[j] = (long long)(sorted ? j / 47 : j * 3 % 5);
      check_pattern(
          batch,
          [&](Index s, Index, Index i, Index j) {
            const auto n = std::size_t(s);
            return of_queries[std::size_t(query_offsets[n] + i)] ==
                   of_keys[std::size_t(key_offsets[n] + j)];
          },
          Documents(of_queries, of_keys));
    }
  }
}

TEST_CASE("the largest number is the id of a document like any other", "[patterns]") {
  const long long largest = std::numeric_limits<long long>::max();
  const std::vector<long long> ids{0, 0, largest, largest, largest};
  check_pattern(
      Batch{{5}, {5}}, [](Index, Index, Index i, Index j) { return (i < 2) == (j < 2); },
      Documents(ids));
}

TEST_CASE("blocks may be of any size, and differ from head to head", "[patterns]") {
  std::mt19937_64 random = seeded_random();
  for (const Batch& batch : batches) {
    const auto longest = [](const Offsets& l) { return *std::max_element(l.begin(), l.end()); };
    for (const auto& [block_queries, block_keys] :
         {std::pair<Index, Index>{64, 64}, {128, 32}, {7, 45}, {1, 1}, {1000, 1000}}) {
      CAPTURE(block_queries, block_keys);
      const Index rows = (longest(batch.queries) + block_queries - 1) / block_queries,
                  cols = (longest(batch.keys) + block_keys - 1) / block_keys;
      const Bools blocks = random_bools(rows, cols, random),
                  of_heads = random_bools(rows, 4 * cols, random);
      const Index bq = block_queries, bk = block_keys;
      check_pattern(
          batch, [&](Index, Index, Index i, Index j) { return blocks(i / bq, j / bk); },
          BlockSparse(blocks, bq, bk));
      check_pattern(
          batch,
          [&](Index, Index h, Index i, Index j) { return of_heads(i / bq, h * cols + j / bk); },
          BlockSparse(of_heads, bq, bk));
    }
  }
}

}  // namespace
